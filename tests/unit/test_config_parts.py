"""Every field of a search belongs to preparation, search or report, and a worker's session depends on what it has to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from pydantic import Field

from selfpruner.config import Part, SearchConfig, Strict, _part
from selfpruner.jobs.comparison import SETTINGS
from selfpruner.jobs.handler import SessionHandler
from selfpruner.jobs.run import session_of
from selfpruner.testing.tiny_models import sample_text, tiny_model
from selfpruner.workers.tasks import PrepareRequest

TEXT = {"sources": [{"source": "pydoc"}], "sequences": 3, "length": 32}
# Another value for every field, and what has to change with it so that the config stays valid.
OTHERS: dict[str, dict[str, Any]] = {
    "model": {"model": "other/model"},
    "rate": {"rate": 0.3},
    "of": {"of": "model"},
    "preset": {"preset": "evolution", "initial": SearchConfig(rate=0.2).initial, "operators": SearchConfig(rate=0.2).operators},
    "pattern": {"pattern": "n_m", "criterion": "wanda", "compensation": "none"},
    "criterion": {"criterion": "flap"},
    "compensation": {"compensation": "bias"},
    "granularity": {"granularity": "layer"},
    "attention": {"attention": "none"},
    "ffn_step": {"ffn_step": 16},
    "tensor_parallel": {"tensor_parallel": 2},
    "drop_blocks": {"drop_blocks": True},
    "group": {"group": 8},
    "sparsity_step": {"sparsity_step": 0.1},
    "level_bytes": {"level_bytes": "1GiB"},
    "calibration": {"calibration": TEXT},
    "fitness_text": {"fitness_text": TEXT},
    "report_text": {"report_text": TEXT},
    "objective": {"objective": "quality,parameters"},
    "rates": {"rates": [0.1], "objective": "quality,parameters"},
    "fitness": {"fitness": "nll"},
    "probe_tokens": {"probe_tokens": 64},
    "population": {"population": 7},
    "crossover_offspring": {"crossover_offspring": 7},
    "mutation_offspring": {"mutation_offspring": 7},
    "generations": {"generations": 7},
    "stages": {"stages": [{"tokens": 64, "keep": 2}]},
    "surveys": {"surveys": 7},
    "survey_tokens": {"survey_tokens": 64},
    "survey_step": {"survey_step": 0.2},
    "final_tokens": {"final_tokens": 64},
    "generation_probe": {"generation_probe": False},
    "early_rejection": {"early_rejection": False},
    "bandit": {"bandit": False},
    "oversample": {"oversample": 7},
    "budget_tokens": {"budget_tokens": 7},
    "patience": {"patience": 7},
    "least_gain": {"least_gain": 0.1},
    "initial": {"initial": ["uniform"]},
    "operators": {"operators": ["select"]},
    "proposer": {"proposer": "gpt"},
    "limits": {"limits": {"calls": 7}},
    "seed": {"seed": 7},
    "device": {"device": "cpu"},
    "dtype": {"dtype": "bfloat16"},
    "memory": {"memory": "1GiB"},
    "base_model": {"base_model": "owner/name"},
    "license": {"license": "mit"},
}


def key(**changes: Any) -> str:
    return session_of(SearchConfig.model_validate({"rate": 0.2, **changes}), Path("cache")).key


@pytest.mark.parametrize("field", SearchConfig.model_fields)
def test_the_session_depends_on_every_field_but_those_of_the_search(field: str) -> None:
    changes = OTHERS[field]
    assert SearchConfig.model_validate({"rate": 0.2, **changes}).model_dump()[field] != SearchConfig(rate=0.2).model_dump()[field]
    assert (key(**changes) == key()) == (field in SearchConfig.fields_of(Part.SEARCH))


def test_the_session_depends_on_what_an_operator_wants_measured() -> None:
    spectral = SearchConfig(rate=0.2).initial
    assert key(initial=[*spectral, "alpha"]) != key(initial=spectral) == key(initial=[*spectral, "owl"])


def test_a_field_belongs_to_one_part_by_its_declaration() -> None:
    parts = [SearchConfig.fields_of(part) for part in Part]
    assert sum(map(len, parts)) == len(SearchConfig.model_fields) == len(frozenset().union(*parts))

    class Wrong(Strict):
        none: int = 0
        two: Annotated[int, Part.SEARCH, Part.REPORT] = Field(default=0)

    for name, field in Wrong.model_fields.items():
        with pytest.raises(TypeError, match=f"{name} must be declared"):
            _part(name, field)


def test_a_comparison_keeps_no_figure_of_other_settings() -> None:
    assert {
        "model",
        "attention",
        "of",
        "ffn_step",
        "granularity",
        "tensor_parallel",
        "drop_blocks",
        "seed",
        "report_text",
    } <= SETTINGS
    assert not SETTINGS & {"rate", "criterion", "compensation", "pattern", "generations"}


def test_two_jobs_that_differ_in_one_field_get_a_space_each(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = tiny_model(tmp_path / "model", "llama", ffn=96)
    text = tmp_path / "text.txt"
    text.write_text(sample_text(20_000, seed=3))
    words = {"sources": [{"source": str(text)}], "sequences": 8, "length": 32}
    handler = SessionHandler("cpu")

    def space(**changes: Any) -> Any:
        body = {"model": str(model), "rate": 0.2, "calibration": words, "device": "cpu", **changes}
        session = session_of(SearchConfig.model_validate(body), tmp_path / "cache")
        return handler.handle(session, PrepareRequest(texts=("calibration",)), lambda _: None, lambda: False).space

    whole = space()
    assert space(tensor_parallel=2) != whole
    assert space(granularity="layer") != whole
    assert space() == whole
