"""Commands that need no server: the same engine, here.

Like the others they print their result on stdout, everything else on stderr, and return their exit code.
"""

from __future__ import annotations

import typer

from selfpruner.commands import cache
from selfpruner.commands.export import export, verify
from selfpruner.commands.measure import benchmark, compare, criteria, evaluate
from selfpruner.commands.prune import prune, search
from selfpruner.commands.show import fields


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (search, prune, evaluate, benchmark, export, verify, criteria, compare, fields):
        app.command()(command)
    app.add_typer(cache.app, name="cache")
