"""Loads the C++ operator library, or says why it cannot."""

from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent.parent / "_native"


def load_library(name: str, needs: str) -> str | None:
    """Load an operator library of this package; None on success, otherwise the reason. needs: what builds it."""
    path = FOLDER / name
    if not path.exists():
        return f"{name} was not built ({needs})"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"the native library {name} does not load: {error}"
    return None


@cache
def load() -> str | None:
    """Load the CPU library once; return None on success, otherwise the reason."""
    return load_library("libconvkernels_cpu.so", "CONVKERNELS_BUILD=none, or no C++ compiler at build time")
