"""One process that has imported torch and transformers, and nothing of selfpruner, and forks for every verification.

Most of what a verifying process costs is importing the two: five seconds of a core. A fork starts where they are loaded, in a
memory of its own, with the arguments, environment and output files that a fresh process would have. Tests that are about the
fresh process itself ask for the fixture ``fresh_verifier``; those that run a whole server or command have one anyway.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, Any, ClassVar

from selfpruner.workers import lifeline

_SERVER = """
import json, os, runpy, sys, traceback
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils
from transformers.models.llama import modeling_llama

torch.set_num_threads(1)
assert not any(name.partition(".")[0] == "selfpruner" for name in sys.modules)


def run(request):
    os.environ.clear()
    os.environ.update(request["environment"])
    # Read from the environment when transformers was imported.
    dynamic_module_utils.HF_MODULES_CACHE = Path(os.environ["HF_MODULES_CACHE"])
    transformers.logging.set_verbosity_error()
    sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
    arguments = [argument for argument in request["arguments"] if argument != "-P"]
    module = arguments[0] == "-m"
    sys.argv = arguments[module:]
    start = runpy.run_module if module else runpy.run_path
    start(sys.argv[0], run_name="__main__", **({"alter_sys": True} if module else {}))


for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for stream, key in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(request[key], os.O_WRONLY | os.O_APPEND), stream)
            run(request)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class WarmProcess:
    """What :class:`subprocess.Popen` is to a verification: ``poll``, ``kill``, ``wait`` and ``returncode`` of one fork."""

    _server: ClassVar[subprocess.Popen[str] | None] = None

    def __init__(self, command: Sequence[str], *, stdout: IO[str], stderr: IO[str], env: dict[str, str], **_: Any) -> None:
        cls = WarmProcess
        if cls._server is None or cls._server.poll() is not None:
            start = [sys.executable, "-c", _SERVER]
            cls._server = subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        assert cls._server.stdin is not None
        assert cls._server.stdout is not None
        # The server ends with this process, so its forks need not be tied to it as the command wants it.
        arguments = list(command)[len(lifeline.tied()) :]
        request = {"arguments": arguments, "environment": env, "stdout": stdout.name, "stderr": stderr.name}
        cls._server.stdin.write(json.dumps(request) + "\n")
        cls._server.stdin.flush()
        self._answers = cls._server.stdout
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = int(self._answers.readline())
        return self.returncode

    @classmethod
    def stop(cls) -> None:
        """The server ends by itself when this process does, whose pipe it reads; here it is waited for."""
        if cls._server is not None:
            cls._server.communicate()
            cls._server = None
