"""Text files: which ones exist, what they hold, and how to read a large one without keeping it in memory.

A source that is neither a word (``WORDS``) nor a hub dataset names a file. ``.jsonl``, ``.ndjson`` and ``.json`` hold one JSON
object per line; the text is in the field ``text`` or in the one named after the path (``texts.jsonl:body``). Every other ending, or
none, is plain text. Any file may be packed by gzip, whatever its name. UTF-8 is read, and UTF-16 with a byte order mark; every line
end becomes ``\\n``.

A file beyond ``WHOLE`` bytes is never in memory as a whole. It is divided at byte positions that depend on nothing but the file: a
line belongs to the part in which it begins, and a line beyond ``LONG_LINE`` bytes is cut (a JSON line never is).

Standard library only: the server looks at files before a job exists.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from selfpruner.config import SearchConfig, TextConfig
from selfpruner.errors import TextError

T = TypeVar("T")

WORDS = ("auto", "self", "c4", "pydoc")
WHOLE = 16 << 20
LONG_LINE = 1 << 16
_HEAD = 1 << 16
_BLOCK = 1 << 20
_JSON = (".jsonl", ".ndjson", ".json")
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_GZIP = b"\x1f\x8b"
# How files of other kinds begin, and what to do with them.
_OTHERS = (
    (b"PK\x03\x04", "a zip archive or office document", "Unpack it, or save it as plain text"),
    (b"BZh", "packed by bzip2", "Unpack it (bunzip2)"),
    (b"\xfd7zXZ\x00", "packed by xz", "Unpack it (unxz)"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd", "Unpack it (unzstd)"),
    (b"%PDF", "a PDF", "Save it as plain text (pdftotext)"),
    (b"GGUF", "a model", "Name a text"),
    (b"PAR1", "a Parquet table", "Save its text column as JSON lines, or name the dataset: hub:DATASET"),
)


class NoFileError(TextError):
    """There is no such file."""


def is_file_name(source: str) -> bool:
    return source not in WORDS and not source.startswith("hub:")


def find(source: str, root: Path | None = None) -> TextFile:
    """The file that ``source`` names; below ``root`` if that is given, links resolved. Raises NoFileError."""
    place, colon, field = source.rpartition(":")
    path = _existing(source, root)
    if path is None and colon and (path := _existing(place, root)) is not None:
        if not is_json(path):
            raise NoFileError(f"There is no file {source!r}, and {path} is plain text, which has no field {field!r}. Leave it out.")
        return TextFile(path, field or "text")
    if path is not None:
        return TextFile(path)
    if "/" not in source and "." not in source:
        raise NoFileError(
            f"Unknown source of text {source!r}. Use {', '.join(WORDS)}, hub:DATASET[:CONFIG[:SPLIT[:FIELD]]], or the path of a "
            "text file or of JSON lines."
        )
    if root is None and (what := _other(Path(source))):
        raise NoFileError(f"{source} is {what}.")
    raise NoFileError(
        f"There is no text file {source!r}. Check the path"
        + (" (it must lie inside the folder this server allows)." if root else ".")
    )


def _existing(source: str, root: Path | None) -> Path | None:
    try:
        path = (Path(source).expanduser() if root is None else root / source).resolve()
        return path if path.is_file() and (root is None or path.is_relative_to(root.resolve())) else None
    except (OSError, ValueError, RuntimeError):  # null bytes, over-long names, loops of links
        return None


def _other(path: Path) -> str:
    """What is there instead of a file, and what to do."""
    try:
        if path.expanduser().is_dir():
            return "a folder; name a file in it, or several by repeating the option"
        return (
            "no ordinary file, and it is read more than once: write what it gives to a file" if path.expanduser().exists() else ""
        )
    except (OSError, ValueError, RuntimeError):
        return ""


def look_at(config: SearchConfig, roles: Collection[str], root: Path | None = None) -> None:
    """Raise TextError, whose ``param`` is the field, for a file of ``config`` that cannot be read for one of the ``roles`` or for
    calibration, and for any file that is not below ``root``: before a model is loaded, converted or fetched."""
    for field, role in (("calibration", "calibration"), ("fitness_text", "fitness"), ("report_text", "report")):
        if root is not None or role in ("calibration", *roles):
            text: TextConfig = getattr(config, field)
            check(text, field, root)


def check(text: TextConfig, param: str, root: Path | None = None) -> None:
    """Raise TextError with that ``param`` for a file of ``text`` that cannot be read or is not below ``root``."""
    try:
        for source in text.sources:
            if is_file_name(source.source):
                find(source.source, root).check()
    except TextError as error:
        error.param = param
        raise


def is_json(path: Path) -> bool:
    return Path(path.name.lower().removesuffix(".gz")).suffix in _JSON


@dataclass(frozen=True, slots=True)
class TextFile:
    """One file. ``field`` of its records is read; of plain text it means nothing. All methods raise TextError."""

    path: Path
    field: str = "text"

    @property
    def name(self) -> str:
        """The name by which :func:`find` finds it."""
        return f"{self.path}:{self.field}" if self.field != "text" else str(self.path)

    def check(self) -> None:
        """Look at the beginning: what cannot be read is mostly refused here, before anything costs time."""
        with self._open() as file:
            head = self._read(file.read, _HEAD)
        complete = len(head) < _HEAD
        encoding, text = self._beginning(head, final=complete)
        if complete and not text.strip():
            raise self._empty()
        if encoding != "utf-8" and self.path.stat().st_size > WHOLE:
            raise self._too_large(encoding)
        if is_json(self.path):
            lines = text.split("\n")[: None if complete else -1]
            for number, line in self._lines(lines)[:1]:
                self._record(line, f"Line {number} of")

    def whole(self) -> list[str] | None:
        """The documents; None where there are more than ``WHOLE`` bytes of them."""
        with self._open() as file:
            content = self._read(file.read, WHOLE + 1)
        return None if len(content) > WHOLE else self._documents(content)

    def documents(self) -> list[str]:
        """The documents, however many."""
        with self._open() as file:
            return self._documents(self._read(file.read, -1))

    def _documents(self, content: bytes) -> list[str]:
        _, text = self._beginning(content, final=True)
        if not text.strip():
            raise self._empty()
        if not is_json(self.path):
            return [text]
        return [self._record(line, f"Line {number} of") for number, line in self._lines(text.split("\n"))]

    def size(self) -> int:
        """Bytes of the text, unpacked. Raises TextError for a large file that cannot be read in parts."""
        with self._open() as file:
            head = self._read(file.read, _HEAD)
            encoding, _ = self._beginning(head, final=False)
            if encoding != "utf-8":
                raise self._too_large(encoding)
            if not isinstance(file, gzip.GzipFile):
                return self.path.stat().st_size
            size = len(head)
            while block := self._read(file.read, _BLOCK):
                size += len(block)
            return size

    def parts(self, places: Iterable[tuple[int, int]]) -> Iterator[Iterator[str]]:
        """The documents of each part, a pair (begin, end) in bytes; best in the file's order."""
        with self._open() as file:
            for begin, end in places:
                yield self._part(file, begin, end)

    def _part(self, file: BinaryIO, begin: int, end: int) -> Iterator[str]:
        longest = -1 if is_json(self.path) else LONG_LINE
        self._read(file.seek, max(begin - 1, 0))
        if begin:
            self._read(file.readline, longest)
        at = file.tell()
        content = bytearray()
        while at < end and (line := self._read(file.readline, longest)):
            at += len(line)
            if not is_json(self.path):
                content += line
            elif line.strip():
                yield self._record(self._decoded(line, "utf-8", 0), f"The line before byte {at:,} of")
        if content:
            # The cut of a long line may have split a character: its remaining bytes are left out.
            cut = next((index for index in range(3) if content[index : index + 1] and content[index] & 0xC0 != 0x80), 3)
            yield self._decoded(bytes(content[cut:]), "utf-8", 0, final=False)

    def _open(self) -> BinaryIO:
        try:
            with self.path.open("rb") as file:
                packed = file.read(2) == _GZIP
            return cast("BinaryIO", gzip.open(self.path)) if packed else self.path.open("rb")
        except OSError as error:
            raise TextError(f"{self.path} cannot be read ({error.strerror}). Check its permissions.") from error

    def _read(self, method: Callable[[int], T], count: int) -> T:
        try:
            return method(count)
        except (OSError, EOFError, zlib.error) as error:
            raise TextError(f"{self.path} cannot be read ({error}). Is it whole? Get it again.") from error

    @staticmethod
    def _lines(lines: Iterable[str]) -> list[tuple[int, str]]:
        """Those that are not blank, numbered from 1."""
        return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]

    def _empty(self) -> TextError:
        return TextError(f"{self.path} is empty. Give a file with text in it.")

    def _too_large(self, encoding: str) -> TextError:
        return TextError(
            f"{self.path} is {encoding[:6].upper()} text of more than {WHOLE >> 20} MiB. Convert it to UTF-8: "
            "iconv -f UTF-16 -t UTF-8 OLD > NEW"
        )

    def _beginning(self, content: bytes, *, final: bool) -> tuple[str, str]:
        """(encoding, text) of the first bytes, or of all (``final``); the mark that says the encoding is left out."""
        for first, kind, advice in _OTHERS:
            if content.startswith(first):
                raise TextError(f"{self.path} is {kind}, not text. {advice}.")
        mark, encoding = next(((m, e) for m, e in _MARKS if content.startswith(m)), (b"", "utf-8"))
        return encoding, self._decoded(content, encoding, len(mark), final=final)

    def _decoded(self, content: bytes, encoding: str, skipped: int, *, final: bool = True) -> str:
        """Text of what is behind the first ``skipped`` bytes; if it is not ``final``, without a character cut off at its end."""
        if encoding == "utf-8" and b"\x00" in content:
            raise TextError(f"{self.path} is a binary file (it holds null bytes). Give a plain text file, in UTF-8.")
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(content[skipped:], final)
        except UnicodeDecodeError as error:
            name = encoding[:6].upper()
            raise TextError(f"{self.path} is not {name} text (byte {error.start + skipped}). Convert it to UTF-8.") from error
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def _record(self, line: str, where: str) -> str:
        """The text of one record."""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise TextError(
                f"{where} {self.path} is not a JSON object; there must be one on every line. Correct or remove the line, or write "
                "the file as JSON lines (jq -c '.[]')."
            )
        if self.field not in record:
            fields = ", ".join(map(str, list(record)[:20])) or "none"
            named = next((name for name, value in record.items() if isinstance(value, str)), "FIELD")
            raise TextError(
                f'{where} {self.path} has no field "{self.field}"; its fields are: {fields}. Name the one to read behind the path: '
                f"{self.path.name}:{named}"
            )
        text = record[self.field]
        if not isinstance(text, str):
            raise TextError(f'{where} {self.path}: "{self.field}" must be a string. Correct or remove the line.')
        return text
