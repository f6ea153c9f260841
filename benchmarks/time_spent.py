"""Where the time of whole searches goes: the tables of benchmarks/time.md, from the reports of searches.

    python -m benchmarks.time_spent 'make demo=runs/demo/result.json' 'selfpruner search=FOLDER/result.json' > benchmarks/time.md

Each argument is the command that was run and the file it left.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from selfpruner.cli.show import STAGE_TITLES
from selfpruner.files.report import Report

HEAD = """# Where the time of a search goes

Written by `python -m benchmarks.time_spent`. A moment belongs to one stage, so all of them add up to the job; `tokens` were read,
written or scored there, of every plan its own; `peak MiB` is the largest resident size of a worker meanwhile.
"""


class Found(Report, total=False):
    """The demo also keeps what it ran beside."""

    cores: int
    load_average: float


def section(command: str, report: Found) -> str:
    """One search: what it was, and its stages."""
    where = f" on {report['cores']} cores, load average {report['load_average']:.1f} before" if "cores" in report else ""
    lines = [
        f"## `{command}`",
        "",
        f"{report['seconds']:,.0f} s{where}; {report['plans']} plans on {report['tokens']:,} plan-tokens, largest worker "
        f"{report['peak_worker_mib']:,} MiB.",
        "",
        "| stage | seconds | share | tokens | workers | peak MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in report["stages"]:
        counts = [f"{count:,}" if count else "" for count in (row["tokens"], row["workers"], row["peak_mib"])]
        cells = [STAGE_TITLES.get(row["stage"], row["stage"]), f"{row['seconds']:,.1f}", f"{100 * row['share']:.1f} %", *counts]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("searches", nargs="+", metavar="COMMAND=result.json")
    named = [search.rpartition("=") for search in parser.parse_args().searches]
    print("\n\n".join([HEAD.strip(), *(section(command, json.loads(Path(file).read_text())) for command, _, file in named)]))


if __name__ == "__main__":
    main()
