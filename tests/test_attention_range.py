"""Scores and values of any size. The CPU kernels take the exponentials of small scores as they are, without the maximum
of the row subtracted, where a bound of the row's scores allows it: near the bound, beyond it, and with values for which
the range of float32 then ends, results are as good as elsewhere, and what a row does not see decides nothing.
"""

import pytest
import torch

import convkernels as ck

B, T, S, H, D, WINDOW = 2, 120, 300, 2, 24, 5
TERMS = {
    "plain": (),
    "tables": ("bias", "query_rel"),
    "keys": ("bias", "key_rel"),
    "rank": ("query_rel", "rel_query"),
    "all": ("bias", "query_rel", "key_rel"),
}


@pytest.fixture(autouse=True)
def on_the_cpu(request):
    if "backend" in request.fixturenames and request.getfixturevalue("backend") != "cpu":
        pytest.skip("others subtract maxima always")


def inputs(terms, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rank = 7 if "rel_query" in terms else D
    shapes = {"q": (B, T, H, D), "k": (B, S, H, D), "v": (B, S, H, D)}
    tables = {
        "bias": (H, 2 * WINDOW + 1),
        "query_rel": (H, rank, 2 * WINDOW + 1),
        "key_rel": (D, 2 * WINDOW + 1),
        "rel_query": (B, T, H, rank),
    }
    shapes |= {name: tables[name] for name in terms}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def results(tensors, backend, dtype, **options):
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return ck.composite_attention(**tensors, window=(WINDOW, WINDOW), return_lse=True, backend=backend, **options)


def check(tensors, backend, **options):
    """Errors of each channel beside its own largest number, and those of lse."""
    out, lse = results(tensors, backend, torch.float32, **options)
    exact, exact_lse = results(tensors, "reference", torch.float64, **options)
    size = exact.abs().amax((0, 1), keepdim=True)
    assert ((out - exact).abs() <= 2e-4 * size).all()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("outside", ["clip", "zero", "mask"])
@pytest.mark.parametrize("terms", TERMS)
def test_scores_of_any_size(terms, outside, causal, backend):
    """Rows side by side whose scores are up to a hundred times larger than those of others."""
    tensors = inputs(TERMS[terms])
    sizes = torch.tensor([0.0, 0.3, 2.0, 6.0, 12.0, 40.0])[torch.arange(T) % 6]
    for name in ("q", "rel_query"):
        if name in tensors:
            tensors[name] *= sizes[None, :, None, None]
    check(tensors, backend, outside=outside, causal=causal)


@pytest.mark.parametrize("level", [-38.0, -20.0, 0.0, 20.0, 38.0])
def test_values_of_any_size(level, backend):
    """All scores near `level`, so that a weight as it is may be 2^-55 or 2^55; channels from 1e-35 to 1e35, and 0."""
    tensors = inputs(("bias",))
    tensors["q"] *= 0.1
    tensors["bias"] = tensors["bias"] * 0.1 + level
    sizes = 10.0 ** torch.linspace(-35, 35, D)
    sizes[5] = 0
    tensors["v"] *= sizes
    check(tensors, backend)


def test_values_of_any_size_in_one_channel(backend):
    """Some keys with values that only a weight relative to the maximum can multiply, the others with 0 or 1."""
    tensors = inputs(("bias",))
    tensors["q"] *= 0.1
    tensors["bias"] = tensors["bias"] * 0.1 - 38
    tensors["v"] = torch.zeros_like(tensors["v"])
    tensors["v"][:, 7, :, :4] = 1e-34
    tensors["v"][:, 260, :, 2:6] = 1.0
    check(tensors, backend)
    check(tensors, backend, causal=True)


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38, 1e-38, 30.0])
def test_what_a_row_does_not_see_changes_no_bit(name, value, backend):
    tensors = inputs(TERMS["all"])
    tensors["v"][..., 3] = 0
    out, lse = results(tensors, backend, torch.float32, causal=True)
    key, row = 200, 200 - (S - T)  # the first row that sees it
    tensors[name][:, key] = value
    changed, changed_lse = results(tensors, backend, torch.float32, causal=True)
    assert torch.equal(out[:, :row], changed[:, :row]) and torch.equal(lse[..., :row], changed_lse[..., :row])
    assert not torch.equal(out[:, row], changed[:, row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("large", ["q", "k", "query_rel", "key_rel"])
def test_gradients_of_scores_beyond_all_precision_are_finite(large, dtype, backend):
    """The log-sum-exp of scores near 1e12 is rounded by more than the exponents of float32 reach."""
    tensors = {name: t.to(dtype) for name, t in inputs(TERMS["all"]).items()}
    tensors[large].view(-1)[7] = 2.0**40
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    out = ck.composite_attention(**leaves, window=(WINDOW, WINDOW), backend=backend)
    for name, grad in zip(leaves, torch.autograd.grad(out.float().sum(), leaves.values()), strict=True):
        assert grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_whose_terms_are_large_are_seen(dtype, backend):
    """Rounding of scores near 2^42 is more than exponents reach: the greatest must not be subtracted by parts."""
    keys = 32
    q, k, v, table = (torch.randn(shape) for shape in ((1, keys, 1, 16), (1, keys, 1, 16), (1, keys, 1, 16), (16, 9)))
    q, k, v = (q * 2.0**20).to(dtype), k.to(dtype), v.to(dtype)
    out, lse = ck.composite_attention(q, k, v, query_rel=table * 2.0**20, return_lse=True, backend=backend)
    exact = ck.composite_attention(
        q.double(), k.double(), v.double(), query_rel=table.double() * 2.0**20, return_lse=True, backend="reference"
    )[1]
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=0)
    assert (out != 0).any(-1).all()
