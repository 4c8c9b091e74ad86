"""composite_attention: derivatives, registration, composition with the rest of PyTorch, and equal ways to say the same.

That the numbers are right is shown by tests/test_attention_fuzz.py and tests/test_attention_golden.py.
"""

import itertools
import random
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of, interpreted
from test_attention_fuzz import random_problem
from test_errors import nested, quantized
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import convkernels as ck
from convkernels.testing.attention import INPUTS, AttentionProblem
from convkernels.testing.inputs import arrange, values

OP = "attention_grad"
DOUBLE = torch.float64
B, T, H, D, W = 2, 5, 4, 3, 4
TERMS = {"bias": (H, W), "query_rel": (H, D, W), "key_rel": (D, W), "value_conv": (H, D, W), "value_conv_bias": (H, D),
         "value_conv_scale": (H,)}  # fmt: skip
SHAPES = {"q": (B, T, H, D), "k": (B, T, 2, D), "v": (B, T, 2, D), "rel_query": (B, T, H, 2), **TERMS}


def leaf(name, salt=0, dtype=DOUBLE, shape=None):
    value = values(shape or SHAPES[name], dtype, list(SHAPES).index(name) + 1 + salt)
    return value.clone().requires_grad_()


# Inputs beside q, k and v, changed shapes, and options.
MODES = {
    "plain": ((), {}, {}),
    "bias": (("bias",), {}, {"window": (1, 2)}),
    "query_rel": (("query_rel",), {"query_rel": (D, W)}, {"window": (1, 2), "outside": "zero"}),
    "rel_query": (("query_rel", "rel_query"), {"query_rel": (2, W)},
                  {"window": (W - 1, 0), "outside": "zero", "causal": True}),
    "key_rel": (("key_rel",), {}, {"window": (2, 1), "outside": "mask"}),
    "value_conv": (("value_conv", "value_conv_bias", "value_conv_scale"), {}, {"window": (2, 1), "causal": True}),
    "no_qk": (("bias", "key_rel"), {}, {"window": (1, 2), "qk": False}),
    "everything": (tuple(TERMS), {},
                   {"window": (1, 2), "mask": True, "dropout": 0.4, "training": True, "seeded": True}),
    "empty_rows": (("bias", "key_rel"), {}, {"window": (1, 2), "mask": "none"}),
    "longer_keys": (tuple(TERMS), {"k": (B, 7, 2, D), "v": (B, 7, 2, D)}, {"window": (1, 2), "causal": True}),
    "packed": (tuple(TERMS), {n: (1, *SHAPES[n][1:]) for n in "qkv"},
               {"window": (1, 2), "cu_seqlens_q": (0, 2, 2, 5), "cu_seqlens_k": (0, 1, 2, 5)}),
    "no_queries": (("bias",), {"q": (B, 0, H, D)}, {"window": (1, 2)}),
    "no_keys": (("bias",), {"k": (B, 0, 2, D), "v": (B, 0, 2, D)}, {"window": (1, 2)}),
}  # fmt: skip


def build(mode, backend, lse=False):
    """The function of its differentiable inputs alone, and these inputs."""
    extra, shapes, options = MODES[mode]
    inputs = {name: leaf(name, shape=shapes.get(name)) for name in ("q", "k", "v", *extra)}
    options = dict(options)
    mask = options.pop("mask", None)
    if mask:
        options["key_mask"] = values(inputs["k"].shape[:2], DOUBLE, 40) > -0.4
        options["key_mask"][-1] &= mask != "none"
    if options.pop("seeded", False):
        options["seed"] = torch.tensor([1234567890123])
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        if name in options:
            options[name] = torch.tensor(options[name])
    names = list(inputs)

    def call(*tensors):
        named = dict(zip(names, tensors, strict=True))
        result = ck.composite_attention(**named, backend=backend, return_lse=lse, **options)
        if not lse:
            return result
        return result[0], torch.where(result[1].isfinite(), result[1], 0.0)

    return call, tuple(inputs.values())


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


@pytest.mark.parametrize("layout", ["swap01", "swap_last", "step2", "step2_time", "offset1", "guarded"])
def test_strides(layout, backend):
    """q, k, v and gradients in any strides give the same bits; the result has q's layout."""
    call, inputs = build("everything", backend)
    cotangent = values(SHAPES["q"], DOUBLE, 9)
    expected = torch.autograd.grad(call(*inputs), inputs, cotangent)
    moved = [arrange(t.detach(), layout).requires_grad_() for t in inputs]
    y = call(*moved)
    assert torch.equal(y, call(*inputs)) and y.stride() == torch.empty_like(moved[0]).stride()
    for a, b in zip(torch.autograd.grad(y, moved, arrange(cotangent, layout)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_heads_before_time_and_slices_of_one_projection(backend):
    """[B,H,T,D] storage, and q, k and v cut from one tensor, as attention layers have them."""
    x = values((B, 3, H, T, D), torch.float32, 3)
    q, k, v = (x[:, n].transpose(1, 2) for n in range(3))
    expected = F.scaled_dot_product_attention(x[:, 0], x[:, 1], x[:, 2]).transpose(1, 2)
    y = ck.composite_attention(q, k, v, backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


# -- equal ways to say the same ---------------------------------------------------------------------------------------


def qkv(dtype=DOUBLE, heads=2, **shapes):
    return [values(shapes.get(n, (B, T, H if n == "q" else heads, D)), dtype, i + 1) for i, n in enumerate("qkv")]


def near(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_plain_is_scaled_dot_product_attention(causal, backend):
    q, k, v = qkv(heads=H)
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal)
    near(ck.composite_attention(q, k, v, causal=causal, backend=backend), expected.transpose(1, 2))


def test_shared_key_heads_are_repeated_key_heads(backend):
    q, k, v = qkv()
    terms = {name: leaf(name).detach() for name in TERMS}
    y = ck.composite_attention(q, k, v, window=(1, 2), backend=backend, **terms)
    k, v = (t.repeat_interleave(2, 2) for t in (k, v))
    near(y, ck.composite_attention(q, k, v, window=(1, 2), backend=backend, **terms))


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_separate_calls(causal, backend):
    lengths, key_lengths = (2, 0, 3, 4), (3, 1, 2, 4)
    q = values((1, sum(lengths), H, D), DOUBLE, 1)
    k, v = (values((1, sum(key_lengths), 2, D), DOUBLE, n) for n in (2, 3))
    options = {name: leaf(name).detach() for name in TERMS} | {"window": (2, 1), "causal": causal, "backend": backend}
    cu_q, cu_k = (torch.tensor([0, *n], dtype=torch.int32).cumsum(0) for n in (lengths, key_lengths))
    y = ck.composite_attention(q, k, v, cu_seqlens_q=cu_q.int(), cu_seqlens_k=cu_k, **options)
    parts = zip(q.split(lengths, 1), k.split(key_lengths, 1), v.split(key_lengths, 1), strict=True)
    near(y, torch.cat([ck.composite_attention(*part, **options) for part in parts], 1))


def test_padding_is_a_shorter_sequence(backend):
    q, k, v = qkv()
    bias = leaf("bias").detach()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[:, 3:] = False
    y = ck.composite_attention(q, k, v, bias=bias, window=(1, 2), key_mask=mask, backend=backend)
    near(y[:, :3], ck.composite_attention(q[:, :3], k[:, :3], v[:, :3], bias=bias, window=(1, 2), backend=backend))


def test_one_query_at_a_time(backend):
    """The last query stands where the last key is: decoding gives the rows of the causal whole."""
    q, k, v = qkv()
    options = {name: leaf(name).detach() for name in TERMS} | {"window": (2, 1), "causal": True, "backend": backend}
    whole = ck.composite_attention(q, k, v, **options)
    for t in range(T):
        near(ck.composite_attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], **options), whole[:, t : t + 1])


def test_the_query_as_its_own_rel_query(backend):
    q, k, v = qkv()
    table = leaf("query_rel").detach()
    y = ck.composite_attention(q, k, v, query_rel=table, window=(1, 2), backend=backend)
    separate = ck.composite_attention(q, k, v, query_rel=table, rel_query=q * D**-0.5, window=(1, 2), backend=backend)
    near(y, separate)


def test_key_term_is_the_query_term_seen_from_the_other_side(backend):
    """Exchanging queries and keys transposes the scores: lse over queries of one is that over keys of the other."""
    q, k, v = qkv(heads=H)
    table = values((H, D, 3), DOUBLE, 7)
    one = ck.composite_attention(q, k, torch.ones_like(v), key_rel=table, backend=backend, return_lse=True)[1].exp()
    other = ck.composite_attention(k, q, torch.ones_like(v), query_rel=table, backend=backend, return_lse=True)[1].exp()
    near(one.sum(-1), other.sum(-1))


def test_banded_low_rank_term_of_a_causal_model(backend):
    """Distances 0..E-1 have a column, further ones no term, and the term is not scaled."""
    E = 3
    q, k, v = qkv(heads=H)
    r, projection = values((B, T, H, 2), DOUBLE, 5), values((2, E), DOUBLE, 6)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    logits = (r @ projection.flip(1)).transpose(1, 2).gather(3, distance.clamp(0, E - 1).expand(B, H, T, T))
    bias = torch.where((distance >= 0) & (distance < E), logits, 0.0).masked_fill(distance < 0, float("-inf"))
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=bias, scale=1 / D)
    y = ck.composite_attention(
        q, k, v, query_rel=projection, rel_query=r, window=(E - 1, 0), outside="zero", causal=True, scale=1 / D,
        backend=backend,
    )  # fmt: skip
    near(y, expected.transpose(1, 2))


@pytest.mark.parametrize("causal", [False, True])
def test_depthwise_term_is_depthwise_conv1d(causal, backend):
    q, k, v = qkv(heads=H)
    taps, bias = values((H, D, 3), DOUBLE, 7), values((H, D), DOUBLE, 8)
    mask = values((B, T), DOUBLE, 9) > -0.5
    window = (2, 0) if causal else (1, 1)
    options = dict(window=window, causal=causal, key_mask=mask, backend=backend)
    term = ck.composite_attention(q, k, v, value_conv=taps, value_conv_bias=bias, **options)
    term = term - ck.composite_attention(q, k, v, **options)
    expected = ck.depthwise_conv1d(
        v.flatten(2), taps.flatten(0, 1), bias.flatten(), padding="causal" if causal else "same", mask=mask,
        backend="reference",
    )  # fmt: skip
    near(term.flatten(2), expected)


def test_t5_beyond_the_window(backend):
    """Clipping continues T5's table: a window of max_distance is as good as one of the whole length."""
    q, k, v = (values((1, 40, 2, D), DOUBLE, n) for n in (1, 2, 3))
    table = values((8, 2), DOUBLE, 4)
    short = ck.t5_relative_bias(table, max_distance=12)
    assert short.shape == (2, 25)
    y = ck.composite_attention(q, k, v, bias=short, backend=backend)
    near(y, ck.composite_attention(q, k, v, bias=ck.t5_relative_bias(table, 40, max_distance=12), backend=backend))


# -- masks and dropout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [float("nan"), float("inf")])
def test_padding_may_hold_anything(fill, backend):
    inputs = {name: leaf(name) for name in ("q", "k", "v", *TERMS)}
    mask = values((B, T), DOUBLE, 40) > -0.3
    assert not mask.all()

    def run(k, v):
        leaves = {**inputs, "k": k.detach().requires_grad_(), "v": v.detach().requires_grad_()}
        y, lse = ck.composite_attention(**leaves, window=(1, 2), key_mask=mask, backend=backend, return_lse=True)
        found = torch.autograd.grad(y.sum() + lse.sum(), list(leaves.values()))
        return y, lse, *found

    clean = run(inputs["k"], inputs["v"])
    where = mask[..., None, None]
    dirty = run(torch.where(where, inputs["k"], fill), torch.where(where, inputs["v"], fill))
    for a, b in zip(dirty, clean, strict=True):
        assert torch.equal(a, b)
    assert not clean[3][~mask].any() and not clean[4][~mask].any()


def test_queries_that_see_nothing(backend):
    """Zero output, zero gradients, lse of -inf; the depthwise term's bias still arrives."""
    inputs = {name: leaf(name) for name in ("q", "k", "v", "bias")}
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0] = True
    y, lse = ck.composite_attention(**inputs, window=(1, 2), key_mask=mask, backend=backend, return_lse=True)
    assert not y[1].any() and (lse[1] == float("-inf")).all() and lse[0].isfinite().all()
    found = torch.autograd.grad(y.sum(), list(inputs.values()))
    assert all(value.isfinite().all() for value in found)
    assert not any(value[1].any() for value in found[:3])
    _, lse = ck.composite_attention(**inputs, window=(1, 2), key_mask=mask, backend=backend, return_lse=True)
    found = torch.autograd.grad(lse, list(inputs.values()), torch.where(lse.isfinite(), 1.0, float("nan")).double(),
                                allow_unused=True)  # fmt: skip
    assert all(value is None or value.isfinite().all() for value in found)
    taps, bias = leaf("value_conv").detach(), leaf("value_conv_bias").detach()
    y = ck.composite_attention(
        **inputs, value_conv=taps, value_conv_bias=bias, window=(1, 2), key_mask=mask, backend=backend
    )
    assert torch.equal(y[1], bias.expand(T, H, D))


def test_dropout(backend):
    """A function of the seed and the coordinates; scaled, off in evaluation, and drawn from the generator."""
    q, k, v = (values((2, 33, 3, 4), torch.float32, n) for n in (1, 2, 3))
    ones = torch.ones_like(v)
    options = dict(dropout=0.25, training=True, backend=backend)
    seed = torch.tensor([5])
    y = ck.composite_attention(q, k, ones, seed=seed, **options)
    assert torch.equal(y, ck.composite_attention(q, k, ones, seed=seed, **options))
    assert not torch.equal(y, ck.composite_attention(q, k, ones, seed=seed + 1, **options))
    assert abs(y.mean().item() - 1) < 0.05 and (y - 1).abs().max() > 0.01
    assert torch.equal(
        ck.composite_attention(q, k, v, dropout=0.25, backend=backend), ck.composite_attention(q, k, v, backend=backend)
    )
    torch.manual_seed(3)
    a = ck.composite_attention(q, k, v, **options)
    torch.manual_seed(3)
    assert torch.equal(a, ck.composite_attention(q, k, v, **options))
    assert not ck.composite_attention(q, k, v, dropout=1.0, training=True, backend=backend).any()
    # Heads, rows and positions drop independently of how many others there are.
    part = ck.composite_attention(q[:1, :7, :1], k[:1, :, :1], ones[:1, :, :1], seed=seed, window=40, **options)
    shifted = ck.composite_attention(q[:1, :, :1], k[:1, :, :1], ones[:1, :, :1], seed=seed, **options)[:, :7]
    torch.testing.assert_close(part, shifted)


# -- the rest of PyTorch ----------------------------------------------------------------------------------------------


def test_flops(backend):
    S, G, R, E = 7, 2, 5, 3
    q, k, v = (torch.randn(B, n, h, D, requires_grad=True) for n, h in ((T, H), (S, G), (S, G)))
    terms = dict(query_rel=torch.randn(R, E), rel_query=torch.randn(B, T, H, R), key_rel=torch.randn(H, D, E),
                 bias=torch.randn(H, E), value_conv=torch.randn(H, D, E))  # fmt: skip
    pairs, by_query, by_key, taps = (
        2 * B * H * T * S * D,
        2 * B * H * T * R * E,
        2 * B * H * S * D * E,
        2 * B * H * T * D * E,
    )

    def count(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    def call(**more):
        return ck.composite_attention(q, k, v, backend=backend, **more)

    with torch.no_grad():
        assert count(call) == 2 * pairs
        assert count(lambda: call(**terms)) == 2 * pairs + by_query + by_key + taps
        assert count(lambda: call(bias=terms["bias"], qk=False)) == pairs
    assert count(lambda: call().sum().backward()) == 2 * pairs + 5 * pairs
    forward = 2 * pairs + by_query + by_key + taps
    every = {name: value.requires_grad_() for name, value in terms.items()}
    backward = 5 * pairs + 3 * by_query + 3 * by_key + 2 * taps
    assert count(lambda: call(**every).sum().backward()) == forward + backward
    q.requires_grad_(False), k.requires_grad_(False)
    assert count(lambda: call().sum().backward()) == 2 * pairs + 2 * pairs


OPCHECK_OF_DOUBLE_BACKWARD = 7007


def sample(number, requires_grad):
    """A random problem whose tensors opcheck can copy: no empty views, nothing expanded."""
    problem = random_problem(number)
    changes = {
        name: "contiguous" for name in ("layout", "table_layout", "grad_layout") if getattr(problem, name) == "expanded"
    }
    problem = problem.with_(**changes, padding=problem.padding % 2)
    t = problem.tensors()
    for name, value in t.items():
        if value is not None and value.numel() == 0:
            t[name] = torch.empty(value.shape, dtype=value.dtype)
        elif name in ("k", "v"):
            t[name] = value.nan_to_num()
        if requires_grad and t[name] is not None and name in (*INPUTS, "grad"):
            t[name] = t[name].detach().requires_grad_()
    return problem, t


@pytest.mark.parametrize(
    "number", [*range(7001, 7007), pytest.param(OPCHECK_OF_DOUBLE_BACKWARD, marks=pytest.mark.slow)]
)
def test_opcheck(number, ops):
    """Schema, fakes, autograd registration and dispatch with dynamic shapes; tracing the double backward takes long."""
    requires_grad = number % 4 == 3
    problem, t = sample(number, requires_grad)
    arguments = problem.op_arguments(t)
    torch.library.opcheck(getattr(torch.ops.convkernels.attention, ops.backend), arguments)
    if not requires_grad:
        torch.library.opcheck(ops.attention, arguments)
    out, lse = ops.attention(*(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments))
    needs = random.Random(number).choice((1023, 1023, 7, 8 | 1, 896))
    for full in ("attention_grad", "_attention_grad"):
        t = sample(number, requires_grad and number == OPCHECK_OF_DOUBLE_BACKWARD)[1]
        grad_op = getattr(getattr(torch.ops.convkernels, full), ops.backend)
        if full[0] != "_" or not t["q"].requires_grad:
            torch.library.opcheck(grad_op, problem.grad_arguments(t, out, lse, needs))


@pytest.mark.parametrize("mode", ["everything", "packed"])
def test_compile(mode, backend):
    """No graph breaks, dynamic shapes, forward and backward equal to eager."""
    torch._dynamo.reset()
    extra, _, options = MODES[mode]
    options = {name: value for name, value in options.items() if name not in ("mask", "seeded")}

    def call(leaves, more):
        return ck.composite_attention(**leaves, **more, backend=backend)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 9, 12):
        leaves = {name: leaf(name, shape=(1, length, *SHAPES[name][2:]) if name in "qkv" else None)
                  for name in ("q", "k", "v", *extra)}  # fmt: skip
        more = dict(options, key_mask=values((1, length), DOUBLE, 8) > -0.5)
        if mode == "packed":
            more.update({name: torch.tensor([0, 3, length]) for name in ("cu_seqlens_q", "cu_seqlens_k")})
        else:
            more["seed"] = torch.tensor([3])
        y, expected = compiled(leaves, more), call(leaves, more)
        near(y, expected)
        for a, b in zip(
            *(torch.autograd.grad(r.square().sum(), list(leaves.values())) for r in (y, expected)), strict=True
        ):
            near(a, b)
    torch._dynamo.reset()


def test_compile_of_a_functional_gradient(backend):
    """torch.compile(torch.func.grad(...)) keeps the operator whole; traced into, its gradient would be zero."""
    torch._dynamo.reset()
    q, k, v = (t.detach() for t in qkv())
    function = grad(lambda q: ck.composite_attention(q, k, v, backend=backend).square().sum())
    found = torch.compile(function, backend="aot_eager", fullgraph=True)(q)
    assert found.any()
    near(found, function(q))
    torch._dynamo.reset()


N = 3


@pytest.mark.parametrize("mapped", [
    *itertools.combinations(["q", "k", "bias", "query_rel", "value_conv_bias"], 1),
    ("q", "k", "v"), ("k", "key_rel"), ("value_conv", "value_conv_scale"), ("q", "k", "v", "key_mask"), ("key_mask",),
    ("bias", "key_mask"), ("q", "k", "v", *TERMS),
], ids="-".join)  # fmt: skip
@pytest.mark.parametrize("tables", [False, True], ids=["", "tables"])
def test_vmap(mapped, tables, backend):
    """Forward and gradients of everything equal a loop, whatever is mapped."""
    names = ["q", "k", "v", *(TERMS if tables or set(mapped) & set(TERMS) else ())]
    every = {name: leaf(name).detach() for name in names} | {"key_mask": values((B, T), DOUBLE, 40) > -0.5}
    for name in mapped:
        if name in every:
            stacked = [every[name]] + [values(every[name].shape, DOUBLE, 50 + n + len(name)) for n in range(N - 1)]
            every[name] = torch.stack(
                [s > -0.5 if name == "key_mask" and s.is_floating_point() else s for s in stacked], 1
            )
    in_dims = tuple(1 if name in mapped else None for name in every)
    cotangent = values((B, T, H, D), DOUBLE, 9)

    def call(*tensors):
        y, lse = ck.composite_attention(
            **dict(zip(every, tensors, strict=True)), window=(1, 2), backend=backend, return_lse=True
        )
        return (y * cotangent).sum() + torch.where(lse.isfinite(), lse, 0.0).sum()

    for function in (call, grad(call, argnums=tuple(range(len(names))))):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*batching rule.*")
            together = vmap(function, in_dims=in_dims)(*every.values())
        single = [
            function(*(t if d is None else t.select(d, n) for t, d in zip(every.values(), in_dims, strict=True)))
            for n in range(N)
        ]
        expected = torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), *single)
        torch.testing.assert_close(together, expected, rtol=1e-12, atol=1e-12)


def test_vmap_with_dropout_and_packing(backend):
    q, k, v = (values((N, 1, T, n, D), DOUBLE, n) for n in (H, 2, 2))
    options = dict(bias=leaf("bias").detach(), window=(1, 2), backend=backend)
    for more in (
        {"dropout": 0.4, "training": True, "seed": torch.tensor([5])},
        {"cu_seqlens_q": torch.tensor([0, 2, T])},
    ):
        together = vmap(lambda q, k, v, more=more: ck.composite_attention(q, k, v, **options, **more))(q, k, v)
        near(together, torch.stack([ck.composite_attention(q[n], k[n], v[n], **options, **more) for n in range(N)]))


def test_tangents_are_refused(backend):
    inputs = {name: leaf(name).detach() for name in ("q", "k", "v", "rel_query", *TERMS)} | {
        "query_rel": leaf("query_rel", shape=(H, 2, W)).detach()
    }
    call = partial(ck.composite_attention, window=(1, 2), backend=backend)
    q = leaf("q")
    y = call(q, inputs["k"], inputs["v"])
    with forward_ad.dual_level():
        for name, value in inputs.items():
            dual = forward_ad.make_dual(value, value)
            with pytest.raises(NotImplementedError, match=f"argument '{name}': expected no tangent"):
                call(**{**inputs, name: dual})
        with pytest.raises(NotImplementedError, match="argument 'grad': expected no tangent"):
            torch.autograd.grad(y, q, forward_ad.make_dual(inputs["q"], inputs["q"]))
    with pytest.raises(NotImplementedError, match="argument 'q': expected no tangent"):
        torch.func.jvp(lambda q: call(q, inputs["k"], inputs["v"]), (inputs["q"],), (inputs["q"],))


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


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_boundaries_without_values(mode, backend):
    """Where sequences' boundaries only stand for others they are not read; in eager code they are."""
    q, bounds = torch.randn(1, T, H, D), torch.tensor([0, 2, T])

    def call(q, bounds):
        return ck.composite_attention(q, q, q, cu_seqlens_q=bounds, backend=backend)

    graph = make_fx(call, tracing_mode=mode)(q, bounds)
    assert torch.equal(graph(q, bounds), call(q, bounds))
    with FakeTensorMode() as fakes:
        assert call(*map(fakes.from_tensor, (q, bounds))).shape == q.shape
    doubled = call(*(TwoTensor(t, t.clone()) for t in (q, bounds)))
    assert torch.equal(doubled.a, call(q, bounds))


def test_meta_tensors(backend):
    """Shapes, dtypes and strides as on a device, and nothing is computed."""
    names = ("q", "k", "v", *TERMS)
    for chosen in (backend, "auto"):
        inputs = {name: leaf(name).detach().to("meta").requires_grad_() for name in names}
        out, lse = ck.composite_attention(**inputs, window=(1, 2), return_lse=True, dropout=0.2, training=True,
                                          backend=chosen)  # fmt: skip
        assert out.is_meta and out.shape == inputs["q"].shape and lse.shape == (B, H, T)
        out.sum().backward()
        assert all(value.grad.shape == value.shape for value in inputs.values())


def test_autocast_and_checkpoint(backend):
    q, k, v = (t.requires_grad_() for t in qkv(torch.float32))
    bias = leaf("bias", dtype=torch.float32)
    kind = q.device.type
    with torch.autocast(kind, dtype=torch.bfloat16):
        y = ck.composite_attention(q, k, v, bias=bias, window=(1, 2), backend=backend)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y.float().sum(), (q, k, v, bias))
    assert all(value.dtype == torch.float32 for value in found)

    def call(q, k, v):
        return ck.composite_attention(q, k, v, dropout=0.3, training=True, backend=backend)

    torch.manual_seed(1)
    plain = torch.autograd.grad(call(q, k, v).sum(), q)
    torch.manual_seed(1)
    assert torch.equal(torch.autograd.grad(checkpoint(call, q, k, v, use_reentrant=False).sum(), q)[0], plain[0])


# -- errors ---------------------------------------------------------------------------------------------


def packed(**changes):
    return {**{n: torch.randn(1, *SHAPES[n][1:]) for n in "qkv"}, **changes}


def bounds(*numbers):
    return torch.tensor(numbers)


r = torch.randn
BAD = [
    ({"q": None}, TypeError, "q", "a tensor", "None"),
    ({"q": r(T, H, D)}, ValueError, "q", r"4 dimensions \[B,T,H,D\]", r"\[5, 4, 3\]"),
    ({"q": torch.ones(B, T, H, D, dtype=torch.int64)}, TypeError, "q", "float", "int64"),
    ({"q": r(B, T, 0, D)}, ValueError, "q", "at least one head", r"\[2, 5, 0, 3\]"),
    ({"q": r(B, T, H, D).to_sparse()}, TypeError, "q", "dense", "sparse"),
    ({"k": r(B, T, D)}, ValueError, "k", r"4 dimensions \[B,S,G,D\]", r"\[2, 5, 3\]"),
    ({"k": r(B + 1, T, 2, D)}, ValueError, "k", r"\[B,S,G,D\] = \[2, 5, 2, 3\]", r"\[3, 5, 2, 3\]"),
    ({"k": r(B, T, 3, D)}, ValueError, "k", "divides H = 4", r"\[2, 5, 3, 3\]"),
    ({"k": r(B, T, 2, D + 1)}, ValueError, "k", r"\[2, 5, 2, 3\]", r"\[2, 5, 2, 4\]"),
    ({"k": r(B, T, 2, D).double()}, TypeError, "k", "dtype of q, torch.float32", "float64"),
    ({"v": r(B, T + 1, 2, D)}, ValueError, "v", r"\[2, 5, 2, 3\]", r"\[2, 6, 2, 3\]"),
    ({"v": r(B, T, 2, D).half()}, TypeError, "v", "dtype of q", "float16"),
    ({"v": r(B, T, 2, D, device="meta")}, ValueError, "v", "on cpu, where q is", "on meta"),
    ({"bias": r(H, 3).tolist()}, TypeError, "bias", "a tensor or None", "list"),
    ({"bias": r(3)}, ValueError, "bias", "at least one column", r"shape \[3\]"),
    ({"bias": r(H + 1, 3)}, ValueError, "bias", r"\[H,W\] = \[4, 3\]", r"\[5, 3\]"),
    ({"bias": r(H, 4)}, ValueError, "window", r"\(left, right\), because bias has an even number of columns", "None"),
    ({"bias": r(H, 3).double()}, TypeError, "bias", "not float64, because q is torch.float32", "float64"),
    ({"bias": r(H, 3), "window": (1, 2)}, ValueError, "bias", r"\[4, 4\]", r"\[4, 3\]"),
    ({"query_rel": r(D + 1, 3)}, ValueError, "query_rel", r"\[R,W\] = \[3, 3\]", r"\[4, 3\]"),
    ({"query_rel": r(2, D, 3)}, ValueError, "query_rel", r"\[R,W\] or \[H,R,W\] = \[4, 3, 3\]", r"\[2, 3, 3\]"),
    ({"query_rel": r(D, 3), "bias": r(H, 5)}, ValueError, "query_rel", r"\[3, 5\]", r"\[3, 3\]"),
    ({"rel_query": r(B, T, H, 2)}, ValueError, "rel_query", "None, because query_rel is not given", r"\[2, 5, 4, 2\]"),
    ({"rel_query": r(B, T, 2), "query_rel": r(2, 3)}, ValueError, "rel_query", "4 dimensions", r"\[2, 5, 2\]"),
    ({"rel_query": r(B, T, 2, 2), "query_rel": r(2, 3)}, ValueError, "rel_query", r"\[2, 5, 4, 2\]", r"\[2, 5, 2, 2\]"),
    ({"rel_query": r(B, T, H, 2), "query_rel": r(D, 3)}, ValueError, "query_rel", r"\[2, 3\]", r"\[3, 3\]"),
    ({"key_rel": r(H, D, 0)}, ValueError, "key_rel", "at least one column", r"\[4, 3, 0\]"),
    ({"key_rel": r(D + 1, 3)}, ValueError, "key_rel", r"\[D,W\] = \[3, 3\]", r"\[4, 3\]"),
    ({"value_conv": r(D, 3)}, ValueError, "value_conv", r"\[H,D,W\] = \[4, 3, 3\]", r"\[3, 3\]"),
    ({"value_conv_bias": r(H, D)}, ValueError, "value_conv_bias", "None, because value_conv is not given", r"\[4, 3\]"),
    ({"value_conv": r(H, D, 3), "value_conv_bias": r(H)}, ValueError, "value_conv_bias", r"\[4, 3\]", r"shape \[4\]"),
    ({"value_conv": r(H, D, 3), "value_conv_scale": r(1, H)}, ValueError, "value_conv_scale", r"\[4\]", r"\[1, 4\]"),
    ({"window": (1, 2, 3)}, TypeError, "window", r"\(left, right\)", r"\(1, 2, 3\)"),
    ({"window": (2**60, 0), "outside": "mask"}, ValueError, "window", r"below 2\^60", r"\(1152921504606846976, 0\)"),
    ({"window": 2**64, "outside": "mask"}, ValueError, "window", r"below 2\^60", "18446744073709551616"),
    ({"q": [0.0] * 10000}, TypeError, "q", "a tensor", r"0.0, \.\.\.\] of type list"),
    ({"k": nested(torch.strided)}, TypeError, "k", "in one row, with cu_seqlens", "a nested tensor"),
    ({"k": nested(torch.jagged)}, TypeError, "k", "in one row, with cu_seqlens", "a nested tensor"),
    ({"v": quantized()}, TypeError, "v", "not quantized", "qint8"),
    ({"window": (1, -1)}, ValueError, "window", "two integers >= 0", r"\(1, -1\)"),
    ({"window": 1.5}, TypeError, "window", r"k for \(k, k\)", "1.5 of type float"),
    ({"window": (True, 1)}, TypeError, "window", "two integers", "True"),
    ({"outside": "mask"}, ValueError, "window", r"\(left, right\), because outside='mask'", "None"),
    ({"outside": "wrap"}, ValueError, "outside", "'clip', 'zero' or 'mask'", "'wrap'"),
    ({"outside": None}, TypeError, "outside", "'clip', 'zero' or 'mask'", "None"),
    ({"causal": 1}, TypeError, "causal", "True or False", "1 of type int"),
    ({"qk": False}, ValueError, "qk", "True, because there is no bias, query_rel or key_rel", "False"),
    ({"return_lse": None}, TypeError, "return_lse", "True or False", "None"),
    ({"key_mask": torch.ones(B, T)}, TypeError, "key_mask", "bool", "float32"),
    ({"key_mask": torch.ones(B, 1, dtype=torch.bool)}, ValueError, "key_mask", r"\[B,S\] = \[2, 5\]", r"\[2, 1\]"),
    ({"cu_seqlens_q": bounds(0, 5)}, ValueError, "q", r"\[1,T,H,D\]", r"\[2, 5, 4, 3\]"),
    ({"cu_seqlens_k": bounds(0, 5)}, ValueError, "cu_seqlens_q", "because cu_seqlens_k is given", "None"),
    (packed(cu_seqlens_q=bounds(1, 5)), ValueError, "cu_seqlens_q", "first boundary of 0", "1"),
    (packed(cu_seqlens_q=bounds(0, 4)), ValueError, "cu_seqlens_q", "last boundary of T = 5", "4"),
    (packed(cu_seqlens_q=bounds(0, 3, 2, 5)), ValueError, "cu_seqlens_q", "never decrease", r"\[0, 3, 2, 5\]"),
    (packed(cu_seqlens_q=torch.tensor([0.0, 5.0])), TypeError, "cu_seqlens_q", "int32 or int64", "float32"),
    (packed(cu_seqlens_q=bounds(0, 5), cu_seqlens_k=bounds(0, 2, 5)), ValueError, "cu_seqlens_k", r"\[2\]", r"\[3\]"),
    (packed(k=r(1, 7, 2, D), v=r(1, 7, 2, D), cu_seqlens_q=bounds(0, 5)), ValueError, "cu_seqlens_k", "differ", "None"),
    ({"dropout": 1.5}, ValueError, "dropout", "probability", "1.5"),
    ({"dropout": True}, TypeError, "dropout", "probability", "True"),
    ({"training": 1}, TypeError, "training", "True or False", "1"),
    ({"seed": torch.tensor([1.0])}, TypeError, "seed", "int64", "float32"),
    ({"seed": torch.tensor([1, 2])}, ValueError, "seed", r"\[1\]", r"\[2\]"),
    ({"scale": "1"}, TypeError, "scale", "a number or None", "'1'"),
    ({"scale": float("nan")}, ValueError, "scale", "finite", "nan"),
    ({"backend": "cudnn"}, ValueError, "backend", "one of 'auto'", "'cudnn'"),
]  # fmt: skip


@pytest.mark.parametrize("row", range(len(BAD)), ids=lambda i: f"{i}-{BAD[i][2]}")
def test_bad_input(row):
    changes, kind, argument, expected, got = BAD[row]
    arguments = {**{n: torch.randn(SHAPES[n]) for n in "qkv"}, "backend": "reference", **changes}
    pattern = rf"^composite_attention: argument '{argument}': expected .*{expected}.*, got .*{got}"
    with pytest.raises(kind, match=pattern) as caught:
        ck.composite_attention(**arguments)
    assert type(caught.value) is kind


@pytest.mark.parametrize(("changes", "argument"), [
    ({"table": torch.randn(32)}, "table"), ({"table": torch.randn(31, 2)}, "table"), ({"table": None}, "table"),
    ({"window": (1,)}, "window"), ({"window": (-1, 2)}, "window"), ({"window": 0}, "window"),
    ({"max_distance": 8}, "max_distance"), ({"max_distance": 2.0}, "max_distance"),
    ({"bidirectional": 1}, "bidirectional"),
])  # fmt: skip
def test_bad_input_of_t5(changes, argument):
    with pytest.raises((TypeError, ValueError), match=f"^t5_relative_bias: argument '{argument}': expected .*, got"):
        ck.t5_relative_bias(**{"table": torch.randn(32, 2), **changes})


def test_large_problem_in_every_dtype(backend):
    """Past the blocks of a kernel, against the same in float64."""
    problem = AttentionProblem(length=70, keys=70, head_size=16, left=8, right=8, bias=True, query_rel=1, key_rel=1,
                               value_conv=3, padding=1, layout="swap01")  # fmt: skip
    if interpreted(backend):
        problem = problem.with_(length=20, keys=20)
    expected = None
    for dtype, limit in ((DOUBLE, 0.0), (torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 2e-2)):
        t = problem.with_(dtype=dtype, table_dtype=dtype).tensors()
        leaves = {n: t[n].requires_grad_() for n in INPUTS if t[n] is not None}
        y = ck.composite_attention(**leaves, window=8, key_mask=t["key_mask"], backend=backend)
        found = [y, *torch.autograd.grad(y, list(leaves.values()), t["grad"])]
        if expected is None:
            expected = [f.double() for f in found]
            continue
        for name, f, e in zip(("out", *leaves), found, expected, strict=True):
            error = (f.double() - e).norm() / e.norm()
            assert error <= limit, f"{name} in {dtype}: {error:.3g}"
