"""The fifth question to the LLM: what do the latest children teach? (ReEvo: short and long reflections.)

The question shows what each child of the latest generation changed against its parent and what that did to the score. It asks for
one lesson from them, and for all lessons so far merged into one text. Both come back in later prompts, quoted.

Asking never hurts the search: a question that fails leaves the reflections as they were, and a bad answer does not count towards
the failures that close the channel. What the LLM wrote is data: cleaned, cut and never used as a template.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence

from pydantic import JsonValue

from selfpruner.errors import ConflictError, ProposerError
from selfpruner.operators import prompt_facts as facts
from selfpruner.operators.base import Context, Reflections
from selfpruner.operators.llm import LlmOperator
from selfpruner.operators.plan_format import Answer, closed
from selfpruner.planning.space import Plan
from selfpruner.records import Candidate

SHORT, LONG = 300, 600  # characters
_SHOWN = 12
_CHANGES = 8  # shown of one child
_TELLS_APART = 0.5  # points between the best and the worst change; less is noise
_LETTERS = 10


class _Lessons(Answer):
    lesson: str
    summary: str = ""


class Reflect(LlmOperator):
    """Asked by the loop between generations; not an operator that a config names."""

    name = "reflect"

    async def reflect(self, context: Context, rng: random.Random) -> Reflections:  # noqa: ARG002
        """The reflections after the latest generation in ``context.history``; those of the context where there is nothing to
        learn, the proposer does not reflect, or the question failed."""
        children = self._children(context)
        if not children or not self._channel.settings.reflects or not self._channel.open:
            return context.reflections
        example = '{"lesson":"Plans that ... got better; those that ... got worse.","summary":"..."}'
        variables = self._facts(context, len(children), example)
        variables |= {"children": children, "lessons": [context.reflections.long] if context.reflections.long else []}
        variables |= {"short": SHORT, "long": LONG}
        text: dict[str, JsonValue] = {"type": "string", "minLength": 1}
        schema = closed({"lesson": {**text, "maxLength": SHORT}, "summary": {**text, "maxLength": LONG}})

        def read(reply: dict[str, object]) -> Reflections:
            answer = _Lessons.model_validate(reply)
            short = lesson(answer.lesson, SHORT)
            try:
                long = lesson(answer.summary, LONG)
            except ValueError:
                # A lesson without a summary is still one: keep the newest of what is known.
                long = f"{context.reflections.long} {short}".strip()[-LONG:]
            return Reflections(short, long)

        try:
            return await self._channel.ask(self.name, context.generation, variables, schema, read, vital=False)
        except ConflictError:
            raise
        except ProposerError:
            return context.reflections

    def _children(self, context: Context) -> list[dict[str, str]]:
        """The latest generation's children, best change last: points gained or lost, and what was changed for it."""
        by_hash = {candidate.plan_hash: candidate for candidate in context.history}
        latest = facts.informed_by(context)
        told: list[tuple[float, Candidate, Candidate | None]] = []
        for child in context.history:
            if child.generation != latest:
                continue
            parents = [by_hash[key] for key in child.parents if key in by_hash]
            parent = min(parents, key=lambda p: facts.moved(context.space, p.levels, child.levels), default=None)
            points = facts.change(context, child, parent)
            if points is not None:
                told.append((points, child, parent))
        told.sort(key=lambda each: (-each[0], each[1].plan_hash))
        if not told or told[0][0] - told[-1][0] < _TELLS_APART:
            return []
        if len(told) > _SHOWN:
            told = [*told[: _SHOWN // 2], *told[-_SHOWN // 2 :]]
        entries = [self._told(context, points, child, parent) for points, child, parent in told]
        return [each for each in entries if each["changes"]]

    def _told(self, context: Context, points: float, child: Candidate, parent: Candidate | None) -> dict[str, str]:
        space = context.space
        origin = Plan(parent.levels) if parent is not None else space.project([space.rate] * space.layers)
        before, after = space.rates(origin), space.rates(Plan(child.levels))
        plans = self._format_of(context)
        changed = plans.differences(before, after)
        changes = plans.tell(before, after, changed[:_CHANGES])
        if len(changed) > _CHANGES:
            changes += f"; and {len(changed) - _CHANGES} smaller changes"
        return {"points": f"{points:+.1f}", "score": facts.score(context, child), "changes": changes}


def lesson(text: str, most: int) -> str:
    """An LLM's text as one line of plain ASCII of at most ``most`` characters, cut at a sentence or a word.

    Accents and typographic signs lose their decoration. Raises ValueError where no English text is left: too few letters, or
    mostly another script.
    """
    plain = unicodedata.normalize("NFKD", text[: 20 * most].translate(_TYPOGRAPHIC))
    written = sum(char.isalpha() for char in plain)
    ascii_ = "".join(char if char.isascii() and char.isprintable() else " " if char.isspace() else "" for char in plain)
    line = " ".join(ascii_.split())
    if sum(char.isalpha() for char in line) < max(_LETTERS, written // 2):
        raise ValueError("lesson: write one or two sentences in English")
    return _cut(line, most)


_TYPOGRAPHIC = str.maketrans({"\u2013": "-", "\u2014": "-", "\u2018": "'", "\u2019": "'", "\u201c": "'", "\u201d": "'",
                              "\u2192": "->", "\u2264": "<=", "\u2265": ">=", "\u2212": "-", "\u00d7": "x"})  # fmt: skip


def _cut(line: str, most: int) -> str:
    if len(line) <= most:
        return line
    head = line[:most]
    ends: Sequence[int] = [head.rfind(mark) for mark in (". ", "; ")]
    if max(ends) > most // 2:
        return head[: max(ends) + 1]
    return head[: head.rfind(" ") if " " in head[most // 2 :] else most]
