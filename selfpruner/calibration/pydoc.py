"""The documentation that ships with every Python, as prose: human text for machines with neither network nor corpus.

It consists of the language reference in ``pydoc_data.topics`` and the docstrings of the standard library's modules and classes.
Grammar, tables and code examples are left out, wrapped lines are joined, and markup is removed.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from selfpruner.errors import TextError

_MARKS = re.compile(r'[*"`]{1,2}(\S(?:[^*"`\n]*\S)?)[*"`]{1,2}')
# Docstrings of modules and classes, found without compiling the sources: that would take seconds.
_DOCSTRING = re.compile(r'^(?:class [^\n]*:\n+    )?[rR]?"""(.*?)"""', re.MULTILINE | re.DOTALL)
_LISTED = re.compile(r"(?:[*•-]|\d+\.)\s+")


@functools.cache
def documents() -> tuple[str, ...]:
    """One document per page or module, paragraphs separated by blank lines, no paragraph twice.

    Raises :class:`TextError` where Python came without them.
    """
    told: set[str] = set()
    result = []
    for page in _pages():
        fresh = [paragraph for paragraph in dict.fromkeys(prose(page)) if paragraph not in told]
        told.update(fresh)
        if fresh:
            result.append("\n\n".join(fresh))
    if not result:
        raise TextError(
            "This Python came without its documentation (pydoc_data and the standard library's sources). "
            "Install the full Python package, or give a text file."
        )
    return tuple(result)


def _pages() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        pass
    else:
        yield from (page for _, page in sorted(topics.items()))
    library = Path(sysconfig.get_path("stdlib"))
    packages: tuple[str, ...] = (
        "asyncio",
        "collections",
        "concurrent/futures",
        "email",
        "html",
        "http",
        "importlib",
        "json",
        "logging",
    )
    packages += ("multiprocessing", "unittest", "urllib", "wsgiref", "xml/dom", "xml/etree", "xml/sax", "xmlrpc", "zoneinfo")
    for folder in (library, *(library / name for name in packages)):
        for file in sorted(folder.glob("*.py")):
            with contextlib.suppress(OSError):
                docstrings = _DOCSTRING.findall(file.read_text(encoding="utf-8", errors="replace"))
                yield "\n\n".join(textwrap.dedent(text) for text in docstrings)


def prose(page: str) -> list[str]:
    """The paragraphs of a page that are sentences."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", page):
        text = " ".join(line.strip() for line in block.strip().splitlines())
        text = _LISTED.sub("", _MARKS.sub(r"\1", text), count=1) if _LISTED.match(text) else _MARKS.sub(r"\1", text)
        letters = sum(c.isalpha() or c.isspace() for c in text)
        is_sentence = text[:1].isupper() and text.endswith((".", ":", "?", "!", ")")) and len(text.split()) >= 8
        if is_sentence and "::=" not in text and ">>>" not in text and letters >= 0.88 * len(text):
            paragraphs.append(text)
    return paragraphs
