"""Loads the C++ operator library, or says why it cannot."""

from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent.parent / "_native" / "libconvkernels_cpu.so"


@cache
def load() -> str | None:
    """Load the CPU library once; return None on success, otherwise the reason."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} was not built (CONVKERNELS_BUILD=none, or no C++ compiler at build time)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"the native library {LIBRARY.name} does not load: {error}"
    return None
