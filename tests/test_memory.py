"""Memory errors and leaks: poisoned allocations, guard bands, masked NaN, propagation of NaN and Inf, growth."""

import gc
import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import interpreted, simulated
from helpers import CALLS

import convkernels as ck
from convkernels.testing import compare
from convkernels.testing.attention import AttentionProblem
from convkernels.testing.bounds import Bounds, StepBounds
from convkernels.testing.inputs import Problem, StepProblem, values
from convkernels.testing.poison import Guarded, fenced, poisoned_allocations
from convkernels.testing.random_problems import for_each, random_conv, random_step, with_few_taps

PROBLEMS = {
    "light": Problem(length=19, heads=2, head_size=9, taps=5, left=2, softmax=True, bias=True),
    "dynamic": Problem(length=19, heads=2, head_size=9, taps=5, left=4, kind="dynamic", softmax=True, renormalize=True),
    "row": Problem(length=7, heads=3, head_size=5, taps=3, left=1, kind="row"),
    "depthwise": Problem(length=19, heads=18, head_size=1, taps=7, left=3, bias=True),
    "gate": Problem(length=11, head_size=17, gate=True, padding_mask=2, dropout=0.3, softmax=True),
    "packed": Problem(batch=1, lengths=(5, 0, 9), taps=4, left=3, state=True, dilation=1, gate=True),
    "long_kernel": Problem(length=6, taps=65, left=32, head_size=8, softmax=True),
    "dilated": Problem(length=23, taps=4, left=6, dilation=4, head_size=16),
}


def test_poison_reaches_torch_empty():
    with poisoned_allocations():
        assert torch.empty(7).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("check", "make"), [
    (compare.conv_forward, random_conv),
    (compare.conv_gradients, random_conv),
    (compare.conv_step, random_step),
])  # fmt: skip
def test_poisoned_allocations(check, make, ops):
    """Fresh memory holds NaN: whatever is not written, or read before it is written, breaks the bound."""

    def poisoned(problem):
        with poisoned_allocations():
            check(ops, with_few_taps(problem) if ops.interpreted else problem)

    for_each(poisoned, make, range(30 if ops.interpreted else 400))


def check_guarded(ops, problem, plain, t, guards):
    """Results of `t`, views inside NaN, are those of the same tensors `plain`; nothing around the views changes."""
    bounds = Bounds(*problem.op_arguments(plain))
    bounds.output().check(ops.tap_conv(*problem.op_arguments(t)), "y")
    gradients = ops.tap_grad(*problem.grad_arguments(t))
    expected = bounds.gradients(plain["grad"])
    for result, grad in zip(compare.CONV_INPUTS, gradients, strict=True):
        if grad.shape != (0,):
            expected[result].check(grad, f"grad_{result}")
    for n, guard in guards.items():
        guard.check(n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PROBLEMS)
def test_guard_bands(name, dtype, ops):
    """Every input is a view inside NaN; results stay exact and nothing around the inputs changes."""
    problem = PROBLEMS[name].with_(dtype=dtype, weight_dtype=dtype)
    plain = problem.tensors()
    guards = {n: Guarded(t) for n, t in plain.items() if t is not None}
    t = {n: guards[n].view if n in guards else None for n in plain}
    check_guarded(ops, problem, plain, t, guards)


ATTENTION = {
    # The first tiles of queries see no key.
    "few_keys": AttentionProblem(batch=1, length=300, keys=20, causal=True, padding=1, head_size=20, left=4, right=2),
    "no_keys": AttentionProblem(keys=0, padding=1),
    "windows": AttentionProblem(length=20, keys=70, outside=2, padding=1, left=40, bias=True, query_rel=2, key_rel=1),
    "sequences": AttentionProblem(batch=1, lengths=(7, 0, 33, 9), padding=1, value_conv=3, bias=True, dropout=0.2),
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", [*PROBLEMS, *ATTENTION])
def test_nothing_beside_a_tensor_is_touched(name, after, ops):
    """Before or after every input there is no memory."""
    problem = (PROBLEMS | ATTENTION)[name].with_(dtype=torch.bfloat16)
    plain = problem.tensors()
    t = {n: fenced(tensor, after).to(tensor.device) if tensor is not None else None for n, tensor in plain.items()}
    for tensors, results in ((plain, expected := []), (t, found := [])):
        if name in PROBLEMS:
            results += [ops.tap_conv(*problem.op_arguments(tensors)), *ops.tap_grad(*problem.grad_arguments(tensors))]
        else:
            out, lse = ops.attention(*problem.op_arguments(tensors))
            results += [out, lse, *ops.attention_grad(*problem.grad_arguments(tensors, out, lse))]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


# Channels and positions around a quad, a vector and a block, of which a number that is odd is read at a time.
IN_PIECES = {
    "depthwise": {"heads": 135, "head_size": 1, "taps": 3, "softmax": True, "bias": True, "padding_mask": 2},
    "light": {"heads": 3, "head_size": 9, "taps": 7, "gate": True, "padding_mask": 1},
    "long": {"heads": 3, "head_size": 24, "taps": 31, "bias": True},
    "long gate": {"heads": 2, "head_size": 40, "taps": 15, "gate": True, "padding_mask": 2},
    "dynamic": {"heads": 3, "head_size": 4, "taps": 5, "gate": True, "kind": "dynamic", "softmax": True},
    "state": {"heads": 5, "head_size": 1, "taps": 4, "dilation": 2, "state": True, "left": 6, "padding_mask": 2},
    "packed": {"batch": 1, "heads": 11, "head_size": 1, "taps": 3, "lengths": (40, 0, 1, 33)},
}


@pytest.mark.parametrize("positions", [False, True], ids=["channels", "positions"])
@pytest.mark.parametrize("piece", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", IN_PIECES)
def test_guard_bands_of_pieces(name, dtype, piece, positions, ops):
    """The same where channels, or positions, can be read `piece` at a time and no more."""
    options = IN_PIECES[name]
    wide = options["head_size"] % 4 != 0 and not positions
    problem = Problem(**{
        "batch": 2, "length": 67 * (piece if positions else 1), "left": 1, "dtype": dtype, "weight_dtype": dtype,
        **options, "head_size": options["head_size"] * (piece if wide else 1),
    })  # fmt: skip
    plain = problem.tensors()
    guards, t = {}, dict(plain)
    for n, tensor in plain.items():
        if tensor is not None:
            turned = positions and n in ("x", "gate", "grad")
            guards[n] = Guarded(tensor.transpose(1, 2) if turned else tensor, piece)
            t[n] = guards[n].view.transpose(1, 2) if turned else guards[n].view
    check_guarded(ops, problem, plain, t, guards)


@pytest.mark.parametrize("taps", [1, 2, 7])
def test_guard_bands_of_a_step(taps, ops):
    """The state is written in place: exactly the state, and nothing beside it."""
    problem = StepProblem(taps=taps, gate=True, bias=True, indexed=True, head_size=9, kind="dynamic", softmax=True)
    plain = problem.tensors()
    bounds = StepBounds(*problem.op_arguments(plain))
    # A state has to be contiguous: its guards lie before and behind it.
    state = plain.pop("state")
    guards = {n: Guarded(t) for n, t in plain.items() if t is not None}
    guards["state"] = Guarded(state.view(-1))
    t = {n: guards[n].view if n in guards else None for n in plain}
    t["state"] = guards["state"].view.view(state.shape)
    bounds.output().check(ops.tap_step(*problem.op_arguments(t)), "y")
    bounds.state().check(t["state"], "state")
    for n, guard in guards.items():
        guard.check(n, unchanged=n != "state")


def call_with_gradients(function, inputs, cotangent, **kwargs):
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    y = function(**leaves, **kwargs)
    return y, dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), cotangent), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("function", ["depthwise", "lightweight", "dynamic"])
def test_masked_positions_never_leak(function, poison, dtype, backend):
    """NaN and Inf in masked x and gate change no bit of any output or gradient, and gradients there are exactly
    zero.
    """
    batch, length, channels, taps = 2, 13, 12, 5
    rows = {"depthwise": (channels,), "lightweight": (3,), "dynamic": (batch, length, 3)}[function]
    inputs = {
        "x": values((batch, length, channels), dtype, 1),
        "weight": values((*rows, taps), dtype, 2),
        "bias": values((channels,), dtype, 3),
        "gate": values((batch, length, channels), dtype, 4),
    }
    mask = values((batch, length), torch.float64, 5) > 0
    assert mask.any() and not mask.all()
    bad = ~mask[:, :, None].expand_as(inputs["x"])
    dirty = {n: t.masked_fill(bad, poison) if n in ("x", "gate") else t for n, t in inputs.items()}
    clean = {n: t.masked_fill(bad, 0.0) if n in ("x", "gate") else t for n, t in inputs.items()}
    cotangent = values(inputs["x"].shape, dtype, 6)
    for padding in ("same", "causal"):
        options = {"mask": mask, "padding": padding, "backend": backend}
        y, grads = call_with_gradients(CALLS[function], dirty, cotangent, **options)
        expected_y, expected = call_with_gradients(CALLS[function], clean, cotangent, **options)
        assert torch.equal(y, expected_y)
        for name, grad in grads.items():
            assert grad.isfinite().all(), name
            assert torch.equal(grad, expected[name]), name
        assert (grads["x"][bad] == 0).all() and (grads["gate"][bad] == 0).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(("taps", "dilation"), [(1, 1), (3, 1), (4, 1), (7, 3), (31, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nan_and_inf_spread_as_in_aten(dtype, taps, dilation, poison, backend):
    """NaN or Inf at t touches exactly the outputs whose window holds t, and exactly those input gradients."""
    batch, length, channels = 2, 40, 9
    x = values((batch, length, channels), dtype, 1).clone()
    weight = values((channels, taps), dtype, 2).clone()
    x[0, 11, 3], x[1, 0, 0], x[1, 39, 8] = poison, poison, -poison
    cotangent = values(x.shape, dtype, 3).clone()
    cotangent[0, 20, 5], cotangent[1, 39, 8] = poison, poison
    left = dilation * (taps // 2)
    leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    y = ck.depthwise_conv1d(leaves[0], weight, dilation=dilation, backend=backend)
    padded = F.pad(leaves[1].transpose(1, 2), (left, dilation * (taps - 1) - left))
    expected = F.conv1d(padded, weight[:, None], dilation=dilation, groups=channels).transpose(1, 2)
    grads = [torch.autograd.grad(out, leaf, cotangent)[0] for out, leaf in zip((y, expected), leaves, strict=True)]
    for ours, theirs in ((y, expected), tuple(grads)):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())
        assert not ours.isfinite().all()


@pytest.mark.parametrize("poisoned", ["x", "cotangent"])
@pytest.mark.parametrize("padding", ["same", "causal"])
@pytest.mark.parametrize(
    ("function", "taps", "softmax"),
    [("lightweight", 15, True), ("lightweight", 15, False), ("lightweight", 31, True), ("dynamic", 7, True),
     ("dynamic", 33, True)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_and_inf_spread_no_further_than_windows(dtype, function, taps, softmax, padding, poisoned, backend):
    """Heads that products of matrices compute: their zeros meet rows that no window has. Without softmax, which spreads
    what is not finite over all taps of a head, this shows in d(weight) too."""
    if backend == "triton" and not softmax:
        pytest.xfail("grad_band multiplies zeros for rows of d(y) that do not exist by what is not finite")
    length, heads = 40, 2
    call = {"lightweight": ck.lightweight_conv1d, "dynamic": ck.dynamic_conv1d}[function]
    shape = (heads, taps) if function == "lightweight" else (2, length, heads, taps)
    weight = values(shape, dtype, 2)
    # Each batch row has one, next to a border and in the middle.
    for place, poison in itertools.product(((0, 39), (20, 33)), (float("nan"), float("inf"))):
        tensors = {name: values((2, length, 64), dtype, n).clone() for n, name in enumerate(("x", "cotangent"))}
        tensors[poisoned][0, place[0], 5] = tensors[poisoned][1, place[1], 40] = poison
        found = []
        for name in (backend, "reference"):
            leaves = [tensors["x"].clone().requires_grad_(), weight.clone().requires_grad_()]
            y = call(*leaves, softmax=softmax, padding=padding, backend=name)
            found.append((y, *torch.autograd.grad(y, leaves, tensors["cotangent"])))
        for ours, expected in zip(*found, strict=True):
            assert torch.equal(ours.isfinite(), expected.isfinite())


def test_nan_stays_in_its_sequence_and_head(backend):
    x = values((1, 12, 8), torch.float32, 1).clone()
    weight = values((4, 5), torch.float32, 2).clone()
    x[0, 6] = float("nan")
    weight[2, 1] = float("nan")
    y = ck.lightweight_conv1d(x, weight, cu_seqlens=torch.tensor([0, 5, 8, 12]), backend=backend)
    head = torch.arange(8) // 2 == 2
    assert y[0, :, head].isnan().all()
    assert y[0, :5, ~head].isfinite().all() and y[0, 8:, ~head].isfinite().all()
    assert y[0, 5:8, ~head].isnan().all()


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
def test_memory_does_not_grow(backend):
    """One kept 64 KiB tensor per call would add 64 MB over the measured calls (16 MB for slow backends)."""
    if interpreted(backend):
        pytest.skip("would measure the interpreter")
    measured = 250 if backend == "reference" or simulated(backend) else 1000
    x = values((2, 64, 128), torch.float32, 1).clone().requires_grad_()
    weight = values((4, 5), torch.float32, 2).clone().requires_grad_()
    gate = values((2, 64, 128), torch.float32, 3)
    state = torch.zeros(2, 4, 128)

    def calls(count):
        for _ in range(count):
            y = ck.lightweight_conv1d(x, weight, gate=gate, training=True, weight_dropout=0.1, backend=backend)
            torch.autograd.grad(y, (x, weight), torch.ones_like(y))
            with torch.no_grad():
                ck.lightweight_conv1d_step(x[:, 0], state, weight, backend=backend)
        gc.collect()

    calls(measured // 5)
    before = resident()
    calls(measured)
    assert resident() - before < 6e6
