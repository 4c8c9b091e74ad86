"""The double backward, put together from differentiable PyTorch and the raw convolution of the same backend.

Only second derivatives run this code. The raw convolution is bilinear, so its gradient is differentiated by calling the
convolution and its gradient again. Softmax, dropout, gate, mask and state are differentiated through PyTorch: a
prologue produces plain inputs and plain weights for the raw convolution.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .._dtypes import accumulate_dtype
from .._functorch import double_vjp
from . import reference
from .schema import GRAD_INPUTS, INPUTS, TapActivationGrad, TapGrad


def double_backward(conv: Callable, grad_op: Callable, needs: int, into: list, args: TapGrad) -> tuple:
    """Gradients of (grad, x, weight, gate, initial_state), those that ``needs`` asks for or more; ``into`` belong to
    the five outputs of ``tap_grad``, None where there is none."""
    bilinear = not args.softmax and args.dropout == 0
    if bilinear and args.gate is None and args.mask is None and args.initial_state is None:
        return (*_bilinear(conv, grad_op, needs, into[:3], args), None, None)
    return _fused(conv, into, args)


def _bilinear(conv: Callable, grad_op: Callable, needs: int, into: list, args: TapGrad):
    """Gradients of (grad, x, weight) of the raw map, where ``into`` belong to (grad_x, grad_weight, grad_bias)."""
    into_x, into_weight, into_bias = into
    relation = {"left": args.left, "dilation": args.dilation, "cu_seqlens": args.cu_seqlens}
    to_grad = to_x = to_weight = None
    if needs & GRAD_INPUTS.bit["grad"]:
        terms = []
        if into_x is not None:
            terms.append(conv(into_x, args.weight, **relation))
        if into_weight is not None:
            terms.append(conv(args.x, into_weight, **relation))
        if into_bias is not None:
            terms.append(into_bias.to(args.grad.dtype).expand_as(args.grad))
        to_grad = sum(terms[1:], terms[0]) if terms else None
    if needs & GRAD_INPUTS.bit["x"] and into_weight is not None:
        to_x = grad_op(args.grad, args.x, into_weight, **relation, needs=INPUTS.bit["x"])[0]
    if needs & GRAD_INPUTS.bit["weight"] and into_x is not None:
        to_weight = grad_op(args.grad, into_x, args.weight, **relation, needs=INPUTS.bit["weight"])[1]
    return to_grad, to_x, to_weight


def _sum(conv: Callable, args: TapActivationGrad | TapGrad, x, weight, bias, gate, initial_state) -> Tensor:
    """The sum of ``tap_conv``, with everything but the bare convolution written in differentiable PyTorch, in the
    accumulation type; the settings are those of ``args``."""
    dtype = accumulate_dtype(x.dtype)
    B, T, C = x.shape
    K = weight.shape[-1]
    left, dilation, cu_seqlens = args.left, args.dilation, args.cu_seqlens
    state_rows = None if initial_state is None else initial_state.shape[1]
    z = reference.gated_input(x.to(dtype), None if gate is None else gate.to(dtype), args.mask, args.gate_activation)
    if args.softmax or args.dropout > 0:
        inside = None
        if args.renormalize:
            _, inside = reference.source_rows(T, K, left, dilation, x.device, cu_seqlens, state_rows)
        w = reference.tap_weights(weight.to(dtype), inside, args)
        w = w[0, 0] if w.shape[:2] == (1, 1) and weight.dim() == 2 else w.expand(B, *w.shape[1:])
    else:
        w = weight.to(dtype)
    if initial_state is None:
        y = conv(z, w, left, dilation, cu_seqlens=cu_seqlens)
    else:
        # Put each sequence's state in front of it and drop the outputs there: the windows then find it by themselves.
        sequence, _, _ = reference.sequence_bounds(T, cu_seqlens, x.device)
        N = reference.sequence_count(cu_seqlens)
        cu = torch.tensor([0, T], device=x.device) if cu_seqlens is None else cu_seqlens.to(torch.int64)
        own = torch.arange(T, device=x.device) + state_rows * (sequence + 1)
        longer = cu + state_rows * torch.arange(N + 1, device=x.device)
        rows = (longer[:-1, None] + torch.arange(state_rows, device=x.device)).reshape(-1)
        z = z.new_zeros(B, T + N * state_rows, C).index_copy(1, own, z)
        z = z.index_copy(1, rows, initial_state.to(dtype).reshape(B, N * state_rows, C))
        if w.dim() == 4 and w.shape[1] != 1:
            w = w.new_zeros(B, z.shape[1], *w.shape[2:]).index_copy(1, own, w)
        y = conv(z, w, left, dilation, cu_seqlens=longer).index_select(1, own)
    return y if bias is None else y + bias.to(dtype)


def _fused(conv: Callable, into: list, args: TapGrad) -> tuple:
    x = args.x
    bias = x.new_zeros(x.shape[2], dtype=accumulate_dtype(x.dtype))  # its gradient does not depend on its values
    primals = (x, args.weight, bias, args.gate, args.initial_state)
    given = [index for index in (0, 1, 3, 4) if primals[index] is not None]
    used = [index for index, value in enumerate(primals) if value is not None and into[index] is not None]
    if not used:
        return (None,) * 5

    def function(*primals):
        return _sum(conv, args, *primals).to(x.dtype)

    to_grad, by_input = double_vjp(function, primals, given, used, args.grad, tuple(into[index] for index in used))
    return to_grad, *(by_input.get(index) for index in (0, 1, 3, 4))


def of_activation_grad(conv: Callable, into: list, args: TapActivationGrad) -> tuple:
    """Gradients of (grad, x, weight, bias, gate, initial_state, out_gate); ``into`` belong to the two outputs of
    ``tap_activation_grad``, None where there is none."""
    primals = (args.grad, args.x, args.weight, args.bias, args.gate, args.initial_state, args.out_gate)
    given = [index for index, value in enumerate(primals) if value is not None]
    used = [index for index, value in enumerate(into) if value is not None]
    if not used:
        return (None,) * len(primals)

    def function(*values):
        by_input = dict(zip(given, values, strict=True))
        grad, *operands, out_gate = (by_input.get(index) for index in range(len(primals)))
        total = _sum(conv, args, *operands)
        results = reference.finish_gradients(total, grad.to(total.dtype), out_gate, args.activation)
        return tuple(results[index].to(args.x.dtype) for index in used)

    gradients = torch.func.vjp(function, *[primals[index] for index in given])[1](tuple(into[index] for index in used))
    by_input = dict(zip(given, gradients, strict=True))
    return tuple(by_input.get(index) for index in range(len(primals)))
