"""Registration of ``attention`` and ``attention_grad``, and the ways to call them with gradients."""

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
from .._spec import OpSpec, called, register
from . import flops, reference, vmap
from .double_backward import double_backward
from .schema import FOR_DOUBLE_BACKWARD, FOR_GRAD, GRAD_INPUTS, INPUTS, ROWS, Attention, AttentionGrad


class Kernels(NamedTuple):
    """One backend's operators; all take the arguments of the op by position. raw, raw_grad: no autograd; those of AUTO,
    which has no other, are public ones. record: eager autograd. Trailing default arguments may be left out."""

    raw: Any
    raw_grad: Any
    record: Any = None


KERNELS: dict[str, Kernels] = {}


def _save(ctx, args: tuple, output: tuple[Tensor, Tensor]) -> None:
    FOR_GRAD.keep(ctx, *args, out=output[0], lse=output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, backend: str, grad: Tensor | None, grad_lse: Tensor | None) -> tuple:
    needs, gradients = INPUTS.plan(ctx.needs_input_grad)
    if needs == 0 or (grad is None and grad_lse is None):
        return (None,) * len(ctx.needs_input_grad)
    args = FOR_GRAD.arguments(ctx, grad, grad_lse, needs)
    if grad is None:
        args = (torch.zeros_like(AttentionGrad(*args).out), *args[1:])
    if torch.is_grad_enabled() or transforming():
        found = differentiable_grad(backend, *args)
    else:
        if forward_ad._current_level >= 0:
            refuse_tangents("the gradient of attention", grad=grad, grad_lse=grad_lse)
        found = KERNELS[backend].raw_grad(*args)
    return gradients((*found, None))


_save_grad = save_gradients(FOR_DOUBLE_BACKWARD, AttentionGrad)


def _double_backward(ctx, backend: str, *grads: Tensor | None) -> tuple:
    args = AttentionGrad(*FOR_DOUBLE_BACKWARD.arguments(ctx))
    into = [grad if asked else None for grad, asked in zip(grads, args.wanted, strict=True)]
    _, gradients = GRAD_INPUTS.plan(ctx.needs_input_grad)
    return gradients((*double_backward(into, args), None))


differentiable_grad = transformable(
    AttentionGrad, lambda backend: KERNELS[backend].raw_grad, _save_grad, _double_backward, vmap.backward
)
differentiable = transformable(Attention, lambda backend: KERNELS[backend].raw, _save, _backward, vmap.forward)


def _fake(args: Attention) -> tuple[Tensor, Tensor]:
    q = args.q
    B, T, H, _ = q.shape
    return torch.empty_like(q), q.new_empty((B, H, T), dtype=accumulate_dtype(q.dtype))


def _fake_grad(args: AttentionGrad) -> tuple[Tensor, ...]:
    results = []
    for name, asked in args.wanted._asdict().items():
        value = getattr(args, name)
        if value is None or not asked:
            results.append((args.q if value is None else value).new_empty(0))
        else:
            results.append(torch.empty_like(value) if name in ROWS else value.new_empty(value.shape))
    return tuple(results)


register(OpSpec(Attention, _fake, reference.attention, flops.forward, partial(hooks, save=_save, backward=_backward)))
register(
    OpSpec(
        AttentionGrad,
        _fake_grad,
        reference.attention_grad,
        flops.backward,
        partial(hooks, save=_save_grad, backward=_double_backward),
    )
)


for _kind in (Attention, AttentionGrad):
    choose_as_it_runs(_kind, lambda args: ("composite_attention", type(args).__name__))


def _kernels(backend: str) -> Kernels:
    raw, raw_grad = (called(kind, backend) for kind in (Attention, AttentionGrad))
    if backend == AUTO:
        return Kernels(raw, raw_grad)
    fast = getattr(raw, "_op", raw)
    return Kernels(raw, raw_grad, recorded(Attention, backend, fast, _save, _backward))


KERNELS.update({name: _kernels(name) for name in (*BACKENDS, AUTO)})
