"""One record per operator; from it come the schemas, fakes, autograd, FLOP formulas and the reference kernel.

Every operator exists once per backend (the overload name) and twice by name: ``name.<backend>`` is public, with
autograd attached, for whoever calls ``torch.ops`` directly; ``_name.<backend>`` is raw, without an autograd kernel,
because an op with ``register_autograd`` costs about 3.7 us more per call even when no gradient is recorded. The
Python functions of this package call the raw ones. ``_plain_name.<backend>`` is a raw one with few arguments, for calls
that need no more: each argument of a schema costs about 0.1 us.

``name``, without an overload name, is public and chooses a backend whenever it runs. It is what exported programs call,
which may run on another device or machine than the one that wrote them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from .._namespace import NAMESPACE
from ..backends import AUTO, BACKENDS
from ._on_import import when_imported

OPERATORS: dict[str, type] = {}
"""All operators registered: name -> record of arguments."""
_FORMS: dict[str, dict[str, "Form"]] = {}  # operator -> the names it is registered under, and how each is called
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


class Form(NamedTuple):
    """schema: from the opening parenthesis on.  record: makes the operator's record of the arguments of a call."""

    schema: str
    record: Callable


class Autograd(NamedTuple):
    """Hooks with the signatures of ``torch.library.register_autograd``."""

    setup_context: Callable[[Any, tuple, Any], None]
    backward: Callable[..., tuple]


@dataclass(frozen=True)
class OpSpec:
    """The record of one operator.

    arguments: record of its arguments, named after the operator (``_arguments.arguments``); the schema has positional
    arguments only, because the stable C++ interface takes no others.  fake: shapes and strides of the outputs.
    reference: the kernel in plain PyTorch.  flops: formula, shapes standing for tensors, for FlopCounterMode.  All
    three take the record.  autograd: keyword argument backend -> hooks for the public op; None for an op without
    gradient.  plain: how ``_plain_name`` is called, where there is one.
    """

    arguments: type
    fake: Callable
    reference: Callable
    flops: Callable
    autograd: Callable[..., Autograd] | None = None
    plain: Form | None = None


def overload(name: str, backend: str) -> torch._ops.OpOverload:
    """The registered operator ``convkernels::<name>.<backend>``; name with a leading underscore for the raw one."""
    return getattr(getattr(getattr(torch.ops, NAMESPACE), name), "default" if backend == AUTO else backend)


def called(kind: type, backend: str) -> torch._ops.OpOverload:
    """The operator that the Python functions call: the raw one, and of AUTO, which programs call, the only one."""
    return overload(kind.__name__ if backend == AUTO else f"_{kind.__name__}", backend)


def overloads(name: str) -> list[torch._ops.OpOverload]:
    """The public and the raw operators of this name, of every backend and of AUTO."""
    return [overload(name, AUTO), *(overload(full, backend) for full in (name, f"_{name}") for backend in BACKENDS)]


def implement(name: str, backend: str, kernel: Callable) -> None:
    """Make a Python function of the record of arguments the kernel of all forms of an operator."""
    key = "CompositeExplicitAutograd" if backend == AUTO else BACKENDS[backend].dispatch_key
    for full, form in _forms(name, backend).items():
        function = lambda *args, of=form.record, **named: kernel(of(*args, **named))  # noqa: E731
        _LIBRARY.impl(_qualified(full, backend), function, key)


def _qualified(full: str, backend: str) -> str:
    return full if backend == AUTO else f"{full}.{backend}"


def _forms(name: str, backend: str) -> dict[str, Form]:
    return {name: _FORMS[name][name]} if backend == AUTO else _FORMS[name]


def _on_one_device(spec: OpSpec, form: Form) -> Callable:
    """The fake, which refuses what kernels refuse: one tensor on device meta among others takes the call to it."""

    def fake(*args, **named):
        record = form.record(*args, **named)
        given = zip(record._fields, record, strict=True)
        devices = {name: value.device for name, value in given if isinstance(value, torch.Tensor)}
        here = next((device for device in devices.values() if device.type != "meta"), torch.device("meta"))
        for name, device in devices.items():
            if device != here:
                raise RuntimeError(
                    f"argument '{name}': expected a tensor on {here}, where this call computes, got one on {device}"
                )
        return spec.fake(record)

    return fake


def register(spec: OpSpec) -> None:
    """Define the operator for every backend in the table, and for AUTO; ``_select`` has the kernel of that."""
    name, usual = spec.arguments.__name__, Form(spec.arguments.schema, spec.arguments)
    OPERATORS[name] = spec.arguments
    _FORMS[name] = {name: usual, f"_{name}": usual} | ({} if spec.plain is None else {f"_plain_{name}": spec.plain})
    for backend in (*BACKENDS, AUTO):
        for full, form in _forms(name, backend).items():
            qualified = _qualified(full, backend)
            _LIBRARY.define(qualified + form.schema)
            torch.library.register_fake(f"{NAMESPACE}::{qualified}", _on_one_device(spec, form), lib=_LIBRARY)
        if spec.autograd is not None:
            hooks, public = spec.autograd(backend=backend), f"{NAMESPACE}::{_qualified(name, backend)}"
            torch.library.register_autograd(public, hooks.backward, setup_context=hooks.setup_context, lib=_LIBRARY)
    implement(name, "reference", spec.reference)
    for full, form in _FORMS[name].items():
        packet = getattr(getattr(torch.ops, NAMESPACE), full)

        def flops(*shapes, out_shape=None, of=form.record, **named) -> int:
            return spec.flops(of(*shapes, **named))

        when_imported("torch.utils.flop_counter", partial(_count_flops, packet, flops))


def _count_flops(packet, formula: Callable, counter) -> None:
    counter.register_flop_formula(packet)(formula)
