"""composite_attention: gradcheck and gradgradcheck of every differentiable input in every mode, in float64."""

import pytest
import torch
from attention_inputs import DOUBLE, MODES, TERMS, D, H, build, leaf
from conftest import device_of, interpreted
from torch.autograd import gradcheck, gradgradcheck

import convkernels as ck
from convkernels.testing.inputs import values

OP = "attention_grad"


def second_derivatives_differ_by(backend):
    """From run to run: they are PyTorch's own operations, whose scattered sums have no order on a GPU."""
    return 0.0 if device_of(backend) == "cpu" else 1e-12


def needs_many_calls(backend):
    """The interpreter would take minutes. What it runs is compared element by element in tests/test_attention_fuzz.py;
    second derivatives run no kernel."""
    if interpreted(backend):
        pytest.skip("hundreds of calls, each interpreted")


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode, backend):
    call, inputs = build(mode, backend)
    whole = not interpreted(backend)
    assert gradcheck(call, inputs, nondet_tol=0.0, fast_mode=True, check_undefined_grad=True)
    if whole and mode in ("everything", "packed"):
        assert gradcheck(call, inputs, nondet_tol=0.0)


@pytest.mark.parametrize("mode", ["everything", "empty_rows", "packed"])
def test_gradcheck_of_lse(mode, backend):
    needs_many_calls(backend)
    call, inputs = build(mode, backend, lse=True)
    assert gradcheck(call, inputs, nondet_tol=0.0, fast_mode=True)
    assert gradgradcheck(call, inputs, nondet_tol=second_derivatives_differ_by(backend), fast_mode=True)


@pytest.mark.parametrize("mode", ["plain", "everything"])
def test_batched_gradients(mode, backend):
    needs_many_calls(backend)
    call, inputs = build(mode, backend)
    assert gradcheck(call, inputs, nondet_tol=0.0, fast_mode=True, check_batched_grad=False)
    cotangents = values((3, *call(*inputs).shape), DOUBLE, 9)
    y = call(*inputs)
    batched = torch.autograd.grad(y, inputs, cotangents, is_grads_batched=True, retain_graph=True)
    for n in range(3):
        for found, expected in zip(
            batched, torch.autograd.grad(y, inputs, cotangents[n], retain_graph=True), strict=True
        ):
            torch.testing.assert_close(found[n], expected)


@pytest.mark.parametrize("mode", MODES)
def test_gradgradcheck(mode, backend):
    needs_many_calls(backend)
    call, inputs = build(mode, backend)
    assert gradgradcheck(call, inputs, nondet_tol=second_derivatives_differ_by(backend), fast_mode=True)


def test_second_order_through_the_public_ops(backend):
    """torch.ops called directly differentiates twice as well."""
    needs_many_calls(backend)
    public = getattr(torch.ops.convkernels.attention, backend)
    inputs = [leaf(name) for name in ("q", "k", "v", "bias")]

    def call(q, k, v, bias):
        return public(q, k, v, 1, 2, 0, False, True, 0.5, 0.5, 0.0, None, bias)

    assert gradcheck(call, inputs, fast_mode=True)
    assert gradgradcheck(call, inputs, fast_mode=True)


def test_third_derivative(backend):
    needs_many_calls(backend)
    call, inputs = build("value_conv", backend)

    def scalar(*tensors):
        (first,) = torch.autograd.grad(call(*tensors).square().sum(), tensors[0], create_graph=True)
        return first

    assert gradgradcheck(scalar, inputs, fast_mode=True)


@pytest.mark.parametrize("subset", [(0,), (1,), (2,), (3,), (0, 5), (4, 6), (7, 8), (2, 3)])
def test_any_subset_of_inputs_may_require_grad(subset, backend):
    call, inputs = build("everything", backend)
    cotangent = values(call(*inputs).shape, DOUBLE, 9)
    full = torch.autograd.grad(call(*inputs), inputs, cotangent)
    some = [t.detach().requires_grad_(i in subset) for i, t in enumerate(inputs)]
    part = torch.autograd.grad(call(*some), [some[i] for i in subset], cotangent)
    for i, found in zip(subset, part, strict=True):
        assert torch.equal(found, full[i])


LOW = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("shift", range(3))
def test_each_gradient_is_rounded_once_to_its_own_dtype(shift, backend):
    """Tables of three dtypes, and gradients that float16 cannot hold: only those of float16 tables overflow."""
    S = 40
    inputs = {n: leaf(n, dtype=torch.float32, shape=(1, S, heads, D)) for n, heads in (("q", H), ("k", 2), ("v", 2))}
    for n, (name, shape) in enumerate(TERMS.items()):
        inputs[name] = (values(shape, DOUBLE, n) / 8).to(LOW[(n + shift) % 3]).requires_grad_()

    def gradients(inputs, backend):
        y = ck.composite_attention(**inputs, window=(1, 2), backend=backend)
        weights = torch.linspace(-1, 3, y.numel(), dtype=y.dtype).view_as(y) * 3e4
        return torch.autograd.grad(y, list(inputs.values()), weights)

    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    expected, found = gradients(exact, "reference"), gradients(inputs, backend)
    for (name, value), e, f in zip(inputs.items(), expected, found, strict=True):
        assert f.dtype == value.dtype
        size = e.abs().max()
        step = {torch.float32: 1e-4, torch.float16: 2**-11, torch.bfloat16: 2**-8}[f.dtype]
        fits = e.abs() < torch.finfo(f.dtype).max
        assert ((f.double() - e).abs()[fits] <= step * size).all(), name
