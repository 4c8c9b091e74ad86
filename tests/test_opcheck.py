"""torch.library.opcheck over 200 samples per op: schema, autograd registration, fakes, and AOT dispatch with dynamic
shapes.

It proves nothing about gradients (tests/test_gradients.py does), but it does find fakes and aliasing declarations that
lie.
"""

import random

import pytest
import torch

from convkernels.testing.inputs import LAYOUTS, Problem, StepProblem

SAMPLES = 200
# Backends share schemas, fakes and autograd formulas; for the reference a part of the samples is enough.
SAMPLES_OF_REFERENCE = 64
CHUNKS = 9
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def random_problem(rng):
    softmax = rng.random() < 0.5
    dtype = rng.choice(DTYPES)
    taps = rng.choice((1, 2, 3, 4, 7, 12))
    dilation = rng.choice((1, 1, 2))
    span = (taps - 1) * dilation
    packed = rng.random() < 0.25
    return Problem(
        batch=rng.choice((0, 1, 2, 2, 3)),
        length=rng.choice((0, 1, 3, 8, 8)),
        heads=rng.choice((1, 2, 3)),
        head_size=rng.choice((1, 3, 8)),
        taps=taps,
        left=rng.choice((span, span // 2, 0)),
        dilation=dilation,
        kind=rng.choice(("light", "dynamic", "row")),
        softmax=softmax,
        renormalize=softmax and rng.random() < 0.5,
        dropout=rng.choice((0.0, 0.0, 0.3)),
        bias=rng.random() < 0.5,
        gate=rng.random() < 0.4,
        padding_mask=rng.choice((0, 0, 1, 2)),
        lengths=tuple(rng.choice((0, 1, 4)) for _ in range(3)) if packed else (),
        state=rng.random() < 0.3,
        dtype=dtype,
        weight_dtype=torch.float64 if dtype == torch.float64 else rng.choice((dtype, torch.float32)),
        layout=rng.choice(LAYOUTS),
        weight_layout=rng.choice(LAYOUTS),
        grad_layout=rng.choice(LAYOUTS),
        seed=rng.randrange(1 << 16),
    )


def random_step(rng):
    softmax = rng.random() < 0.5
    renormalize = softmax and rng.random() < 0.5
    dtype = rng.choice(DTYPES)
    return StepProblem(
        batch=rng.choice((0, 1, 3)),
        heads=rng.choice((1, 2, 3)),
        head_size=rng.choice((1, 3, 8)),
        taps=rng.choice((1, 2, 4, 7)),
        dilation=rng.choice((1, 1, 2)),
        kind=rng.choice(("light", "dynamic")),
        softmax=softmax,
        renormalize=renormalize,
        bias=rng.random() < 0.5,
        gate=rng.random() < 0.5,
        indexed=rng.random() < 0.4,
        position=rng.choice((0, 1, 2)) if renormalize else 0,
        dtype=dtype,
        weight_dtype=torch.float64 if dtype == torch.float64 else rng.choice((dtype, torch.float32)),
        layout=rng.choice(LAYOUTS),
        state_layout=rng.choice(("contiguous", "offset1")),
        weight_layout=rng.choice(LAYOUTS),
        seed=rng.randrange(1 << 16),
    )


def dense_where_empty(tensors):
    """opcheck's own copies fail on a tensor without elements that is a strided view."""
    return {
        name: torch.empty(t.shape, dtype=t.dtype) if t is not None and t.numel() == 0 else t
        for name, t in tensors.items()
    }


def sample(op, index):
    """Arguments of the op; every other sample of tap_conv and every fourth of tap_grad asks for gradients."""
    rng = random.Random(f"{op}{index}")
    if op == "tap_step":
        problem = random_step(rng)
        return problem, problem.op_arguments(dense_where_empty(problem.tensors()))
    problem = random_problem(rng)
    tensors = dense_where_empty(problem.tensors())
    if index % (2 if op == "tap_conv" else 4) == 1:
        for name in ("x", "weight", "bias", "gate", "initial_state", "grad"):
            if tensors[name] is not None:
                tensors[name] = tensors[name].detach().requires_grad_()
    if op == "tap_conv":
        return problem, problem.op_arguments(tensors)
    return problem, problem.grad_arguments(tensors, rng.choice((31, 31, 3, 1, 2, 24)))


def check(name, op, backend, indices):
    operator = getattr(getattr(torch.ops.convkernels, name), backend)
    utilities = "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    # Before 2.13 torch asserts something else of its own of second derivatives with dynamic shapes.
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
    for index in indices:
        problem, arguments = sample(op, index)
        try:
            torch.library.opcheck(operator, arguments, test_utils=utilities[:3] if old and "grad" in op else utilities)
        except Exception as error:
            raise AssertionError(f"opcheck of {operator} failed on sample {index}: {problem!r}") from error


@pytest.mark.slow
@pytest.mark.thin(7)
@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("op", ["tap_conv", "tap_grad", "tap_step"])
def test_opcheck(op, chunk, backend):
    check(op, op, backend, range(chunk, SAMPLES_OF_REFERENCE if backend == "reference" else SAMPLES, CHUNKS))


@pytest.mark.parametrize("op", ["tap_conv", "tap_grad", "tap_step"])
def test_opcheck_quick(op, backend):
    check(op, op, backend, range(SAMPLES, SAMPLES + 6))


@pytest.mark.parametrize("op", ["tap_conv", "tap_grad", "tap_step"])
def test_opcheck_raw(op, backend):
    # Only samples without requires_grad: the raw ops have no autograd kernel, on purpose.
    check(f"_{op}", op, backend, range(SAMPLES + 8, SAMPLES + 20, 2))
