"""Tables and lines for people, whole at every width: a figure, a hash or a path that is cut can be neither read nor copied.

Outside a terminal there is no width. On a terminal, words are wrapped and figures never; a table that is still too wide is shown as
a block of ``name  value`` lines per row.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Collection, Iterator
from itertools import zip_longest
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

BOUNDLESS = 1_000_000


class Screen(Console):
    """A console that breaks lines between words only; a longer word is the terminal's to break, which copies it whole."""

    def __init__(self, **options: Any) -> None:
        file = options.get("file") or (sys.stderr if options.get("stderr") else sys.stdout)
        wide = {} if file.isatty() else {"width": BOUNDLESS}
        super().__init__(**{"markup": False, "highlight": False, **wide, **options})

    def print(self, *objects: Any, **options: Any) -> None:
        lines = [self._broken(thing) if isinstance(thing, str) and not options.get("soft_wrap") else thing for thing in objects]
        super().print(*lines, **{"overflow": "ignore", "crop": False, **options})

    def _broken(self, text: str) -> str:
        wrap = textwrap.TextWrapper(self.width, break_long_words=False, break_on_hyphens=False)
        return "\n".join(wrap.fill(line) for line in text.split("\n"))


class Table:
    """What rich prints as a table. The columns in ``words`` hold text: on the left, and broken between words where that helps.
    Those of the others are figures."""

    def __init__(self, *columns: str, words: Collection[str] = (), title: str = "") -> None:
        self._columns = columns
        self._words = [name in words for name in columns]
        self._title = title
        self._rows: list[tuple[str, ...]] = []

    def add_row(self, *cells: str) -> None:
        """Add a row; cells that lack at its end are empty."""
        self._rows.append((*cells, *[""] * (len(self._columns) - len(cells))))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        if self._title:
            yield Text(self._title, "bold")
        widths = self._widths(options.max_width)
        if widths is not None:
            rows = [self._lines(self._columns, widths, True), *(self._lines(row, widths) for row in self._rows)]
            if max(map(len, rows)) <= len(widths):  # else such a row would be taller than its block
                spaces = " " * (2 if sum(widths) + 2 * (len(widths) - 1) <= options.max_width else 1)
                for index, lines in enumerate(rows):
                    for line in lines:
                        parts = (_placed(part, width, left) for part, width, left in zip(line, widths, self._words, strict=True))
                        yield Text(spaces.join(parts).rstrip(), "" if index else "bold")
                return
        yield from self._blocks(options.max_width)

    def _lines(self, row: tuple[str, ...], widths: list[int], heading: bool = False) -> list[tuple[str, ...]]:
        cells = [_broken(cell, width, words or heading) for cell, width, words in zip(row, widths, self._words, strict=True)]
        return list(zip_longest(*cells, fillvalue=""))

    def _widths(self, room: int) -> list[int] | None:
        """A width per column, or None where what cannot be broken takes more than ``room``."""
        least, widths = [], []
        for index, name in enumerate(self._columns):
            cells = [row[index] for row in self._rows]
            pieces = [piece for cell in cells for piece in _pieces(cell, self._words[index])]
            least.append(max(map(cell_len, [*pieces, *_pieces(name, True)]), default=0))
            widths.append(max(cell_len(line) for cell in (name, *cells) for line in cell.split("\n")))
        gaps = len(widths) - 1
        if sum(least) + gaps > room:
            return None
        room -= gaps * (2 if sum(least) + 2 * gaps <= room else 1)
        while sum(widths) > room:
            widths[max((width, index) for index, width in enumerate(widths) if width > least[index])[1]] -= 1
        return widths

    def _blocks(self, room: int) -> Iterator[Text]:
        names = [" ".join(name.split()) for name in self._columns]
        width = max(map(cell_len, names))
        for row in self._rows:
            for name, cell, words in zip(names, row, self._words, strict=True):
                indent = width + 2 if name else 0
                for number, line in enumerate(_broken(cell, room - indent, words) if cell else ()):
                    yield Text.assemble((_placed("" if number else name, indent, True), "bold"), line)
            yield Text("")


def _pieces(cell: str, words: bool) -> list[str]:
    """What must stay on one line; what stands in brackets behind a figure may go below it."""
    return cell.split() if words else re.split(r"\n| (?=\()", cell)


def _broken(cell: str, width: int, words: bool) -> list[str]:
    """The lines of a cell in a column that is ``width`` wide."""
    lines = []
    for line in cell.split("\n"):
        now = ""
        for piece in _pieces(line, words):
            if now and cell_len(now) + 1 + cell_len(piece) > width:
                lines.append(now)
                now = piece
            else:
                now = f"{now} {piece}" if now else piece
        lines.append(now)
    return lines


def _placed(text: str, width: int, left: bool) -> str:
    space = " " * (width - cell_len(text))
    return text + space if left else space + text
