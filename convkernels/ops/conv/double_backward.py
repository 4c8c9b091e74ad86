"""The double backward, put together from differentiable PyTorch and the raw convolution of the same backend.

Only second derivatives run this code. The raw convolution is bilinear, so its gradient is differentiated by calling the
convolution and its gradient again. Softmax, dropout, gate, mask and state are differentiated through a composite: a
prologue in PyTorch that produces plain inputs and plain weights, followed by the raw convolution.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .._functorch import double_vjp
from . import reference


def is_raw(softmax: bool, dropout: float, gate: Tensor | None, mask: Tensor | None, state: Tensor | None) -> bool:
    """Whether an op call is the bare bilinear map of x and weight."""
    return not softmax and dropout == 0 and gate is None and mask is None and state is None


def raw_double_backward(conv: Callable, grad_op: Callable, wanted, grads, grad, x, weight, left, dilation, cu_seqlens):
    """Gradients of (grad, x, weight) where ``grads`` belong to (grad_x, grad_weight, grad_bias) of the raw map."""
    into_x, into_weight, into_bias = grads
    to_grad = to_x = to_weight = None
    if wanted[0]:
        terms = []
        if into_x is not None:
            terms.append(conv(into_x, weight, left, dilation, cu_seqlens=cu_seqlens))
        if into_weight is not None:
            terms.append(conv(x, into_weight, left, dilation, cu_seqlens=cu_seqlens))
        if into_bias is not None:
            terms.append(into_bias.to(grad.dtype).expand_as(grad))
        to_grad = sum(terms[1:], terms[0]) if terms else None
    if wanted[1] and into_weight is not None:
        to_x = grad_op(grad, x, into_weight, left, dilation, cu_seqlens=cu_seqlens, needs=1)[0]
    if wanted[2] and into_x is not None:
        to_weight = grad_op(grad, into_x, weight, left, dilation, cu_seqlens=cu_seqlens, needs=2)[1]
    return to_grad, to_x, to_weight


def forward(
    conv: Callable,
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
) -> Tensor:
    """``tap_conv`` with everything but the bare convolution written in differentiable PyTorch, in the accumulation
    type."""
    dtype = reference.accumulate_dtype(x.dtype)
    B, T, C = x.shape
    K = weight.shape[-1]
    state_rows = None if initial_state is None else initial_state.shape[1]
    z = reference.gated_input(x.to(dtype), None if gate is None else gate.to(dtype), mask)
    if softmax or dropout > 0:
        inside = None
        if renormalize:
            _, inside = reference.source_rows(T, K, left, dilation, x.device, cu_seqlens, state_rows)
        w = reference.tap_weights(weight.to(dtype), inside, softmax, renormalize, dropout, seed)
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
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


def fused_double_backward(
    conv: Callable,
    wanted,
    grads,
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
):
    """Gradients of (grad, x, weight, gate, initial_state); ``grads`` belong to the five outputs of ``tap_grad``."""
    given = [index for index, value in enumerate((x, weight, None, gate, state)) if value is not None]
    bias_like = x.new_zeros(x.shape[2], dtype=reference.accumulate_dtype(x.dtype))
    primals = (x, weight, bias_like, gate, state)
    used = [index for index, value in enumerate(primals) if value is not None and grads[index] is not None]

    if not used:
        return (None,) * 5

    def function(x, weight, bias, gate, state):
        return forward(
            conv, x, weight, left, dilation, softmax, renormalize, dropout, seed, bias, gate, mask, cu_seqlens, state
        )

    to_grad, by_input = double_vjp(function, primals, given, used, grad, tuple(grads[index] for index in used))
    found = [to_grad, by_input[0], by_input[1], by_input.get(3), by_input.get(4)]
    return tuple(value if want else None for value, want in zip(found, wanted, strict=True))
