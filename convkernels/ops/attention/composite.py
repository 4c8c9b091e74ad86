"""The double backward, through the differentiable definition: only second derivatives run this code, and no kernel of
a backend. Memory grows with T*S."""

import torch
from torch import Tensor

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

    def gradient(cotangents, *inputs):
        values = list(args)
        for index, value in zip(given, inputs, strict=True):
            values[index] = value

        def forward(*chosen):
            inner = list(values)
            for index, value in zip(used, chosen, strict=True):
                inner[index] = value
            out, lse = reference.attend(*inner)
            out = out.to(grad.dtype)
            return (out,) if grad_lse is None else (out, lse)

        return torch.func.vjp(forward, *[values[index] for index in used])[1](cotangents)

    pull = torch.func.vjp(gradient, cotangents, *[args[index] for index in given])[1]
    to_cotangents, *to_inputs = pull(tuple(grads[INPUTS.index(index)] for index in used))
    by_input = dict(zip(given, to_inputs, strict=True))
    return [to_cotangents[0], to_cotangents[1] if grad_lse is not None else None, *(by_input.get(i) for i in INPUTS)]
