"""Activations of results and gates, gated results and residuals, in every family of kernels of the cuda backend."""

import itertools

import pytest
import torch

from convkernels.testing import compare
from convkernels.testing.inputs import Problem

plan = pytest.importorskip("convkernels._C").cuda_plan

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)
# By family problems that its kernels serve, and the types of their tensors.
FAMILIES = {
    "plain": (
        [{"head_size": 5, "kind": "dynamic"}, {"layout": "step2", "grad_layout": "step2"}], (torch.float64, *FLOATS),
    ),
    "stream": ([{"heads": 5, "head_size": 8}, {"heads": 33, "head_size": 1, "kind": "row", "taps": 11}], FLOATS),
    "time": ([{"layout": "swap_last", "grad_layout": "swap_last", "length": length} for length in (45, 592)], FLOATS),
    "band": ([{"head_size": 32, "taps": 31}, {"head_size": 72, "kind": "dynamic"}], HALVES),
    "rows": ([{"heads": 4, "head_size": 8, "kind": "dynamic"}, {"head_size": 12, "renormalize": True}], FLOATS),
}  # fmt: skip
NONE, SIGMOID, SILU = range(3)


def problems(family):
    shapes, dtypes = FAMILIES[family]
    numbers = itertools.count()
    for shape, dtype, gate_activation, activation, (out_gate, residual) in itertools.product(
        shapes, dtypes, (None, NONE, SILU), (NONE, SIGMOID, SILU), ((False, True), (True, False), (True, True))
    ):
        number = next(numbers)
        options = {"length": 45, "taps": 4, "left": 2, "dilation": 1 + number % 2, **shape}
        yield Problem(
            **options, dtype=dtype, weight_dtype=torch.promote_types(dtype, torch.float32),
            softmax=number % 3 == 0, bias=number % 2 == 1, padding_mask=number % 3,
            gate=gate_activation is not None, gate_activation=SIGMOID if gate_activation is None else gate_activation,
            activation=activation, out_gate=out_gate, residual=residual, seed=number,
        )  # fmt: skip


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, strided, ops):
    if ops.backend != "cuda":
        pytest.skip("families of kernels are of the cuda backend")
    for number, problem in enumerate(problems(family)):
        if strided and problem.layout == "contiguous":
            problem = problem.with_(layout="guarded", grad_layout=("sliced", "step2_time")[number % 2])
        assert plan(False, **problem.plan_facts(False))["family"] == family, problem
        compare.conv_forward(ops, problem)
        compare.conv_gradients(ops, problem)


@pytest.mark.parametrize("kind", ["light", "dynamic"])
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_what_is_not_finite_spreads_no_further_than_windows(poison, kind, ops):
    """Tensor cores spread it; that is seen in the sums, of which a sigmoid would make numbers again."""
    if ops.backend != "cuda":
        pytest.skip("families of kernels are of the cuda backend")
    for activation, number in itertools.product((SIGMOID, SILU), range(4)):
        problem = Problem(
            head_size=32, taps=31, left=15, length=90, kind=kind, dtype=HALVES[number % 2], activation=activation,
            out_gate=number > 1, residual=True, gate=number > 2, gate_activation=SILU, seed=number,
        )  # fmt: skip
        assert plan(False, **problem.plan_facts(False))["family"] == "band"
        tensors = problem.tensors()
        tensors["x"][0, 40, 3] = poison
        arguments, gradients = problem.op_arguments(tensors), problem.activation_grad_arguments(tensors)
        results = (ops.tap_conv(*arguments), *ops.tap_activation_grad(*gradients))
        expected = (compare.REFERENCE.tap_conv(*arguments), *compare.REFERENCE.tap_activation_grad(*gradients))
        for result, exact in zip(results, expected, strict=True):
            torch.testing.assert_close(result, exact, rtol=0.02, atol=0.02, equal_nan=True)
