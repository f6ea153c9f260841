"""Memory and threads of a worker: its peak, giving back memory it no longer needs, and the settings of its libraries.

Standard library only; POSIX.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path

# What libraries read once, before torch is imported. Threads that wait for each other must not spin: where other processes want
# the cores too, spinning threads slow a worker several times over. oneDNN keeps compiled code for every shape it has seen, a
# thousand of them by default; writing text alone meets hundreds of shapes once, and the code took several hundred MiB. One malloc
# arena instead of one per thread: what one thread freed, the next can use.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "MALLOC_ARENA_MAX": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


# The highest peak before the one that is counted now.
_passed = 0.0


def peak_mib() -> float:
    """Peak resident set size of this process in MiB."""
    return max(_passed, _counted_mib())


def fresh_peak_mib() -> float:
    """The peak since this was last asked; where the system counts no new one, as far as it goes back."""
    global _passed
    peak = _counted_mib()
    _passed = max(_passed, peak)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak


def _counted_mib() -> float:
    """Linux: VmHWM, because ``ru_maxrss`` starts at the size of the process that forked this one. Elsewhere ``ru_maxrss``, which is
    bytes on macOS and KiB on the others."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:", 1)[1].split(None, 1)[0]) / 1024
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


def release() -> None:
    """Return freed memory to the system. glibc keeps what large temporaries leave behind, hundreds of MiB for a model of 135M."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
