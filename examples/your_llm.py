"""Let an LLM of your own propose the plans: any server that speaks OpenAI's chat completions (vLLM, llama.cpp, Ollama, OpenAI).

    LLM_URL=http://127.0.0.1:8001/v1 LLM_MODEL=Qwen/Qwen3-8B python examples/your_llm.py MODEL OUTPUT [FIELDS.json]

LLM_KEY is the key where the server wants one.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import selfpruner
from selfpruner.proposers import ProposerSettings


def main(model: str, output: str, fields: str | None = None) -> None:
    more = json.loads(Path(fields).read_text("utf-8")) if fields else {}
    server = {"base_url": os.environ["LLM_URL"], "model": os.environ["LLM_MODEL"], "api_key": os.environ.get("LLM_KEY")}
    mine = ProposerSettings.model_validate({"kind": "openai", **server})
    result = selfpruner.search(0.2, output, model=model, proposer="mine", proposers={"mine": mine}, **more)
    for name, row in result.report["operators"].items():
        print(f"{name:14} {row['made']:>4} plans, {row['improved']} of them better than all before")
    with closing(sqlite3.connect(Path(output) / "selfpruner.db")) as connection:
        for row in connection.execute("SELECT operator, calls, failed, cost FROM llm_cost WHERE job_id IN newest"):
            print("the LLM as {}: {} calls, {} failed, cost {}".format(*row))


if __name__ == "__main__":
    main(*sys.argv[1:])
