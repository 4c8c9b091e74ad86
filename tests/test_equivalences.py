"""Different ways to ask for the same convolution, here and in PyTorch, and the degenerate sizes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import CALLS, close

import convkernels as ck
from convkernels.testing.inputs import LAYOUTS, arrange, values


def grads(y, leaves):
    return torch.autograd.grad(y, leaves, values(y.shape, y.dtype, 77))


def leaf(shape, salt, dtype=torch.float64):
    return values(shape, dtype, salt).clone().requires_grad_()


@pytest.mark.parametrize("dilation", [1, 2, 5])
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 7, 8, 31])
@pytest.mark.parametrize("padding", ["same", "causal", 0])
def test_depthwise_equals_conv1d(padding, taps, dilation, backend):
    x, weight, bias = leaf((2, 19, 10), 1), leaf((10, taps), 2), leaf((10,), 3)
    y = ck.depthwise_conv1d(x, weight, bias, padding=padding, dilation=dilation, backend=backend)
    left = {"same": dilation * (taps // 2), "causal": dilation * (taps - 1), 0: 0}[padding]
    padded = F.pad(x.transpose(1, 2), (left, dilation * (taps - 1) - left))
    expected = F.conv1d(padded, weight[:, None], bias, dilation=dilation, groups=10).transpose(1, 2)
    close([y], [expected])
    close(grads(y, (x, weight, bias)), grads(expected, (x, weight, bias)))


@pytest.mark.parametrize(
    "options", [{}, {"softmax": False}, {"renormalize": True}, {"renormalize": True, "dilation": 3}]
)
def test_lightweight_equals_dynamic_with_expanded_weights(options, backend):
    x, weight, gate = leaf((2, 9, 12), 1), leaf((4, 5), 2), leaf((2, 9, 12), 3)
    mask = values((2, 9), torch.float64, 4) > -0.5
    light = ck.lightweight_conv1d(x, weight, gate=gate, mask=mask, backend=backend, **options)
    dynamic = ck.dynamic_conv1d(x, weight.expand(2, 9, 4, 5), gate=gate, mask=mask, backend=backend, **options)
    close([light], [dynamic])
    close(grads(light, (x, weight, gate)), grads(dynamic, (x, weight, gate)))


def test_lightweight_with_every_channel_a_head_equals_depthwise(backend):
    x, weight = leaf((2, 9, 6), 1), leaf((6, 4), 2)
    light = ck.lightweight_conv1d(x, weight, softmax=False, backend=backend)
    depthwise = ck.depthwise_conv1d(x, weight, backend=backend)
    assert torch.equal(light, depthwise)
    assert all(torch.equal(a, b) for a, b in zip(grads(light, (x, weight)), grads(depthwise, (x, weight)), strict=True))


@pytest.mark.parametrize("dilation", [2, 3])
def test_dilation_equals_a_kernel_with_zeros_between(dilation, backend):
    x, weight = leaf((2, 17, 6), 1), leaf((3, 4), 2)
    stuffed = F.pad(weight[..., None], (0, dilation - 1)).reshape(3, -1)[:, : 3 * dilation + 1]
    for left in (0, 1, 3 * dilation):
        y = ck.lightweight_conv1d(x, weight, softmax=False, dilation=dilation, padding=left, backend=backend)
        expected = ck.lightweight_conv1d(x, stuffed, softmax=False, padding=left, backend=backend)
        close([y], [expected])
        close(grads(y, (x, weight)), grads(expected, (x, weight)))


def test_softmax_outside_equals_softmax_inside(backend):
    x, weight = leaf((2, 9, 6), 1), leaf((2, 9, 3, 5), 2)
    inside = ck.dynamic_conv1d(x, weight, backend=backend)
    outside = ck.dynamic_conv1d(x, torch.softmax(weight, -1), softmax=False, backend=backend)
    close([inside], [outside])
    close(grads(inside, (x, weight)), grads(outside, (x, weight)))


def test_renormalize_differs_only_at_the_edges(backend):
    x, weight = torch.ones(1, 12, 4, dtype=torch.float64), values((2, 5), torch.float64, 1)
    plain = ck.lightweight_conv1d(x, weight, backend=backend)
    normalised = ck.lightweight_conv1d(x, weight, renormalize=True, backend=backend)
    torch.testing.assert_close(normalised, torch.ones_like(x))
    torch.testing.assert_close(plain[:, 2:-2], normalised[:, 2:-2])
    assert (plain[:, :2] < 0.999).all() and (plain[:, -2:] < 0.999).all()


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_softmax_of_large_logits(scale, backend):
    """The maximum is subtracted first: no overflow, and the largest tap takes all."""
    x = values((1, 9, 4), torch.float32, 1)
    weight = values((2, 5), torch.float32, 2) * scale
    y = ck.lightweight_conv1d(x, weight, backend=backend)
    one_hot = F.one_hot(weight.argmax(-1), 5).float()
    assert y.isfinite().all()
    torch.testing.assert_close(
        y, ck.lightweight_conv1d(x, one_hot, softmax=False, backend=backend), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("function", ["lightweight", "dynamic"])
def test_a_tap_with_logit_minus_infinity_is_absent(function, dtype, backend):
    """Masking taps by -inf before the softmax equals leaving them out; their gradient is 0."""
    rows = {"lightweight": (3,), "dynamic": (2, 9, 3)}[function]
    x, weight = leaf((2, 9, 12), 1, dtype), values((*rows, 5), dtype, 2).clone()
    weight[..., 0] = weight[..., 4] = float("-inf")
    weight.requires_grad_()
    middle = weight.detach()[..., 1:4].clone().requires_grad_()
    y = CALLS[function](x, weight, backend=backend)
    expected = CALLS[function](x, middle, backend=backend)
    close([y], [expected], rtol=1e-5, atol=1e-6)
    (ours_x, ours), (theirs_x, theirs) = grads(y, (x, weight)), grads(expected, (x, middle))
    close([ours_x, ours[..., 1:4]], [theirs_x, theirs], rtol=1e-5, atol=1e-5)
    assert (ours[..., 0] == 0).all() and (ours[..., 4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("head_size", [1, 16])
@pytest.mark.parametrize("function", ["lightweight", "dynamic"])
def test_a_filter_of_minus_infinities_is_nan(function, head_size, renormalize, dtype, backend):
    """softmax(-inf, ..., -inf) is NaN in PyTorch, and stays within its head and, if dynamic, its position."""
    rows = {"lightweight": (3,), "dynamic": (2, 9, 3)}[function]
    x, weight = leaf((2, 9, 3 * head_size), 1, dtype), values((*rows, 5), dtype, 2).clone()
    broken = (1,) if function == "lightweight" else (0, 4, 1)
    weight[broken] = float("-inf")
    weight.requires_grad_()
    y = CALLS[function](x, weight, renormalize=renormalize, backend=backend)
    lost = torch.zeros(2, 9, 3, dtype=torch.bool)
    reached, lost_filters = lost.clone(), torch.zeros(*rows, 5, dtype=torch.bool)
    lost_filters[broken] = True
    if function == "lightweight":
        lost[..., 1] = reached[..., 1] = True
    else:
        lost[0, 4, 1], reached[0, 2:7, 1] = True, True
    found = (y, *grads(y, (x, weight)))
    for tensor, expected in zip(found, (lost, reached, lost_filters), strict=True):
        width = tensor.numel() // expected.numel()
        assert torch.equal(tensor.isnan(), expected.repeat_interleave(width, -1))


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, repeat=2)))
def test_any_strides(function, layouts, backend):
    """Same numbers whatever the strides of x and weight; outputs keep the layout of a dense x."""
    rows = {"depthwise": (12,), "lightweight": (3,), "dynamic": (2, 9, 3)}[function]
    x = arrange(values((2, 9, 12), torch.float32, 1), layouts[0]).detach().requires_grad_()
    weight = arrange(values((*rows, 4), torch.float32, 2), layouts[1]).detach().requires_grad_()
    dense = [t.detach().contiguous().requires_grad_() for t in (x, weight)]
    y = CALLS[function](x, weight, backend=backend)
    expected = CALLS[function](*dense, backend=backend)
    close([y], [expected], rtol=1e-5, atol=1e-5)
    assert y.stride() == torch.empty_like(x).stride()
    close(grads(y, (x, weight)), grads(expected, dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("sizes", list(itertools.product((0, 2), (0, 1, 5), (0, 4))))
def test_degenerate_sizes(function, sizes, dtype, backend):
    """No rows, no positions, no channels: results and gradients of the right shape, zero gradients where nothing was
    read.
    """
    batch, length, channels = sizes
    rows = {"depthwise": (channels,), "lightweight": (2,), "dynamic": (batch, length, 2)}[function]
    if function == "depthwise" and channels == 0:
        pytest.skip("a weight needs a row")
    for taps, padding in ((1, "same"), (4, "causal"), (9, 0)):
        x, weight, bias = (leaf(shape, 1, dtype) for shape in ((batch, length, channels), (*rows, taps), (channels,)))
        y = CALLS[function](x, weight, bias, padding=padding, backend=backend)
        assert y.shape == x.shape and y.dtype == dtype
        found = torch.autograd.grad(y.sum(), (x, weight, bias))
        for grad, tensor in zip(found, (x, weight, bias), strict=True):
            assert grad.shape == tensor.shape and grad.dtype == dtype
            if y.numel() == 0:
                assert (grad == 0).all()
        with torch.no_grad():
            state = torch.zeros(batch, taps - 1, channels, dtype=dtype)
            if function != "dynamic":
                step = getattr(ck, f"{CALLS[function].__name__}_step")
                assert step(x.new_zeros(batch, channels), state, weight, bias, backend=backend).shape == (
                    batch,
                    channels,
                )


def test_taps_longer_than_the_sequence_read_nothing_outside(backend):
    """255 taps on 3 positions: only the three in the middle matter."""
    x, weight = leaf((2, 3, 4), 1), leaf((2, 255), 2)
    y = ck.lightweight_conv1d(x, weight, softmax=False, backend=backend)
    expected = ck.lightweight_conv1d(x, weight[:, 125:130].contiguous(), softmax=False, backend=backend)
    close([y], [expected])
    grad = torch.autograd.grad(y.sum(), weight)[0]
    assert (grad[:, :125] == 0).all() and (grad[:, 130:] == 0).all() and (grad[:, 125:130] != 0).all()


def test_a_position_whose_taps_are_all_outside(backend):
    """renormalize over nothing: weight 0, output bias, gradient 0, never NaN."""
    x, weight, bias = leaf((1, 3, 2), 1), leaf((1, 2), 2), leaf((2,), 3)
    y = ck.lightweight_conv1d(
        x, weight, bias, renormalize=True, dilation=5, padding=2, cu_seqlens=torch.tensor([0, 1, 3]), backend=backend
    )
    torch.testing.assert_close(y, bias.expand_as(y))
    found = torch.autograd.grad(y.sum(), (x, weight))
    assert all((grad == 0).all() for grad in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_dtypes(dtype, backend):
    """Activations in low precision with float32 parameters: y in x's dtype, gradients in each input's own."""
    x = leaf((2, 9, 6), 1, dtype)
    weight, bias = leaf((3, 5), 2, torch.float32), leaf((6,), 3, torch.float32)
    y = ck.lightweight_conv1d(x, weight, bias, backend=backend)
    assert y.dtype == dtype
    found = torch.autograd.grad(y.float().sum(), (x, weight, bias))
    assert [grad.dtype for grad in found] == [dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [0, 2**28, 2**30])
@pytest.mark.parametrize("function", ["lightweight", "dynamic"])
def test_the_greatest_dilation(function, padding, dtype, backend):
    """At most one tap of five meets the sequence: the others read zeros, however far they reach."""
    x = values((2, 6, 32), dtype, 1).clone().requires_grad_()
    weight = values((2, 5) if function == "lightweight" else (2, 6, 2, 5), dtype, 2).clone().requires_grad_()
    y = getattr(ck, f"{function}_conv1d")(x, weight, softmax=False, padding=padding, dilation=2**28, backend=backend)
    expected = (x.float() * weight.float()[..., padding // 2**28].repeat_interleave(16, -1)).to(dtype)
    torch.testing.assert_close(y, expected)
    cotangent = values(y.shape, dtype, 3)
    found = torch.autograd.grad(y, (x, weight), cotangent)
    for f, e in zip(found, torch.autograd.grad(expected, (x, weight), cotangent), strict=True):
        torch.testing.assert_close(f, e)


def test_gates_far_from_zero(backend):
    """sigmoid is 1 / (1 + exp(-gate)) in float32 to the ends: 0 where exp is infinite."""
    inf = float("inf")
    gates = torch.tensor([-inf, -1e30, -104.0, -89.0, -87.0, -80.0, 0.0, 87.0, 89.0, 1e30, inf])
    x = torch.full((1, 1, gates.numel()), 1e38)
    y = ck.depthwise_conv1d(x, torch.ones(gates.numel(), 1), gate=gates.view_as(x), backend=backend)
    torch.testing.assert_close(y, x * torch.sigmoid(gates), rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_denormals_pass_through(dtype, backend):
    """As input, as output, as gradient and in a state."""
    bits = torch.arange(1, 128, dtype=torch.int32 if dtype == torch.float32 else torch.int16)
    x = torch.cat([bits.view(dtype), -bits.view(dtype)])
    weight, C = torch.ones(x.numel(), 1, dtype=dtype), x.numel()
    leaf = x.view(1, 1, C).clone().requires_grad_()
    y = ck.depthwise_conv1d(leaf, weight, backend=backend)
    assert torch.equal(y.view(-1), x)
    assert torch.equal(torch.autograd.grad(y, leaf, leaf.detach())[0].view(-1), x)
    state = torch.zeros(1, 1, C, dtype=dtype)
    ck.depthwise_conv1d_step(x[None], state, weight.expand(C, 2), backend=backend)
    assert torch.equal(state.view(-1), x)


@pytest.mark.parametrize("length", [4, 8, 12])
def test_few_positions_side_by_side(length, backend):
    """Rows of so few positions that neighbouring threads have different ones."""
    results = []
    for name in (backend, "reference"):
        generator = torch.Generator().manual_seed(0)
        x, weight, cotangent = (
            torch.randn(shape, generator=generator, device="cpu")
            for shape in ((2, 40, length), (40, 5), (2, length, 40))
        )
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        y = ck.depthwise_conv1d(x.transpose(1, 2), weight, backend=name)
        results.append((y, *torch.autograd.grad(y, leaves, cotangent)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
