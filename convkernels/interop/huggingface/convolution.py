"""The causal depthwise convolutions of transformers models computed by this package, model by model.

Mamba, Qwen3-Next, LFM2 and others have modules whose ``forward`` calls ``causal_conv1d_fn`` and
``causal_conv1d_update``, global names of their file. ``optimize`` gives such modules of one model a class of their own:
the same but for ``forward``, whose source is compiled again where the two names mean this package's functions. Nothing
else changes, in the model or outside of it.
"""

import __future__

import ast
import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ...ops._functorch import recording
from ...ops._validate import fail
from .. import causal_conv1d

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


# Classes with another forward.


class _Unreachable(Exception):
    """Why the convolutions of a class cannot be replaced."""


class _Optimized:
    """Marks the classes that ``_optimized`` makes, and pickles and copies their modules by the class that they had, for
    which it makes another one where they are read."""

    def __reduce_ex__(self, protocol):
        return _make, (type(self).__bases__[1],), self.__getstate__()


def _make(kind: type) -> nn.Module:
    optimized = _optimized(kind)
    return optimized.__new__(optimized)


@functools.cache
def _optimized(kind: type) -> type:
    """The class with the forward that calls this package."""
    same = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (_Optimized, kind), same | {"forward": _rebound(kind.forward)})


def _rebound(forward: Callable) -> Callable:
    """forward with ``_FUNCTIONS`` for its global names: its source, decorators too, within a function that has them as
    arguments. All other globals stay those of its file, and lines have their numbers there."""
    function = inspect.unwrap(forward)
    if not function.__module__.startswith("transformers."):
        raise _Unreachable(f"its forward is written in {function.__module__}, not in transformers")
    if function.__code__.co_freevars:
        raise _Unreachable("its forward uses variables of a function around it")
    try:
        lines, first = inspect.getsourcelines(function)
    except OSError:
        raise _Unreachable("the source of its forward is not installed") from None
    tree = ast.parse("if True:\n" + "".join(lines) if lines[0][0].isspace() else "".join(lines))
    (definition,) = tree.body[0].body if isinstance(tree.body[0], ast.If) else tree.body
    ast.increment_lineno(definition, first - min(node.lineno for node in (definition, *definition.decorator_list)))
    around = ast.parse(f"def bind({', '.join(_FUNCTIONS)}):\n return {definition.name}")
    around.body[0].body.insert(0, definition)
    flags = function.__code__.co_flags & __future__.annotations.compiler_flag
    scope: dict[str, Callable] = {}
    code = compile(around, inspect.getsourcefile(function), "exec", flags, dont_inherit=True)
    exec(code, function.__globals__, scope)
    rebound = scope["bind"](**_FUNCTIONS)
    if _wrappers(rebound) != _wrappers(forward):
        raise _Unreachable("other code has wrapped its forward")
    return rebound


def _wrappers(function: Callable) -> list:
    """The code of what decorators have put around a function."""
    found = []
    while hasattr(function, "__wrapped__"):
        found.append(getattr(function, "__code__", type(function)))
        function = function.__wrapped__
    return found


@functools.cache
def _callers(kind: type) -> tuple[str, ...]:
    """Names of the methods that call the two functions."""
    methods = ((name, inspect.unwrap(method)) for name, method in inspect.getmembers(kind, inspect.isfunction))
    return tuple(name for name, method in methods if not _FUNCTIONS.keys().isdisjoint(method.__code__.co_names))


def _why_not(module: nn.Module) -> str | None:
    """Why the forward of a module that calls the two functions cannot be replaced."""
    kind = type(module)
    if _callers(kind) != ("forward",):
        return f"{kind.__name__} calls {' and '.join(_FUNCTIONS)} in {', '.join(_callers(kind))}, not in forward alone"
    own = vars(module).get("_old_forward", vars(module).get("forward"))
    if own is not None and getattr(own, "__func__", None) is not kind.forward:
        return f"this {kind.__name__} has a forward of its own"
    try:
        _optimized(kind)
    except _Unreachable as reason:
        return f"{kind.__name__}: {reason}"


def _change(module: nn.Module, kind: type) -> None:
    """Another class, also for the method that hooks of accelerate keep in the module."""
    old = type(module).forward
    module.__class__ = kind
    for name in ("forward", "_old_forward"):
        if getattr(vars(module).get(name), "__func__", None) is old:
            vars(module)[name] = types.MethodType(kind.forward, module)


@dataclass(frozen=True)
class Report:
    """What ``optimize`` did; ``print`` shows it."""

    model: str
    replaced: dict[str, str] = field(default_factory=dict)  # names of modules -> of their classes
    skipped: dict[str, str] = field(default_factory=dict)  # names of modules -> why they compute as before

    def __str__(self) -> str:
        lines = [f"{self.model}: convkernels computes the causal convolutions of {len(self.replaced)} modules"]
        lines += [f"  {kind}: {names}" for kind, names in _by_value(self.replaced)]
        lines += [f"  not of {names}: {reason}" for reason, names in _by_value(self.skipped)]
        return "\n".join(lines)


def _by_value(entries: dict[str, str]) -> list[tuple[str, str]]:
    """Each value once, and its names; of many the first and the last."""
    groups: dict[str, list[str]] = {}
    for name, value in entries.items():
        groups.setdefault(value, []).append(name)
    return [
        (value, ", ".join(names) if len(names) < 5 else f"{names[0]} ... {names[-1]}, {len(names)} in all")
        for value, names in groups.items()
    ]


def optimize(model: nn.Module) -> Report:
    """Let this package compute the causal depthwise convolutions of a model of transformers, in place.

    model: any module. Those in it whose ``forward`` calls ``causal_conv1d_fn`` and ``causal_conv1d_update`` get a class
        with another ``forward``, which calls this package, in training and in decoding, on CPUs and GPUs. Parameters,
        buffers, names, hooks and other models are not touched. A second call changes nothing.

    Returns what was replaced, and what was not and why, depthwise ``nn.Conv1d`` that other modules run among it. Copies
    and pickles of the model are optimized as well; ``restore`` undoes it. Optimize before ``torch.compile``.
    TypeError if model is not a module.
    """
    _module("optimize", model)
    report = Report(type(model).__name__)
    for name, module in model.named_modules():
        if isinstance(module, _Optimized):
            report.replaced[name] = type(module).__name__
        elif _callers(type(module)):
            reason = _why_not(module)
            if reason is None:
                _change(module, _optimized(type(module)))
                report.replaced[name] = type(module).__name__
            else:
                report.skipped[name] = reason
        elif isinstance(module, nn.Conv1d) and 1 < module.groups == module.in_channels == module.out_channels:
            parent = name.rpartition(".")[0]
            if parent not in report.replaced and parent not in report.skipped:
                kind = type(model.get_submodule(parent)).__name__
                report.skipped[name] = f"{kind} runs this nn.Conv1d, and does not call causal_conv1d_fn"
    return report


def restore(model: nn.Module) -> list[str]:
    """Undo ``optimize``: modules have the classes again that they had. Returns their names."""
    _module("restore", model)
    names = []
    for name, module in model.named_modules():
        if isinstance(module, _Optimized):
            _change(module, type(module).__bases__[1])
            names.append(name)
    return names


def _module(function: str, model) -> None:
    if not isinstance(model, nn.Module):
        expected = "a torch.nn.Module, such as a transformers.PreTrainedModel"
        fail(function, "model", expected, type(model).__name__, TypeError)
