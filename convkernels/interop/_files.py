"""Reads checkpoints of other implementations: tensors and plain values, and nothing that could run code.

Every error is a ValueError that names the argument, but for the OSError of a file that cannot be opened.
"""

import os
import pickle
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops._validate import describe, fail


def read(function: str, argument: str, file: Any, types: Iterable = ()) -> Any:
    """The content of a file written by torch.save that holds tensors, plain values and ``types`` alone."""
    if not isinstance(file, str | os.PathLike) and not hasattr(file, "read"):
        fail(function, argument, "a path or a dict", describe(file))
    try:
        with torch.serialization.safe_globals(list(types)):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of any type where the bytes mean nothing
        found = re.search(r"(?:GLOBAL |but got <class ')([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and found:
            expected = (
                "a file of parameters, arguments and plain values alone (if you trust this one, pass what "
                "torch.load(file, weights_only=False) gives)"
            )
            got = f"one with {found[1]} in it"
        else:
            expected, got = "a file that torch.save wrote", f"{file}, which cannot be read ({type(error).__name__})"
        raise ValueError(f"{function}: argument '{argument}': expected {expected}, got {got}") from error


def parameters(function: str, argument: str, state: Any) -> None:
    """Check that ``state`` is a dict of tensors by name, and not empty."""
    expected = "tensors by name as the parameters"
    if not isinstance(state, Mapping) or not state:
        fail(function, argument, expected, describe(state))
    for name, value in state.items():
        if not isinstance(value, Tensor):
            fail(function, argument, expected, f"{describe(value)} as {name!r}")
