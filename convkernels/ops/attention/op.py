"""Registration of ``attention`` and ``attention_grad``, and the ways to call them with gradients.

As for ``tap_conv``: nothing to differentiate -> the raw op; eager autograd -> ``record``, everything in ``forward``;
torch.func and torch.compile -> ``Attention``, with ``setup_context`` and ``vmap``.
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

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, int left=0, int right=0, int outside=0, bool causal=False, bool qk=True, "
    "float scale=1.0, float rel_scale=1.0, float dropout=0.0, Tensor? seed=None, Tensor? bias=None, "
    "Tensor? query_rel=None, Tensor? rel_query=None, Tensor? key_rel=None, Tensor? value_conv=None, "
    "Tensor? value_conv_bias=None, Tensor? value_conv_scale=None, Tensor? key_mask=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None"
)
_SCHEMA = f"({_ARGUMENTS}) -> (Tensor, Tensor)"
_GRAD_SCHEMA = (
    f"(Tensor grad, Tensor? grad_lse, Tensor out, Tensor lse, {_ARGUMENTS}, int needs=1023) "
    f"-> ({', '.join(['Tensor'] * 10)})"
)
_ARITY, _GRAD_ARITY = 22, 27
_FIRST = 4
"""Where the arguments of ``attention`` begin in those of ``attention_grad``."""
INPUTS = double_backward.INPUTS


class Kernels(NamedTuple):
    """One backend's operators; all take the arguments of the op by position. raw, raw_grad: no autograd. record:
    eager autograd. Trailing default arguments may be left out."""

    raw: Any
    raw_grad: Any
    record: Any


KERNELS: dict[str, Kernels] = {}


def _full(args: tuple) -> tuple:
    """All arguments of ``attention``, where trailing defaults were left out."""
    defaults = (0, 0, 0, False, True, 1.0, 1.0, 0.0)
    return (*args, *defaults[len(args) - 3 :], *(None,) * (_ARITY - max(len(args), 11)))


def _save(ctx, args: tuple, output: tuple[Tensor, Tensor]) -> None:
    args = _full(args)
    ctx.setting = args[3:11]
    ctx.save_for_backward(*args[:3], *args[11:], *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_lse, backend) -> tuple:
    """Gradients of ``attention`` for all its arguments."""
    *tensors, out, lse = ctx.saved_tensors
    args = (*tensors[:3], *ctx.setting, *tensors[3:])
    given = ctx.needs_input_grad + (False,) * (_ARITY - len(ctx.needs_input_grad))
    needs = sum(1 << bit for bit, index in enumerate(INPUTS) if given[index])
    result: list[Tensor | None] = [None] * _ARITY
    if needs == 0 or (grad is None and grad_lse is None):
        return tuple(result)
    grad = torch.zeros_like(out) if grad is None else grad
    if torch.is_grad_enabled() or transforming():
        found = AttentionGrad.apply(grad, grad_lse, out, lse, *args, needs, backend)
    else:
        if forward_ad._current_level >= 0:
            refuse_tangents("the gradient of attention", grad=grad, grad_lse=grad_lse)
        found = KERNELS[backend].raw_grad(grad, grad_lse, out, lse, *args, needs)
    for bit, index in enumerate(INPUTS):
        if needs & 1 << bit:
            result[index] = found[bit]
    return tuple(result)


def _grad_save(ctx, args: tuple, output: tuple) -> None:
    args = (*args[:_FIRST], *_full(args[_FIRST:]), 1023) if len(args) < _GRAD_ARITY else args
    grad, grad_lse, _, _, *rest, ctx.needs = args
    ctx.setting = tuple(rest[3:11])
    ctx.save_for_backward(grad, grad_lse, *rest[:3], *rest[11:])
    ctx.set_materialize_grads(False)


def _grad_backward(ctx, grads) -> tuple:
    """Gradients of ``attention_grad`` for all its arguments: the double backward. out and lse get none of their own:
    they are functions of the other arguments, which get all of it."""
    grad, grad_lse, *tensors = ctx.saved_tensors
    args = (*tensors[:3], *ctx.setting, *tensors[3:])
    grads = [value if ctx.needs & 1 << bit else None for bit, value in enumerate(grads)]
    found = double_backward.double_backward(grads, grad, grad_lse, args)
    given = ctx.needs_input_grad + (False,) * (_GRAD_ARITY - len(ctx.needs_input_grad))
    result: list[Tensor | None] = [None] * _GRAD_ARITY
    for index, value in zip((0, 1, *(i + _FIRST for i in INPUTS)), found, strict=True):
        result[index] = value if given[index] else None
    return tuple(result)


# The compiler counts the parameters of `forward`, and so they are spelled out.


class AttentionGrad(Function):
    """attention_grad with its own derivative; the arguments of the op, all of them, and the backend."""

    @staticmethod
    def forward(
        grad, grad_lse, out, lse, q, k, v, left, right, outside, causal, qk, scale, rel_scale, dropout, seed, bias,
        query_rel, rel_query, key_rel, value_conv, value_conv_bias, value_conv_scale, key_mask, cu_seqlens_q,
        cu_seqlens_k, needs, backend,
    ):  # fmt: skip
        return KERNELS[backend].raw_grad(
            grad, grad_lse, out, lse, q, k, v, left, right, outside, causal, qk, scale, rel_scale, dropout, seed, bias,
            query_rel, rel_query, key_rel, value_conv, value_conv_bias, value_conv_scale, key_mask, cu_seqlens_q,
            cu_seqlens_k, needs,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        _grad_save(ctx, inputs[:-1], output)
        ctx.mark_non_differentiable(*[value for bit, value in enumerate(output) if not ctx.needs & 1 << bit])

    @staticmethod
    def backward(ctx, *grads):
        return *_grad_backward(ctx, grads), None

    @staticmethod
    def vmap(info, in_dims, *args):
        return vmap.grad(partial(_apply, AttentionGrad, args[-1]), info.batch_size, in_dims[:-1], args[:-1])


class Attention(Function):
    """attention; the arguments of the op, all of them, and the backend."""

    @staticmethod
    def forward(
        q, k, v, left, right, outside, causal, qk, scale, rel_scale, dropout, seed, bias, query_rel, rel_query,
        key_rel, value_conv, value_conv_bias, value_conv_scale, key_mask, cu_seqlens_q, cu_seqlens_k, backend,
    ):  # fmt: skip
        return KERNELS[backend].raw(
            q, k, v, left, right, outside, causal, qk, scale, rel_scale, dropout, seed, bias, query_rel, rel_query,
            key_rel, value_conv, value_conv_bias, value_conv_scale, key_mask, cu_seqlens_q, cu_seqlens_k,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend = inputs[-1]
        _save(ctx, inputs[:-1], output)

    @staticmethod
    def backward(ctx, grad, grad_lse):
        return *_backward(ctx, grad, grad_lse, ctx.backend), None

    @staticmethod
    def vmap(info, in_dims, *args):
        return vmap.forward(partial(_apply, Attention, args[-1]), info.batch_size, in_dims[:-1], args[:-1])


def _apply(function, backend: str, *args):
    return function.apply(*args, backend)


def _record(backend: str, raw):
    """The Function of eager autograd: everything in ``forward``, which is cheapest."""

    class RecordedAttention(Function):
        @staticmethod
        def forward(ctx, *args):
            output = raw(*args)
            _save(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx, grad, grad_lse):
            return _backward(ctx, grad, grad_lse, backend)[: len(ctx.needs_input_grad)]

    return RecordedAttention.apply


def _autograd(backend: str) -> Autograd:
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs, output)

    return Autograd(setup_context, lambda ctx, grad, grad_lse: _backward(ctx, grad, grad_lse, backend))


def _grad_autograd(backend: str) -> Autograd:
    def setup_context(ctx, inputs, output):
        _grad_save(ctx, inputs, output)

    return Autograd(setup_context, lambda ctx, *grads: _grad_backward(ctx, grads))


def _fake(q: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return torch.empty_like(q), q.new_empty((B, H, T), dtype=accumulate_dtype(q.dtype))


def _fake_grad(grad, grad_lse, out, lse, *args) -> tuple[Tensor, ...]:
    needs = args[_ARITY] if len(args) > _ARITY else 1023
    args = _full(args[:_ARITY])
    results = []
    for bit, index in enumerate(INPUTS):
        value = args[index]
        if value is None or not needs & 1 << bit:
            results.append((args[0] if value is None else value).new_empty(0))
        else:
            results.append(torch.empty_like(value) if index in (0, 1, 2, 14) else value.new_empty(value.shape))
    return tuple(results)


register(OpSpec("attention", _SCHEMA, _fake, reference.attention, flops.flops, _autograd))
register(OpSpec("attention_grad", _GRAD_SCHEMA, _fake_grad, reference.attention_grad, flops.grad_flops, _grad_autograd))


def _kernels(backend: str) -> Kernels:
    raw, raw_grad = (overload(f"_{name}", backend) for name in ("attention", "attention_grad"))
    fast = getattr(raw, "_op", raw)
    return Kernels(raw, raw_grad, _record(backend, fast))


KERNELS.update({name: _kernels(name) for name in BACKENDS})


@partial(when_imported, "torch._dynamo")
def _keep_whole(dynamo) -> None:
    """Have the compiler call the Functions instead of tracing into them (see ``tap_conv``)."""
    dynamo.allow_in_graph(Attention)
    dynamo.allow_in_graph(AttentionGrad)
