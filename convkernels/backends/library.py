"""Loads an operator library of this package, or says why it cannot: what the compiled backends share."""

import ctypes
from pathlib import Path

import torch

from .._namespace import NAMESPACE

FOLDER = Path(__file__).parent.parent / "_native"
# What leaves each library out.
LEFT_OUT = {
    "cpu": "CONVKERNELS_BUILD=none, or no C++ compiler at build time",
    "cuda": "CONVKERNELS_BUILD=cpu, or no nvcc at build time",
    "simt": "it is made for tests, by `make simt-build`",
    "counted": "it is made for tests, by `make counted-build`",
}


def path_of(name: str) -> Path:
    return FOLDER / f"libconvkernels_{name}.so"


def missing(name: str) -> str | None:
    """That a library is not where it is looked for, which may be a source tree in front of an installed package."""
    if path_of(name).exists():
        return None
    return (
        f"{path_of(name).name} is not in {FOLDER}: it was not built ({LEFT_OUT[name]}), or Python imports a source "
        "tree here and not the installed package"
    )


def load_library(name: str) -> str | None:
    """Load an operator library of this package; None on success, otherwise the reason."""
    reason = missing(name)
    if reason is not None:
        return reason
    try:
        torch.ops.load_library(str(path_of(name)))
        register = ctypes.CDLL(str(path_of(name))).convkernels_register
    except (OSError, RuntimeError, AttributeError) as error:
        return f"the native library {path_of(name).name} does not load: {error}"
    register.restype = ctypes.c_char_p
    failure = register(NAMESPACE.encode())
    return failure and f"the native library {path_of(name).name} does not register its operators: {failure.decode()}"
