"""Attention around the tiles of warpgroups, 128 queries and 128 keys forward, and around what they ask of a problem,
against the reference in float64; forward not finite where that is not, and nowhere else.
"""

import pytest
import torch

import convkernels as ck
from convkernels.testing.accuracy import NORM_LIMIT
from convkernels.testing.attention import AttentionProblem
from convkernels.testing.compare import REFERENCE, attention_large, attention_results, in_float64
from convkernels.testing.inputs import values

OP = "attention_grad"
NAN, INF = float("nan"), float("inf")
BASE = AttentionProblem(batch=1, length=300, keys=300, groups=1, sharing=2, head_size=64, left=8, right=8, bias=True,
                        query_rel=2, dtype=torch.bfloat16, table_dtype=torch.bfloat16, seed=3)  # fmt: skip
TERMS = {
    "window": {},
    "none": {"bias": False, "query_rel": 0},
    "rank": {"rank": 16, "outside": 1, "causal": True},
    "all": {"key_rel": 1, "value_conv": 3, "dropout": 0.3},
    "mask": {"key_rel": 2, "outside": 2},
}
PROBLEMS = {
    **{f"T={T}, S={S}": {"length": T, "keys": S} for T, S in ((1, 257), (127, 128), (128, 129), (129, 127), (257, 1))},
    **{f"W={left + right + 1}": {"left": left, "right": right, "key_rel": 1, "length": 257}
       for left, right in ((0, 0), (23, 23), (30, 17), (17, 31), (63, 0), (1000, 24))},
    **{f"D={D}": {"head_size": D, "groups": 2, "length": 140} for D in (8, 24, 72, 128)},
    **{f"rank {R}": {"rank": R, "head_size": D, "length": 257} for R, D in ((4, 128), (64, 16), (128, 64), (128, 128))},
    "band": {"left": 100, "right": 0, "bias": False, "query_rel": 1, "rank": 16, "outside": 1, "causal": True},
    "band, clipped": {"left": 70, "right": 20, "bias": False, "rank": 6, "head_size": 128, "dtype": torch.float16},
    "band, masked": {"left": 70, "right": 30, "bias": False, "rank": 40, "outside": 2, "lengths": (0, 1, 128, 300)},
    "band, float32 table": {"left": 50, "right": 50, "bias": False, "rank": 24, "table_dtype": torch.float32},
    "no product": {"qk": False, "dtype": torch.float16},
    "several rows": {"batch": 3, "groups": 2, "causal": True, "length": 257, "dtype": torch.float16},
}  # fmt: skip


@pytest.fixture(autouse=True)
def not_interpreted(ops):
    if ops.backend == "reference" or ops.interpreted:
        pytest.skip("for kernels that compute in tiles, at some speed")


def check(ops, problem, tensors, twice=False):
    """out and lse; where they are finite, or nan, as well."""
    call = problem.op_arguments(tensors)
    found = ops.attention(*call)
    for value, exact in zip(found, REFERENCE.attention(*problem.op_arguments(in_float64(tensors))), strict=True):
        assert torch.equal(value.isfinite(), exact.isfinite()) and torch.equal(value == -INF, exact == -INF)
        finite = exact.isfinite()
        off, size = (value.double() - exact)[finite].norm(), exact[finite].norm()
        assert off <= NORM_LIMIT[problem.dtype] * size, f"off by {off:.3g}, in norm, of {size:.3g}"
    if twice:
        assert all(map(torch.equal, ops.attention(*call), found)), "not the same bits"
    return found


@pytest.mark.parametrize("name", PROBLEMS)
def test_tiles(name, ops):
    problem = BASE.with_(**PROBLEMS[name])
    check(ops, problem, problem.tensors(), twice=True)


@pytest.mark.parametrize("outside", [0, 1, 2])
@pytest.mark.parametrize("left, right", [(1, 1), (17, 0), (0, 17)])
def test_edges_of_parts(left, right, outside, ops):
    """Parts of 32 keys that begin or end with the first or the last column of the window, or have a key too few."""
    problem = BASE.with_(length=96, keys=95, left=left, right=right, outside=outside, query_rel=0)
    tensors = problem.tensors()
    tensors["bias"][:, 0], tensors["bias"][:, -1] = 6.0, 4.0
    for length, keys in ((96, 95), (31, 31)):
        cut = {name: tensors[name][:, : length if name == "q" else keys] for name in ("q", "k", "v")}
        check(ops, problem, dict(tensors, **cut))


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_of_tiles(name, ops):
    problem = BASE.with_(**PROBLEMS[name])
    found, again = attention_large(ops, problem), attention_results(ops, problem, problem.tensors())
    assert all(torch.equal(again[name], value) for name, value in found.items()), "not the same bits"


def test_queries_of_a_band_that_see_nothing(ops):
    """What they hold reaches no gradient."""
    problem = BASE.with_(**PROBLEMS["band"] | {"length": 300, "keys": 123})
    tensors = problem.tensors()
    results = []
    for value in (0.0, NAN):
        for name in ("q", "rel_query"):
            tensors[name][0, :177] = value
        results.append(attention_results(ops, problem, tensors))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("hidden", [(0, 128), (128, 256), (0, 300), (1, 300), (127, 129)], ids=str)
def test_masked_tiles(hidden, terms, ops):
    problem = BASE.with_(**TERMS[terms])
    tensors = problem.tensors()
    mask = torch.ones(tensors["k"].shape[:2], dtype=torch.bool)
    mask[:, slice(*hidden)] = False
    tensors["k"][~mask], tensors["v"][~mask] = NAN, INF
    check(ops, problem, dict(tensors, key_mask=mask))


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("poisoned", [(0, 1), (1, 129), (129, 429)], ids=str)
def test_other_sequences(poisoned, terms, ops):
    """Tiles of 128 that have rows of two sequences, one of which is NaN."""
    problem = BASE.with_(lengths=(0, 1, 128, 300), **TERMS[terms])
    tensors = problem.tensors()
    for name in ("q", "k", "v", "rel_query"):
        if tensors[name] is not None:
            tensors[name][0, slice(*poisoned)] = NAN
    check(ops, problem, tensors)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_hidden_values_of_later_tiles(value, name, ops):
    """A row in the second and third tile of keys that the first queries do not see."""
    for terms in ("none", "window", "rank"):
        problem = BASE.with_(**TERMS[terms] | {"causal": True})
        tensors = problem.tensors()
        for row in (130, 299):
            tensors[name][0, row, :, 1] = value
        check(ops, problem, tensors)


@pytest.mark.parametrize("layout", ["repeated heads", "repeated rows", "a batch of one", "odd stride", "heads first"])
def test_strides(layout, backend):
    """Those that boxes can be read with, and those that they cannot."""
    q = values((2, 140, 4, 64), torch.bfloat16, 1)
    k, v = values((2, 2, 140, 4, 64), torch.bfloat16, 2)
    if layout == "repeated heads":
        k, v = (x[:, :, :1].expand(-1, -1, 4, -1) for x in (k, v))
    elif layout == "repeated rows":
        q, v = (x[:1].expand(2, -1, -1, -1) for x in (q, v))
    elif layout == "a batch of one":
        q, k, v = (x[:1].as_strided((1, 140, 4, 64), (1, 256, 64, 1)) for x in (q, k, v))
    elif layout == "odd stride":
        k = torch.nn.functional.pad(k, (0, 3))[..., :64]
    else:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    y = ck.composite_attention(q, k, v, causal=True, backend=backend)
    exact = ck.composite_attention(*(x.double() for x in (q, k, v)), causal=True, backend="reference")
    assert (y.double() - exact).norm() <= NORM_LIMIT[torch.bfloat16] * exact.norm()


@pytest.mark.parametrize("processors", ["2", "3", "5"])
def test_blocks_share_the_tiles(processors, ops, monkeypatch):
    """However many there are, each tile of queries is computed once, with the same bits."""
    if not ops.simulated:
        pytest.skip("a GPU has as many as it has")
    for change in ({}, {"causal": True, "groups": 3}, {"lengths": (0, 1, 128, 300, 3)}, {"length": 1, "sharing": 1}):
        problem = BASE.with_(**change)
        tensors = problem.tensors()
        with monkeypatch.context() as context:
            context.setenv("CONVKERNELS_SIMT_PROCESSORS", processors)
            found = check(ops, problem, tensors)
        assert all(map(torch.equal, ops.attention(*problem.op_arguments(tensors)), found))
