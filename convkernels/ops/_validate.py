"""Checks of arguments. Every error reads: function: argument 'name': expected ..., got ... (function: or class)

TypeError for a value of the wrong kind, ValueError for one of the right kind that cannot be used. The functions here
are slow and complete; the public functions call them only when a few cheap comparisons do not already settle that a
call is fine.
"""

import reprlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ._dtypes import dtype_name
from ._functorch import transforming

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FLOAT_NAMES = "float64, float32, bfloat16 or float16"
_INTEGERS = (torch.int32, torch.int64)
PLAIN = (Tensor, torch.nn.Parameter)
_mode = torch._C._get_dispatch_mode
# torch.compile cannot trace this function.
autocast_somewhere = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
_FAKE, _PROXY, _FUNCTIONAL = (
    torch._C._TorchDispatchModeKey.__members__[name] for name in ("FAKE", "PROXY", "FUNCTIONAL")
)


def fail(function: str, argument: str, expected: str, got: Any, kind: type[Exception] = ValueError) -> NoReturn:
    """Raise the uniform error."""
    shown = describe(got) if isinstance(got, Tensor) else got
    raise kind(f"{function}: argument '{argument}': expected {expected}, got {shown}")


def expect(function: str, argument: str, good: bool, expected: str, got: Any) -> None:
    """ValueError unless ``good``."""
    if not good:
        fail(function, argument, expected, got if isinstance(got, Tensor) else repr(got))


def each(check: Callable[[str, str, Any], None], function: str, **values: Any) -> None:
    """One check for several arguments, given by their names."""
    for argument, value in values.items():
        check(function, argument, value)


def describe(value: Any) -> str:
    """A value as error messages show it."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} tensor of shape {list(value.shape)} on {value.device}"
    kind = type(value).__name__
    if hasattr(value, "shape") and hasattr(value, "dtype"):  # an array of another package may be large
        return f"{kind} of shape {list(value.shape)}"
    text = reprlib.repr(value)  # which limits each level of nested lists, not all of them together
    return f"{text if len(text) <= 200 else text[:200] + '...'} of type {kind}"


def real(value: Tensor) -> bool:
    """Whether there is memory behind a tensor that may be looked at: not where it stands for others, as under
    torch.func, make_fx, FakeTensorMode and for subclasses."""
    return (
        type(value) in PLAIN
        and value.device.type != "meta"
        and not transforming()
        and _mode(_FAKE) is None
        and _mode(_PROXY) is None
        and _mode(_FUNCTIONAL) is None
    )


def readable(value: Tensor) -> bool:
    """Whether the values of a tensor may be looked at without waiting for a device."""
    return value.device.type == "cpu" and real(value)


def tensor(function: str, argument: str, value: Any, *, optional: bool = False) -> None:
    """A dense tensor (or None where optional)."""
    if value is None and optional:
        return
    if not isinstance(value, Tensor):
        fail(function, argument, "a tensor" + (" or None" if optional else ""), describe(value), TypeError)
    if value.is_nested:
        expected = "a dense tensor (sequences of several lengths: one after the other in one row, with cu_seqlens)"
        fail(function, argument, expected, "a nested tensor", TypeError)
    if value.is_quantized:
        fail(function, argument, "a dense tensor, not quantized (see Tensor.dequantize)", value, TypeError)
    if value.layout is not torch.strided:
        fail(function, argument, "a dense tensor", f"layout {value.layout}", TypeError)


def floating(function: str, argument: str, value: Tensor) -> None:
    if value.dtype not in FLOATS:
        fail(function, argument, f"a tensor of {_FLOAT_NAMES}", value, TypeError)


def integers(function: str, argument: str, value: Tensor) -> None:
    if value.dtype not in _INTEGERS:
        fail(function, argument, "an int32 or int64 tensor", value, TypeError)


def shape(function: str, argument: str, value: Tensor, expected: tuple, letters: str) -> None:
    """Shape equal to ``expected``; ``letters`` names the dimensions in the message."""
    if value.dim() != len(expected) or any(size != want for size, want in zip(value.shape, expected, strict=True)):
        fail(function, argument, f"shape {letters} = {[size_text(n) for n in expected]}", value)


# `name` is what the input x, which decides for the others, is called in messages.


def same_device(function: str, argument: str, value: Tensor, x: Tensor, name: str = "x") -> None:
    if value.device != x.device:
        fail(function, argument, f"a tensor on {x.device}, where {name} is", value)


def same_dtype(function: str, argument: str, value: Tensor, x: Tensor, name: str = "x") -> None:
    if value.dtype != x.dtype:
        fail(function, argument, f"the dtype of {name}, {x.dtype}", value, TypeError)


def like(function: str, argument: str, value: Tensor, x: Tensor, sizes: tuple, letters: str) -> None:
    """These sizes, and the dtype and device of x."""
    shape(function, argument, value, sizes, letters)
    same_dtype(function, argument, value, x)
    same_device(function, argument, value, x)


def own_memory(function: str, argument: str, value: Tensor) -> None:
    """That a tensor can be written in place: every element in memory of its own."""
    if value.is_contiguous():
        return
    # Each stride against the memory that dimensions with smaller ones take; torch.compile cannot sort symbolic strides.
    steps = [(step, size) for step, size in zip(value.stride(), value.shape, strict=True) if size > 1]
    for i, (step, _) in enumerate(steps):
        inside = sum(other * (size - 1) for j, (other, size) in enumerate(steps) if j != i and other <= step)
        if step <= inside and value.numel() > 0:
            expected = "every element in memory of its own, because it is updated in place"
            fail(function, argument, expected, f"strides {list(value.stride())}")


def parameter_dtype(function: str, argument: str, value: Tensor, x: Tensor, name: str = "x") -> None:
    """Weights may be of another float type than x, but double precision is all or nothing."""
    floating(function, argument, value)
    if (value.dtype == torch.float64) != (x.dtype == torch.float64):
        whole = x.dtype == torch.float64
        expected = f"float64, because {name} is float64" if whole else f"not float64, because {name} is {x.dtype}"
        fail(function, argument, expected, value, TypeError)


def autocasting(x: Any) -> bool:
    """Whether x lies on a device with an active autocast region. "meta" knows none."""
    if not isinstance(x, Tensor):
        return False
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast(x: Any, *others: Any) -> tuple:
    """x and what shares its dtype, in the dtype of an active autocast region; double precision is left alone."""
    if autocasting(x) and x.dtype in FLOATS[1:]:
        dtype = torch.get_autocast_dtype(x.device.type)
        return tuple(
            value.to(dtype) if isinstance(value, Tensor) and value.dtype in FLOATS[1:] else value
            for value in (x, *others)
        )
    return x, *others


def flag(function: str, argument: str, value: Any) -> None:
    if not isinstance(value, bool):
        fail(function, argument, "True or False", describe(value), TypeError)


def integer(function: str, argument: str, value: Any, expected: str) -> None:
    """An int; bool is not one."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        fail(function, argument, expected, describe(value), TypeError)


def positive(function: str, argument: str, value: Any) -> None:
    integer(function, argument, value, "a positive integer")
    if value < 1:
        fail(function, argument, "a positive integer", value)


def probability(function: str, argument: str, p: Any) -> None:
    if isinstance(p, bool) or not isinstance(p, int | float):
        fail(function, argument, "a probability from 0 to 1", describe(p), TypeError)
    if not 0 <= p <= 1:
        fail(function, argument, "a probability from 0 to 1", p)


def dropout(function: str, argument: str, p: Any, training: Any, seed: Any, x: Tensor, name: str = "x") -> None:
    flag(function, "training", training)
    probability(function, argument, p)
    if seed is not None:
        tensor(function, "seed", seed, optional=True)
        if seed.dtype != torch.int64:
            fail(function, "seed", "an int64 tensor of shape [1]", seed, TypeError)
        shape(function, "seed", seed, (1,), "[1]")
        same_device(function, "seed", seed, x, name)


def boundaries(
    function: str, argument: str, value: Tensor, x: Tensor, length: int, name: str = "x", letters: str = "[1,T,C]",
    letter: str = "T",
) -> None:  # fmt: skip
    """Boundaries of packed sequences. Their values are read only where that costs no device synchronisation."""
    integers(function, argument, value)
    if value.dim() != 1 or value.shape[0] < 2:
        fail(function, argument, "shape [N+1] with N >= 1 sequences", value)
    same_device(function, argument, value, x, name)
    if x.shape[0] != 1:
        fail(function, name, f"shape {letters}, one row of packed sequences, because {argument} is given", x)
    if not readable(value):
        return
    bounds = value.tolist()
    if bounds[0] != 0:
        fail(function, argument, "a first boundary of 0", bounds[0])
    if bounds[-1] != length:
        fail(function, argument, f"a last boundary of {letter} = {length}", bounds[-1])
    if any(later < earlier for earlier, later in zip(bounds, bounds[1:], strict=False)):
        fail(function, argument, "boundaries that never decrease", bounds)


def size_text(size) -> int | str:
    return size if isinstance(size, int) else str(size)
