"""composite_attention: different ways to ask for the same, here and in PyTorch, masks and dropout.

That the numbers are right is shown by tests/test_attention_fuzz.py and tests/test_attention_golden.py.
"""

import pytest
import torch
import torch.nn.functional as F
from attention_inputs import DOUBLE, SHAPES, TERMS, B, D, H, T, build, leaf, qkv
from conftest import interpreted
from helpers import close

import convkernels as ck
from convkernels.testing.accuracy import NORM_LIMIT
from convkernels.testing.attention import INPUTS, AttentionProblem
from convkernels.testing.inputs import arrange, values

OP = "attention_grad"


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
        close(a, b)


def test_heads_before_time_and_slices_of_one_projection(backend):
    """[B,H,T,D] storage, and q, k and v cut from one tensor, as attention layers have them."""
    x = values((B, 3, H, T, D), torch.float32, 3)
    q, k, v = (x[:, n].transpose(1, 2) for n in range(3))
    expected = F.scaled_dot_product_attention(x[:, 0], x[:, 1], x[:, 2]).transpose(1, 2)
    y = ck.composite_attention(q, k, v, backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_plain_is_scaled_dot_product_attention(causal, backend):
    q, k, v = qkv(heads=H)
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal)
    close(ck.composite_attention(q, k, v, causal=causal, backend=backend), expected.transpose(1, 2))


def test_shared_key_heads_are_repeated_key_heads(backend):
    q, k, v = qkv()
    terms = {name: leaf(name).detach() for name in TERMS}
    y = ck.composite_attention(q, k, v, window=(1, 2), backend=backend, **terms)
    k, v = (t.repeat_interleave(2, 2) for t in (k, v))
    close(y, ck.composite_attention(q, k, v, window=(1, 2), backend=backend, **terms))


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_separate_calls(causal, backend):
    lengths, key_lengths = (2, 0, 3, 4), (3, 1, 2, 4)
    q = values((1, sum(lengths), H, D), DOUBLE, 1)
    k, v = (values((1, sum(key_lengths), 2, D), DOUBLE, n) for n in (2, 3))
    options = {name: leaf(name).detach() for name in TERMS} | {"window": (2, 1), "causal": causal, "backend": backend}
    cu_q, cu_k = (torch.tensor([0, *n], dtype=torch.int32).cumsum(0) for n in (lengths, key_lengths))
    y = ck.composite_attention(q, k, v, cu_seqlens_q=cu_q.int(), cu_seqlens_k=cu_k, **options)
    parts = zip(q.split(lengths, 1), k.split(key_lengths, 1), v.split(key_lengths, 1), strict=True)
    close(y, torch.cat([ck.composite_attention(*part, **options) for part in parts], 1))


def test_padding_is_a_shorter_sequence(backend):
    q, k, v = qkv()
    bias = leaf("bias").detach()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[:, 3:] = False
    y = ck.composite_attention(q, k, v, bias=bias, window=(1, 2), key_mask=mask, backend=backend)
    close(y[:, :3], ck.composite_attention(q[:, :3], k[:, :3], v[:, :3], bias=bias, window=(1, 2), backend=backend))


def test_one_query_at_a_time(backend):
    """The last query stands where the last key is: decoding gives the rows of the causal whole."""
    q, k, v = qkv()
    options = {name: leaf(name).detach() for name in TERMS} | {"window": (2, 1), "causal": True, "backend": backend}
    whole = ck.composite_attention(q, k, v, **options)
    for t in range(T):
        close(ck.composite_attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], **options), whole[:, t : t + 1])


def test_the_query_as_its_own_rel_query(backend):
    q, k, v = qkv()
    table = leaf("query_rel").detach()
    y = ck.composite_attention(q, k, v, query_rel=table, window=(1, 2), backend=backend)
    separate = ck.composite_attention(q, k, v, query_rel=table, rel_query=q * D**-0.5, window=(1, 2), backend=backend)
    close(y, separate)


def test_key_term_is_the_query_term_seen_from_the_other_side(backend):
    """Exchanging queries and keys transposes the scores: lse over queries of one is that over keys of the other."""
    q, k, v = qkv(heads=H)
    table = values((H, D, 3), DOUBLE, 7)
    one = ck.composite_attention(q, k, torch.ones_like(v), key_rel=table, backend=backend, return_lse=True)[1].exp()
    other = ck.composite_attention(k, q, torch.ones_like(v), query_rel=table, backend=backend, return_lse=True)[1].exp()
    close(one.sum(-1), other.sum(-1))


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
    close(y, expected.transpose(1, 2))


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
    close(term.flatten(2), expected)


def test_t5_beyond_the_window(backend):
    """Clipping continues T5's table: a window of max_distance is as good as one of the whole length."""
    q, k, v = (values((1, 40, 2, D), DOUBLE, n) for n in (1, 2, 3))
    table = values((8, 2), DOUBLE, 4)
    short = ck.t5_relative_bias(table, max_distance=12)
    assert short.shape == (2, 25)
    y = ck.composite_attention(q, k, v, bias=short, backend=backend)
    close(y, ck.composite_attention(q, k, v, bias=ck.t5_relative_bias(table, 40, max_distance=12), backend=backend))


@pytest.mark.parametrize(
    ("heads", "slopes"), [(4, [2, 4, 6, 8]), (6, [2, 4, 6, 8, 1, 3]), (1, [8]), (16, [n / 2 for n in range(1, 17)])]
)
def test_alibi(heads, slopes):
    """The slopes of Press et al., and of BLOOM where the number of heads is no power of two."""
    bias = ck.alibi_bias(heads, (2, 1), dtype=DOUBLE)
    expected = torch.tensor([2.0**-s for s in slopes], dtype=DOUBLE)[:, None] * torch.tensor([-2.0, -1, 0, -1])
    torch.testing.assert_close(bias, expected)
    assert torch.equal(ck.alibi_bias(heads, 1), expected[:, 1:].float())


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


def test_large_problem_in_every_dtype(backend):
    """Past the blocks of a kernel, against the same in float64."""
    problem = AttentionProblem(length=70, keys=70, head_size=16, left=8, right=8, bias=True, query_rel=1, key_rel=1,
                               value_conv=3, padding=1, layout="swap01")  # fmt: skip
    if interpreted(backend):
        problem = problem.with_(length=20, keys=20)
    expected = None
    for dtype, limit in NORM_LIMIT.items():
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
