"""Text files of every kind and size: read as they are meant, or refused at once with what to do."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from selfpruner.calibration import encoding, files
from selfpruner.calibration.encoding import encode
from selfpruner.calibration.files import NoFileError, find
from selfpruner.calibration.texts import token_batches
from selfpruner.config import Role, Source, TextConfig
from selfpruner.errors import TextError
from selfpruner.models import LoadedModel, load, resolve
from selfpruner.testing.tiny_models import sample_text, tiny_tokenizer

ROLES: tuple[Role, ...] = ("calibration", "fitness", "report")
TEXT = "Caf\u00e9 and cr\u00e8me,\nsecond line.\n"


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    torch.set_num_threads(1)
    return load(resolve(str(tiny_llama), tmp_path_factory.mktemp("cache")), "cpu", "float32")


def batches(loaded: LoadedModel, cache: Path, source: str, role: Role, sequences: int, seed: int = 0) -> torch.Tensor:
    wanted = TextConfig(sources=(Source(source=source),), sequences=sequences, length=32)
    return token_batches(wanted, role, loaded, cache, seed).tokens


# -- kinds -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["a.txt", "a.raw", "a.md", "README", "a.txt.gz", "a.strange"])
@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        b"\xef\xbb\xbf" + TEXT.encode(),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        b"\xff\xfe" + TEXT.encode("utf-16-le"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        gzip.compress(TEXT.encode(), mtime=0),
        gzip.compress(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode(), mtime=0),
    ],
    ids=["utf-8", "mark", "crlf", "cr", "utf-16-le", "utf-16-be", "gzip", "gzip-mark-crlf"],
)
def test_plain_text_is_read_whatever_it_is_called(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    file = find(str(tmp_path / name))
    file.check()
    assert file.whole() == [TEXT]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "A.JSONL", "a.jsonl.gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_lines_of_any_field(tmp_path: Path, name: str, mark: bytes) -> None:
    lines = "\r\n".join(json.dumps({"id": n, "body": f"b{n}", "text": f"t{n}"}) for n in range(3)).encode()
    (tmp_path / name).write_bytes(gzip.compress(mark + lines, mtime=0) if name.endswith("gz") else mark + lines)
    for suffix, letter in (("", "t"), (":body", "b"), (":text", "t")):
        file = find(str(tmp_path / name) + suffix)
        file.check()
        assert file.whole() == [f"{letter}{n}" for n in range(3)]
        assert find(file.name) == file
    with pytest.raises(TextError, match=r"its fields are: id, body, text\. Name the one"):
        find(f"{tmp_path / name}:content").check()
    with pytest.raises(TextError, match="must be a string"):
        find(f"{tmp_path / name}:id").check()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"content": "x", "n": 1}\n', r'"text"; its fields are: content, n\. Name .* a\.jsonl:content'),
        ("a.json", b'[{"text": "x"},\n {"text": "y"}]', r"JSON lines \(jq -c"),
        ("a.json", b'[{"text": "x"}]', r"JSON lines \(jq -c"),
        ("a.txt", "caf\u00e9".encode("latin-1"), r"not UTF-8 text \(byte 3\)"),
        ("a.txt", TEXT.encode("utf-16-le"), "null bytes"),
        ("a.txt", b"\xff\xfe" + TEXT.encode("utf-16-le")[:-1] + b"\xdc", "not UTF-16"),
        ("a", b"PAR1 and more", "Parquet.*JSON lines"),
        ("a.docx", b"PK\x03\x04 and more", "zip archive or office document"),
        ("a.xz", b"\xfd7zXZ\x00", "unxz"),
        ("a.bz2", b"BZh91AY", "bunzip2"),
        ("a.zst", b"\x28\xb5\x2f\xfd", "unzstd"),
        ("a.pdf", b"%PDF-1.7", "pdftotext"),
        ("a.gz", gzip.compress(TEXT.encode() * 9, mtime=0)[:-20], "Is it whole"),
        ("a.gz", gzip.compress(b"", mtime=0), "is empty"),
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_else(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=words):
        find(str(tmp_path / name)).check()


def test_a_field_of_plain_text_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a:b.txt").write_text(TEXT)
    assert find(str(tmp_path / "a:b.txt")).whole() == [TEXT]
    for name, words in (("a:b.txt:field", "no field 'field'"), ("none.txt", "no text file"), ("none.jsonl:x", "no text file")):
        with pytest.raises(NoFileError, match=words):
            find(str(tmp_path / name))


def test_looking_at_files_needs_no_torch() -> None:
    code = "import sys, selfpruner.calibration.files; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


# -- pieces ------------------------------------------------------------------------------------------------------------
def metaspace() -> PreTrainedTokenizerFast:
    """Like Llama 1: the whole text is one word to the merges, and a space is put before it."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    tokenizer.train_from_iterator([sample_text(2000)], BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False))
    tokenizer.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def mixed() -> str:
    chance = random.Random(0)
    parts = [sample_text(3), "\n\n", " ", "  \n", "\t", "\u00e9", "a\u0301", "\U0001f44d\U0001f3fd", "\u6f22\u5b57", "12345", "'s"]
    return "".join(chance.choice(parts) for _ in range(6000))


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer, metaspace])
@pytest.mark.parametrize("text", [lambda: sample_text(8000), mixed])
def test_pieces_give_the_tokens_of_the_whole(
    tokenizer: Callable[[], PreTrainedTokenizerFast], text: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "PIECE", 3000)
    monkeypatch.setattr(encoding, "OVERLAP", 400)
    made, document = tokenizer(), text()
    parts = list(encode(made, document))
    assert len(parts) > 5
    assert list(itertools.chain.from_iterable(parts)) == made(document, add_special_tokens=False)["input_ids"]


def test_a_text_without_any_border_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PIECE", 3000)
    monkeypatch.setattr(encoding, "OVERLAP", 400)
    tokenizer = tiny_tokenizer()
    found = list(itertools.chain.from_iterable(encode(tokenizer, "e" * 10_001)))
    assert tokenizer.decode(found) == "e" * 10_001


# -- large files -------------------------------------------------------------------------------------------------------
@pytest.fixture(params=["txt", "jsonl", "line", "gz"])
def large(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every word once: as lines, as records, as one line without an end, packed. Large by the limits set here."""
    monkeypatch.setattr(files, "WHOLE", 20_000)
    monkeypatch.setattr(files, "LONG_LINE", 1_000)
    monkeypatch.setattr("selfpruner.calibration.texts._STRETCH_BYTES", 10_000)
    lines = [" ".join(f"w{n}" for n in range(first, first + 8)) for first in range(0, 16_000, 8)]
    path = tmp_path / f"large.{request.param}"
    match request.param:
        case "jsonl":
            path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        case "line":
            path.write_text(" ".join(lines))
        case "gz":
            path.write_bytes(gzip.compress("\n".join(lines).encode()))
        case _:
            path.write_text("\n".join(lines))
    return path


def words(loaded: LoadedModel, tokens: torch.Tensor) -> set[int]:
    # The first and last word of a sequence may be cut; so may words at the ends of a part where no line ends.
    found = (word for row in tokens for word in loaded.tokenizer.decode(row).replace("</s>", " ").split()[1:-1])
    return {int(word[1:]) for word in found if word[:1] == "w" and word[1:].isdigit()}


def test_roles_of_a_large_file_never_share_text(loaded: LoadedModel, large: Path, tmp_path: Path) -> None:
    shapes = {"calibration": 40, "fitness": 23, "report": 12}
    found = {
        role: words(loaded, batches(loaded, tmp_path, str(large), role, n, n)) for role, n in shapes.items() for role in [role]
    }
    assert all(len(part) > 30 for part in found.values())
    assert not found["calibration"] & found["fitness"] | found["fitness"] & found["report"] | found["report"] & found["calibration"]
    for part in found.values():
        assert min(part) < 3_000, "from the beginning ..."
        assert max(part) > 13_000, "... to the end"


def test_all_of_a_large_file_can_be_had(loaded: LoadedModel, large: Path, tmp_path: Path) -> None:
    few = batches(loaded, tmp_path, str(large), "report", 4)
    assert torch.equal(few, batches(loaded, tmp_path / "again", str(large), "report", 4, seed=3))
    total = 0
    for role in ROLES:
        with pytest.raises(TextError, match=rf"has ([\d,]+) sequences of 32 tokens for {role}") as caught:
            batches(loaded, tmp_path, str(large), role, 60_000)
        total += (most := int(caught.value.message.split(" has ")[1].split()[0].replace(",", "")))
        assert batches(loaded, tmp_path, str(large), role, most).shape == (most, 32)
    everything = " ".join(f"w{n}" for n in range(16_000))
    assert total * 32 > 0.8 * len(loaded.tokenizer(everything)["input_ids"])


def test_a_large_file_is_read_as_far_as_is_needed(loaded: LoadedModel, large: Path, tmp_path: Path) -> None:
    read = []

    class Counted:
        is_fast = True

        def __init__(self, inner: PreTrainedTokenizerFast) -> None:
            self.inner = inner

        def __call__(self, text: str, **options: object) -> object:
            read.append(len(text))
            return self.inner(text, **options)

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

    batches(replace(loaded, tokenizer=Counted(loaded.tokenizer)), tmp_path, str(large), "calibration", 2)
    assert 0 < sum(read) < 20_000


def test_large_utf16_says_how_to_convert_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WHOLE", 20_000)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe" + (TEXT * 1000).encode("utf-16-le"))
    with pytest.raises(TextError, match="iconv -f UTF-16"):
        find(str(tmp_path / "a.txt")).check()
