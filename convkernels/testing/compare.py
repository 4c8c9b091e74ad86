"""Whether a backend is right on a problem: one comparison for each operator, in both directions.

The convolutions, of any size, and attention on small tensors: every element within its a-priori bound, of the exact
value written from the definition (`oracle`, `attention_oracle`). Attention on large tensors: the norm of each result's
error within NORM_LIMIT, of the reference in float64. There the definition element by element takes minutes, and a
bound for each element grows with the number of terms, which a norm's does not.

``ops`` is `Operators(backend)`, or more than that.
"""

import torch

from convkernels.testing.accuracy import ELEMENT_LIMIT, NORM_LIMIT
from convkernels.testing.attention import DELTA_THROUGH_OUT, INPUTS
from convkernels.testing.attention_oracle import Elements
from convkernels.testing.bounds import Bounds, StepBounds


class Operators:
    """The raw operators of a backend that has been loaded, by name: tap_conv, tap_activation_grad, tap_grad, tap_step,
    attention, attention_grad."""

    def __init__(self, backend):
        self.backend = backend

    def __getattr__(self, name):
        return getattr(getattr(torch.ops.convkernels, f"_{name}"), self.backend)


REFERENCE = Operators("reference")
CONV_INPUTS = ("x", "weight", "bias", "gate", "initial_state")


def conv_forward(ops, problem):
    t = problem.tensors()
    arguments = problem.op_arguments(t)
    y = ops.tap_conv(*arguments)
    Bounds(*arguments).output().check(y, "y")
    if t["x"].is_contiguous():
        assert y.is_contiguous()


def conv_gradients(ops, problem):
    """All gradients, or for one problem in four some of them."""
    t = problem.tensors()
    needs = 31 if problem.seed % 4 else problem.seed // 4 % 32
    results = ops.tap_grad(*problem.grad_arguments(t, needs))
    absent = {name for name in ("gate", "initial_state") if t[name] is None}
    expected = Bounds(*problem.op_arguments({**t, "bias": None})).gradients(t["grad"])
    _check_gradients(expected, zip(CONV_INPUTS, results, strict=True), needs, absent)
    needs = (3, 1, 2)[problem.seed % 3]
    results = ops.tap_activation_grad(*problem.activation_grad_arguments(t, needs))
    expected = Bounds(*problem.op_arguments(t)).activation_gradients(t["grad"])
    _check_gradients(expected, zip(expected, results, strict=True), needs)


def _check_gradients(expected, results, needs, absent=()):
    for bit, (name, result) in enumerate(results):
        if needs & 1 << bit and name not in absent:
            expected[name].check(result, f"grad of {name}")
        else:
            assert tuple(result.shape) == (0,), f"grad of {name} was not asked for, got {tuple(result.shape)}"


def conv_step(ops, problem, tensors=None):
    """tensors: instead of those that the problem draws."""
    t = problem.tensors() if tensors is None else tensors
    arguments = problem.op_arguments(t)
    bounds = StepBounds(*arguments)
    y = ops.tap_step(*arguments)
    bounds.output().check(y, "y")
    bounds.state().check(t["state"], "state")


def attention(ops, problem):
    """On small tensors: out, lse and all gradients, or for one problem in four some of them."""
    t = problem.tensors()
    elements = Elements(problem, t)
    out, lse = ops.attention(*problem.op_arguments(t))
    assert out.dtype == t["q"].dtype and out.stride() == torch.empty_like(t["q"]).stride()
    elements.check_out(out, lse)
    needs = 1023 if problem.seed % 4 else problem.seed // 4 % 1024
    found = dict(zip(INPUTS, ops.attention_grad(*problem.grad_arguments(t, out, lse, needs)), strict=True))
    asked = {name for bit, name in enumerate(INPUTS) if needs & 1 << bit and t[name] is not None}
    for name in set(INPUTS) - asked:
        assert tuple(found[name].shape) == (0,), f"grad of {name} was not asked for"
    assert all(found[name].dtype == t[name].dtype for name in asked)
    elements.check_gradients({name: found[name] for name in asked}, through_out=ops.backend in DELTA_THROUGH_OUT)


def attention_results(ops, problem, tensors):
    """out, lse and the gradients of the inputs that are given, by name."""
    out, lse = ops.attention(*problem.op_arguments(tensors))
    gradients = ops.attention_grad(*problem.grad_arguments(tensors, out, lse))
    found = {"out": out, "lse": lse, **dict(zip(INPUTS, gradients, strict=True))}
    return {name: value for name, value in found.items() if tensors.get(name, 0) is not None}


def in_float64(tensors):
    return {name: t.double() if t is not None and t.is_floating_point() else t for name, t in tensors.items()}


def attention_large(ops, problem, elementwise=False, depthwise=1):
    """On tensors of any size. A result whose terms cancel is held to the size that such a result has: that of the
    gradient that came in, or half of what normally distributed numbers have. elementwise: every element within
    ELEMENT_LIMIT, too. depthwise: how many limits the gradients in 16-bit types may be off where delta carries the
    rounding of a depthwise term (DELTA_THROUGH_OUT)."""
    single = problem.dtype in (torch.float64, torch.float32)
    through_out = ops.backend in DELTA_THROUGH_OUT and problem.value_conv and not single
    t = problem.tensors()
    found = attention_results(ops, problem, t)
    expected = attention_results(REFERENCE, problem, in_float64(t))
    incoming = t["grad"].double().norm().item() * problem.head_size**-0.5
    for name, exact in expected.items():
        value, own = found[name], t.get(name, t["q"])
        limit = NORM_LIMIT[problem.dtype]
        if name in INPUTS:
            limit = max(limit * (depthwise if through_out else 1), NORM_LIMIT[own.dtype])
        assert value.shape == exact.shape and (name == "lse" or value.dtype == own.dtype), name
        empty = exact == float("-inf")
        assert torch.equal(empty, value == float("-inf")), f"{name}: -inf elsewhere"
        exact, off = exact.masked_fill(empty, 0.0), (value.double() - exact).masked_fill(empty, 0.0)
        half = 0.5 * exact.numel() ** 0.5
        gradients = half if through_out and depthwise == 1 else min(incoming, half)
        least = {"out": 0.0, "lse": half}.get(name, gradients)
        size, error = max(exact.norm().item(), least), off.norm().item()
        assert error <= limit * size, f"{name}: off by {error:.3g}, in norm, of {size:.3g}"
        if name == "lse":
            assert (off.abs() <= limit * (1 + exact.abs())).all(), f"lse: off by {off.abs().max():.3g}"
        if elementwise and exact.numel():
            worst, allowed = off.abs().max().item(), ELEMENT_LIMIT[problem.dtype] * max(1.0, exact.abs().max().item())
            assert worst <= allowed, f"{name}: off by {worst:.3g}, more than {allowed:.3g}"
    return found
