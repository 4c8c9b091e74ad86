"""Checks of the arguments of the convolutions."""

from typing import Any

import torch
from torch import Tensor

from .._dtypes import FARTHEST
from .._validate import (
    PLAIN,
    boundaries,
    dropout,
    fail,
    flag,
    floating,
    integer,
    parameter_dtype,
    positive,
    readable,
    real,
    same_device,
    same_dtype,
    shape,
    size_text,
    tensor,
)  # fmt: skip


def reach(function: str, dilation: Any, K: int) -> None:
    """A dilation, such that no position that K taps read overflows."""
    positive(function, "dilation", dilation)
    if dilation > FARTHEST or (isinstance(K, int) and (K - 1) * dilation > FARTHEST):
        fail(function, "dilation", f"a positive integer, at most 2^30, also times K - 1 = {size_text(K - 1)}", dilation)


def padding_left(function: str, padding: Any, K: int, dilation: int) -> int:
    """Number of input positions to the left of an output that its first tap reaches."""
    limit = (K - 1) * dilation
    expected = f"'same', 'causal' or an integer from 0 to (K-1)*dilation = {limit}"
    if isinstance(padding, str):
        if padding == "same":
            return dilation * (K // 2)
        if padding == "causal":
            return limit
        fail(function, "padding", expected, repr(padding))
    integer(function, "padding", padding, expected)
    if not 0 <= padding <= limit:
        fail(function, "padding", expected, padding)
    return padding


def kernel_options(function: str, softmax: Any, renormalize: Any, dilation: Any, K: int) -> None:
    flag(function, "softmax", softmax)
    flag(function, "renormalize", renormalize)
    if renormalize and not softmax:
        fail(function, "renormalize", "False, because without softmax there is nothing to renormalize", renormalize)
    reach(function, dilation, K)


def weight(function: str, value: Any, x: Tensor, leading: tuple, letters: str) -> tuple[int, int]:
    """The weight [*leading, H, K]; returns H and K. The error says where it would be right for x.mT."""
    try:
        return _weight(function, value, x, leading, letters)
    except ValueError as error:
        if x.dim() != 3:
            raise
        try:
            _weight(function, value, x.mT, leading and (x.shape[0], x.shape[2]), letters)
        except (TypeError, ValueError):
            raise error from None
        raise ValueError(f"{error} (x is read as [B,T,C]: give x.mT if channels come first)") from None


def _weight(function: str, value: Any, x: Tensor, leading: tuple, letters: str) -> tuple[int, int]:
    rank = len(leading) + 2
    C = x.shape[-1]
    if value.dim() != rank:
        hint = ""
        if value.numel() and not leading and value.dim() == 3 and value.shape[1] == 1:
            hint = " (from a Conv1d: weight.squeeze(1))"
        elif value.numel() and leading and value.shape[:-1] == leading:
            hint = " (from a Linear: weight.unflatten(-1, (H, K)))"
        fail(function, "weight", f"a tensor of {rank} dimensions {letters}{hint}", value)
    H, K = value.shape[-2:]
    if leading:
        shape(function, "weight", value, (*leading, H, K), letters)
    if H == 0:
        fail(function, "weight", f"at least one row of weights in {letters}", value)
    if K == 0:
        fail(function, "weight", f"at least one tap, K >= 1, in {letters}", value)
    if letters == "[C,K]":
        shape(function, "weight", value, (C, K), letters)
    elif C % H != 0:
        fail(function, "weight", f"a number of heads H in {letters} that divides C = {size_text(C)}", value)
    parameter_dtype(function, "weight", value, x)
    same_device(function, "weight", value, x)
    return H, K


def bias(function: str, value: Any, x: Tensor) -> None:
    tensor(function, "bias", value, optional=True)
    if value is not None:
        shape(function, "bias", value, (x.shape[-1],), "[C]")
        parameter_dtype(function, "bias", value, x)
        same_device(function, "bias", value, x)


def gate(function: str, value: Any, x: Tensor) -> None:
    tensor(function, "gate", value, optional=True)
    if value is not None:
        shape(function, "gate", value, tuple(x.shape), "[B,T,C]" if x.dim() == 3 else "[B,C]")
        same_dtype(function, "gate", value, x)
        same_device(function, "gate", value, x)


def mask(function: str, value: Any, x: Tensor) -> None:
    tensor(function, "mask", value, optional=True)
    if value is not None:
        if value.dtype != torch.bool:
            fail(function, "mask", "a bool tensor (True: real position)", value, TypeError)
        shape(function, "mask", value, tuple(x.shape[:2]), "[B,T]")
        same_device(function, "mask", value, x)


def cu_seqlens(function: str, value: Any, x: Tensor) -> None:
    tensor(function, "cu_seqlens", value, optional=True)
    if value is not None:
        boundaries(function, "cu_seqlens", value, x, x.shape[1])


def initial_state(function: str, value: Any, x: Tensor, rows: int, cu: Tensor | None) -> None:
    tensor(function, "initial_state", value, optional=True)
    if value is not None:
        sequences, letters = (x.shape[0], "[B,S,C]") if cu is None else (cu.shape[0] - 1, "[N,S,C]")
        shape(function, "initial_state", value, (sequences, rows, x.shape[2]), f"{letters}, S = (K-1)*dilation,")
        same_dtype(function, "initial_state", value, x)
        same_device(function, "initial_state", value, x)


def convolution(
    function: str, x, weight_, bias_, softmax, renormalize, padding, dilation, p, training, seed, gate_, mask_, cu,
    state, return_state, *, letters: str,
) -> int:  # fmt: skip
    """All checks of a convolution over a sequence; returns ``left``. letters: [C,K], [H,K] or [B,T,H,K]."""
    tensor(function, "x", x)
    tensor(function, "weight", weight_)
    floating(function, "x", x)
    if x.dim() != 3:
        fail(function, "x", "a tensor of 3 dimensions [B,T,C]", x)
    _, K = weight(function, weight_, x, tuple(x.shape[:2]) if letters == "[B,T,H,K]" else (), letters)
    bias(function, bias_, x)
    kernel_options(function, softmax, renormalize, dilation, K)
    left = padding_left(function, padding, K, dilation)
    dropout(function, "weight_dropout", p, training, seed, x)
    gate(function, gate_, x)
    mask(function, mask_, x)
    cu_seqlens(function, cu, x)
    flag(function, "return_state", return_state)
    rows = (K - 1) * dilation
    initial_state(function, state, x, rows, cu)
    for argument, given in (("initial_state", state is not None), ("return_state", return_state)):
        if given and left != rows:
            fail(function, "padding", f"'causal', because {argument} is given", repr(padding))
    return left


def step(
    function: str, x, state, weight_, bias_, softmax, renormalize, dilation, gate_, state_index, position, *,
    letters: str,
) -> None:  # fmt: skip
    """All checks of a decoding step. letters: [C,K], [H,K] or [B,H,K]."""
    tensor(function, "x", x)
    tensor(function, "state", state)
    tensor(function, "weight", weight_)
    floating(function, "x", x)
    if x.dim() != 2:
        fail(function, "x", "a tensor of 2 dimensions [B,C]", x)
    B, C = x.shape
    _, K = weight(function, weight_, x, (B,) if letters == "[B,H,K]" else (), letters)
    bias(function, bias_, x)
    kernel_options(function, softmax, renormalize, dilation, K)
    shape(function, "state", state, (B, (K - 1) * dilation, C), "[B,S,C], S = (K-1)*dilation,")
    same_dtype(function, "state", state, x)
    same_device(function, "state", state, x)
    if not state.is_contiguous():
        expected = "a contiguous tensor, every element in memory of its own, because it is updated in place"
        fail(function, "state", expected, f"strides {list(state.stride())}")
    gate(function, gate_, x)
    tensor(function, "state_index", state_index, optional=True)
    if state_index is not None:
        if state_index.dtype != torch.int64:
            fail(function, "state_index", "an int64 tensor", state_index, TypeError)
        shape(function, "state_index", state_index, (B,), "[B]")
        same_device(function, "state_index", state_index, x)
        if readable(state_index):
            rows = state_index.tolist()
            if any(not 0 <= row < B for row in rows):
                fail(function, "state_index", f"rows of the state, 0 to {B - 1}", rows)
    tensor(function, "position", position, optional=True)
    if position is not None:
        if position.dtype != torch.int64:
            fail(function, "position", "an int64 tensor", position, TypeError)
        if position.dim() != 1 or position.shape[0] not in (1, B):
            fail(function, "position", f"shape [B] = [{size_text(B)}] or [1]", position)
        same_device(function, "position", position, x)
        if readable(position):
            numbers = position.tolist()
            if any(number < 0 for number in numbers):
                fail(function, "position", "numbers of positions >= 0", numbers)
    inputs = {"x": x, "weight": weight_, "bias": bias_, "gate": gate_}
    for argument, value in {**inputs, "state": state}.items():
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            fail(
                function, argument, "no gradient (a step is inference only: use torch.no_grad())", "requires_grad=True"
            )
    if real(state):
        if state.is_neg():
            fail(
                function,
                "state",
                "memory that holds its values (see Tensor.resolve_neg)",
                "a negated view of other memory",
            )
        for argument, value in inputs.items():
            if type(value) in PLAIN and _overlap(value, state):
                fail(
                    function,
                    argument,
                    "memory apart from the state's, which is updated in place",
                    "an overlapping view",
                )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory spans of two tensors meet (interleaved views count: nothing cheaper is exact)."""
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device:
        return False
    (a_first, a_last), (b_first, b_last) = (
        (
            t.data_ptr(),
            t.data_ptr() + t.element_size() * sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)),
        )
        for t in (a, b)
    )
    return a_first <= b_last and b_first <= a_last
