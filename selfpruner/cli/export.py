"""``export`` and ``verify``: write a checkpoint in a runtime's format, and prove it again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter

from selfpruner import catalogue
from selfpruner.cli import shared_options
from selfpruner.cli.show import print_pruned
from selfpruner.errors import NotFoundError
from selfpruner.files import places


def export(
    source: Annotated[
        str,
        typer.Argument(help="A checkpoint, or what was saved of one later; a job on a server; the folder or database of a search."),
    ],
    output: shared_options.Output,
    format: Annotated[str, typer.Option("--format", "-f", help=f"One of {', '.join(catalogue.FORMATS)}.")] = "transformers",
    quantize: Annotated[str | None, typer.Option(help="For formats that quantize.", show_default="none")] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Refuse what does not divide among so many ranks.")] = 1,
    job: Annotated[str | None, typer.Option(help="Which job of a database.", show_default="the newest")] = None,
    plan: Annotated[
        str | None, typer.Option(help="Any candidate of it by its hash, or the beginning.", show_default="the best")
    ] = None,
    cache: shared_options.Cache = None,
    as_json: shared_options.Json = False,
    url: shared_options.Url = shared_options.DEFAULT_URL,
) -> int:
    """Write a checkpoint, or any plan of a search, in the format of a runtime; loaded again in a fresh process and compared."""
    from selfpruner import api

    catalogue.check("export format", format, catalogue.FORMATS, param="format")
    places.writable_folder(output)
    with ExitStack() as stack:
        place: Path | str = source
        if source.startswith("job_") and not Path(source).exists():
            place = stack.enter_context(_of_job(source, output, url))
        result = api.export(
            place,
            output,
            format=format,
            quantize=quantize,
            tensor_parallel=tensor_parallel,
            job=job,
            plan=plan,
            cache=cache,
        )
    return print_pruned(result, as_json)


def verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint, or an export of one.")],
    device: Annotated[str, typer.Option(help="Where it is loaded.")] = "cpu",
    memory: Annotated[str | None, typer.Option(help="Stream it in so much, 2GiB say.", show_default="load it whole")] = None,
    as_json: shared_options.Json = False,
) -> int:
    """Prove an export again: every file's sha256, and in a fresh process that it loads and computes what it did."""
    from selfpruner.config import Bytes
    from selfpruner.export import formats

    ceiling = None if memory is None else TypeAdapter(Bytes).validate_python(memory)
    result = formats.verify(folder, device=device, memory=ceiling)
    if as_json:
        print(json.dumps(result))
    else:
        verification = result["verification"]
        if "allowed_error" in verification:
            difference = f"{verification['error']:.2g} of their spread (allowed {verification['allowed_error']:.2g})"
        else:
            difference = f"at most {verification['max_difference']:.2g} (allowed {verification['allowed_difference']:.2g})"
        print(f"{folder}  {result['format']}, {result['parameters']:,} parameters, {result['files']} files unchanged")
        print(f"loaded in a fresh process: logits differ by {difference}")
    return 0


@contextmanager
def _of_job(job: str, output: Path, url: str) -> Iterator[Path]:
    """The folder of a job's checkpoint: the server's own where that is this machine's, else fetched for as long as it is needed."""
    from selfpruner.export.folder import aside
    from selfpruner.files import manifest

    with shared_options.client(url) as client:
        exported = list(client.checkpoints(job))
        if not exported:
            raise NotFoundError(f"Job {job} has no checkpoint: it is {client.get(job)['status']}.")
        here = Path(exported[-1]["path"])
        listed = here / manifest.NAME
        if listed.is_file() and manifest.sha256(listed) == exported[-1]["manifest_sha256"]:
            yield here
        else:
            with aside(output.absolute()) as scratch:
                yield client.download(job, exported[-1]["id"], scratch / "checkpoint")
