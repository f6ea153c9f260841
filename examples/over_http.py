"""Send a search to a server, watch it, and fetch its checkpoint.

    selfpruner serve &
    python examples/over_http.py http://127.0.0.1:8000 OUTPUT [FIELDS.json]

SELFPRUNER_TOKEN is the token where the server wants one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from selfpruner.client import Client


def main(url: str, output: str, fields: str | None = None) -> None:
    more = json.loads(Path(fields).read_text("utf-8")) if fields else {}
    with Client(url, os.environ.get("SELFPRUNER_TOKEN")) as client:
        job = client.submit({"model": "smollm2-135m", "rate": 0.2, "preset": "evolution", **more})
        for name, data in client.follow(job["id"]):
            if name == "job":
                job = data  # its status and progress, whenever they changed
            else:
                print(f"{data['type']}: {data['message']}")
        if job["status"] != "succeeded":
            raise SystemExit(f"{job['id']} {job['status']}: {job['error']}")
        for checkpoint in client.checkpoints(job["id"]):
            print("fetched", client.download(job["id"], checkpoint["id"], Path(output)))


if __name__ == "__main__":
    main(*sys.argv[1:])
