"""Pictures of a job: the rates a plan gives each layer, and how fitness fell. Altair in, SVG or PNG out, no browser needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from selfpruner.files.report import FrontRow, Report
from selfpruner.store.objects import EventObject

if TYPE_CHECKING:
    import altair as alt


def draw(chart: Callable[[], alt.TopLevelMixin], path: Path) -> str | None:
    """Make a picture and save it. A picture is an extra: what stops it is returned, not raised."""
    try:
        save(chart(), path)
    except Exception as error:  # altair and its renderer raise whatever they like
        return f"{path.name} could not be drawn ({type(error).__name__}: {error})."
    return None


def result_chart(report: Report, events: Sequence[EventObject]) -> alt.HConcatChart:
    """Rates per layer of the best plan beside the best fitness by generation, as an Altair chart; and the front where there is one.

    ``report`` is a job's report; ``events`` its events, of which the generations' are drawn.
    """
    import altair as alt

    rates = [{"layer": layer, "rate": rate} for layer, rate in enumerate(report["plan"]["layer_rates"])]
    bars = (
        alt.Chart(_data(rates))
        .mark_bar()
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelOverlap=True)),
            y=alt.Y("rate:Q", title="removed share of the layer", axis=alt.Axis(format="%")),
        )
        .properties(width=420, height=220, title="Rates of the best plan")
    )
    target = alt.Chart(_data([{"rate": report["target"]["rate"]}])).mark_rule(strokeDash=[4, 4]).encode(y="rate:Q")
    steps = [
        {
            "generation": event["data"]["generation"],
            "relative": event["data"]["relative"],
            "operator": event["data"]["operator"],
        }
        for event in events
        if event["type"] == "search.generation" and event["data"].get("relative") is not None
    ]
    x = alt.X("generation:O", title="generation")
    line = alt.Chart(_data(steps)).mark_line(color="#888").encode(x=x, y=alt.Y("relative:Q", title=""))
    points = (
        alt.Chart(_data(steps))
        .mark_point(filled=True, size=70, opacity=1)
        .encode(
            x=x,
            y=alt.Y("relative:Q", title="best fitness / uniform", scale=alt.Scale(zero=False), axis=alt.Axis(format="%")),
            color=alt.Color("operator:N", title="made by"),
        )
    )
    convergence = (line + points).properties(width=420, height=220, title="Convergence, fresh tokens every generation")
    charts: alt.HConcatChart = (bars + target) | convergence
    return charts | front_chart(report["front"]) if report.get("front") else charts


def front_chart(rows: Sequence[FrontRow]) -> alt.Chart:
    """KL of a front's members over their predicted latency, or else over their parameters. ``rows``: a report's ``front``."""
    import altair as alt

    if "latency_us" in rows[0]:
        points = [{**_point(row), "ms": row["latency_us"] / 1000} for row in rows]
        x = alt.X("ms:Q", title="prefill, ms by the sum of its blocks", scale=alt.Scale(zero=False))
    else:
        points = [_point(row) for row in rows]
        x = alt.X("parameters:Q", title="parameters", scale=alt.Scale(zero=False), axis=alt.Axis(format="~s"))
    marks = (
        alt.Chart(_data(points))
        .mark_point(filled=True, size=70, opacity=1)
        .encode(
            x=x,
            y=alt.Y("kl:Q", title="KL, nats per token", scale=alt.Scale(zero=False)),
            color=alt.Color("removed:N", title="removed"),
            tooltip=["plan:N", "kl:Q", "parameters:Q"],
        )
    )
    chart: alt.Chart = marks.properties(width=420, height=220, title="Front, held-out text")
    return chart


def _point(row: FrontRow) -> dict[str, object]:
    return {"plan": row["plan"], "kl": row["kl"], "parameters": row["parameters"], "removed": f"{100 * row['rate']:g} %"}


def _data(values: Sequence[Mapping[str, object]]) -> dict[str, list[dict[str, object]]]:
    """Inline data as Vega-Lite's specification has it."""
    return {"values": [dict(row) for row in values]}


def save(chart: alt.TopLevelMixin, path: Path) -> None:
    """Write the chart; the suffix says how (.svg, .png, .json)."""
    chart.save(str(path))
