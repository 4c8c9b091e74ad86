"""The cores that the threads of this process run on. Imported before torch, whose OpenMP binds the first thread."""

from __future__ import annotations

import os
from pathlib import Path

_AFFINITY = hasattr(os, "sched_getaffinity")
_OWN = os.sched_getaffinity(0) if _AFFINITY else set(range(os.cpu_count() or 1))
VARIABLES = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
TASKS = Path("/proc/self/task")


def own() -> set[int]:
    """The CPUs that this process may use, however its threads are bound."""
    return _OWN


def bind() -> None:
    """Ask OpenMP, which reads this when torch is imported, for a core of its own for each thread, both of its hardware
    threads where it has two. What the user asked for stays."""
    if _AFFINITY and not any(os.environ.get(name) for name in VARIABLES):
        os.environ.update(OMP_PROC_BIND="close", OMP_PLACES="cores")


def release() -> None:
    """Let this thread, and those that it starts, use any core again."""
    if _AFFINITY:
        os.sched_setaffinity(0, _OWN)


def binding() -> str:
    """What OpenMP was asked for."""
    return " ".join(f"{name}={os.environ[name]}" for name in VARIABLES if os.environ.get(name)) or "none"


def waited() -> float:
    """Seconds, since they started, that threads of this process were ready to run and waited for a core; 0 where the
    system does not tell."""
    nanoseconds = 0
    try:
        for task in os.listdir(TASKS):
            nanoseconds += int((TASKS / task / "schedstat").read_bytes().split()[1])
    except (OSError, IndexError):
        return 0.0
    return nanoseconds * 1e-9
