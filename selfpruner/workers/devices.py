"""Which devices get a worker, as people name them: ``cuda:0,cuda:1``, or ``cpu*2`` for two workers that share the cores. Imports
no torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence

from selfpruner import catalogue
from selfpruner.errors import ConfigError

_PART = re.compile(r"([^*]+)\*([0-9]{1,4})")


def parse(named: str | Sequence[str], *, param: str = "devices") -> tuple[str, ...]:
    """One device per worker. Raises ConfigError for an unknown name, one that is there twice, and for no worker at all."""
    parts = named.split(",") if isinstance(named, str) else named
    found: dict[str, int] = {}
    for part in (part.strip() for part in parts):
        if not part:
            continue
        counted = _PART.fullmatch(part)
        name, count = (counted[1].strip(), int(counted[2])) if counted else (part, 1)
        name = "cuda:0" if catalogue.check_device(name, param=param) == "cuda" else name
        if count < 1:
            raise ConfigError(f"{part} makes no worker. {_example(name, 2)}", param=param)
        if name in found:
            raise ConfigError(f"{name} is named twice. {_example(name, found[name] + count)}", param=param)
        found[name] = count
    if not found:
        raise ConfigError("Name at least one device, such as cuda:0,cuda:1, or cpu*2.", param=param)
    if "auto" in found and (len(found) > 1 or found["auto"] > 1):
        raise ConfigError("auto is one device, the best that is here; name several, such as cuda:0,cuda:1, or cpu*2.", param=param)
    return tuple(name for name, count in found.items() for _ in range(count))


def check_here(devices: Sequence[str], *, param: str = "devices") -> None:
    """Raise ConfigError where this machine has fewer devices. Whoever is asked for more than CPUs is a process that ends again."""
    cores = _cores()
    on_cpu = devices.count("cpu")
    if on_cpu > cores:
        raise ConfigError(f"cpu*{on_cpu} is more workers than this machine has cores for. Use at most cpu*{cores}.", param=param)
    if all(device in ("auto", "cpu") for device in devices):
        return
    code = "from selfpruner.models.loading import devices_here; print(*devices_here())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ConfigError(f"What devices are here could not be found out: {why[0]}", param=param)
    here = done.stdout.split()
    for device in devices:
        if device not in ("auto", *here):
            raise ConfigError(f"Device {device!r} is not here. This machine has: {', '.join(here)}.", param=param)


def threads() -> int:
    """Threads that all workers together may use: what ``OMP_NUM_THREADS`` says, or a thread for each core there is."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(given) if given.isdigit() and int(given) else _cores()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _example(name: str, count: int) -> str:
    several = f"; {name}*{count} puts {count} workers on it" if name != "auto" else ""
    return f"Name every device once, such as cuda:0,cuda:1{several}."
