"""Registration of ``tap_conv``, ``tap_grad`` and ``tap_step``, and the ways to call them with gradients.

Which way is taken matters for speed and for what composes (all measured): nothing to differentiate -> the raw op; eager
autograd -> ``record``, an autograd.Function with everything in ``forward``, the cheapest to record; torch.func and
torch.compile -> ``conv``, an autograd.Function with ``setup_context`` and ``vmap``. No ``jvp``: it would break compiled graphs.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .. import _cost
from .._spec import Autograd, OpSpec, overload, register
from . import batching, composite, reference

_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)

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
_CONV_ARITY = 13


def _bind_conv(
    x, weight, left, dilation=1, softmax=False, renormalize=False, dropout=0.0, seed=None, bias=None, gate=None, mask=None,
    cu_seqlens=None, initial_state=None,
):  # fmt: skip
    return (
        x, weight, left, dilation, softmax, renormalize, dropout, seed, bias, gate, mask, cu_seqlens, initial_state,
    )  # fmt: skip


def _bind_grad(
    grad, x, weight, left, dilation=1, softmax=False, renormalize=False, dropout=0.0, seed=None, gate=None, mask=None,
    cu_seqlens=None, initial_state=None, needs=31,
):  # fmt: skip
    return (
        grad, x, weight, left, dilation, softmax, renormalize, dropout, seed, gate, mask, cu_seqlens, initial_state, needs,
    )  # fmt: skip


def transforming() -> bool:
    """Whether a torch.func transform or a compiler is looking at the code that runs now."""
    return torch.compiler.is_compiling() or _transforms_active()


class Kernels(NamedTuple):
    """One backend's operators as Python callables; all take the arguments of the op, by position.

    raw: no autograd.  record: eager autograd; trailing default arguments may be left out.  conv, grad: for torch.func,
    torch.compile and higher derivatives; every argument has to be given.  step: the decoding step.
    """

    raw: Any
    record: Any
    conv: Any
    grad: Any
    step: Any


def _save_for_grad(ctx, inputs, needs_input_grad) -> None:
    """Keep what the backward pass reads: x only if a gradient depends on it (that of weight or gate)."""
    x, weight, left, dilation, softmax, renormalize, dropout, seed, bias, gate, mask, cu_seqlens, state = inputs
    keep_x = needs_input_grad[1] or (gate is not None and needs_input_grad[9])
    ctx.save_for_backward(x if keep_x else None, weight, seed, gate, mask, cu_seqlens, state)
    ctx.setting = left, dilation, softmax, renormalize, dropout
    ctx.bias_dtype = None if bias is None else bias.dtype


def _conv_backward(ctx, grad, needs_input_grad, raw_grad, grad_function) -> tuple:
    """Gradients of tap_conv for all its arguments."""
    x, weight, seed, gate, mask, cu_seqlens, state = ctx.saved_tensors
    needs = 0
    for bit, index in enumerate(_CONV_INPUTS):
        if needs_input_grad[index]:
            needs |= 1 << bit
    # If x was not kept, no gradient depends on its values; grad has its shape and type.
    args = (grad, grad if x is None else x, weight, *ctx.setting, seed, gate, mask, cu_seqlens, state, needs)
    call = grad_function if torch.is_grad_enabled() or transforming() else raw_grad
    to_x, to_weight, to_bias, to_gate, to_state = call(*args)
    if needs & 4 and to_bias.dtype != ctx.bias_dtype:
        to_bias = to_bias.to(ctx.bias_dtype)
    return (
        to_x if needs & 1 else None,
        to_weight if needs & 2 else None,
        *(None,) * 6,
        to_bias if needs & 4 else None,
        to_gate if needs & 8 else None,
        None,
        None,
        to_state if needs & 16 else None,
    )


def _grad_setup(ctx, inputs, output) -> None:
    grad, x, weight, left, dilation, softmax, renormalize, dropout, seed, gate, mask, cu_seqlens, state, needs = inputs
    ctx.save_for_backward(grad, x, weight, seed, gate, mask, cu_seqlens, state)
    ctx.setting = left, dilation, softmax, renormalize, dropout
    ctx.needs = needs
    ctx.set_materialize_grads(False)


def _grad_backward(ctx, grads, needs_input_grad, conv, grad_function) -> tuple:
    """Gradients of tap_grad for all its arguments: the double backward."""
    grad, x, weight, seed, gate, mask, cu_seqlens, state = ctx.saved_tensors
    left, dilation, softmax, renormalize, dropout = ctx.setting
    grads = [value if ctx.needs & 1 << bit else None for bit, value in enumerate(grads)]
    wanted = [needs_input_grad[index] for index in _GRAD_INPUTS]

    def bare_conv(*args, **kwargs):
        return conv(*_bind_conv(*args, **kwargs))

    def bare_grad(*args, **kwargs):
        return grad_function(*_bind_grad(*args, **kwargs))

    if composite.is_raw(softmax, dropout, gate, mask, state):
        found = composite.raw_double_backward(
            bare_conv, bare_grad, wanted, grads[:3], grad, x, weight, left, dilation, cu_seqlens
        )
        found = (*found, None, None)
    else:
        found = composite.fused_double_backward(
            bare_conv, wanted, grads, grad, x, weight, left, dilation, softmax, renormalize, dropout, seed, gate, mask,
            cu_seqlens, state,
        )  # fmt: skip
    result = [None] * 14
    for index, value in zip(_GRAD_INPUTS, found, strict=True):
        result[index] = value
    return tuple(result)


@cache
def kernels(backend: str) -> Kernels:
    """The callables of one backend."""
    raw, raw_grad, step = (overload(f"_{name}", backend) for name in ("tap_conv", "tap_grad", "tap_step"))
    # OpOverload.__call__ only forwards to `_op`; calling that directly saves 0.1 us of the 3 a small call takes.
    fast = getattr(raw, "_op", raw)

    class TapGrad(Function):
        @staticmethod
        def forward(*args):
            return raw_grad(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            _grad_setup(ctx, inputs, output)
            ctx.mark_non_differentiable(*(value for bit, value in enumerate(output) if not inputs[-1] & 1 << bit))

        @staticmethod
        def backward(ctx, *grads):
            return _grad_backward(ctx, grads, ctx.needs_input_grad, TapConv.apply, TapGrad.apply)

        @staticmethod
        def vmap(info, in_dims, *args):
            return batching.grad(TapGrad.apply, info.batch_size, in_dims, args)

    class TapConv(Function):
        @staticmethod
        def forward(*args):
            return raw(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            _save_for_grad(ctx, inputs, ctx.needs_input_grad)

        @staticmethod
        def backward(ctx, grad):
            return _conv_backward(ctx, grad, ctx.needs_input_grad, raw_grad, TapGrad.apply)

        @staticmethod
        def vmap(info, in_dims, *args):
            return batching.conv(TapConv.apply, info.batch_size, in_dims, args)

    class Record(Function):
        @staticmethod
        def forward(ctx, *args):
            missing = _CONV_ARITY - len(args)
            if missing:
                _save_for_grad(ctx, _bind_conv(*args), ctx.needs_input_grad)
            else:
                _save_for_grad(ctx, args, ctx.needs_input_grad)
            return fast(*args)

        @staticmethod
        def backward(ctx, grad):
            given = ctx.needs_input_grad
            found = _conv_backward(ctx, grad, given + (False,) * (_CONV_ARITY - len(given)), raw_grad, TapGrad.apply)
            return found[: len(given)]

    return Kernels(fast, Record.apply, TapConv.apply, TapGrad.apply, getattr(step, "_op", step))


def _conv_autograd(backend: str) -> Autograd:
    def setup_context(ctx, inputs, output):
        _save_for_grad(ctx, inputs, ctx.needs_input_grad)

    def backward(ctx, grad):
        raw_grad = overload("_tap_grad", backend)
        return _conv_backward(ctx, grad, ctx.needs_input_grad, raw_grad, kernels(backend).grad)

    return Autograd(setup_context, backward)


def _grad_autograd(backend: str) -> Autograd:
    def backward(ctx, *grads):
        functions = kernels(backend)
        return _grad_backward(ctx, grads, ctx.needs_input_grad, functions.conv, functions.grad)

    return Autograd(_grad_setup, backward)


def _fake_conv(x: Tensor, *args, **kwargs) -> Tensor:
    return torch.empty_like(x)


def _fake_grad(*args, **kwargs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, x, weight, *_, gate, _, _, state, needs = _bind_grad(*args, **kwargs)
    return (
        torch.empty_like(x) if needs & 1 else x.new_empty(0),
        weight.new_empty(weight.shape) if needs & 2 else weight.new_empty(0),
        weight.new_empty(x.shape[2]) if needs & 4 else weight.new_empty(0),
        torch.empty_like(gate) if needs & 8 and gate is not None else x.new_empty(0),
        state.new_empty(state.shape) if needs & 16 and state is not None else x.new_empty(0),
    )


def _conv_flops(x, weight, *args, out_shape=None, **kwargs) -> int:
    return _cost.conv_flops(x, weight)


def _grad_flops(grad, x, weight, *args, out_shape=None, needs=31, **kwargs) -> int:
    return _cost.grad_flops(x, weight, args[10] if len(args) > 10 else needs)


def _step_flops(x, state, weight, *args, out_shape=None, **kwargs) -> int:
    return _cost.conv_flops(x, weight)


register(OpSpec("tap_conv", _CONV_SCHEMA, _fake_conv, reference.tap_conv, _conv_flops, _conv_autograd))
register(OpSpec("tap_grad", _GRAD_SCHEMA, _fake_grad, reference.tap_grad, _grad_flops, _grad_autograd))
register(OpSpec("tap_step", _STEP_SCHEMA, _fake_conv, reference.tap_step, _step_flops))
