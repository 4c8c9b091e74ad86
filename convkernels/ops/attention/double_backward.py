"""The double backward, through the differentiable definition: only second derivatives run this code, and no kernel of
a backend. Memory grows with T*S."""

from torch import Tensor

from .._functorch import double_vjp
from . import reference
from .schema import INPUTS, AttentionGrad


def double_backward(into: list[Tensor | None], args: AttentionGrad) -> tuple:
    """Gradients of (grad, grad_lse, and the ten inputs); ``into`` belong to the ten outputs of ``attention_grad``."""
    primals = tuple(getattr(args, name) for name in INPUTS.names)
    given = [index for index, value in enumerate(primals) if value is not None]
    used = [index for index in given if into[index] is not None]
    if not used:
        return (None,) * (2 + len(primals))
    cotangents = (args.grad,) if args.grad_lse is None else (args.grad, args.grad_lse)

    def forward(*inputs):
        out, lse = reference.attend(args._replace(**dict(zip(INPUTS.names, inputs, strict=True))))
        out = out.to(args.grad.dtype)
        return (out,) if args.grad_lse is None else (out, lse)

    to_cotangents, by_input = double_vjp(forward, primals, given, used, cotangents, tuple(into[i] for i in used))
    to_grad, to_lse = (*to_cotangents, None)[:2]
    return to_grad, to_lse, *(by_input.get(index) for index in range(len(primals)))
