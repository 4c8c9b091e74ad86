"""gradcheck and gradgradcheck of every differentiable input of every public function in every mode, in float64.

Nondeterminism tolerance is zero; batched gradients (vmap over the backward pass) and undefined gradients are checked
as well.
"""

import pytest
import torch
from conftest import interpreted
from helpers import CALLS
from torch.autograd import gradcheck, gradgradcheck

from convkernels.testing.compare import conv_gradients
from convkernels.testing.inputs import Problem, arrange, values

# Sizes and options; what is not named takes the values of SIZES. "with_*" adds an input, the rest goes to the function.
SIZES = {"batch": 2, "length": 5, "heads": 2, "head_size": 2, "taps": 3, "layout": "contiguous"}
MODES = {
    "plain": {},
    "bias": {"with_bias": True},
    "causal": {"padding": "causal"},
    "padding_0": {"padding": 0, "taps": 4},
    "padding_1": {"padding": 1, "taps": 4},
    "even_taps": {"taps": 4},
    "one_tap": {"taps": 1},
    "more_taps_than_length": {"taps": 9, "length": 4},
    "one_position": {"length": 1},
    "no_position": {"length": 0},
    "dilation": {"dilation": 2},
    "dilation_causal": {"dilation": 3, "padding": "causal", "length": 8},
    "gate": {"with_gate": True},
    "mask": {"with_mask": True},
    "gate_mask_bias": {"with_gate": True, "with_mask": True, "with_bias": True},
    "silu": {"activation": "silu", "with_bias": True},
    "silu_state": {"activation": "silu", "with_state": True, "return_state": True, "padding": "causal"},
    "product_gates": {"with_gate": True, "gate_activation": "none", "with_out_gate": True},
    "everything_after": {"with_gate": True, "gate_activation": "silu", "activation": "silu", "with_out_gate": True,
                         "with_residual": True, "with_bias": True, "with_mask": True, "layout": "swap_last"},
    "packed_silu": {"lengths": (3, 0, 1, 4), "activation": "silu", "with_out_gate": True, "padding": "causal",
                    "with_state": True},
    "residual": {"with_residual": True},
    "tbc": {"layout": "swap01", "with_gate": True},
    "bct": {"layout": "swap_last", "with_gate": True},
    "strided": {"layout": "step2", "with_gate": True, "with_bias": True},
    "packed": {"lengths": (3, 0, 1, 4), "with_gate": True},
    "state": {"with_state": True, "padding": "causal"},
    "return_state": {"return_state": True, "padding": "causal", "with_gate": True, "with_mask": True},
    "state_to_state": {"with_state": True, "return_state": True, "padding": "causal", "with_gate": True, "length": 2,
                       "taps": 5},
    "packed_state": {"lengths": (3, 0, 1, 4), "with_state": True, "return_state": True, "padding": "causal"},
}  # fmt: skip
SOFTMAX_MODES = {
    "raw": {"softmax": False},
    "raw_dropout": {"softmax": False, "weight_dropout": 0.4, "training": True, "with_seed": True},
    "dropout": {"weight_dropout": 0.4, "training": True, "with_seed": True},
    "dropout_all": {"weight_dropout": 1.0, "training": True, "with_seed": True},
    "dropout_gate_state": {"weight_dropout": 0.4, "training": True, "with_seed": True, "with_gate": True,
                           "with_state": True, "padding": "causal"},
    "renormalize": {"renormalize": True},
    "renormalize_short": {"renormalize": True, "taps": 9, "length": 3},
    "renormalize_outside": {"renormalize": True, "taps": 3, "dilation": 4, "length": 3, "padding": 0},
    "renormalize_packed": {"renormalize": True, "lengths": (3, 0, 1, 4), "padding": "causal"},
    "renormalize_dropout_mask": {"renormalize": True, "weight_dropout": 0.4, "training": True, "with_seed": True,
                                 "with_mask": True},
    "renormalize_state": {"renormalize": True, "with_state": True, "padding": "causal", "dilation": 2},
    "everything": {"renormalize": True, "weight_dropout": 0.3, "training": True, "with_seed": True, "with_gate": True,
                   "with_bias": True, "with_mask": True, "with_state": True, "return_state": True,
                   "padding": "causal", "lengths": (2, 0, 1), "dilation": 2, "layout": "swap01", "with_out_gate": True,
                   "gate_activation": "silu", "activation": "silu", "with_residual": True},
}  # fmt: skip
CASES = [(f, m) for f in CALLS for m in (*MODES, *SOFTMAX_MODES) if f != "depthwise" or m in MODES]


def build(function, mode, backend, **sizes):
    """The function of its differentiable inputs alone, and those inputs."""
    options = {**SIZES, **MODES.get(mode, {}), **SOFTMAX_MODES.get(mode, {}), **sizes}
    size = {name: options.pop(name) for name in SIZES}
    lengths = options.pop("lengths", None)
    batch, length = (1, sum(lengths)) if lengths else (size["batch"], size["length"])
    heads, taps = size["heads"], size["taps"]
    channels = heads * size["head_size"]
    rows = {"depthwise": (channels,), "lightweight": (heads,), "dynamic": (batch, length, heads)}[function]

    def make(shape, salt):
        tensor = arrange(values(shape, torch.float64, salt), size["layout"])
        return tensor.detach().requires_grad_()

    inputs = {"x": make((batch, length, channels), 1), "weight": make((*rows, taps), 2)}
    if options.pop("with_bias", False):
        inputs["bias"] = make((channels,), 3)
    if options.pop("with_gate", False):
        inputs["gate"] = make((batch, length, channels), 4)
    for salt, name in enumerate(("out_gate", "residual"), 7):
        if options.pop(f"with_{name}", False):
            inputs[name] = make((batch, length, channels), salt)
    if options.pop("with_state", False):
        span = (taps - 1) * options.get("dilation", 1)
        inputs["initial_state"] = make((len(lengths) if lengths else batch, span, channels), 5)
    if options.pop("with_mask", False):
        options["mask"] = values((batch, length), torch.float64, 6) > -0.4
    if options.pop("with_seed", False):
        options["seed"] = torch.tensor([1234567890123])
    if lengths:
        options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    names = list(inputs)

    def call(*tensors):
        return CALLS[function](**dict(zip(names, tensors, strict=True)), backend=backend, **options)

    return call, tuple(inputs.values())


@pytest.mark.parametrize(("function", "mode"), CASES)
def test_gradcheck(function, mode, backend):
    call, inputs = build(function, mode, backend)
    whole = not interpreted(backend)  # every element and all batches, or one random direction
    assert gradcheck(
        call, inputs, nondet_tol=0.0, fast_mode=not whole, check_batched_grad=whole, check_undefined_grad=True
    )


@pytest.mark.slow
@pytest.mark.thin(9)
@pytest.mark.parametrize(("function", "mode"), CASES)
def test_gradgradcheck(function, mode, backend):
    call, inputs = build(function, mode, backend)
    assert gradgradcheck(call, inputs, nondet_tol=0.0, check_batched_grad=True, check_undefined_grad=True)


@pytest.mark.parametrize("function", CALLS)
def test_gradgradcheck_quick(function, backend):
    mode = "gate_mask_bias" if function == "depthwise" else "everything"
    call, inputs = build(function, mode, backend)
    assert gradgradcheck(call, inputs, nondet_tol=0.0, fast_mode=True)


@pytest.mark.thin(3)
@pytest.mark.parametrize(("function", "mode"), CASES)
def test_gradcheck_larger(function, mode, backend):
    """Widths past one vector and lengths past one block, checked along one random direction."""
    call, inputs = build(function, mode, backend, batch=3, heads=3, head_size=11)
    assert gradcheck(call, inputs, nondet_tol=0.0, fast_mode=True)


def test_gradcheck_long_kernel(backend):
    short = interpreted(backend)
    for function, taps in (("depthwise", 63), ("lightweight", 255), ("dynamic", 63)):
        call, inputs = build(function, "bias", backend, taps=taps // 4 if short else taps, length=20 if short else 40)
        assert gradcheck(call, inputs, nondet_tol=0.0, fast_mode=True)


# Of many heads with few partial sums a block of a GPU adds several up, of few heads with many one each.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["light", "row"])
@pytest.mark.parametrize(
    ("heads", "head_size", "taps"),
    [(70, 1, 1), (70, 1, 3), (33, 4, 7), (5, 2, 20), (3, 2, 40), (2, 3, 90), (3, 2, 200), (2, 2, 300), (1, 96, 31)],
)
def test_sums_of_heads(heads, head_size, taps, kind, dtype, ops):
    problem = Problem(
        batch=3, length=70, heads=heads, head_size=head_size, taps=taps, left=taps // 2, kind=kind, softmax=True,
        dropout=0.25, dtype=dtype, weight_dtype=dtype,
    )  # fmt: skip
    conv_gradients(ops, problem)


@pytest.mark.parametrize("subset", [(0,), (1,), (2,), (3,), (0, 1), (1, 3), (2, 3), (0, 2, 3)])
@pytest.mark.parametrize("function", CALLS)
def test_any_subset_of_inputs_may_require_grad(function, subset, backend):
    """Gradients do not depend on which others are asked for."""
    call, inputs = build(function, "gate_mask_bias", backend)
    cotangent = values(call(*inputs).shape, torch.float64, 9)
    full = torch.autograd.grad(call(*inputs), inputs, cotangent)
    some = [t.detach().requires_grad_(i in subset) for i, t in enumerate(inputs)]
    part = torch.autograd.grad(call(*some), [some[i] for i in subset], cotangent)
    for i, grad in zip(subset, part, strict=True):
        assert torch.equal(grad, full[i])


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("layout", ["contiguous", "swap01", "swap_last"])
def test_expanded_and_sliced_grad_output(function, layout, backend):
    """`y.sum().backward()` sends an expanded gradient; a slice of y sends a strided one."""
    call, inputs = build(function, "gate_mask_bias", backend, length=7, layout=layout)
    shape = call(*inputs).shape
    dense = torch.ones(shape, dtype=torch.float64)
    for name, cotangent in {
        "expanded": torch.ones((), dtype=torch.float64).expand(shape),
        "sliced": arrange(dense, "step2"),
        "sliced in time": arrange(dense, "step2_time"),
        "transposed": arrange(dense, "swap01"),
        "misaligned": arrange(dense, "offset1"),
    }.items():
        expected = torch.autograd.grad(call(*inputs), inputs, dense)
        actual = torch.autograd.grad(call(*inputs), inputs, cotangent)
        for e, a in zip(expected, actual, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_second_order_through_the_public_op(backend):
    """torch.ops called directly differentiates twice as well (a missing second derivative would be a silent zero)."""
    public = getattr(torch.ops.convkernels.tap_conv, backend)
    x = values((2, 5, 4), torch.float64, 1).clone().requires_grad_()
    weight = values((2, 3), torch.float64, 2).clone().requires_grad_()
    fast = interpreted(backend)
    assert gradcheck(lambda x, w: public(x, w, 1, 1, True), (x, weight), fast_mode=fast)
    assert gradgradcheck(lambda x, w: public(x, w, 1, 1, True), (x, weight), fast_mode=fast)


def test_third_derivative(backend):
    """Gradients of gradients of gradients exist too: d3/dx3 of a cubic form in the gate's argument."""
    call, inputs = build("lightweight", "gate", backend, length=3, taps=2, heads=1)

    def scalar(*tensors):
        (first,) = torch.autograd.grad(call(*tensors).square().sum(), tensors[2], create_graph=True)
        return first

    assert gradgradcheck(scalar, inputs, fast_mode=True)


LOW = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("bias_dtype", LOW)
@pytest.mark.parametrize("weight_dtype", LOW)
def test_each_gradient_is_rounded_once_to_its_own_dtype(function, weight_dtype, bias_dtype, backend):
    """x, weight and bias of three dtypes, and sums that float16 cannot hold: exact where the dtype has the number."""
    length, channels, taps = 700, 4, 2
    rows = {"depthwise": (channels,), "lightweight": (2,), "dynamic": (1, length, 2)}[function]
    x = torch.zeros(1, length, channels, requires_grad=True)
    weight = torch.zeros(*rows, taps, dtype=weight_dtype, requires_grad=True)
    bias = torch.zeros(channels, dtype=bias_dtype, requires_grad=True)
    expected = torch.full((channels,), 100.125 * length).to(bias_dtype)
    for mode in ({}, {"gate": torch.zeros(1, length, channels)}):
        y = CALLS[function](x, weight, bias, backend=backend, **mode)
        cotangent = torch.full_like(y, 100.125).requires_grad_()
        for graph in (False, True):
            found = torch.autograd.grad(y, (x, weight, bias), cotangent, create_graph=graph, retain_graph=True)
            assert [g.dtype for g in found] == [x.dtype, weight.dtype, bias.dtype]
            assert torch.equal(found[2], expected)
        # The second derivative: that of sum(d(bias)) with respect to the cotangent is 1.
        assert torch.equal(torch.autograd.grad(found[2].float().sum(), cotangent)[0], torch.ones_like(y))

    def call(bias):
        y = CALLS[function](x.detach(), weight.detach(), bias, backend=backend)
        return (y * 100.125).sum()

    batched = torch.func.vmap(torch.func.grad(call))(bias.detach().expand(2, -1))
    assert batched.dtype == bias_dtype and torch.equal(batched, expected.expand(2, -1))
