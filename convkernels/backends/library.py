"""Loads an operator library of this package, or says why it cannot: what the compiled backends share."""

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
