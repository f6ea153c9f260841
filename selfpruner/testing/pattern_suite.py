"""What every pattern must do: levels known before anything is measured, and blocks that hold what they say they hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from selfpruner import catalogue
from selfpruner.architectures import describe
from selfpruner.architectures.order import restore_channels
from selfpruner.config import SearchConfig
from selfpruner.evaluation.engine import Weights
from selfpruner.evaluation.session import Prepared, prepare
from selfpruner.models import load, resolve
from selfpruner.pruning.patterns import PATTERNS, Pattern
from selfpruner.pruning.search_space import expected_space
from selfpruner.testing.device import DEVICE
from selfpruner.testing.device_suite import DeviceSuite
from selfpruner.testing.tiny_models import load_tiny, sample_text, tiny_model


def config_of(pattern: str, model: str = "m", text: str = "t", **changes: object) -> SearchConfig:
    words = {"sources": [{"source": text}], "sequences": 8, "length": 32}
    fields_ = {"model": model, "rate": 0.3, "pattern": pattern, "ffn_step": 8, "calibration": words, "compensation": "none"}
    return SearchConfig.model_validate({**fields_, "dtype": "float32", **changes})


def tensors_of(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    for each in fields(weights) if weights is not None else ():
        value = getattr(weights, each.name)
        if isinstance(value, Tensor):
            yield each.name, value


class PatternSuite(DeviceSuite):
    """Subclass it with ``pattern``."""

    pattern: ClassVar[type[Pattern]]

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp(cls.pattern.name)
        tiny_model(folder / "model", "llama")
        (folder / "text.txt").write_text(sample_text(20_000))
        return folder

    @classmethod
    def prepare(cls, folder: Path, **changes: object) -> Prepared:
        config = config_of(cls.pattern.name, str(folder / "model"), str(folder / "text.txt"), **changes)
        loaded = load(resolve(str(folder / "model"), folder), str(DEVICE), "float32")
        return prepare(config, loaded, folder / "cache", [], lambda _: None, lambda: False)

    @pytest.fixture(scope="class")
    @classmethod
    def prepared(cls, folder: Path) -> Prepared:
        return cls.prepare(folder)

    def test_is_what_its_line_says(self) -> None:
        assert PATTERNS[self.pattern.name] is self.pattern
        entry = catalogue.PATTERNS[self.pattern.name]
        _, baseline = entry.baseline
        for criterion in (entry.criterion, baseline["criterion"]):
            catalogue.check_criterion(criterion, self.pattern.name)
        assert baseline["compensation"] in catalogue.compensations_of(self.pattern.name)
        assert SearchConfig.model_validate({"rate": 0.2, "pattern": self.pattern.name}).criterion == entry.criterion

    @pytest.mark.parametrize("drop", [False, True])
    def test_levels_are_known_before_anything_is_measured(self, drop: bool) -> None:
        pattern = self.pattern(config_of(self.pattern.name, drop_blocks=drop), describe(load_tiny("llama")))
        for block in (0, 1):
            sizes = [option.parameters for option in pattern.expected(0, block)]
            assert sizes == sorted(set(sizes), reverse=True)
            assert len(sizes) > 1
            assert (sizes[-1] == 0) == drop

    def test_attention_can_be_left_alone(self) -> None:
        pattern = self.pattern(config_of(self.pattern.name, attention="none"), describe(load_tiny("llama")))
        assert len(pattern.expected(0, 0)) == 1
        assert len(pattern.expected(0, 1)) > 1

    def test_what_was_expected_is_what_is_made(self, prepared: Prepared) -> None:
        expected = expected_space(prepared.config, prepared.arch)
        assert (expected.total, expected.step, expected.target) == (
            prepared.space.total,
            prepared.space.step,
            prepared.space.target,
        )
        for before, after in zip(expected.blocks, prepared.space.blocks, strict=True):
            assert before.kind == after.kind
            assert {option.parameters for option in after.options} <= {option.parameters for option in before.options}
            assert after.options[0].error == 0
            assert all(option.error >= 0 for option in after.options)

    def test_blocks_hold_what_they_say(self, prepared: Prepared) -> None:
        for block in prepared.engine.blocks:
            dense = dict(tensors_of(block.weights(0)))
            shapes = {name: tensor.shape for name, tensor in dense.items()}
            for level in range(1, len(block.options)):
                pruned = dict(tensors_of(block.weights(level)))
                removed = block.options[0].parameters - block.options[level].parameters
                if catalogue.PATTERNS[self.pattern.name].zeros:
                    assert {name: tensor.shape for name, tensor in pruned.items()} == shapes
                    assert sum(int((tensor == 0).sum()) for tensor in pruned.values()) >= removed
                else:
                    assert sum(t.numel() for t in dense.values()) - sum(t.numel() for t in pruned.values()) == removed

    def test_what_was_made_can_be_renewed(self, prepared: Prepared) -> None:
        for block in prepared.engine.blocks[:2]:
            for level in (0, 1):
                made = block.weights(level)
                again = dict(tensors_of(block.renewed(level, made)))
                assert all(torch.equal(tensor, again[name]) for name, tensor in tensors_of(made))
                assert (block.own_bytes(made) == 0) <= (level == 0)

    def test_it_is_read_from_the_cache_and_not_made_again(self, folder: Path, prepared: Prepared) -> None:
        restore_channels(prepared.arch)
        again = self.prepare(folder)
        assert again.space == prepared.space
        assert again.signals == prepared.signals
