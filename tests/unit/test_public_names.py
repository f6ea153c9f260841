"""What ``import selfpruner`` offers is what it says, whatever was imported before."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import selfpruner
from tests.helpers import ROOT

# Every order in a process of its own, with other people's modules imported once, before they part.
SCRIPT = """
import importlib, inspect, io, contextlib, os, pkgutil, sys
import torch, transformers

def check():
    import selfpruner
    from selfpruner import api
    for name in selfpruner.__all__:
        found = getattr(selfpruner, name)
        assert callable(found), (name, found)
        assert getattr(api, name, found) is found, (name, found)
        space = {}
        exec(f"from selfpruner import {name}", space)
        assert space[name] is found, (name, space[name])
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        help(selfpruner.search)
        help(selfpruner.export)
    assert "Search for the best plan" in shown.getvalue() and "Write a checkpoint" in shown.getvalue()

def everything():
    import selfpruner
    for module in pkgutil.iter_modules(selfpruner.__path__, "selfpruner."):
        importlib.import_module(module.name)

everything()
import server.runner
for name in [name for name in sys.modules if name.partition(".")[0] in ("selfpruner", "server")]:
    del sys.modules[name]

ORDERS = {
    "names first": lambda: None,
    "used twice": check,
    "export first": lambda: importlib.import_module("selfpruner.export"),
    "a file of it first": lambda: importlib.import_module("selfpruner.export.formats"),
    "the search first": lambda: importlib.import_module("selfpruner.jobs.run"),
    "the server first": lambda: importlib.import_module("server.runner"),
    "everything first": everything,
}
for order, first in ORDERS.items():
    child = os.fork()
    if child == 0:
        first()
        check()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, order
print("as they say")
"""


def test_every_name_is_what_it_says_after_every_import_order() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False, timeout=170)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("as they say\n")


def test_every_function_of_the_api_is_a_public_name() -> None:
    documented = {"search", "prune", "evaluate", "quality", "benchmark", "export", "load", "verify", "SearchConfig"}
    assert set(selfpruner.__all__) == documented
    assert documented <= set(dir(selfpruner))
    clashes = {module.name for module in pkgutil.iter_modules(selfpruner.__path__)} & documented
    assert clashes == {"export"}, "a module of that name would have to be had by its files alone"
