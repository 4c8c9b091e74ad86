"""What the operators have in common under torch.func transforms and forward-mode differentiation: how to notice one,
and pieces of vmap rules and double backwards."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def transforming() -> bool:
    """Whether a torch.func transform or a compiler is looking at the code that runs now."""
    return torch.compiler.is_compiling() or transforms_active()


def refuse_tangents(function: str, **inputs: Tensor | None) -> None:
    """NotImplementedError for an input that carries a tangent. An operator without an autograd kernel would lose it
    without a word. Worth a call only where ``forward_ad._current_level`` is not negative. A compiler sees no tangents:
    it gets the error always, and leaves the call to eager code."""
    for argument, value in inputs.items():
        if not isinstance(value, Tensor):
            continue
        if torch.compiler.is_compiling() or forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"{function}: argument '{argument}': expected no tangent, because there are no forward-mode "
                "derivatives (use torch.func.vjp or jacrev), got a dual tensor"
            )


def recording(inputs: Sequence[Tensor | None]) -> bool:
    """Whether eager autograd records a call with these differentiable inputs."""
    if torch.is_grad_enabled():
        for value in inputs:
            if value is not None and value.requires_grad:
                return True
    return False


def mapped(value: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension first, [N, ...]; repeated where it is not mapped."""
    return value.movedim(dim, 0) if dim is not None else value.expand(size, *value.shape)


def fold(value: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """N times [B, ...] -> [N*B, ...]."""
    if value is None:
        return None
    value = mapped(value, dim, size)
    return value.reshape(size * value.shape[1], *value.shape[2:])


def loop(function: Callable, size: int, dims: tuple, args: tuple):
    """One call per element of the mapped dimension, results stacked at 0."""
    results = [
        function(*(a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True))) for i in range(size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


def double_vjp(
    function: Callable, primals: tuple, given: list[int], used: list[int], cotangent, grads: tuple
) -> tuple[Tensor, dict[int, Tensor]]:
    """The gradient of a gradient, by two torch.func.vjp: that of function(*primals) with respect to the primals
    ``used``, applied to ``cotangent``, is differentiated with respect to the cotangent and the primals ``given``;
    ``grads`` belong to those used. Returns what belongs to the cotangent, and to the primals by index.
    """

    def replaced(values: tuple, indices: list[int], by: tuple) -> tuple:
        values = list(values)
        for index, value in zip(indices, by, strict=True):
            values[index] = value
        return tuple(values)

    def gradient(cotangent, *inputs):
        values = replaced(primals, given, inputs)

        def chosen(*inputs):
            return function(*replaced(values, used, inputs))

        return torch.func.vjp(chosen, *[values[index] for index in used])[1](cotangent)

    pull = torch.func.vjp(gradient, cotangent, *[primals[index] for index in given])[1]
    to_cotangent, *to_inputs = pull(grads)
    return to_cotangent, dict(zip(given, to_inputs, strict=True))
