"""Random problems against the float64 oracle within the a-priori bounds: 5,000 per op and backend, 10,000 with --full,
no exceptions, no reruns.

A failing problem is printed as a constructor call; paste it into `Problem(...)` to replay it.
"""

import pytest
import torch
from hypothesis import given, settings
from strategies import large_problems, problems, row_problems, step_problems, wide_problems

from convkernels.testing.bounds import Bounds, StepBounds

FULL, QUICK, LARGE, WIDE = 5_000, 300, 240, 300
# The reference is slower than the oracle and simpler than a kernel, CUDA kernels on a CPU and sanitized ones are slow:
# they get fewer.
FULL_OF_SLOW, WIDE_OF_SLOW, ROWS_OF_SLOW = 1_500, 120, 60
# Triton's interpreter takes half a second for a case; with --full it gets twice as many.
INTERPRETED, INTERPRETED_LARGE, INTERPRETED_WIDE = 90, 2, 4
NEEDS = {"x": 1, "weight": 2, "bias": 4, "gate": 8, "initial_state": 16}


def check_forward(ops, problem):
    t = problem.tensors()
    arguments = problem.op_arguments(t)
    y = ops.tap_conv(*arguments)
    Bounds(*arguments).output().check(y, "y")
    if t["x"].is_contiguous():
        assert y.is_contiguous()


def check_gradients(ops, problem):
    t = problem.tensors()
    needs = 31 if problem.seed % 4 else problem.seed // 4 % 32
    results = dict(zip(NEEDS, ops.tap_grad(*problem.grad_arguments(t, needs)), strict=True))
    absent = {name for name in ("gate", "initial_state") if t[name] is None}
    expected = Bounds(*problem.op_arguments({**t, "bias": None})).gradients(t["grad"])
    for name, result in results.items():
        if needs & NEEDS[name] and name not in absent:
            expected[name].check(result, f"grad_{name}")
        else:
            assert tuple(result.shape) == (0,), f"grad_{name} was not asked for, got {tuple(result.shape)}"


def check_step(ops, problem):
    t = problem.tensors()
    arguments = problem.op_arguments(t)
    bounds = StepBounds(*arguments)
    y = ops.tap_step(*arguments)
    bounds.output().check(y, "y")
    bounds.state().check(t["state"], "state")


def run(check, strategy, ops, examples, interpreted=INTERPRETED):
    if ops.interpreted:
        strategy = strategy.map(shorter)
        examples = min(examples, interpreted * (1 + ops.full))

    @settings(max_examples=examples)
    @given(problem=strategy)
    def over_all(problem):
        check(ops, problem)

    over_all()


def shorter(problem):
    """The same problem, mostly with few taps, and now and then with so many that another kernel takes it."""
    taps = problem.taps if problem.taps <= 9 or problem.seed % 16 == 0 else problem.taps % 9 + 1
    changes = {"taps": taps}
    if hasattr(problem, "left"):  # a step has none
        changes["left"] = min(problem.left, (taps - 1) * problem.dilation)
    return problem.with_(**changes)


def full(ops):
    return (FULL_OF_SLOW if ops.slow else FULL) * (1 + ops.full)


@pytest.mark.slow
def test_forward(ops):
    run(check_forward, problems(), ops, full(ops))


@pytest.mark.slow
def test_gradients(ops):
    run(check_gradients, problems(), ops, full(ops))


@pytest.mark.slow
def test_step(ops):
    run(check_step, step_problems(), ops, full(ops))


def test_forward_quick(ops):
    run(check_forward, problems(), ops, QUICK)


def test_gradients_quick(ops):
    run(check_gradients, problems(), ops, QUICK)


def test_step_quick(ops):
    run(check_step, step_problems(), ops, QUICK)


@pytest.mark.parametrize("check", [check_forward, check_gradients])
def test_wide_quick(check, ops):
    """Tensors that are read in vectors, or in pieces of them."""
    run(check, wide_problems(), ops, WIDE_OF_SLOW if ops.slow and not ops.full else WIDE, INTERPRETED_WIDE)


@pytest.mark.parametrize("check", [check_forward, check_gradients])
def test_rows_quick(check, ops):
    """Filters that differ between positions, for heads of many widths."""
    run(check, row_problems(), ops, ROWS_OF_SLOW if ops.slow and not ops.full else WIDE, INTERPRETED_WIDE)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("check", [check_forward, check_gradients])
def test_large(check, threads, ops):
    """Fewer, but past every block size of the kernels, and on threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        share = 4 * threads if ops.slow else threads
        run(check, large_problems(), ops, LARGE // share, INTERPRETED_LARGE)
    finally:
        torch.set_num_threads(before)
