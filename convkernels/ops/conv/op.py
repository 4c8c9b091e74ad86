"""Registration of the operators of the convolutions, and the ways to call them with gradients."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...backends import AUTO, BACKENDS
from .._differentiable import hooks, recorded, save_gradients, transformable
from .._dtypes import accumulate_dtype
from .._functorch import refuse_tangents, transforming
from .._select import choose_as_it_runs
from .._spec import OpSpec, called, overload, register
from . import double_backward, flops, reference, vmap
from .schema import (
    ACTIVATION_GRAD_INPUTS,
    FOR_ACTIVATION_GRAD,
    FOR_DOUBLE_BACKWARD,
    FOR_GRAD,
    GRAD_INPUTS,
    INPUTS,
    NONE,
    OF_ACTIVATION_GRAD,
    OF_SUM,
    PLAIN,
    TapActivationGrad,
    TapConv,
    TapGrad,
    TapStep,
    of_grad,
)

_plan, _keep = INPUTS.plan, FOR_GRAD.keep
_READS_X = INPUTS.bit["weight"] | INPUTS.bit["gate"]
_ACTIVATION, _OUT_GATE = (TapConv._fields.index(name) for name in ("activation", "out_gate"))


class Kernels(NamedTuple):
    """One backend's operators; all take the arguments of the op by position. raw, raw_activation_grad, raw_grad, step:
    no autograd; those of AUTO, which has no others, are public ones.
    fast: raw, for eager code only.  record: eager autograd. Trailing default arguments may be left out.
    plain, record_plain: fast and record of x, weight and ``packed`` settings, for tensors outside torch.func."""

    raw: Any
    raw_activation_grad: Any
    raw_grad: Any
    step: Any
    fast: Any = None
    record: Any = None
    plain: Any = None
    record_plain: Any = None


KERNELS: dict[str, Kernels] = {}


def _save(ctx, args: tuple, output: Tensor) -> None:
    """Keep what the backward pass reads: x, the first argument, only if the gradient of weight or gate is needed, or
    what the sum is followed by."""
    ctx.by_sum = len(args) <= _ACTIVATION or (
        args[_ACTIVATION] == NONE and (len(args) <= _OUT_GATE or args[_OUT_GATE] is None)
    )
    if not ctx.by_sum:
        FOR_ACTIVATION_GRAD.keep(ctx, *args)
    elif _plan(ctx.needs_input_grad)[0] & _READS_X:
        _keep(ctx, *args)
    else:
        _keep(ctx, None, *args[1:])


def _backward(ctx, backend: str, grad: Tensor) -> tuple:
    needs, gradients = _plan(ctx.needs_input_grad)
    residual, of_sum = grad if needs & INPUTS.bit["residual"] else None, needs & OF_SUM
    out_gate, found = None, (None,) * len(TapGrad.inputs)
    if ctx.by_sum:
        args = FOR_GRAD.arguments(ctx, grad, of_sum)
        if not needs & _READS_X:
            # No gradient asked for depends on the values of x; grad has its shape and type.
            args = (grad, grad, *args[2:])
    elif needs & ~INPUTS.bit["residual"]:
        wanted = (of_sum > 0) | (needs & INPUTS.bit["out_gate"] > 0) << 1
        args = TapActivationGrad(*FOR_ACTIVATION_GRAD.arguments(ctx, grad, wanted))
        to_sum, out_gate = _called(differentiable_activation_grad, KERNELS[backend].raw_activation_grad, backend, args)
        args = of_grad(args, to_sum, of_sum)
    if of_sum:
        found = _gradients(backend, args)
    # The gradient of the bias has the accumulation type; autograd rounds it to the type of the bias.
    return gradients((*found, out_gate, residual, None))


def _save_plain(ctx, args: tuple, output: Tensor) -> None:
    x, weight, ctx.settings = args
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)


def _backward_plain(ctx, backend: str, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    args = PLAIN.record(grad if x is None else x, weight, ctx.settings)
    needs, gradients = _plan(ctx.needs_input_grad[:2])
    found = _gradients(backend, TapGrad(grad, args.x, args.weight, args.left, args.dilation, args.softmax, needs=needs))
    return *gradients((*found, None, None, None)), None


def _gradients(backend: str, args: tuple) -> tuple[Tensor, ...]:
    """args: of tap_grad."""
    return _called(differentiable_grad, KERNELS[backend].raw_grad, backend, args)


def _called(differentiable, raw, backend: str, args: tuple) -> tuple[Tensor, ...]:
    """args: of an operator that returns gradients."""
    if torch.is_grad_enabled() or transforming():
        return differentiable(backend, *args)
    if forward_ad._current_level >= 0:
        refuse_tangents("the gradient of tap_conv", grad=args[0])
    return raw(*args)


_save_grad = save_gradients(FOR_DOUBLE_BACKWARD, TapGrad)
_save_activation_grad = save_gradients(OF_ACTIVATION_GRAD, TapActivationGrad)


def _double_backward(ctx, backend: str, *grads: Tensor | None) -> tuple:
    args = TapGrad(*FOR_DOUBLE_BACKWARD.arguments(ctx))
    into = [grad if asked else None for grad, asked in zip(grads, args.wanted, strict=True)]
    needs, gradients = GRAD_INPUTS.plan(ctx.needs_input_grad)
    conv, grad_op = (partial(function, backend) for function in (differentiable_conv, differentiable_grad))
    return gradients((*double_backward.double_backward(conv, grad_op, needs, into, args), None))


def _activation_double_backward(ctx, backend: str, *grads: Tensor | None) -> tuple:
    args = TapActivationGrad(*OF_ACTIVATION_GRAD.arguments(ctx))
    into = [grad if asked else None for grad, asked in zip(grads, args.wanted, strict=True)]
    _, gradients = ACTIVATION_GRAD_INPUTS.plan(ctx.needs_input_grad)
    return gradients((*double_backward.of_activation_grad(partial(differentiable_conv, backend), into, args), None))


differentiable_activation_grad = transformable(
    TapActivationGrad,
    lambda backend: KERNELS[backend].raw_activation_grad,
    _save_activation_grad,
    _activation_double_backward,
    vmap.activation_grad,
)
differentiable_grad = transformable(
    TapGrad, lambda backend: KERNELS[backend].raw_grad, _save_grad, _double_backward, vmap.backward
)
differentiable_conv = transformable(TapConv, lambda backend: KERNELS[backend].raw, _save, _backward, vmap.forward)


def _fake(args: TapConv | TapStep) -> Tensor:
    return torch.empty_like(args.x)


def _fake_activation_grad(args: TapActivationGrad) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(args.x) if asked else args.x.new_empty(0) for asked in args.wanted)


def _fake_grad(args: TapGrad) -> tuple[Tensor, ...]:
    x, weight, gate, state, wanted = args.x, args.weight, args.gate, args.initial_state, args.wanted
    return (
        torch.empty_like(x) if wanted.x else x.new_empty(0),
        weight.new_empty(weight.shape) if wanted.weight else weight.new_empty(0),
        x.new_empty(x.shape[2] if wanted.bias else 0, dtype=accumulate_dtype(x.dtype)),
        torch.empty_like(gate) if wanted.gate and gate is not None else x.new_empty(0),
        x.new_empty(state.shape) if wanted.initial_state and state is not None else x.new_empty(0),
    )


register(
    OpSpec(
        TapConv, _fake, reference.tap_conv, flops.forward, partial(hooks, save=_save, backward=_backward), plain=PLAIN
    )
)
register(
    OpSpec(
        TapActivationGrad,
        _fake_activation_grad,
        reference.tap_activation_grad,
        flops.forward,
        partial(hooks, save=_save_activation_grad, backward=_activation_double_backward),
    )
)
register(
    OpSpec(
        TapGrad,
        _fake_grad,
        reference.tap_grad,
        flops.backward,
        partial(hooks, save=_save_grad, backward=_double_backward),
    )
)
register(OpSpec(TapStep, _fake, reference.tap_step, flops.forward))


def _function(args: TapConv | TapActivationGrad | TapGrad | TapStep) -> tuple[str]:
    """The public function that makes such a call."""
    *leading, heads, _ = args.weight.shape
    kind = "dynamic" if leading else "lightweight" if args.softmax or heads != args.x.shape[-1] else "depthwise"
    return (f"{kind}_conv1d{'_step' if isinstance(args, TapStep) else ''}",)


_KINDS = (TapConv, TapActivationGrad, TapGrad, TapStep)
for _kind in _KINDS:
    choose_as_it_runs(_kind, _function)


def _kernels(backend: str) -> Kernels:
    raw, *others = (called(kind, backend) for kind in _KINDS)
    if backend == AUTO:
        return Kernels(raw, *others)
    # OpOverload.__call__ only forwards to `_op`; calling that directly saves 0.1 us of the 3 a small call takes.
    fast, plain = (getattr(op, "_op", op) for op in (raw, overload("_plain_tap_conv", backend)))
    record = recorded(TapConv, backend, fast, _save, _backward)
    record_plain = recorded(TapConv, backend, plain, _save_plain, _backward_plain, unwrapped=True)
    return Kernels(raw, *others, fast, record, plain, record_plain)


KERNELS.update({name: _kernels(name) for name in (*BACKENDS, AUTO)})
