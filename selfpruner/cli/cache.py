"""``selfpruner cache``: list what is kept on disk between jobs, and clean it."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from selfpruner import catalogue
from selfpruner.cli import shared_options
from selfpruner.errors import ConfigError
from selfpruner.files.cache_folder import KINDS, clean, default_cache, entries, limit, size

Folder = Annotated[
    Path | None,
    typer.Option("--folder", help="The cache; a server's is the folder cache in its home.", show_default="$SELFPRUNER_CACHE"),
]
_UNITS = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}

app = typer.Typer(help="List and clean what is kept on disk between jobs: models, texts, statistics, orders.")


@app.callback(invoke_without_command=True)
def cache(context: typer.Context, folder: Folder = None, as_json: shared_options.Json = False) -> int:
    """List what is kept on disk between jobs, the longest unused first; SELFPRUNER_CACHE_LIMIT (20GiB, say) bounds it."""
    if context.invoked_subcommand is not None:
        return 0
    cache_dir = folder or default_cache()
    listed, most = entries(cache_dir), limit()
    if as_json:
        rows = [{**asdict(entry), "path": str(entry.path)} for entry in listed]
        print(json.dumps({"folder": str(cache_dir), "limit": most, "bytes": sum(entry.bytes for entry in listed), "entries": rows}))
        return 0
    for entry in listed:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        what = f"{entry.model or 'unknown'}  {entry.what}".rstrip()
        print(f"{used}  {size(entry.bytes):>10}  {entry.kind:10}  {what}  {entry.path.name}")
    bound = f"of {size(most)} allowed" if most is not None else "without a limit (SELFPRUNER_CACHE_LIMIT)"
    print(f"{size(sum(entry.bytes for entry in listed))} {bound} in {cache_dir}")
    server = Path("~/.selfpruner/cache").expanduser()
    if folder is None and server != cache_dir and server.is_dir():
        print(f"A server's own: selfpruner cache --folder {server}")
    return 0


@app.command("clean")
def remove(
    older_than: Annotated[str | None, typer.Option(help="Only what was not used for so long: 30m, 12h, 7d.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help=f"Only this, repeatable: {', '.join(KINDS)}.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of it.")] = False,
    folder: Folder = None,
    as_json: shared_options.Json = False,
) -> int:
    """Remove what no running job uses; it is made again when it is needed."""
    if not (everything or kind or older_than):
        raise ConfigError("Say what to remove: --older-than 7d, --kind statistics, or --all.")
    for name in kind or ():
        catalogue.check("kind of entry", name, dict.fromkeys(KINDS, ""), param="kind")
    removed, kept = clean(folder or default_cache(), kinds=kind or KINDS, older_than=_seconds(older_than))
    freed = sum(entry.bytes for entry in removed)
    if as_json:
        print(
            json.dumps({"removed": [str(entry.path) for entry in removed], "bytes": freed, "in_use": [str(e.path) for e in kept]})
        )
        return 0
    in_use = f"; {len(kept)} are in use and stay" if kept else ""
    print(f"Removed {len(removed)} entries, {size(freed)}{in_use}.")
    return 0


def _seconds(text: str | None) -> float:
    if text is None:
        return 0.0
    match = re.fullmatch(r"(\d{1,6})\s*([mhdw])", text.strip())
    if match is None:
        raise ConfigError(f"--older-than {text!r} is no time: say 30m, 12h, 7d or 2w.", param="older_than")
    return int(match[1]) * float(_UNITS[match[2]])
