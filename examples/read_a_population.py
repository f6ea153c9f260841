"""Read every candidate of a search with pandas: which operators found good plans, and how fitness fell.

    python examples/read_a_population.py OUTPUT/selfpruner.db

Any program that reads SQLite will do; the views are described in selfpruner/store/views.sql.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from contextlib import closing

import pandas as pd


def main(database: str) -> None:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        table = pd.read_sql("SELECT * FROM population WHERE job_id IN newest ORDER BY sequence", connection)
    table["rates"] = table["rates"].map(json.loads)  # one per block: parameters removed, as a share
    scored = table[table["status"] == "evaluated"]

    print(scored.groupby("operator")["relative"].agg(["count", "min", "median"]).sort_values("min").to_string())
    print(scored.groupby("generation")["relative"].min().to_string())
    best = scored.loc[scored["rank"].idxmin()]
    print(f"best: {best['plan']} by {best['operator']}, {best['relative']:.3f} of the uniform plan's fitness")
    print("removed by block:", ", ".join(f"{rate:.0%}" for rate in best["rates"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
