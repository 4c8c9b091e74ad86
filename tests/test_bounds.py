"""The judge is judged first: the numpy oracle against autograd, and the bounds against good and bad accumulators."""

import dataclasses
from pathlib import Path

import pytest
import torch

from convkernels.testing import accuracy
from convkernels.testing.bounds import Bounds
from convkernels.testing.inputs import Problem, values
from convkernels.testing.philox import keep_mask

BASE = Problem(batch=2, length=11, heads=2, head_size=3, taps=5, left=3, bias=True)
MODES = {
    "raw": {},
    "softmax": {"softmax": True},
    "renormalize": {"softmax": True, "renormalize": True},
    "dropout": {"softmax": True, "dropout": 0.4},
    "gate_mask": {"gate": True, "padding_mask": 2},
    "dynamic": {"kind": "dynamic", "softmax": True, "renormalize": True, "dropout": 0.3, "gate": True},
    "row": {"kind": "row", "softmax": True},
    "packed": {"batch": 1, "lengths": (4, 0, 1, 6), "softmax": True, "renormalize": True},
    "state": {"state": True, "softmax": True, "renormalize": True, "dilation": 2, "left": 8},
    "packed_state": {"batch": 2, "lengths": (4, 0, 1, 6), "state": True, "gate": True},
    "long_kernel": {"taps": 23, "left": 11, "length": 6, "softmax": True},
}


def plain(problem, t, accumulate=None):
    """The relation, one scalar loop over taps in torch, differentiable; `accumulate` rounds after every addition."""
    x, weight = t["x"], t["weight"]
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    z = x.to(work) * torch.sigmoid(t["gate"].to(work)) if t["gate"] is not None else x.to(work)
    if t["mask"] is not None:
        z = torch.where(t["mask"][:, :, None], z, 0.0)
    batch, length, channels = x.shape
    heads, taps = weight.shape[-2:]
    bounds = [0, length] if t["cu_seqlens"] is None else t["cu_seqlens"].tolist()
    logits = weight.to(work)
    logits = logits[None, None] if logits.dim() == 2 else logits
    drawn = logits.shape
    logits = logits.expand(batch, length, heads, taps)
    state = t["initial_state"]
    if state is not None:
        state = state.to(work).reshape(batch, len(bounds) - 1, problem.span, channels)
    rows, inside = [], torch.zeros(length, taps, dtype=torch.bool)
    for time in range(length):
        n = next(n for n in range(len(bounds) - 1) if bounds[n] <= time < bounds[n + 1])
        for tap in range(taps):
            source = time + problem.dilation * tap - problem.left
            if bounds[n] <= source < bounds[n + 1]:
                rows.append(z[:, source])
                inside[time, tap] = True
            elif source < bounds[n] and state is not None:
                rows.append(state[:, n, problem.span + source - bounds[n]])
                inside[time, tap] = True
            else:
                rows.append(torch.zeros(batch, channels, dtype=work))
    window = torch.stack(rows, 1).reshape(batch, length, taps, heads, -1)
    if problem.softmax:
        if problem.renormalize:
            logits = torch.where(inside[None, :, None], logits, float("-inf"))
        logits = torch.nan_to_num(torch.softmax(logits, -1), nan=0.0)
    if problem.dropout:
        keep = torch.from_numpy(keep_mask(int(t["seed"]), problem.dropout, *drawn)).to(work)
        logits = logits * keep / (1 - problem.dropout)
    y = torch.zeros(batch, length, heads, channels // heads, dtype=work)
    for tap in range(taps):
        y = y + logits[:, :, :, tap, None] * window[:, :, tap]
        y = y if accumulate is None else y.to(accumulate).to(work)
    y = y.reshape(batch, length, channels)
    return (y if t["bias"] is None else y + t["bias"].to(work)).to(x.dtype)


def results(problem, accumulate=None):
    t = problem.tensors()
    names = [n for n in ("x", "weight", "bias", "gate", "initial_state") if t[n] is not None]
    leaves = {n: t[n].detach().requires_grad_() for n in names}
    y = plain(problem, {**t, **leaves}, accumulate)
    return t, y, dict(zip(names, torch.autograd.grad(y, list(leaves.values()), t["grad"]), strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_oracle_equals_autograd_in_float64(mode):
    problem = BASE.with_(dtype=torch.float64, weight_dtype=torch.float64, **MODES[mode])
    t, y, grads = results(problem)
    bounds = Bounds(*problem.op_arguments(t))
    bounds.output().check(y, "y")
    expected = bounds.gradients(t["grad"])
    for name, grad in grads.items():
        expected[name].check(grad, f"grad {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_float32_accumulation_is_within_the_bound(mode, dtype):
    for seed in range(5):
        problem = BASE.with_(dtype=dtype, weight_dtype=dtype, bias_dtype=torch.float32, seed=seed, **MODES[mode])
        t, y, grads = results(problem)
        bounds = Bounds(*problem.op_arguments(t))
        bounds.output().check(y, "y")
        expected = bounds.gradients(t["grad"])
        for name in grads:
            expected[name].check(grads[name], f"grad {name}")


@pytest.mark.parametrize("accumulate", [torch.bfloat16, torch.float16])
def test_low_precision_accumulation_is_rejected(accumulate):
    """The bound is useful only if it is tight: 60 problems, low-precision partial sums, at most 2 may pass unseen."""
    unseen = 0
    for seed in range(60):
        problem = Problem(length=20, taps=3 + seed % 29, left=1, dtype=accumulate, weight_dtype=accumulate, seed=seed)
        t = problem.tensors()
        ratio = Bounds(*problem.op_arguments(t)).output().worst(plain(problem, t, accumulate))
        unseen += ratio <= 1.0
    assert unseen <= 2


def test_a_single_wrong_element_is_reported_by_name_and_place():
    problem = BASE.with_(dtype=torch.float32)
    t = problem.tensors()
    expected = Bounds(*problem.op_arguments(t)).output()
    y = plain(problem, t)
    y[1, 4, 2] += 1e-4
    with pytest.raises(AssertionError, match=r"result y: 1 of 132 .* at \(1, 4, 2\)"):
        expected.check(y, "result y")


def test_nan_is_never_within_a_bound():
    problem = BASE.with_()
    t = problem.tensors()
    expected = Bounds(*problem.op_arguments(t)).output()
    y = plain(problem, t)
    y[0, 0, 0] = float("nan")
    with pytest.raises(AssertionError, match="exceed the bound"):
        expected.check(y, "y")
    assert expected.worst(y) == float("inf")


def test_problems_are_values():
    problem = BASE.with_(seed=3)
    assert (
        eval(repr(problem).replace("torch.float32", "torch.float32"), {"Problem": Problem, "torch": torch}) == problem
    )
    assert dataclasses.replace(problem) == problem
    assert torch.equal(values((3, 2), torch.float32, 5), values((3, 2), torch.float32, 5))


def test_the_documentation_has_the_limits():
    text = (Path(__file__).parents[1] / "docs" / "semantics.md").read_text().partition("# What results must meet")[2]
    rows = [line.strip("| ").split(" | ")[-4:] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == [str(dtype).removeprefix("torch.") for dtype in accuracy.UNIT_ROUNDOFF]
    limits = accuracy.UNIT_ROUNDOFF, accuracy.NORM_LIMIT, accuracy.ELEMENT_LIMIT
    for row, values_of in zip(rows[2:], limits, strict=True):
        assert [2.0 ** int(n[2:]) if n.startswith("2^") else float(n) for n in row] == list(values_of.values())
