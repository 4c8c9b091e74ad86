"""torch.func: vmap over every combination of mapped inputs, per-sample gradients, Jacobians."""

import itertools
import warnings
from functools import partial

import pytest
import torch
from helpers import CALLS, close
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, jacfwd, jacrev, jvp, vmap

import convkernels as ck
from convkernels import nn as cknn
from convkernels.testing.inputs import values

N, B, T, C, H, K = 3, 2, 7, 6, 2, 4
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def batching_rule_warnings_are_errors():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule.*")
        yield


def weight_shape(function):
    return {"depthwise": (C, K), "lightweight": (H, K), "dynamic": (B, T, H, K)}[function]


def make(shape, salt, mapped, dim=0):
    """A tensor, with a dimension of size N at `dim` when mapped."""
    shape = list(shape)
    if mapped:
        shape.insert(dim if dim >= 0 else len(shape) + 1 + dim, N)
    return values(shape, DOUBLE, salt)


def loop(function, in_dims, inputs):
    parts = []
    for n in range(N):
        parts.append(function(*(t if d is None else t.select(d, n) for t, d in zip(inputs, in_dims, strict=True))))
    return torch.utils._pytree.tree_map(lambda *p: torch.stack(p), *parts)


def check(function, in_dims, inputs):
    torch.testing.assert_close(
        vmap(function, in_dims=in_dims)(*inputs), loop(function, in_dims, inputs), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("mapped", [m for m in itertools.product((False, True), repeat=5) if any(m)])
def test_vmap_over_every_combination(function, mapped, backend):
    """x, weight, bias, gate and initial_state, each mapped or not, forward and gradients of all five."""
    shapes = [(B, T, C), weight_shape(function), (C,), (B, T, C), (B, K - 1, C)]
    inputs = [make(shape, i + 1, m) for i, (shape, m) in enumerate(zip(shapes, mapped, strict=True))]
    in_dims = tuple(0 if m else None for m in mapped)

    def call(x, weight, bias, gate, state):
        return CALLS[function](x, weight, bias, gate=gate, initial_state=state, padding="causal", backend=backend)

    check(call, in_dims, inputs)
    cotangent = values((B, T, C), DOUBLE, 9)
    check(grad(lambda *a: (call(*a) * cotangent).sum(), argnums=(0, 1, 2, 3, 4)), in_dims, inputs)


@pytest.mark.parametrize("dims", [(1, -1), (2, 0), (-1, 1), (3, None), (None, -1)])
@pytest.mark.parametrize("function", CALLS)
def test_vmap_over_any_dimension(function, dims, backend):
    shapes = [(B, T, C), weight_shape(function)]
    inputs = [make(s, i + 1, d is not None, d or 0) for i, (s, d) in enumerate(zip(shapes, dims, strict=True))]
    check(lambda x, w: CALLS[function](x, w, backend=backend), dims, inputs)
    moved = vmap(lambda x, w: CALLS[function](x, w, backend=backend), in_dims=dims, out_dims=2)(*inputs)
    torch.testing.assert_close(
        moved.movedim(2, 0), loop(lambda x, w: CALLS[function](x, w, backend=backend), dims, inputs)
    )


@pytest.mark.parametrize("options", [
    {"renormalize": True},
    {"softmax": False, "dilation": 2},
    {"weight_dropout": 0.4, "training": True},
    {"renormalize": True, "weight_dropout": 0.4, "training": True},
], ids=["renormalize", "raw_dilation", "dropout", "renormalize_dropout"])  # fmt: skip
@pytest.mark.parametrize("function", ["lightweight", "dynamic"])
def test_vmap_of_modes(function, options, backend):
    if "training" in options:
        options = options | {"seed": torch.tensor([5])}
    for mapped in ((True, False), (False, True), (True, True)):
        inputs = [make((B, T, C), 1, mapped[0]), make(weight_shape(function), 2, mapped[1])]
        in_dims = tuple(0 if m else None for m in mapped)

        def call(x, weight):
            return CALLS[function](x, weight, backend=backend, **options)

        check(call, in_dims, inputs)
        check(grad(lambda *a: call(*a).square().sum(), argnums=(0, 1)), in_dims, inputs)


def test_vmap_over_the_mask_alone(backend):
    x, weight = values((B, T, C), DOUBLE, 1), values((H, K), DOUBLE, 2)
    masks = values((N, B, T), DOUBLE, 3) > 0
    check(lambda m: ck.lightweight_conv1d(x, weight, mask=m, backend=backend), (0,), (masks,))


def test_vmap_over_packed_boundaries(backend):
    x, weight = values((1, 8, C), DOUBLE, 1), values((H, K), DOUBLE, 2)
    bounds = torch.tensor([[0, 3, 8], [0, 0, 8], [0, 5, 8]])
    check(lambda b: ck.lightweight_conv1d(x, weight, cu_seqlens=b, backend=backend), (0,), (bounds,))


def test_nested_vmap(backend):
    x, weight = values((2, 3, B, T, C), DOUBLE, 1), values((3, H, K), DOUBLE, 2)
    call = vmap(vmap(lambda a, w: ck.lightweight_conv1d(a, w, backend=backend)), in_dims=(0, None))
    expected = torch.stack(
        [torch.stack([ck.lightweight_conv1d(x[i, j], weight[j], backend=backend) for j in range(3)]) for i in range(2)]
    )
    torch.testing.assert_close(call(x, weight), expected)


@pytest.mark.parametrize("function", CALLS)
def test_per_sample_gradients(function, backend):
    """vmap(grad) over the batch equals one backward pass per sample."""
    x = values((5, T, C), DOUBLE, 1)
    shape = (5, T, H, K) if function == "dynamic" else weight_shape(function)
    weight, bias = values(shape, DOUBLE, 2), values((C,), DOUBLE, 3)

    def loss(sample, w, b):
        w = w[None] if function == "dynamic" else w
        return CALLS[function](sample[None], w, b, backend=backend).square().sum()

    in_dims = (0, 0 if function == "dynamic" else None, None)
    found = vmap(grad(loss, argnums=(1, 2)), in_dims=in_dims)(x, weight, bias)
    for n in range(5):
        leaves = [
            (weight[n] if function == "dynamic" else weight).clone().requires_grad_(),
            bias.clone().requires_grad_(),
        ]
        expected = torch.autograd.grad(loss(x[n], *leaves), leaves)
        for f, e in zip(found, expected, strict=True):
            close(f[n], e)


@pytest.mark.parametrize("function", CALLS)
def test_jacobians(function, backend):
    shape = {"depthwise": (2, 3), "lightweight": (1, 3), "dynamic": (1, 4, 1, 3)}[function]
    inputs = values((1, 4, 2), DOUBLE, 1), values(shape, DOUBLE, 2), values((1, 4, 2), DOUBLE, 3)

    def call(x, weight, gate):
        return CALLS[function](x, weight, gate=gate, backend=backend)

    found = jacrev(call, argnums=(0, 1, 2))(*inputs)
    expected = torch.autograd.functional.jacobian(call, inputs)
    for f, e in zip(found, expected, strict=True):
        close(f, e)


def test_hessian_by_reverse_over_reverse(backend):
    weight = values((1, 3), DOUBLE, 1)
    x = values((1, 4, 2), DOUBLE, 2)

    def loss(w):
        return ck.lightweight_conv1d(x, w, backend=backend).square().sum()

    torch.testing.assert_close(jacrev(jacrev(loss))(weight), torch.autograd.functional.hessian(loss, weight))


def test_functional_call_of_a_module(backend):
    module = cknn.GatedConv(C, cknn.LightweightConv1d(C, K, H, backend=backend)).double()
    parameters = dict(module.named_parameters())
    x = values((4, B, T, C), DOUBLE, 1)

    def loss(p, sample):
        return functional_call(module, p, (sample,)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for n in range(4):
        expected = torch.autograd.grad(module(x[n]).square().sum(), list(parameters.values()))
        for (name, value), e in zip(found.items(), expected, strict=True):
            torch.testing.assert_close(value[n], e, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


STEPS = {"depthwise": ck.depthwise_conv1d_step, "lightweight": ck.lightweight_conv1d_step,
         "dynamic": ck.dynamic_conv1d_step}  # fmt: skip


def refuses(call):
    with pytest.raises(NotImplementedError, match="forward-mode|forward mode"):
        call()


@pytest.mark.parametrize("function", CALLS)
def test_tangents_are_refused(function, backend):
    """Forward-mode differentiation is an error, whatever carries the tangent and however the call is made."""
    x, weight = values((B, T, C), DOUBLE, 1), values(weight_shape(function), DOUBLE, 2)
    inputs = {"x": x, "weight": weight, "bias": values((C,), DOUBLE, 3), "gate": values((B, T, C), DOUBLE, 4)}
    inputs["initial_state"] = values((B, K - 1, C), DOUBLE, 5)
    call = partial(CALLS[function], padding="causal", backend=backend)
    leaf = x.clone().requires_grad_()
    y = call(leaf, weight)
    with forward_ad.dual_level():
        for name, value in inputs.items():
            dual = forward_ad.make_dual(value, value)
            refuses(lambda name=name, dual=dual: call(**{**inputs, name: dual}))
        dual = forward_ad.make_dual(x, x)
        for short in (lambda: call(dual, weight), lambda: call(dual, weight.clone().requires_grad_()),
                      lambda: torch.autograd.grad(y, leaf, dual)):  # fmt: skip
            refuses(short)
        assert torch.equal(call(**inputs), call(**inputs))  # what has no tangent is computed as ever
        first = dual[:, 0].contiguous()
        row = weight[:, 0].contiguous() if function == "dynamic" else weight
        refuses(lambda: STEPS[function](first, torch.zeros(B, K - 1, C, dtype=DOUBLE), row, backend=backend))
    refuses(lambda: jvp(lambda v: call(v, weight), (x,), (x,)))
    refuses(lambda: jacfwd(jacrev(lambda w: call(x, w).sum()))(weight))


@pytest.mark.parametrize("function", CALLS)
def test_compiled_calls_refuse_tangents(function, backend):
    x, weight = values((B, T, C), DOUBLE, 1), values(weight_shape(function), DOUBLE, 2)
    compiled = torch.compile(
        partial(CALLS[function], weight=weight, padding="causal", backend=backend), backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), CALLS[function](x, weight, padding="causal", backend=backend))
    with forward_ad.dual_level():
        refuses(lambda: compiled(forward_ad.make_dual(x, x)))
    torch._dynamo.reset()


@pytest.mark.parametrize("function", STEPS)
def test_a_step_under_a_transform_is_refused(function, backend):
    x, state = torch.randn(N, B, C), torch.zeros(N, B, K - 1, C)
    weight = torch.randn(N, *({"dynamic": (B, H, K)}.get(function, weight_shape(function))))
    call = partial(STEPS[function], backend=backend)
    with pytest.raises(NotImplementedError, match=f"{function}_conv1d_step: expected no torch.func transform"):
        vmap(call)(x, state, weight)
    with pytest.raises(NotImplementedError, match=f"{function}_conv1d_step: expected no torch.func transform"):
        functionalize(call)(x[0], state[0], weight[0])
    assert not state.any()


def test_vmap_with_a_mapped_bias_rounds_once(backend):
    """As the loop does, bit for bit."""
    x, weight = values((B, T, C), torch.bfloat16, 1), values((H, K), torch.bfloat16, 2)
    bias = values((N, C), torch.bfloat16, 3)

    def call(bias):
        return ck.lightweight_conv1d(x, weight, bias, backend=backend)

    close = dict(rtol=2**-8, atol=0) if backend in ("triton", "cuda") else dict(rtol=0, atol=0)
    torch.testing.assert_close(vmap(call)(bias), torch.stack([call(b) for b in bias]), **close)
