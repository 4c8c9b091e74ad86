"""Modules of one model of transformers given other classes, with which this package computes what they compute.

Such a class is the module's own, but for a few methods, or for what a few global names mean in its ``forward``. Nothing
else changes, in the model or outside of it.
"""

import types
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from ...ops._validate import fail
from .attention import NAME, register
from .convolution import CONVOLUTIONS, convolves
from .families import ADAPTERS
from .swapping import Adapter, Unreachable, rebound


class Swapped:
    """Marks the classes that ``swapped`` makes, and pickles and copies their modules by the class that they had, for
    which it makes another one where they are read."""

    stock: type

    def __reduce_ex__(self, protocol):
        return _make, (self.stock,), self.__getstate__()


def _make(kind: type) -> nn.Module:
    made = swapped(kind)
    return made.__new__(made)


_made: dict[type, type] = {}


def swapped(kind: type) -> type:
    """The class that computes with this package."""
    if kind not in _made:
        adapter = _adapter(kind)
        attributes = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        if adapter.functions:
            attributes["forward"] = rebound(kind.forward, adapter.functions)
        bases = [Swapped, kind] if adapter.methods is object else [Swapped, adapter.methods, kind]
        _made[kind] = type(kind.__name__, tuple(bases), attributes | {"stock": kind})
    return _made[kind]


def _adapter(kind: type) -> Adapter | None:
    """How a class comes to compute with this package; None for one that does not."""
    if convolves(kind):
        return CONVOLUTIONS
    package, _, path = kind.__module__.partition(".models.")
    return ADAPTERS.get(f"{path.partition('.')[0]}.{kind.__name__}") if package == "transformers" else None


def _why_not(module: nn.Module, adapter: Adapter) -> str | None:
    """Why a module must keep its class."""
    kind = type(module)
    reason = adapter.why_not(module)
    if reason is not None:
        return reason
    own = vars(module).get("_old_forward", vars(module).get("forward"))
    if own is not None and getattr(own, "__func__", None) is not kind.forward:
        return f"this {kind.__name__} has a forward of its own"
    try:
        swapped(kind)
    except Unreachable as reason:
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
        lines = [f"{self.model}: convkernels computes in {len(self.replaced)} modules"]
        lines += [f"  {kind}: {names}" for kind, names in _by_value(self.replaced)]
        lines += [f"  not in {names}: {reason}" for reason, names in _by_value(self.skipped)]
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
    """Let this package compute the causal convolutions and the relative attention of a model of transformers, in place.

    model: any module. Those in it that convolve causally for each channel, by ``causal_conv1d_fn`` and
        ``causal_conv1d_update``, and those whose attention has relative positions (T5's and MPNet's buckets, DeBERTa,
        Transformer-XL and its speech encoders, ALiBi, WavLM, Inkling) get classes that call this package, in training
        and in decoding, on CPUs and GPUs, without tensors of T x T for each head. Where their attention needs masks of
        another kind, the model's attention implementation becomes "convkernels". Parameters, buffers, names, hooks and
        other models are not touched. A second call changes nothing.

    Returns what was replaced, and what was not and why, depthwise ``nn.Conv1d`` that other modules run among it. Copies
    and pickles of the model are optimized as well; ``restore`` undoes it. Optimize before ``torch.compile``.
    TypeError if model is not a module.
    """
    _module("optimize", model)
    report = Report(type(model).__name__)
    plan: dict[str, Adapter] = {}
    blocking: list[str] = []
    for name, module in model.named_modules():
        adapter = None if isinstance(module, Swapped) else _adapter(type(module))
        if isinstance(module, Swapped):
            report.replaced[name] = type(module).__name__
        elif adapter is not None:
            unneeded = adapter.unneeded(module)
            reason = unneeded or _why_not(module, adapter)
            if reason is None:
                plan[name] = adapter
            else:
                report.skipped[name] = reason
            if reason is not None and unneeded is None and adapter.attention:
                blocking.append(name)
        elif isinstance(module, nn.Conv1d) and 1 < module.groups == module.in_channels == module.out_channels:
            parent = name.rpartition(".")[0]
            if parent not in report.replaced and parent not in report.skipped and parent not in plan:
                kind = type(model.get_submodule(parent)).__name__
                report.skipped[name] = f"{kind} runs this nn.Conv1d, and does not call causal_conv1d_fn"
    _together(model, plan, blocking, report)
    owners = _owners(model, [name for name, adapter in plan.items() if adapter.masks])
    if owners:
        register()
    for owner in owners:
        if owner.config._attn_implementation != NAME:
            owner._attention_before = owner.config._attn_implementation
            owner.config._attn_implementation_internal = NAME
    for name in plan:
        module = model.get_submodule(name)
        _change(module, swapped(type(module)))
        report.replaced[name] = type(module).__name__
    return report


def _together(model: nn.Module, plan: dict[str, Adapter], blocking: list[str], report: Report) -> None:
    """Take from the plan attention that must stay as it is, because other attention of the model must or because there
    is no model to say which masks it takes."""
    for name in [name for name, adapter in plan.items() if adapter.attention]:
        if blocking:
            report.skipped[name] = f"shares masks and positions with {blocking[0]}"
        elif plan[name].masks and not _owners(model, [name]):
            report.skipped[name] = "optimize the model that it is a part of, which makes its masks"
        else:
            continue
        del plan[name]


def _owners(model: nn.Module, names: list[str]) -> list[PreTrainedModel]:
    """The models, each within the one before, that the modules of these names are parts of."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and any(not name or f"{one}.".startswith(f"{name}.") for one in names)
    ]


def restore(model: nn.Module) -> list[str]:
    """Undo ``optimize``: modules have the classes again that they had. Returns their names."""
    _module("restore", model)
    names = []
    for name, module in model.named_modules():
        if isinstance(module, Swapped):
            _change(module, module.stock)
            names.append(name)
        if "_attention_before" in vars(module):
            module.config._attn_implementation_internal = vars(module).pop("_attention_before")
    return names


def _module(function: str, model) -> None:
    if not isinstance(model, nn.Module):
        expected = "a torch.nn.Module, such as a transformers.PreTrainedModel"
        fail(function, "model", expected, type(model).__name__, TypeError)
