"""From single results to the table: means over seeds, convergence curves, JSON and pictures. Knows no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from selfpruner.tables import Table

Result = Mapping[str, Any]  # one method at one rate and seed, as benchmarks.judge.judged leaves it
Axis = Literal["tokens", "seconds"]
NO_LLM = "no LLM configured"


def summary(results: Mapping[str, Sequence[Result] | str]) -> dict[str, Any]:
    """The rows of one rate: {method: {tokens, evaluations, seconds, plans, held_out, tokens_to_level_switch, curves}}.

    ``results`` holds each method's results, one per seed, or a text that says why there are none.
    """
    peer = results.get("level_switch")
    goal = fmean(final_kl(result) for result in peer) if peer and not isinstance(peer, str) else None
    rows: dict[str, Any] = {}
    for method, found in results.items():
        if isinstance(found, str):
            rows[method] = {"note": found}
        elif found:
            rows[method] = _row(found, goal)
    return rows


def _row(found: Sequence[Result], goal: float | None) -> dict[str, Any]:
    texts = found[0]["held_out"]
    return {
        "seeds": [result["seed"] for result in found],
        **{key: round(fmean(result[key] for result in found), 1) for key in ("tokens", "evaluations", "seconds", "llm_calls")},
        "plans": {str(result["seed"]): {key: result[key] for key in ("plan", "layer_rates", "removed")} for result in found},
        "held_out": {
            text: {key: _spread([result["held_out"][text][key] for result in found]) for key in ("kl", "perplexity")}
            for text in texts
        },
        "trace_kl": _spread([final_kl(result) for result in found]),
        "tokens_to_level_switch": None if goal is None else tokens_to(mean_curve(found, "tokens"), goal),
        "curves": {
            str(result["seed"]): [[point["tokens"], point["seconds"], point["kl"]] for point in result["trace"]] for result in found
        },
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": fmean(values), "min": min(values), "max": max(values)}


def final_kl(result: Result) -> float:
    """KL of the answer on the text that draws the curves."""
    return float(result["trace"][-1]["kl"])


def mean_curve(found: Sequence[Result], axis: Axis) -> list[tuple[float, float]]:
    """The mean over seeds of what each would have answered with at that moment: steps (x, KL) from 0 to the last seed's end."""
    steps = sorted({float(point[axis]) for result in found for point in result["trace"]} | {max(float(r[axis]) for r in found)})
    return [(x, fmean(_at(result, axis, x) for result in found)) for x in steps]


def _at(result: Result, axis: Axis, x: float) -> float:
    return float([point["kl"] for point in result["trace"] if point[axis] <= x][-1])


def tokens_to(curve: Sequence[tuple[float, float]], goal: float) -> int | None:
    """Where a curve is first at or below ``goal``; None when it never is."""
    return next((round(x) for x, kl in curve if kl <= goal), None)


def table(rate: str, rows: Mapping[str, Any], title: str) -> Table:
    """One line per method: what it cost, and mean (minimum to maximum) on every held-out text."""
    texts = next((list(row["held_out"]) for row in rows.values() if "held_out" in row), [])
    figures = (*(f"{text} KL" for text in texts), *(f"{text} ppl" for text in texts))
    columns = ("method", "tokens", "plans scored", "seconds", *figures, "tokens to level_switch")
    made = Table(*columns, title=f"{title}, rate {rate}", words=("method",))
    for method, row in rows.items():
        if "note" in row:
            made.add_row(method, row["note"])
            continue
        held = row["held_out"]
        reached = row["tokens_to_level_switch"]
        made.add_row(
            method,
            f"{row['tokens']:,.0f}",
            f"{row['evaluations']:,.0f}",
            f"{row['seconds']:,.0f}",
            *(_cell(held[text]["kl"], 4) for text in texts),
            *(_cell(held[text]["perplexity"], 2) for text in texts),
            "-" if reached is None else f"{reached:,}",
        )
    return made


def _cell(spread: Mapping[str, float], digits: int) -> str:
    mean = f"{spread['mean']:.{digits}f}"
    if math.isclose(spread["min"], spread["max"], rel_tol=1e-9):
        return mean
    return f"{mean} ({spread['min']:.{digits}f}-{spread['max']:.{digits}f})"


def chart(results: Mapping[str, Mapping[str, Sequence[Result] | str]], title: str) -> Any:
    """Convergence per rate over tokens and over seconds: lines for searches, points for what answers once. Altair."""
    import altair as alt

    axes: tuple[Axis, ...] = ("tokens", "seconds")
    drawn = list(dict.fromkeys(method for methods in results.values() for method, found in methods.items() if listed(found)))
    panels = []
    for rate, methods in results.items():
        rows = []
        for axis in axes:
            lines: list[dict[str, Any]] = []
            points: list[dict[str, Any]] = []
            for method, found in methods.items():
                runs = listed(found)
                if not runs:
                    continue
                curve = mean_curve(runs, axis)
                closed = all(len(result["trace"]) <= 2 for result in runs)
                rows_of = points if closed else lines
                rows_of += [{"x": x, "kl": kl, "method": method} for x, kl in (curve[-1:] if closed else curve)]
            x = alt.X("x:Q", title="fitness tokens" if axis == "tokens" else "seconds", axis=alt.Axis(format="~s"))
            y = alt.Y("kl:Q", title="KL of the incumbent on unseen text", scale=alt.Scale(zero=False))
            color = alt.Color("method:N", sort=None, scale=alt.Scale(domain=drawn, scheme="category20"))
            line = alt.Chart({"values": lines}).mark_line(interpolate="step-after").encode(x=x, y=y, color=color)
            point = alt.Chart({"values": points}).mark_point(filled=True, size=80, opacity=1).encode(x=x, y=y, color=color)
            rows.append((line + point).properties(width=420, height=280, title=f"{title}, rate {rate}"))
        panels.append(rows[0] | rows[1])
    return alt.vconcat(*panels)


def listed(found: Sequence[Result] | str) -> Sequence[Result]:
    """The results of a method; none where there is only a reason."""
    return () if isinstance(found, str) else found


def write_chart(results: Mapping[str, Mapping[str, Sequence[Result] | str]], title: str, path: Path) -> None:
    from selfpruner.cli.plots import save

    save(chart(results, title), path)
