"""vmap rules: the mapped dimension is folded into the batch, so that one kernel launch does the work of all.

Weights become per batch row ([N*B,1,H,K] or [N*B,T,H,K]) and their gradients are summed over each row's share of the
batch afterwards. Two cases run one call per element instead: weight dropout, whose mask depends on the batch index,
and mapped sequence boundaries, which the op shares between batch rows.
"""

from collections.abc import Callable

from torch import Tensor

from .._functorch import fold, loop, mapped
from . import reference


def _fold_weight(weight: Tensor, dim: int | None, size: int, batch: int, separate: bool) -> Tensor:
    """Weight per folded batch row; an unmapped [H,K] stays as it is unless its gradients are needed separately."""
    if dim is None and weight.dim() == 2 and not separate:
        return weight
    weight = mapped(weight, dim, size)
    if weight.dim() == 3:
        weight = weight[:, None, None].expand(size, batch, 1, *weight.shape[1:])
    return weight.reshape(size * batch, *weight.shape[2:])


def conv(function: Callable, size: int, dims: tuple, args: tuple):
    """vmap of ``tap_conv``: function(*args) with args as in the op's schema."""
    x, weight, left, dilation, softmax, renormalize, dropout, seed, bias, gate, mask, cu_seqlens, state = args
    if dropout > 0 or dims[11] is not None:
        return loop(function, size, dims, args)
    B = x.shape[0] if dims[0] is None else x.movedim(dims[0], 0).shape[1]
    dtype = x.dtype
    if dims[8] is not None:
        # The bias is added below; round once, after that.
        x, gate, state = (None if v is None else v.to(reference.accumulate_dtype(dtype)) for v in (x, gate, state))
    y = function(
        fold(x, dims[0], size),
        _fold_weight(weight, dims[1], size, B, separate=False),
        left,
        dilation,
        softmax,
        renormalize,
        dropout,
        None,
        bias if dims[8] is None else None,
        fold(gate, dims[9], size),
        fold(mask, dims[10], size),
        cu_seqlens,
        fold(state, dims[12], size),
    )
    y = y.reshape(size, B, *y.shape[1:])
    if dims[8] is not None:
        y = (y + bias.movedim(dims[8], 0)[:, None, None, :]).to(dtype)
    return y, 0


def grad(function: Callable, size: int, dims: tuple, args: tuple):
    """vmap of ``tap_grad``: function(*args) with args as in the op's schema."""
    grad, x, weight, left, dilation, softmax, renormalize, dropout, seed, gate, mask, cu_seqlens, state, needs = args
    if dropout > 0 or dims[11] is not None:
        return loop(function, size, dims, args)
    B = x.shape[0] if dims[1] is None else x.movedim(dims[1], 0).shape[1]
    folded = fold(grad, dims[0], size)
    per_row = _fold_weight(weight, dims[2], size, B, separate=bool(needs & 2))
    if needs & 2:
        # Partial sums over batch rows are added below; keep them in the accumulation type until then.
        per_row = per_row.to(reference.accumulate_dtype(weight.dtype))
    grad_x, grad_weight, grad_bias, grad_gate, grad_state = function(
        folded,
        fold(x, dims[1], size),
        per_row,
        left,
        dilation,
        softmax,
        renormalize,
        dropout,
        None,
        fold(gate, dims[9], size),
        fold(mask, dims[10], size),
        cu_seqlens,
        fold(state, dims[12], size),
        needs & ~4,
    )
    if needs & 2:
        grad_weight = grad_weight.reshape(size, B, *grad_weight.shape[1:])
        rank = weight.dim() - (dims[2] is not None)
        grad_weight = (grad_weight.sum((1, 2)) if rank == 2 else grad_weight).to(weight.dtype)
    if needs & 4:
        dtype = reference.accumulate_dtype(grad.dtype)
        grad_bias = folded.reshape(size, B, *folded.shape[1:]).sum((1, 2), dtype=dtype)

    def unfold(value: Tensor, bit: int) -> Tensor:
        return (
            value.reshape(size, value.shape[0] // size, *value.shape[1:]) if needs & bit and value.dim() > 1 else value
        )

    outputs = (unfold(grad_x, 1), grad_weight, grad_bias, unfold(grad_gate, 8), unfold(grad_state, 16))
    present = (needs & 1, needs & 2, needs & 4, needs & 8 and gate is not None, needs & 16 and state is not None)
    return outputs, tuple(0 if there else None for there in present)
