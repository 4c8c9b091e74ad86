"""The C++ kernels for CPUs."""

from functools import cache

from .library import load_library


@cache
def load() -> str | None:
    """Load the CPU library once; return None on success, otherwise the reason."""
    return load_library("cpu")
