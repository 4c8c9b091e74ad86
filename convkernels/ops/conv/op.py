"""Registration of ``tap_conv``, ``tap_grad`` and ``tap_step``, and the ways to call them with gradients.

Which way is taken matters for speed and for what composes (all measured): nothing to differentiate -> the raw op; eager
autograd -> ``record``, an autograd.Function with everything in ``forward``, the cheapest to record; torch.func and
torch.compile -> ``conv``, an autograd.Function with ``setup_context`` and ``vmap``. No ``jvp``: it would break
compiled graphs.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ...backends import BACKENDS
from .._dtypes import accumulate_dtype
from .._functorch import refuse_tangents, transforming
from .._on_import import when_imported
from .._spec import Autograd, OpSpec, overload, register
from . import double_backward, flops, reference, vmap

_SETTING = "int dilation=1, bool softmax=False, bool renormalize=False"
_CONV_SCHEMA = (
    f"(Tensor x, Tensor weight, int left, {_SETTING}, float dropout=0.0, Tensor? seed=None, Tensor? bias=None, "
    "Tensor? gate=None, Tensor? mask=None, Tensor? cu_seqlens=None, Tensor? initial_state=None) -> Tensor"
)
_GRAD_SCHEMA = (
    f"(Tensor grad, Tensor x, Tensor weight, int left, {_SETTING}, float dropout=0.0, Tensor? seed=None, "
    "Tensor? gate=None, Tensor? mask=None, Tensor? cu_seqlens=None, Tensor? initial_state=None, int needs=31) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_STEP_SCHEMA = (
    f"(Tensor x, Tensor(a!) state, Tensor weight, {_SETTING}, Tensor? bias=None, Tensor? gate=None, "
    "Tensor? state_index=None, Tensor? position=None) -> Tensor"
)

# Positions of the differentiable inputs of tap_conv and of tap_grad, in the order of the bits of `needs`.
_CONV_INPUTS = (0, 1, 8, 9, 12)
_GRAD_INPUTS = (0, 1, 2, 9, 12)
_CONV_ARITY, _GRAD_ARITY = 13, 14


class Kernels(NamedTuple):
    """One backend's operators; all take the arguments of the op by position. raw, raw_grad, step: no autograd.
    fast: raw, for eager code only.  record: eager autograd. Trailing default arguments may be left out."""

    raw: Any
    raw_grad: Any
    step: Any
    fast: Any
    record: Any


KERNELS: dict[str, Kernels] = {}


def differentiable_conv(
    backend, x, weight, left, dilation=1, softmax=False, renormalize=False, dropout=0.0, seed=None, bias=None,
    gate=None, mask=None, cu_seqlens=None, initial_state=None,
) -> Tensor:  # fmt: skip
    """tap_conv for torch.func, torch.compile and higher derivatives."""
    return TapConv.apply(
        x,
        weight,
        left,
        dilation,
        softmax,
        renormalize,
        dropout,
        seed,
        bias,
        gate,
        mask,
        cu_seqlens,
        initial_state,
        backend,
    )


def differentiable_grad(
    backend, grad, x, weight, left, dilation=1, softmax=False, renormalize=False, dropout=0.0, seed=None, gate=None,
    mask=None, cu_seqlens=None, initial_state=None, needs=31,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """tap_grad for torch.func, torch.compile and higher derivatives."""
    return TapGrad.apply(
        grad, x, weight, left, dilation, softmax, renormalize, dropout, seed, gate, mask, cu_seqlens, initial_state,
        needs, backend,
    )  # fmt: skip


def _save_for_grad(
    ctx, x, weight, left, dilation=1, softmax=False, renormalize=False, dropout=0.0, seed=None, bias=None, gate=None,
    mask=None, cu_seqlens=None, initial_state=None,
) -> None:  # fmt: skip
    """Keep what the backward pass reads: x only if a gradient depends on it (that of weight or gate)."""
    given = ctx.needs_input_grad
    # needs_input_grad ends where the arguments given end.
    keep_x = given[1] or (gate is not None and given[9])
    ctx.save_for_backward(x if keep_x else None, weight, seed, gate, mask, cu_seqlens, initial_state)
    ctx.setting = left, dilation, softmax, renormalize, dropout
    ctx.bias_dtype = None if bias is None else bias.dtype


def _conv_backward(ctx, grad, needs_input_grad, backend) -> tuple:
    """Gradients of tap_conv for all its arguments."""
    x, weight, seed, gate, mask, cu_seqlens, state = ctx.saved_tensors
    left, dilation, softmax, renormalize, dropout = ctx.setting
    needs = 0
    for bit, index in enumerate(_CONV_INPUTS):
        if needs_input_grad[index]:
            needs |= 1 << bit
    if x is None:
        # No gradient asked for depends on the values of x; grad has its shape and type.
        x = grad
    if torch.is_grad_enabled() or transforming():
        to_x, to_weight, to_bias, to_gate, to_state = TapGrad.apply(
            grad, x, weight, left, dilation, softmax, renormalize, dropout, seed, gate, mask, cu_seqlens, state, needs,
            backend,
        )  # fmt: skip
    else:
        if forward_ad._current_level >= 0:
            refuse_tangents("the gradient of tap_conv", grad=grad)
        to_x, to_weight, to_bias, to_gate, to_state = KERNELS[backend].raw_grad(
            grad, x, weight, left, dilation, softmax, renormalize, dropout, seed, gate, mask, cu_seqlens, state, needs
        )
    if needs & 4 and to_bias.dtype != ctx.bias_dtype:
        to_bias = to_bias.to(ctx.bias_dtype)
    return (
        to_x if needs & 1 else None,
        to_weight if needs & 2 else None,
        None, None, None, None, None, None,
        to_bias if needs & 4 else None,
        to_gate if needs & 8 else None,
        None, None,
        to_state if needs & 16 else None,
    )  # fmt: skip


def _grad_setup(ctx, inputs, output) -> None:
    grad, x, weight, left, dilation, softmax, renormalize, dropout, seed, gate, mask, cu_seqlens, state, needs = inputs
    ctx.save_for_backward(grad, x, weight, seed, gate, mask, cu_seqlens, state)
    ctx.setting = left, dilation, softmax, renormalize, dropout
    ctx.needs = needs
    ctx.set_materialize_grads(False)


def _grad_backward(ctx, grads, needs_input_grad, backend) -> tuple:
    """Gradients of tap_grad for all its arguments: the double backward."""
    grad, x, weight, seed, gate, mask, cu_seqlens, state = ctx.saved_tensors
    left, dilation, softmax, renormalize, dropout = ctx.setting
    grads = [value if ctx.needs & 1 << bit else None for bit, value in enumerate(grads)]
    wanted = [needs_input_grad[index] for index in _GRAD_INPUTS]
    conv = partial(differentiable_conv, backend)
    if double_backward.is_raw(softmax, dropout, gate, mask, state):
        grad_op = partial(differentiable_grad, backend)
        found = double_backward.raw_double_backward(
            conv, grad_op, wanted, grads[:3], grad, x, weight, left, dilation, cu_seqlens
        )
        found = (*found, None, None)
    else:
        found = double_backward.fused_double_backward(
            conv, wanted, grads, grad, x, weight, left, dilation, softmax, renormalize, dropout, seed, gate, mask,
            cu_seqlens, state,
        )  # fmt: skip
    result = [None] * _GRAD_ARITY
    for index, value in zip(_GRAD_INPUTS, found, strict=True):
        result[index] = value
    return tuple(result)


# The compiler counts the parameters of `forward`, and so they are spelled out.


class TapGrad(Function):
    """tap_grad with its own derivative; the arguments of the op, all of them, and the backend."""

    @staticmethod
    def forward(
        grad,
        x,
        weight,
        left,
        dilation,
        softmax,
        renormalize,
        dropout,
        seed,
        gate,
        mask,
        cu_seqlens,
        state,
        needs,
        backend,
    ):
        return KERNELS[backend].raw_grad(
            grad, x, weight, left, dilation, softmax, renormalize, dropout, seed, gate, mask, cu_seqlens, state, needs
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend = inputs[-1]
        _grad_setup(ctx, inputs[:-1], output)
        ctx.mark_non_differentiable(*[value for bit, value in enumerate(output) if not ctx.needs & 1 << bit])

    @staticmethod
    def backward(ctx, *grads):
        return *_grad_backward(ctx, grads, ctx.needs_input_grad, ctx.backend), None

    @staticmethod
    def vmap(info, in_dims, *args):
        return vmap.grad(partial(differentiable_grad, args[-1]), info.batch_size, in_dims[:-1], args[:-1])


class TapConv(Function):
    """tap_conv; the arguments of the op, all of them, and the backend."""

    @staticmethod
    def forward(
        x, weight, left, dilation, softmax, renormalize, dropout, seed, bias, gate, mask, cu_seqlens, state, backend
    ):
        return KERNELS[backend].raw(
            x, weight, left, dilation, softmax, renormalize, dropout, seed, bias, gate, mask, cu_seqlens, state
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend = inputs[-1]
        _save_for_grad(ctx, *inputs[:-1])

    @staticmethod
    def backward(ctx, grad):
        return *_conv_backward(ctx, grad, ctx.needs_input_grad, ctx.backend), None

    @staticmethod
    def vmap(info, in_dims, *args):
        return vmap.conv(partial(differentiable_conv, args[-1]), info.batch_size, in_dims[:-1], args[:-1])


def _record(backend: str, raw):
    """The Function of eager autograd: everything in ``forward``, which is cheapest, and only as many arguments as
    given."""

    class RecordedTapConv(Function):
        @staticmethod
        def forward(ctx, *args):
            _save_for_grad(ctx, *args)
            return raw(*args)

        @staticmethod
        def backward(ctx, grad):
            given = ctx.needs_input_grad
            return _conv_backward(ctx, grad, _padded(given, _CONV_ARITY), backend)[: len(given)]

    return RecordedTapConv.apply


def _padded(needs_input_grad: tuple, arity: int) -> tuple:
    """One entry per argument of the op, where trailing defaults were left out of the call."""
    return needs_input_grad + (False,) * (arity - len(needs_input_grad))


def _conv_autograd(backend: str) -> Autograd:
    def setup_context(ctx, inputs, output):
        _save_for_grad(ctx, *inputs)

    def backward(ctx, grad):
        return _conv_backward(ctx, grad, _padded(ctx.needs_input_grad, _CONV_ARITY), backend)

    return Autograd(setup_context, backward)


def _grad_autograd(backend: str) -> Autograd:
    def backward(ctx, *grads):
        return _grad_backward(ctx, grads, _padded(ctx.needs_input_grad, _GRAD_ARITY), backend)

    return Autograd(_grad_setup, backward)


def _fake_conv(x: Tensor, *args, **kwargs) -> Tensor:
    return torch.empty_like(x)


def _fake_grad(
    grad, x, weight, left, dilation=1, softmax=False, renormalize=False, dropout=0.0, seed=None, gate=None, mask=None,
    cu_seqlens=None, initial_state=None, needs=31,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty_like(x) if needs & 1 else x.new_empty(0),
        weight.new_empty(weight.shape) if needs & 2 else weight.new_empty(0),
        x.new_empty(x.shape[2] if needs & 4 else 0, dtype=accumulate_dtype(x.dtype)),
        torch.empty_like(gate) if needs & 8 and gate is not None else x.new_empty(0),
        x.new_empty(initial_state.shape) if needs & 16 and initial_state is not None else x.new_empty(0),
    )


def _conv_flops(x, weight, *args, out_shape=None, **kwargs) -> int:
    return flops.conv_flops(x, weight)


def _grad_flops(grad, x, weight, *args, out_shape=None, needs=31, **kwargs) -> int:
    return flops.grad_flops(x, weight, args[10] if len(args) > 10 else needs)


def _step_flops(x, state, weight, *args, out_shape=None, **kwargs) -> int:
    return flops.conv_flops(x, weight)


register(OpSpec("tap_conv", _CONV_SCHEMA, _fake_conv, reference.tap_conv, _conv_flops, _conv_autograd))
register(OpSpec("tap_grad", _GRAD_SCHEMA, _fake_grad, reference.tap_grad, _grad_flops, _grad_autograd))
register(OpSpec("tap_step", _STEP_SCHEMA, _fake_conv, reference.tap_step, _step_flops))


def _kernels(backend: str) -> Kernels:
    raw, raw_grad, step = (overload(f"_{name}", backend) for name in ("tap_conv", "tap_grad", "tap_step"))
    # OpOverload.__call__ only forwards to `_op`; calling that directly saves 0.1 us of the 3 a small call takes.
    fast = getattr(raw, "_op", raw)
    return Kernels(raw, raw_grad, step, fast, _record(backend, fast))


KERNELS.update({name: _kernels(name) for name in BACKENDS})


@partial(when_imported, "torch._dynamo")
def _keep_whole(dynamo) -> None:
    """Have the compiler call the Functions instead of tracing into them. Inside torch.func.grad it takes their
    inputs for constants, skips the Function, and every gradient is silently zero (seen with torch 2.13)."""
    dynamo.allow_in_graph(TapConv)
    dynamo.allow_in_graph(TapGrad)
