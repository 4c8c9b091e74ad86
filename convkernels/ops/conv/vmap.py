"""vmap rules: the mapped dimension is folded into the batch, so that one kernel launch does the work of all.

Weights become per batch row ([N*B,1,H,K] or [N*B,T,H,K]) and their gradients are summed over each row's share of the
batch afterwards. Three cases run one call per element instead: weight dropout, whose mask depends on the batch
index, mapped sequence boundaries, which the op shares between batch rows, and a mapped bias where more than the sum is
computed.
"""

from collections.abc import Callable

from torch import Tensor

from .._dtypes import accumulate_dtype
from .._functorch import fold, loop, mapped
from .schema import INPUTS, NONE, TapActivationGrad, TapConv, TapGrad

_BATCHED = ("grad", "x", "gate", "mask", "initial_state", "out_gate", "residual")


def _fold_weight(weight: Tensor, dim: int | None, size: int, batch: int, separate: bool) -> Tensor:
    """Weight per folded batch row; an unmapped [H,K] stays as it is unless its gradients are needed separately."""
    if dim is None and weight.dim() == 2 and not separate:
        return weight
    weight = mapped(weight, dim, size)
    if weight.dim() == 3:
        weight = weight[:, None, None].expand(size, batch, 1, *weight.shape[1:])
    return weight.reshape(size * batch, *weight.shape[2:])


def _folded(size: int, dims, args, separate: bool):
    """The arguments with the mapped dimension in the batch, and how many rows each element has there."""
    B = args.x.shape[0] if dims.x is None else args.x.movedim(dims.x, 0).shape[1]
    return B, args._replace(
        weight=_fold_weight(args.weight, dims.weight, size, B, separate),
        seed=None,
        **{name: fold(getattr(args, name), getattr(dims, name), size) for name in _BATCHED if name in args._fields},
    )


def forward(function: Callable, size: int, dims: TapConv, args: TapConv):
    """vmap of ``tap_conv``."""
    sum_only = args.activation == NONE and args.out_gate is None and args.residual is None
    if args.dropout > 0 or dims.cu_seqlens is not None or not (sum_only or dims.bias is None):
        return loop(function, size, dims, args)
    dtype, bias = args.x.dtype, args.bias
    if dims.bias is not None:
        # The bias is added below; round once, after that.
        wide = {name: getattr(args, name) for name in ("x", "gate", "initial_state")}
        wide = {name: None if value is None else value.to(accumulate_dtype(dtype)) for name, value in wide.items()}
        args = args._replace(bias=None, **wide)
    B, args = _folded(size, dims, args, separate=False)
    y = function(*args)
    y = y.reshape(size, B, *y.shape[1:])
    if dims.bias is not None:
        y = (y + bias.movedim(dims.bias, 0)[:, None, None, :]).to(dtype)
    return y, 0


def _unfolded(value: Tensor, asked: bool, size: int) -> Tensor:
    return value.reshape(size, value.shape[0] // size, *value.shape[1:]) if asked and value.dim() > 1 else value


def activation_grad(function: Callable, size: int, dims: TapActivationGrad, args: TapActivationGrad):
    """vmap of ``tap_activation_grad``."""
    if args.dropout > 0 or dims.cu_seqlens is not None or dims.bias is not None:
        return loop(function, size, dims, args)
    _, args = _folded(size, dims, args, separate=False)
    wanted = args.wanted
    outputs = tuple(_unfolded(value, asked, size) for value, asked in zip(function(*args), wanted, strict=True))
    return outputs, tuple(0 if asked else None for asked in wanted)


def backward(function: Callable, size: int, dims: TapGrad, args: TapGrad):
    """vmap of ``tap_grad``."""
    if args.dropout > 0 or dims.cu_seqlens is not None:
        return loop(function, size, dims, args)
    weight, wanted = args.weight, args.wanted
    B, args = _folded(size, dims, args, separate=wanted.weight)
    args = args._replace(needs=args.needs & ~INPUTS.bit["bias"])
    if wanted.weight:
        # Partial sums over batch rows are added below; keep them in the accumulation type until then.
        args = args._replace(weight=args.weight.to(accumulate_dtype(weight.dtype)))
    grad_x, grad_weight, grad_bias, grad_gate, grad_state = function(*args)
    if wanted.weight:
        grad_weight = grad_weight.reshape(size, B, *grad_weight.shape[1:])
        rank = weight.dim() - (dims.weight is not None)
        grad_weight = (grad_weight.sum((1, 2)) if rank == 2 else grad_weight).to(weight.dtype)
    if wanted.bias:
        grad = args.grad.reshape(size, B, *args.grad.shape[1:])
        grad_bias = grad.sum((1, 2), dtype=accumulate_dtype(grad.dtype))

    outputs = (
        _unfolded(grad_x, wanted.x, size),
        grad_weight,
        grad_bias,
        _unfolded(grad_gate, wanted.gate, size),
        _unfolded(grad_state, wanted.initial_state, size),
    )
    present = wanted._replace(
        gate=wanted.gate and args.gate is not None,
        initial_state=wanted.initial_state and args.initial_state is not None,
    )
    return outputs, tuple(0 if there else None for there in present)
