"""The causal depthwise convolutions of transformers models, computed by this package.

Mamba, Qwen3-Next, LFM2 and others have modules whose ``forward`` calls ``causal_conv1d_fn`` and
``causal_conv1d_update``, global names of their file, which come to mean this package's functions.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ...ops._functorch import recording
from .. import causal_conv1d
from .swapping import Adapter

# The two functions as modules of transformers call them: with any activation, and options of other functions.


def causal_conv1d_fn(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **options
) -> Tensor:
    """``causal_conv1d.causal_conv1d_fn``.

    options: seq_idx and initial_states as there, cu_seqlens [N+1] of packed sequences in the place of seq_idx; others
        are not for the convolution.
    """
    seq_idx, cu_seqlens = options.get("seq_idx"), options.get("cu_seqlens")
    if seq_idx is None and cu_seqlens is not None:
        B, _, T = hidden_states.shape
        positions = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        seq_idx = torch.searchsorted(cu_seqlens, positions, right=True).expand(B, T)
    inside, outside = _activations(activation)
    weight, bias = _precision(hidden_states, weight), _precision(hidden_states, bias)
    states = options.get("initial_states")
    return outside(causal_conv1d.causal_conv1d_fn(hidden_states, weight, bias, seq_idx, states, activation=inside))


def causal_conv1d_update(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``causal_conv1d.causal_conv1d_update``, which has no gradients, and its equal where autograd records the call."""
    if recording((hidden_states, conv_state, weight, bias)):
        W, reach = conv_state.shape[2], weight.shape[1] - 1
        inputs = torch.cat([conv_state, hidden_states], 2)
        conv_state.copy_(inputs[:, :, -W:])
        past = inputs[:, :, W - reach : W]
        return causal_conv1d_fn(hidden_states, weight, bias, activation, initial_states=past)
    inside, outside = _activations(activation)
    weight, bias = _precision(hidden_states, weight), _precision(hidden_states, bias)
    return outside(causal_conv1d.causal_conv1d_update(hidden_states, conv_state, weight, bias, inside))


def _activations(name: str | None) -> tuple[str | None, Callable[[Tensor], Tensor]]:
    """What the convolution applies itself, and what is left."""
    if name in (None, "silu", "swish"):
        return name, lambda y: y
    return None, ACT2FN[name]


def _precision(x: Tensor, parameter: Tensor | None) -> Tensor | None:
    """Some models convolve in float32 whatever type their parameters have, of which this package refuses float64."""
    if parameter is None or (parameter.dtype == torch.float64) == (x.dtype == torch.float64):
        return parameter
    return parameter.to(x.dtype)


_FUNCTIONS = {"causal_conv1d_fn": causal_conv1d_fn, "causal_conv1d_update": causal_conv1d_update}


@functools.cache
def _callers(kind: type) -> tuple[str, ...]:
    """Names of the methods that call the two functions."""
    methods = ((name, inspect.unwrap(method)) for name, method in inspect.getmembers(kind, inspect.isfunction))
    return tuple(name for name, method in methods if not _FUNCTIONS.keys().isdisjoint(method.__code__.co_names))


def _called_elsewhere(module: nn.Module) -> str | None:
    """Why the forward of a module that calls the two functions cannot be replaced."""
    kind = type(module)
    if _callers(kind) != ("forward",):
        return f"{kind.__name__} calls {' and '.join(_FUNCTIONS)} in {', '.join(_callers(kind))}, not in forward alone"


CONVOLUTIONS = Adapter(functions=_FUNCTIONS, attention=False, why_not=_called_elsewhere)


def convolves(kind: type) -> bool:
    """Whether a class calls the two functions."""
    return bool(_callers(kind))
