"""Which backend runs a call, and why another one does not.

``auto`` is the first usable backend: that which was measured to be the fastest on this device (``FASTEST``), or else
that which is estimated to be (``ESTIMATED``), then those of ``backends.BACKENDS`` in their order.
``CONVKERNELS_BACKEND=<name>`` changes what ``auto`` means, and a backend named there or in the call never falls back.
Stepping down to the reference is announced once for a reason, not per function; ``CONVKERNELS_STRICT=1`` makes it an
error. Decisions are cached: after a change of the environment call ``reset()``. Exported programs decide as they run.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Callable
from functools import cache

import torch

from .. import backends
from ..backends import AUTO
from ..backends.switches import switch
from . import _spec

# (device, op, dtype): the backend that measurements of docs/results.md prefer. Only what differs from the order of
# ``backends.BACKENDS``, or from ``ESTIMATED``, is entered. Attention goes by its operators.
FASTEST = {
    ("NVIDIA H100 80GB HBM3", "lightweight_conv1d", torch.bfloat16): "cuda",
    ("NVIDIA H100 80GB HBM3", "dynamic_conv1d", torch.bfloat16): "triton",
}
# (op, dtype): the backend that takes less time by the estimates of docs/cuda-without-a-gpu.md, which are of an
# H100, for GPUs of its compute capability without measurements. Only what differs from the order is entered. The
# kernels of attention that were measured are not those that run there now.
ESTIMATED = {
    ("attention", torch.bfloat16): "cuda",
    ("attention", torch.float16): "cuda",
    ("attention_grad", torch.bfloat16): "cuda",
    ("attention_grad", torch.float16): "cuda",
    ("lightweight_conv1d", torch.bfloat16): "cuda",
    ("dynamic_conv1d", torch.bfloat16): "cuda",
}
ESTIMATED_FOR = (9, 0)
_CALLERS = ("convkernels", "torch", "transformers", "accelerate")
# The public functions, whose names `why_not` takes like those of operators.
_FUNCTIONS = ("composite_attention",) + tuple(
    f"{kind}_conv1d{step}" for kind in ("depthwise", "lightweight", "dynamic") for step in ("", "_step")
)
_resets: list = []
_announced: set[str] = set()


def reset() -> None:
    """Forget all decisions, so that the environment is read again."""
    choose.cache_clear()
    _announced.clear()
    for clear in _resets:
        clear()


def on_reset(clear) -> None:
    """Have ``clear()`` called by ``reset()``; for caches built on top of decisions."""
    _resets.append(clear)


@cache
def _load(name: str) -> str | None:
    """Load a backend's module once; None, or the reason it is not usable on this machine."""
    module_name = backends.BACKENDS[name].module
    if module_name is None:
        return None
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        return f"its module does not import: {error}"
    reason = module.load()
    if reason is None:
        for op, kernel in getattr(module, "KERNELS", {}).items():
            _spec.implement(op, name, kernel)
    return reason


def _implements(backend: str, op: str) -> bool:
    """Whether a loaded backend has a kernel for an operator; True for what is not the name of one."""
    if op not in _spec.OPERATORS:
        return True
    entry = backends.BACKENDS[backend]
    key = entry.dispatch_key or {"cpu": "CPU", "cuda": "CUDA"}[entry.devices[0]]
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{_spec.NAMESPACE}::_{op}.{backend}", key)


def why_not(
    backend: str,
    *,
    op: str = "tap_conv",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **facts,
) -> list[str]:
    """Reasons why ``backend`` cannot run ``op`` on ``device`` with inputs of ``dtype``; an empty list: it can.

    op: the name of an operator ("tap_conv", "attention", ...), which a backend may not have yet, or of a function.
    Further keyword arguments are facts about the call (for example ``K=31``) for backends with limits of their own.
    ValueError for a backend or an op that does not exist, TypeError for what is not a dtype.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"why_not: argument 'dtype': expected a torch.dtype, got {dtype!r}")
    if op not in _FUNCTIONS and op not in _spec.OPERATORS:
        names = ", ".join(map(repr, (*_spec.OPERATORS, *_FUNCTIONS)))
        raise ValueError(f"why_not: argument 'op': expected one of {names}, got {op!r}")
    if backend == AUTO:
        return []
    known("why_not", backend)
    entry = backends.BACKENDS[backend]
    reasons = []
    kind = torch.device(device).type
    if entry.devices is not None and kind not in (*entry.devices, "meta"):  # on "meta" nothing is computed
        reasons.append(f"it runs on {' or '.join(entry.devices)} tensors, not on {kind}")
    if dtype not in entry.dtypes:
        reasons.append(f"it does not compute in {dtype}")
    missing = _load(backend)
    if missing is not None:
        reasons.append(missing)
    elif not _implements(backend, op):
        reasons.append(f"it does not implement {op} yet")
    elif entry.module is not None:
        limits = getattr(importlib.import_module(entry.module), "why_not", None)
        if limits is not None:
            reasons += limits(op, **facts)
    return reasons


def fastest(op: str, device_type: str, dtype: torch.dtype) -> tuple[str | None, str]:
    """The backend that ``auto`` tries first on the current device, None where nothing prefers one, and what does."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return None, ""
    device = torch.cuda.get_device_name()
    if (device, op, dtype) in FASTEST:
        return FASTEST[device, op, dtype], f"measured on {device}"
    if (op, dtype) in ESTIMATED and torch.cuda.get_device_capability() == ESTIMATED_FOR:
        return ESTIMATED[op, dtype], "estimated for an H100"
    return None, "which is the fastest is not known"


def first_fast(op: str, device_type: str, dtype: torch.dtype) -> tuple[str | None, list[str]]:
    """The fast backend that ``auto`` takes, None without one, and why not those before it that are for such tensors."""
    passed_over, (first, _) = [], fastest(op, device_type, dtype)
    for name in sorted(backends.BACKENDS, key=lambda name: name != first):
        entry = backends.BACKENDS[name]
        if entry.fast and (entry.devices is None or device_type in entry.devices):
            reasons = why_not(name, op=op, device=device_type, dtype=dtype)
            if not reasons:
                return name, passed_over
            passed_over.append(f"backend '{name}': {'; '.join(reasons)}")
    return None, passed_over


@cache
def choose(backend: str, op: str, device_type: str, dtype: torch.dtype, operator: str | None = None) -> str:
    """The name of the backend that runs the call. ValueError for an unknown name, RuntimeError for an unusable one.

    op: the function called, as messages name it.  operator: the operator behind it, where not every backend has it.
    """
    variable = ""
    if backend == AUTO and os.environ.get("CONVKERNELS_BACKEND"):
        backend, variable = os.environ["CONVKERNELS_BACKEND"], "environment variable 'CONVKERNELS_BACKEND'"
    known(op, backend, variable or "argument 'backend'")
    strict = switch("CONVKERNELS_STRICT")
    if backend != AUTO:
        reasons = why_not(backend, op=operator or op, device=device_type, dtype=dtype)
        if reasons:
            raise RuntimeError(": ".join(filter(None, (op, variable, f"backend '{backend}'", "; ".join(reasons)))))
        return backend
    if device_type == "meta":
        return "reference"
    name, passed_over = first_fast(operator or op, device_type, dtype)
    if name is not None:
        return name
    reason = "; ".join(passed_over) or f"none is made for {device_type} tensors"
    message = f"{op} on {device_type} in {dtype}: no fast backend is usable ({reason})"
    if strict:
        raise RuntimeError(f"{message}, and CONVKERNELS_STRICT=1 forbids the slow reference")
    if reason not in _announced:
        _announced.add(reason)
        warnings.warn(
            f"{message}; using the slow reference (said once). Silence this by backend='reference'.",
            RuntimeWarning,
            stacklevel=_users_level(),
        )
    return "reference"


def pick(backend: str, op: str, *call) -> str:
    """``choose``, for code that may be compiled: a constant there; AUTO, where nothing else is said, for a program that
    is exported."""
    if backend == AUTO and torch.compiler.is_exporting():
        return AUTO
    try:
        return choose(backend, op, *call)
    except TypeError:  # of the cache, for what cannot be its key
        known(op, backend)
        raise


# What torch.compiler.assume_constant_result does; calling it would import the compiler (1.3 s) along with this package.
pick._dynamo_marked_constant = True


def choose_as_it_runs(kind: type, called: Callable) -> None:
    """Register the kernel of an operator of AUTO, the first argument of which is a tensor. kind: the record of its
    arguments.  called(record): for what ``choose`` chooses, its op, and its operator where it asks for that."""

    def kernel(args) -> object:
        op, *operator = called(args)
        chosen = choose(AUTO, op, args[0].device.type, args[0].dtype, *operator)
        return _spec.called(kind, chosen)(*args)

    _spec.implement(kind.__name__, AUTO, kernel)


def known(function: str, backend, named_by: str = "argument 'backend'") -> None:
    """ValueError for what is not the name of a backend, or "auto"."""
    names = (AUTO, *backends.BACKENDS)
    if backend not in names:
        raise ValueError(f"{function}: {named_by}: expected one of {', '.join(map(repr, names))}, got {backend!r}")


def _users_level() -> int:
    """The caller's ``stacklevel`` of the line that is neither of this package nor of what calls modules for a user."""
    frame, level = sys._getframe(1), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _CALLERS:
        frame, level = frame.f_back, level + 1
    return level
