"""Token batches: where text comes from, how roles stay apart, and what the model writes itself."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfpruner.architectures import Architecture, describe
from selfpruner.calibration import openings, pydoc, selftext, texts
from selfpruner.calibration.texts import TokenBatches, apportion, separator, token_batches
from selfpruner.config import Role, SearchConfig, Source, TextConfig
from selfpruner.errors import CancelledTaskError, ModelNotFoundError, TextError
from selfpruner.jobs.handler import ServedSessionHandler
from selfpruner.models import LoadedModel, load, resolve
from selfpruner.testing.tiny_models import tiny_model
from selfpruner.workers.base import Session
from selfpruner.workers.tasks import PrepareRequest

ROLES: tuple[Role, ...] = ("calibration", "fitness", "report")
FIELDS = {"calibration": "calibration", "fitness": "fitness_text", "report": "report_text"}


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    torch.set_num_threads(1)
    return load(resolve(str(tiny_llama), tmp_path_factory.mktemp("cache")), "cpu", "float32")


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """A text in which every word occurs once, so that overlaps show."""
    path = tmp_path / "numbered.txt"
    path.write_text(" ".join(f"w{n}" for n in range(4000)))
    return path


def ask(
    loaded: LoadedModel,
    cache: Path,
    *sources: str | Source,
    role: Role = "calibration",
    sequences: int = 4,
    length: int = 32,
    seed: int = 0,
    **kw: Any,
) -> TokenBatches:
    given_sources = tuple(s if isinstance(s, Source) else Source(source=s) for s in sources)
    return token_batches(TextConfig(sources=given_sources, sequences=sequences, length=length), role, loaded, cache, seed, **kw)


def words(loaded: LoadedModel, batches: TokenBatches) -> set[str]:
    # The first and last word of a sequence may be cut.
    return {word for row in batches.tokens for word in loaded.tokenizer.decode(row).split()[1:-1]}


# --- shape and packing ------------------------------------------------------------------------------------------------------


def test_batches_of_a_text_file(loaded: LoadedModel, numbered: Path, tmp_path: Path) -> None:
    batches = ask(loaded, tmp_path, str(numbered), sequences=6, length=48)
    assert batches.tokens.shape == (6, 48)
    assert batches.tokens.dtype == torch.int64
    assert [(s.source, s.weight, s.sequences) for s in batches.sources] == [(str(numbered), 1.0, 6)]
    assert loaded.tokenizer.eos_token_id not in batches.tokens  # one document
    again = ask(loaded, tmp_path / "other cache", str(numbered), sequences=6, length=48)
    assert torch.equal(again.tokens, batches.tokens)
    assert again.fingerprint == batches.fingerprint
    other = ask(loaded, tmp_path, str(numbered), sequences=6, length=48, seed=1)
    assert other.fingerprint != batches.fingerprint


def test_documents_are_joined_by_eos(loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"the sea {n}", "url": "x"}) for n in range(400)) + "\n\n")
    row = ask(loaded, tmp_path, str(path), sequences=1, length=64).tokens[0].tolist()
    eos = loaded.tokenizer.eos_token_id
    starts = [at + 1 for at, token in enumerate(row) if token == eos]
    assert len(starts) > 3
    document = loaded.tokenizer.decode(row[starts[0] : starts[1] - 1])
    assert document.startswith("the sea ")


@pytest.mark.parametrize("length", [16, 33])
def test_bos_only_where_the_tokenizer_adds_it(length: int, tmp_path: Path, numbered: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    folder = tiny_model(tmp_path / "m", "llama")
    plain = load(resolve(str(folder), tmp_path), "cpu", "float32")
    assert plain.tokenizer.bos_token_id not in ask(plain, tmp_path, str(numbered), length=length).tokens
    plain.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    for source in (str(numbered), "self"):
        tokens = ask(plain, tmp_path / "b", source, length=length).tokens
        assert tokens.shape == (4, length)
        assert (tokens[:, 0] == 1).all()
        assert 1 not in tokens[:, 1:]


def test_separator_prefers_the_document_end_of_training(loaded: LoadedModel) -> None:
    assert separator(loaded) == [2]
    chat = load(loaded.source, "cpu", "float32")
    chat.tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    assert separator(chat) == [2], "a token that the model has no row for ends nothing"
    chat.model.config.vocab_size += 1
    assert separator(chat) == [chat.tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    bare = load(loaded.source, "cpu", "float32")
    bare.tokenizer.eos_token = None
    assert bare.tokenizer.decode(separator(bare)) == "\n"


# --- roles never share text -------------------------------------------------------------------------------------------------


def test_roles_never_share_text(loaded: LoadedModel, numbered: Path, tmp_path: Path) -> None:
    shapes = {"calibration": (40, 64), "fitness": (30, 32), "report": (12, 100)}
    parts = {
        role: words(loaded, ask(loaded, tmp_path, str(numbered), role=role, sequences=n, length=length, seed=seed))
        for seed, (role, (n, length)) in enumerate(shapes.items())
        for role in [role]  # each with its own shape and seed
    }
    assert all(len(part) > 50 for part in parts.values())
    assert not parts["calibration"] & parts["fitness"]
    assert not parts["calibration"] & parts["report"]
    assert not parts["fitness"] & parts["report"]


def test_long_texts_are_shared_out_in_stretches(
    loaded: LoadedModel, numbered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_STRETCH", 1000)
    found = {role: words(loaded, ask(loaded, tmp_path, str(numbered), role=role, sequences=24, length=32)) for role in ROLES}
    assert not found["calibration"] & found["fitness"] | found["fitness"] & found["report"] | found["report"] & found["calibration"]
    report = sorted(int(word[1:]) for word in found["report"] if word[1:].isdigit())
    assert report[0] < 1000  # from the beginning of the text ...
    assert report[-1] > 3000  # ... to its end


def test_report_text_is_the_same_for_every_seed(loaded: LoadedModel, numbered: Path, tmp_path: Path) -> None:
    first, second = (ask(loaded, tmp_path, str(numbered), role="report", seed=seed).fingerprint for seed in (0, 1))
    assert first == second


# --- mixtures ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(0, 500))
def test_apportion(weights: list[float], total: int) -> None:
    shares = apportion(weights, total)
    assert sum(shares) == total
    assert all(abs(share - weight / sum(weights) * total) < 1 for share, weight in zip(shares, weights, strict=True))


def test_mixture_by_weight_is_interleaved(loaded: LoadedModel, numbered: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("x " * 8000)
    sources = (Source(source=str(numbered), weight=1), Source(source=str(other), weight=2), Source(source=str(other), weight=1))
    batches = ask(loaded, tmp_path, *sources, sequences=16)
    assert [(s.source, s.weight, s.sequences) for s in batches.sources] == [(str(numbered), 1, 4), (str(other), 3, 12)]
    is_numbered = ["w" in loaded.tokenizer.decode(row) for row in batches.tokens]
    assert sum(is_numbered) == 4
    assert [sum(is_numbered[at : at + 4]) for at in range(0, 16, 4)] == [1, 1, 1, 1]


# --- sources ----------------------------------------------------------------------------------------------------------------


def test_auto_offline(loaded: LoadedModel, tmp_path: Path) -> None:
    resolved = {role: ask(loaded, tmp_path, "auto", role=role).sources[0].source for role in ROLES}
    assert resolved == {"calibration": "self", "fitness": "self", "report": "pydoc"}


def test_auto_stays_what_it_was(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ask(loaded, tmp_path, "auto")
    monkeypatch.setattr(texts, "hub_available", lambda: True)
    assert ask(loaded, tmp_path, "auto").fingerprint == before.fingerprint


def test_pydoc_is_prose() -> None:
    documents = pydoc.documents()
    whole = "\n\n".join(documents)
    assert len(whole) > 300_000  # about 80,000 tokens: enough for every role at its default size
    paragraphs = whole.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    assert ">>>" not in whole
    assert "::=" not in whole
    assert pydoc.prose("Title\n*****\n\n   x = 1\n\n* The *first* line of a list\n  is a sentence of nine words.\n") == [
        "The first line of a list is a sentence of nine words."
    ]


class FakeHub:
    """Stands in for ``datasets.load_dataset``: remembers what was asked and streams numbered documents."""

    def __init__(self, rows: Callable[[], Iterator[dict[str, Any]]]) -> None:
        self.rows, self.calls = rows, []

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        self.calls.append((args, kwargs))
        return self.rows()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(lambda: ({"text": " ".join(f"d{doc}x{n}" for n in range(20)), "id": doc} for doc in range(200)))
    monkeypatch.setattr("datasets.load_dataset", fake)
    monkeypatch.setattr(texts, "hub_available", lambda: True)
    return fake


def test_c4_gives_whole_documents_to_roles(loaded: LoadedModel, tmp_path: Path, hub: FakeHub) -> None:
    found = {role: words(loaded, ask(loaded, tmp_path, "c4", role=role, sequences=10)) for role in ROLES}
    documents = {role: {word.partition("x")[0] for word in part} for role, part in found.items()}
    assert not documents["calibration"] & documents["fitness"] | documents["fitness"] & documents["report"]
    assert not documents["calibration"] & documents["report"]
    assert hub.calls[0][0][0] == "allenai/c4"
    assert hub.calls[0][1]["streaming"] is True


def test_auto_with_a_network(loaded: LoadedModel, tmp_path: Path, hub: FakeHub) -> None:
    assert ask(loaded, tmp_path, "auto").sources[0].source == "c4"
    hub.rows = lambda: ({"text": f" line{n} and more\n" if n % 2 else ""} for n in range(2000))
    report = ask(loaded, tmp_path, "auto", role="report")
    assert report.sources[0].source == "hub:Salesforce/wikitext:wikitext-2-raw-v1:test"
    assert hub.calls[-1][0] == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert hub.calls[-1][1]["split"] == "test"
    assert " and more\n\n\n\n\n line" in loaded.tokenizer.decode(report.tokens[0])  # rows joined by a blank line


def test_hub_source_parts(loaded: LoadedModel, tmp_path: Path, hub: FakeHub) -> None:
    hub.rows = lambda: ({"body": "the sea " * 20} for _ in range(100))
    ask(loaded, tmp_path, "hub:owner/set:config:validation:body")
    assert hub.calls[0][0] == ("owner/set", "config")
    assert hub.calls[0][1]["split"] == "validation"
    with pytest.raises(TextError, match="no text field 'text', but body"):
        ask(loaded, tmp_path, "hub:owner/set")
    hub.rows = lambda: iter([{"text": "short"}] * 20)
    with pytest.raises(TextError, match=r"ended after \d+ tokens for report"):
        ask(loaded, tmp_path, "hub:owner/set", role="report")

    def broken() -> Iterator[dict[str, Any]]:
        raise ConnectionError("no route")

    hub.rows = broken
    with pytest.raises(TextError, match=r"cannot be read \(no route\)"):
        ask(loaded, tmp_path, "c4")


# --- bad text ---------------------------------------------------------------------------------------------------------------


def make(name: str, content: bytes) -> Callable[[Path], str]:
    def build(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return build


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (make("empty.txt", b""), "is empty"),
        (make("blank.txt", b" \n\n "), "is empty"),
        (make("short.txt", b"Too short."), r"has \d+ tokens, of which \d+ are for .* need 128"),
        (make("latin.txt", "caf\u00e9 cr\u00e8me".encode("latin-1")), r"not UTF-8 text \(byte 3\)"),
        (make("binary.txt", b"abc\x00def"), "binary"),
        (make("bad.jsonl", b'{"text": "fine"}\n{"text": "cut'), "Line 2 of .* is not a JSON object"),
        (make("field.jsonl", b'{"content": "x"}'), 'Line 1 of .* field "text"'),
        (make("type.jsonl", b'{"text": 3}'), "Line 1 of .* must be a string"),
        (make("deep.jsonl", b"[" * 100_000), "Line 1"),
        (lambda _: "/no/such/file.txt", "There is no text file"),
        (lambda folder: str(folder / ("x" * 300)) + ".txt", "There is no text file"),
        (lambda folder: str(folder), "is a folder; name a file in it"),
        (lambda _: "/dev/null", "/dev/null is no ordinary file.* write what it gives to a file"),
        (lambda _: "wikipedia", "Use auto, self, c4, pydoc"),
        (lambda _: "c4", "no network, or offline mode is on. Use source self"),
        (lambda _: "hub:owner/set", "cannot be reached"),
    ],
)
@pytest.mark.parametrize("role", ROLES)
def test_bad_text(source: Callable[[Path], str], words: str, role: Role, loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(TextError, match=words) as caught:
        ask(loaded, tmp_path / "cache", source(tmp_path), role=role)
    assert caught.value.param == FIELDS[role]
    assert not (tmp_path / "cache" / "texts").exists()


def test_length_beyond_the_context(loaded: LoadedModel, numbered: Path, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="longer than the model's context of 512"):
        ask(loaded, tmp_path, str(numbered), sequences=1, length=513)


@pytest.mark.parametrize("field", FIELDS.values())
def test_a_worker_of_a_server_reads_texts_below_its_root_only(
    field: str, numbered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "in.txt").write_bytes(numbered.read_bytes())
    (root / "link.txt").symlink_to(numbered)
    monkeypatch.setenv("SELFPRUNER_TEXT_ROOT", str(root))
    handler = ServedSessionHandler("cpu")

    def prepare(name: str) -> None:
        text = {"sources": [{"source": name}], "sequences": 4, "length": 32}
        asked = SearchConfig.model_validate({"rate": 0.2, "model": "nobody/nothing", "preset": "evolution", field: text})
        session = Session("key", asked.model_dump(mode="json"), str(tmp_path / "cache"))
        handler.handle(session, PrepareRequest(texts=()), lambda _: None, lambda: False)

    for name in (str(numbered), "../numbered.txt", str(root / "link.txt")):
        with pytest.raises(TextError, match="inside the folder") as caught:
            prepare(name)
        assert caught.value.param == field
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError):  # comes after the texts
        prepare(str(root / "in.txt"))


def test_changed_file_is_read_again(loaded: LoadedModel, numbered: Path, tmp_path: Path) -> None:
    first = ask(loaded, tmp_path, str(numbered)).fingerprint
    numbered.write_text("other words " * 4000)
    assert ask(loaded, tmp_path, str(numbered)).fingerprint != first


# --- the model writes -------------------------------------------------------------------------------------------------------


def write(loaded: LoadedModel, cache: Path, **changes: Any) -> torch.Tensor:
    settings = {"count": 5, "length": 24, "separator": [2], "seed": 0, "stream": "calibration", "cache": cache}
    return selftext.write(loaded, **settings | changes)


def test_written_text_is_a_function_of_its_seed_and_stream(loaded: LoadedModel, tmp_path: Path) -> None:
    first = write(loaded, tmp_path / "a")
    assert first.shape == (5, 24)
    assert first.dtype == torch.int64
    assert (first[:, 0] == 2).all()  # a document begins
    assert torch.equal(first, write(loaded, tmp_path / "b"))
    for changes in ({"seed": 1}, {"stream": "fitness"}):
        other = write(loaded, tmp_path / "c", **changes)
        assert not any(torch.equal(a, b) for a in first for b in other)


def test_rows_do_not_depend_on_their_neighbours(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(loaded, tmp_path / "a")
    monkeypatch.setattr(selftext, "MAX_ROWS", 2)
    assert torch.equal(whole, write(loaded, tmp_path / "b"))


def test_a_long_row_is_written_in_stretches(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are rows like any others while they are written: nothing of one is seen by the next, and more are written at once."""
    monkeypatch.setattr(selftext, "STRETCH", 10)
    asked: list[tuple[int, int]] = []
    decode = selftext._decode

    def counted(loaded: LoadedModel, arch: Architecture, names: list[str], length: int, *rest: Any) -> torch.Tensor:
        asked.append((len(names), length))
        return decode(loaded, arch, names, length, *rest)

    monkeypatch.setattr(selftext, "_decode", counted)
    rows = write(loaded, tmp_path / "a", count=4, length=23)
    assert rows.shape == (4, 23)
    assert asked == [(12, 8)]
    assert (rows[:, [0, 8, 16]] == 2).all()
    short = write(loaded, tmp_path / "b", count=12, length=8)
    assert torch.equal(torch.cat([rows, short.view(4, 24)[:, 23:]], 1), short.view(4, 24))


def test_interrupted_writing_goes_on(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftext, "MAX_ROWS", 2)
    expected = write(loaded, tmp_path / "a")
    polls = 0

    def cancelled() -> bool:
        nonlocal polls
        polls += 1
        return polls > 60  # in the third chunk of 24 steps

    with pytest.raises(CancelledTaskError):
        write(loaded, tmp_path / "b", cancelled=cancelled)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "b").rglob("*.safetensors")}
    assert len(done) == 2
    assert torch.equal(write(loaded, tmp_path / "b"), expected)
    assert all(path.stat().st_mtime_ns == written for path, written in done.items())
    assert not list(tmp_path.rglob("*.tmp"))


def test_written_tokens_follow_the_model(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """At temperature near zero the sampler with its cache must give the model's own greedy continuation."""
    monkeypatch.setattr(selftext, "styles", lambda _: selftext.Style(1e-4, 10_000))
    monkeypatch.setattr(selftext, "opening", lambda _: "the sea was")
    monkeypatch.setattr(selftext, "_LOOP", 1000)
    rows = selftext._decode(loaded, describe(loaded.model), ["a", "b"], 20, [2], lambda _: None, lambda: False)
    prompt = [2, *loaded.tokenizer("the sea was")["input_ids"]]
    tokens = list(prompt)
    while len(tokens) < 20:
        with torch.no_grad():
            logits = loaded.model(torch.tensor([tokens])).logits[0, -1]
        logits[[0, 1, 3]] = -torch.inf  # special tokens other than the end are no text
        tokens.append(int(logits.argmax()))
        if tokens[-1] == 2:
            tokens += prompt[1:]
    assert rows[0].tolist() == rows[1].tolist() == tokens[:20]


def test_sampling_matches_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probabilities.log().repeat(4000, 1)

    def shares(style: selftext.Style) -> torch.Tensor:
        rows = [selftext._Row(random.Random(n), style=style) for n in range(4000)]
        tokens = selftext._sample(logits, rows)
        assert tokens is not None
        return torch.bincount(tokens, minlength=4) / 4000

    assert torch.allclose(shares(selftext.Style(1.0, 1)), probabilities, atol=0.03)
    hot = probabilities.pow(0.5) / probabilities.pow(0.5).sum()
    assert torch.allclose(shares(selftext.Style(2.0, 1)), hot, atol=0.03)


@pytest.mark.parametrize("vocabulary", [97, 768, 1000])
def test_sampling_in_blocks_inverts_the_distribution(vocabulary: int) -> None:
    logits = torch.randn(50, vocabulary, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, ::3] = -torch.inf
    chance = torch.linspace(0, 1, 51)[:-1, None]
    found = selftext._invert(logits, torch.full((50, 1), 1.3), chance)
    assert found is not None
    sums = (logits / 1.3).double().softmax(-1).cumsum(-1)
    below = torch.where(found > 0, sums.gather(1, (found[:, None] - 1).clamp(min=0))[:, 0], 0)
    draw = 1 - chance[:, 0].double()
    assert (below <= draw + 1e-6).all()
    assert (sums.gather(1, found[:, None])[:, 0] >= draw - 1e-6).all()
    assert not (found % 3 == 0).any()
    logits[7, 4] = torch.nan
    assert selftext._invert(logits, torch.full((50, 1), 1.3), chance) is None


def test_loops_end_the_document(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftext, "styles", lambda _: selftext.Style(1e-4, 10_000))
    monkeypatch.setattr(selftext, "_sample", lambda logits, _: torch.full((logits.shape[0],), 40))  # always the same token
    rows = selftext._decode(loaded, describe(loaded.model), ["a"], 120, [2], lambda _: None, lambda: False)
    assert (rows == 2).sum() > 3


def test_degenerate_rows_are_written_again(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def decode(_loaded: LoadedModel, _arch: Architecture, names: list[str], *_: Any) -> torch.Tensor:
        asked.append(names)
        good = loaded.tokenizer("".join(random.Random(0).choices("abcdefghij klmno pqrst", k=400)))["input_ids"][:200]
        bad = [40] * 200
        return torch.tensor([bad if name.startswith(("x/1/0", "x/2")) else good for name in names])

    monkeypatch.setattr(selftext, "_decode", decode)
    monkeypatch.setattr(selftext, "is_degenerate", lambda text: len(set(text)) < 3)
    selftext._write_rows(loaded, describe(loaded.model), ["x/0", "x/1", "x/2"], 200, [2], lambda _: None, lambda: False)
    assert asked == [["x/0/0", "x/1/0", "x/2/0"], ["x/1/1", "x/2/1"], ["x/2/2"]]


def test_degenerate_text(sample_text: Callable[[int, int], str]) -> None:
    assert selftext.is_degenerate("the same words again and " * 40)
    assert not selftext.is_degenerate(
        "\n\n".join(pydoc.prose("\n\n".join(openings.opening(random.Random(n)) for n in range(100)))) or "short"
    )
    assert not selftext.is_degenerate(sample_text(300, 0))


def test_openings_are_varied_and_complete() -> None:
    drawn = [openings.opening(random.Random(n)) for n in range(2000)]
    assert len(set(drawn)) > 700
    assert not any("{" in text or text.endswith(" ") for text in drawn)
    assert 0.05 < sum(not text for text in drawn) / len(drawn) < 0.25
