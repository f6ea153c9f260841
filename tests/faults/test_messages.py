"""What people are told when something is wrong: what it was, what would be right, and only advice that can be followed."""

from __future__ import annotations

import ast
import errno
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from selfpruner import api, catalogue, errors
from selfpruner.cli import app as cli
from selfpruner.config import SearchConfig, differences, field_names
from selfpruner.criteria.magnitude import Magnitude
from selfpruner.errors import (
    ConfigError,
    ContractError,
    NoPermissionError,
    OutOfMemoryError,
    SelfprunerError,
    UnknownNameError,
    disk_errors,
)
from selfpruner.files import places
from selfpruner.jobs import comparison
from selfpruner.models import choose_device
from selfpruner.testing.criterion_suites import registered
from selfpruner.timing.tasks import refuse_larger
from selfpruner.workers.tasks import ScoreRow
from server.settings import load_settings
from tests.helpers import ROOT


@pytest.mark.parametrize(("given", "rate"), [("20%", 0.2), (" 12.5 % ", 0.125), ("0.2", 0.2), (0.2, 0.2)])
def test_a_rate_may_be_percent(given: Any, rate: float) -> None:
    assert api.config_of({"rate": given}).rate == pytest.approx(rate)
    assert api.config_of({"rate": 0.5, "objective": "quality,parameters", "rates": [given]}).rates == (pytest.approx(rate),)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"rate": 25}, "rate: must lie between 0 and 1; did you mean 0.25 (25 %)?"),
        ({"rate": "25"}, "did you mean 0.25"),
        ({"rate": "120%"}, "between 0 and 1"),
        ({"rate": 1}, "between 0 and 1"),
        ({"rate": "a fifth"}, "0.2 or 20%"),
        ({"rate": True}, "rate: "),
        (
            {"rate": 0.3, "objective": "quality,parameters", "rates": "0.1,25"},
            "rates.1: must lie between 0 and 1; did you",
        ),
        ({"rate": 0.2, "generation": 3}, "Did you mean generations"),
        ({"rate": 0.2, "calls": 3}, "Did you mean limits.calls? `selfpruner fields` lists all"),
        ({"rate": 0.2, "limits": {"token": 3}}, "Did you mean limits.tokens"),
        ({"rate": 0.2, "qqqq": 3}, "qqqq: unknown field. `selfpruner fields`"),
        ({"rate": 0.2, "device": "gpu"}, "Did you mean 'cuda'? There are auto"),
        ({"rate": 0.2, "device": "cuda:x"}, "cuda:N"),
    ],
)
def test_what_a_search_is_refused_with(body: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        api.config_of(body)
    assert says in error.value.message
    assert "pattern" not in error.value.message


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("prune -o {folder}/o -r 20% -s cache=/tmp/x", "cache: unknown field"),
        ("prune -o {folder}/o -r 20% -s directory=x", "directory: unknown field"),
        ("pause {folder}", "only a server's job is paused"),
        ("resume {folder}/missing", "There is no folder"),
        ("show missing", "There is no folder missing"),
    ],
)
def test_what_a_command_is_refused_with(line: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(line.format(folder=tmp_path).split()) == 2
    assert says in capsys.readouterr().err


def test_a_folder_is_named_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object, **how: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", f"{how['dir']}/.tmp-5a88lgcw")

    monkeypatch.setattr("selfpruner.files.places.tempfile.TemporaryDirectory", closed)
    with pytest.raises(NoPermissionError, match=f"^{tmp_path} is on a disk that can only be read"):
        places.writable_folder(tmp_path)


def test_less_than_a_mebibyte_is_not_none() -> None:
    with pytest.raises(OutOfMemoryError, match="m takes 3 MiB, and 1,000 bytes of memory are left"):
        refuse_larger("m", 3 << 20, 1000)


def test_a_score_has_both_figures_or_none() -> None:
    with pytest.raises(ContractError, match="both numbers, or both null"):
        ScoreRow.read({"kl": 0.5, "nll": None, "tokens": 1})


def test_a_criterion_that_is_not_installed() -> None:
    criterion = type("Own", (Magnitude,), {"name": "own"})
    with pytest.raises(pytest.fail.Exception, match="Install the package whose entry point"):
        registered(criterion, "structured")


def test_every_field_is_listed_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["fields"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert set(SearchConfig.model_fields) - set(listed) == {"calibration", "fitness_text", "report_text", "limits"}
    assert set(listed) < set(field_names())
    assert len(listed) == len(set(listed))
    assert "fitness_text.sequences" in listed


def test_which_settings_differ() -> None:
    one = SearchConfig(rate=0.2).model_dump(mode="json")
    assert differences(one, one) == []
    other = SearchConfig(rate=0.3, limits={"calls": 5}, device="cpu").model_dump(mode="json")
    assert differences(one, other) == ["rate 0.2 then, 0.3 now", "limits.calls 200 then, 5 now", "device auto then, cpu now"]
    assert differences({"a": None}, {}) == ["a null then, not given now"]


def test_a_comparison_goes_on_only_with_its_own_settings(tmp_path: Path) -> None:
    comparison.ComparisonFile(tmp_path, {"model": "a", "seed": 0}).save()
    assert comparison.ComparisonFile(tmp_path, {"model": "a", "seed": 0}).rows == []
    with pytest.raises(ConfigError, match="model a then, b now; seed 0 then, 1 now"):
        comparison.ComparisonFile(tmp_path, {"model": "b", "seed": 1})


def test_devices_are_those_of_this_machine() -> None:
    with pytest.raises(ConfigError, match=r"'gpu'\. Did you mean 'cuda'.*This machine has: cpu"):
        choose_device("gpu")
    with pytest.raises(ConfigError, match="SELFPRUNER_DEVICES: Unknown device 'gpu'"):
        load_settings(devices="gpu")


def test_how_a_proposer_is_defined() -> None:
    with pytest.raises(UnknownNameError, match=r"Known: gpt, local\. .*SELFPRUNER_PROPOSERS='\{\"NAME\": \{\"kind\": \"openai\""):
        catalogue.check_proposer("gtp", ["local", "gpt"])


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("SELFPRUNER_PROPOSERS", "{secret", 'SELFPRUNER_PROPOSERS is not JSON. It is written as \'{"gpt"'),
        ("SELFPRUNER_TOKENS", "ann=secret", "SELFPRUNER_TOKENS is not JSON"),
        (
            "SELFPRUNER_PROPOSERS",
            '{"gpt": {"kind": "openai", "api_key": "secret"}}',
            "SELFPRUNER_PROPOSERS: gpt: a proposer",
        ),
        ("SELFPRUNER_PORT", "secret", "SELFPRUNER_PORT: "),
    ],
)
def test_which_variable_is_wrong(variable: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as error:
        load_settings()
    assert says in error.value.message
    assert "secret" not in error.value.message


def test_which_folder_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    closed = str(tmp_path / "closed")
    with pytest.raises(NoPermissionError, match=f"{closed} is closed to this user"), disk_errors("elsewhere"):
        raise PermissionError(13, "Permission denied", closed)
    with pytest.raises(NoPermissionError, match="elsewhere is on a disk that can only be read"), disk_errors("elsewhere"):
        raise OSError(30, "Read-only file system")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", closed)

    monkeypatch.setattr(api, "config_of", refuse)
    assert cli.run(["search", "--rate", "0.2", "-o", closed]) == 1
    assert capsys.readouterr().err.startswith(f"selfpruner: {closed} is closed to this user")


def test_a_home_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for home, says in (
        ("/proc/none", "/proc/none cannot be written"),
        (str(tmp_path / "file" / "home"), "is a file; name a folder"),
    ):
        assert cli.run(["serve", "--home", home, "--port", "0"]) == 2
        assert says in capsys.readouterr().err


# -- advice -------------------------------------------------------------------------------------------------------------
def texts() -> Iterator[tuple[str, str]]:
    """(place, text) of everything a person may be told: strings of the program, f-strings with a word for every value, and the
    documentation."""
    for file in (*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("tests/*.md"), ROOT / "Makefile"):
        yield file.name, file.read_text("utf-8").replace("\\\n", " ")
    for file in (*ROOT.glob("selfpruner/**/*.py"), *ROOT.glob("server/**/*.py"), *ROOT.glob("benchmarks/*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "VALUE" for part in node.values]
                yield f"{file.name}:{node.lineno}", "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield f"{file.name}:{node.lineno}", node.value


CALL = re.compile(r"(?P<before>`|\.venv/bin/|^| )selfpruner (?P<command>[a-z]+)(?P<rest>[^`\n#|&;]*)", re.MULTILINE)


def test_advice_names_commands_and_options_that_exist() -> None:
    app: Any = typer.main.get_command(cli.app)
    seen, wrong = 0, []
    for place, text in texts():
        for call in CALL.finditer(text):
            command = app.commands.get(call["command"])
            if command is None:
                if call["before"] in ("`", ".venv/bin/"):  # elsewhere it may be prose
                    wrong.append(f"{place}: selfpruner {call['command']}")
                continue
            seen += 1
            known = {"-h", "--help", *(name for each in command.params for name in (*each.opts, *each.secondary_opts))}
            rest = re.sub(r"'[^']*'|\"[^\"]*\"", "", call["rest"]).split(" selfpruner ")[0]
            for option in re.findall(r"(?<!\S)(--?[a-z][\w-]*)", rest):
                if option not in known:
                    wrong.append(f"{place}: selfpruner {call['command']} {option}")
    assert wrong == []
    assert seen > 40


def test_advice_names_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {(place, target) for place, text in texts() for target in re.findall(r"`make ([a-z][\w-]*)", text)}
    assert len(named) > 5
    assert {(place, target) for place, target in named if target not in targets} == set()


def test_the_drawn_tree_of_errors_is_the_tree() -> None:
    def classes(base: type[SelfprunerError]) -> Iterator[type[SelfprunerError]]:
        yield base
        for child in base.__subclasses__():
            yield from classes(child)

    drawn = re.findall(r"^ {4,}(\w+Error)\b", errors.__doc__ or "", re.MULTILINE)
    ours = {cls.__name__ for cls in classes(SelfprunerError) if cls.__module__ == "selfpruner.errors"}
    assert ours == set(drawn)
