"""Activations, the gate of the result and the residual, in every family of kernels and with everything that meets them
at once; random problems (tests/test_fuzz.py) seldom have so much."""

import pytest
import torch

from convkernels.ops.conv.schema import TapConv
from convkernels.testing import compare
from convkernels.testing.inputs import Problem

ALL = Problem(
    batch=2, length=45, heads=2, head_size=5, taps=4, left=3, softmax=True, bias=True, gate=True, gate_activation=2,
    activation=2, out_gate=True, residual=True, padding_mask=2, layout="sliced", grad_layout="step2_time", seed=3,
)  # fmt: skip
WIDE = ALL.with_(heads=2, head_size=16)
PER_POSITION = ALL.with_(kind="dynamic", head_size=4)
PACKED = {"batch": 1, "lengths": (20, 0, 1, 24)}

# Problems by the kernels of Triton that serve them, forward and backward.
FAMILIES = {
    ("Tile", "Tile"): ALL.with_(dilation=2),
    ("Tile", "Tile", "packed"): ALL.with_(**PACKED, state=True),
    ("Band", "Band"): WIDE.with_(taps=12, left=5, dtype=torch.float16),
    ("Band", "Band", "packed"): WIDE.with_(**PACKED),
    ("Band", "Band", "per position"): WIDE.with_(kind="dynamic", taps=12, dtype=torch.bfloat16),
    ("Tile", "Heads"): PER_POSITION,
    ("Tile", "Window"): PER_POSITION.with_(taps=12, renormalize=True, dropout=0.2),
}
families = pytest.mark.parametrize("family", FAMILIES, ids=" ".join)


def served(ops, family, problem):
    """Whether the kernels are those of the family, where these are Triton's."""
    if ops.backend == "triton":
        from convkernels.backends.triton.conv import configs, launch

        shape = launch.Call(TapConv(*problem.op_arguments(problem.tensors()))).shape
        assert family[:2] == tuple(type(configs.choose(shape, backward)).__name__ for backward in (False, True))


@pytest.mark.parametrize("activations", [(2, 2), (0, 1), (1, 2), (2, 0)], ids=lambda pair: f"{pair[0]} {pair[1]}")
@families
def test_all_at_once(family, activations, ops):
    gate_activation, activation = activations
    problem = FAMILIES[family].with_(gate_activation=gate_activation, activation=activation)
    served(ops, family, problem)
    compare.conv_forward(ops, problem)
    compare.conv_gradients(ops, problem)


@families
def test_what_is_masked_is_not_looked_at(family, ops):
    problem = FAMILIES[family]
    results = []
    for value in (0.0, float("nan"), float("inf")):
        t = problem.tensors()
        for name in ("x", "gate"):
            t[name] = t[name].masked_fill(~t["mask"][..., None], value)
        results.append(
            (
                ops.tap_conv(*problem.op_arguments(t)),
                *ops.tap_activation_grad(*problem.activation_grad_arguments(t)),
                *ops.tap_grad(*problem.grad_arguments(t)),
            )
        )
    for others in results[1:]:
        for ours, other in zip(results[0], others, strict=True):
            assert ours.isfinite().all() and torch.equal(ours, other)


@pytest.mark.parametrize("activation", [1, 2])
@families
def test_what_is_not_finite_goes_no_further_than_its_taps(family, activation, ops):
    """Products with banded matrices would spread it; what follows the sums gets what the reference has."""
    problem = FAMILIES[family].with_(activation=activation, padding_mask=0, dtype=torch.float32)
    t = problem.tensors()
    t["x"][:, 22, ::2] = float("inf")
    found, expected = (
        (
            each.tap_conv(*problem.op_arguments(t)),
            *each.tap_activation_grad(*problem.activation_grad_arguments(t)),
        )
        for each in (ops, compare.REFERENCE)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert 0 < theirs.isfinite().sum() < theirs.numel() or activation == 1
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
