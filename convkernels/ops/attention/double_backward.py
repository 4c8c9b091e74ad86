"""The double backward, through the differentiable definition: only second derivatives run this code, and no kernel of
a backend. Memory grows with T*S."""

from torch import Tensor

from .._functorch import double_vjp
from . import reference

INPUTS = (0, 1, 2, 12, 13, 14, 15, 16, 17, 18)
"""Positions of the differentiable arguments of ``attention``, in the order of the bits of ``needs``."""


def double_backward(grads: list, grad: Tensor, grad_lse: Tensor | None, args: tuple) -> list:
    """Gradients of (grad, grad_lse, and the ten inputs); ``grads`` belong to the ten outputs of ``attention_grad``."""
    given = [index for index in INPUTS if args[index] is not None]
    used = [index for index, value in zip(INPUTS, grads, strict=True) if args[index] is not None and value is not None]
    if not used:
        return [None] * (2 + len(INPUTS))
    cotangents = (grad,) if grad_lse is None else (grad, grad_lse)

    def forward(*inner):
        out, lse = reference.attend(*inner)
        out = out.to(grad.dtype)
        return (out,) if grad_lse is None else (out, lse)

    into = tuple(grads[INPUTS.index(index)] for index in used)
    to_cotangents, by_input = double_vjp(forward, args, given, used, cotangents, into)
    return [to_cotangents[0], to_cotangents[1] if grad_lse is not None else None, *(by_input.get(i) for i in INPUTS)]
