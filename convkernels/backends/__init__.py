"""The table of backends, in the order in which ``auto`` tries them.

A backend is one entry here and, unless it is ``reference``, one module that offers ``load() -> str | None``: make the
kernels callable and return None, or return the reason why that is not possible on this machine. A module may also hold
``KERNELS``, a mapping from op name to a Python function of the record of the op's arguments, registered for
``dispatch_key`` once ``load`` succeeds, and ``why_not(op, **facts) -> list[str]`` for limits of its own (see
docs/adding-a-backend.md).
"""

import os
from typing import NamedTuple

import torch

from .switches import switch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
AUTO = "auto"
"""Given for a backend: that which is chosen for a call."""


class Backend(NamedTuple):
    name: str
    module: str | None
    """Where ``load`` lives; None for the reference, which every op brings along itself."""
    devices: tuple[str, ...] | None
    """Device types it runs on; None: any."""
    dtypes: tuple[torch.dtype, ...]
    dispatch_key: str | None
    """Dispatch key for the module's ``KERNELS``; None where the library registers its own."""
    fast: bool
    """Whether ``auto`` may choose it without a warning."""


def _triton() -> Backend:
    """The Triton interpreter runs kernels on CPU tensors, and too slowly to be chosen by ``auto``."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device, key = ("cpu", "CPU") if interpreted else ("cuda", "CUDA")
    return Backend("triton", f"{__name__}.triton", (device,), FLOATS, key, not interpreted)


def _cuda() -> Backend:
    """The kernels simulated on a CPU are too slow to be chosen by ``auto``."""
    simulated = switch("CONVKERNELS_SIMT")
    return Backend("cuda", f"{__name__}.cuda", ("cpu" if simulated else "cuda",), FLOATS, None, not simulated)


_ENTRIES = (
    Backend("cpu", f"{__name__}.native", ("cpu",), FLOATS, None, True),
    _triton(),
    _cuda(),
    Backend("reference", None, None, FLOATS, "CompositeExplicitAutograd", False),
)

BACKENDS: dict[str, Backend] = {entry.name: entry for entry in _ENTRIES}


def names() -> tuple[str, ...]:
    """Names of all backends, in the order in which ``auto`` tries them."""
    return tuple(BACKENDS)
