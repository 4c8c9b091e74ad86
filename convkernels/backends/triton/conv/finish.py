"""What becomes of the sums a of a forward pass, before they are rounded."""

from typing import NamedTuple

import triton
import triton.language as tl

from .activations import activated, slope
from .taps import Rows, columns_at, load_rows, rows_from, store_rows


class Finish(NamedTuple):
    """Tensors of the shape of x that sums go to or meet.

    tap_conv, tap_step:   y = residual + out_gate * act(a)
    tap_activation_grad:  y = grad * out_gate * act'(a)  and  grad_out_gate = grad * act(a)"""

    y: Rows
    out_gate: Rows
    residual: Rows
    grad: Rows
    grad_out_gate: Rows


class FinishFlags(NamedTuple):
    """Which tensors of ``Finish`` are given, or asked for; HAS_GRAD: gradients are."""

    ACTIVATION: int
    HAS_Y: bool
    HAS_OUT_GATE: bool
    HAS_RESIDUAL: bool
    HAS_GRAD: bool
    HAS_GRAD_OUT_GATE: bool


@triton.jit
def finish_at(finish, b, c):
    """``finish`` from position 0 of batch row b and channels c on."""
    return Finish(
        columns_at(finish.y, b, c),
        columns_at(finish.out_gate, b, c),
        columns_at(finish.residual, b, c),
        columns_at(finish.grad, b, c),
        columns_at(finish.grad_out_gate, b, c),
    )


@triton.jit
def finish_from(finish, t):
    """``finish`` from position t on."""
    return Finish(
        rows_from(finish.y, t),
        rows_from(finish.out_gate, t),
        rows_from(finish.residual, t),
        rows_from(finish.grad, t),
        rows_from(finish.grad_out_gate, t),
    )


@triton.jit
def store_finished(finish, t, total, keep, FINISH: tl.constexpr, DTYPE: tl.constexpr):
    """What becomes of the sums ``total`` of positions t where ``keep``; their type is DTYPE."""
    if FINISH.HAS_GRAD:
        grad = load_rows(finish.grad, t, keep, DTYPE)
        if FINISH.HAS_GRAD_OUT_GATE:
            store_rows(finish.grad_out_gate, t, grad * activated(total, FINISH.ACTIVATION), keep)
        if FINISH.HAS_Y:
            if FINISH.HAS_OUT_GATE:
                grad *= load_rows(finish.out_gate, t, keep, DTYPE)
            store_rows(finish.y, t, grad * slope(total, FINISH.ACTIVATION), keep)
    else:
        total = activated(total, FINISH.ACTIVATION)
        if FINISH.HAS_OUT_GATE:
            total *= load_rows(finish.out_gate, t, keep, DTYPE)
        if FINISH.HAS_RESIDUAL:
            total += load_rows(finish.residual, t, keep, DTYPE)
        store_rows(finish.y, t, total, keep)
