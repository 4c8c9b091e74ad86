"""Long filters of bfloat16, which matrix units multiply as bands of bfloat16 numbers."""

import pytest
import torch

from convkernels.testing.bounds import Bounds
from convkernels.testing.inputs import Problem, values


def in_two_terms(value):
    """The sum of the two bfloat16 numbers that are nearest to a float32 number."""
    first = value.bfloat16().float()
    return first + (value - first).bfloat16().float()


@pytest.mark.parametrize("kind", ["light", "dynamic"])
@pytest.mark.parametrize("taps", [11, 17, 18, 33])
def test_filters_keep_all_their_bits(taps, kind, ops):
    """Two taps that cancel but for what two bfloat16 numbers leave of one: the bounds allow less than that."""
    problem = Problem(batch=1, length=64, heads=2, head_size=128, taps=taps, left=taps // 2, kind=kind,
                      dtype=torch.bfloat16)  # fmt: skip
    candidates = torch.linspace(1, 2, 4099)
    value = candidates[(candidates - in_two_terms(candidates)).abs().argmax()]
    t = problem.tensors()
    t["weight"] = torch.zeros(t["weight"].shape)
    t["weight"][..., 2], t["weight"][..., taps - 1] = value, -in_two_terms(value)
    # The same at all positions.
    t["x"], t["grad"] = (values((256,), torch.bfloat16, seed).expand(1, 64, 256).clone() for seed in (1, 2))
    bounds = Bounds(*problem.op_arguments(t))
    bounds.output().check(ops.tap_conv(*problem.op_arguments(t)), "y")
    bounds.gradients(t["grad"])["x"].check(ops.tap_grad(*problem.grad_arguments(t))[0], "grad of x")


@pytest.mark.parametrize("kind", ["light", "dynamic"])
@pytest.mark.parametrize("denormal", ["x", "grad"])
def test_gradients_of_denormal_numbers(denormal, kind, ops):
    """Their products with large numbers count, though matrix units take them for zeros."""
    problem = Problem(batch=1, length=64, heads=2, head_size=128, taps=15, left=7, kind=kind, dtype=torch.bfloat16)
    t = problem.tensors()
    for name in ("x", "grad"):
        power = torch.tensor(-128 if name == denormal else 100)
        t[name] = t[name].float().abs().ldexp(power).bfloat16()
    bounds = Bounds(*problem.op_arguments(t))
    bounds.gradients(t["grad"])["weight"].check(ops.tap_grad(*problem.grad_arguments(t))[1], "grad of weight")


@pytest.mark.parametrize("kind", ["light", "dynamic"])
@pytest.mark.parametrize("power", [-118, 20])
def test_filters_of_any_size(power, kind, ops):
    """Terms of small filters would be denormal, and large ones make much of denormal inputs, which matrix units take
    for zeros."""
    if ops.backend in ("triton", "cuda") and power < 0:
        pytest.xfail("the bands of GPUs lose terms of filters that are denormal")
    problem = Problem(batch=2, length=70, heads=2, head_size=128, taps=15, left=7, kind=kind, dtype=torch.bfloat16)
    t = problem.tensors()
    t["weight"] = t["weight"].ldexp(torch.tensor(power))
    size = torch.tensor(60 if power < 0 else -130)
    t["x"], t["grad"] = (t[name].float().ldexp(size).bfloat16() for name in ("x", "grad"))
    bounds = Bounds(*problem.op_arguments(t))
    bounds.output().check(ops.tap_conv(*problem.op_arguments(t)), "y")
    bounds.gradients(t["grad"])["x"].check(ops.tap_grad(*problem.grad_arguments(t))[0], "grad of x")
