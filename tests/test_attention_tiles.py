"""Attention over many tiles of queries and keys: before, at and behind the window, of whole and of parted tables.

The small random problems of tests/test_attention_fuzz.py fit into one tile of most kernels; these do not, and are
compared with the reference in float64.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

import convkernels as ck
from convkernels.backends.triton.attention import configs
from convkernels.testing import compare
from convkernels.testing.attention import INPUTS, AttentionProblem
from convkernels.testing.philox import keep_mask
from convkernels.testing.random_problems import for_each, random_attention

OP = "attention_grad"
COUNT, INTERPRETED = 160, 8


def test_many_tiles(ops):
    numbers = range(INTERPRETED if ops.interpreted else COUNT)
    for_each(partial(compare.attention_large, ops, depthwise=3), partial(random_attention, size="tiles"), numbers)


def test_tiles_of_older_gpus(ops, monkeypatch):
    """Matrix units that read registers walk the same tiles in another way."""
    if not ops.interpreted:
        pytest.skip("on a GPU the tiles are those of its architecture")
    from convkernels.backends.triton.attention import launch as attention_launch

    asked = []
    monkeypatch.setattr(attention_launch, "architecture_of", lambda device: asked.append(device) or 80)
    for number in range(2):
        compare.attention_large(ops, random_attention(number, "tiles"), depthwise=3)
    assert asked


def test_addresses_of_an_older_triton(ops, monkeypatch):
    """With registers that are short, addresses are found in another way."""
    if not ops.interpreted:
        pytest.skip("on a GPU they are those of its Triton")
    from convkernels.backends.triton.attention import launch as attention_launch

    asked = []
    monkeypatch.setattr(attention_launch, "version", lambda: asked.append(True) or (3, 6))
    for number in range(2):
        compare.attention_large(ops, random_attention(number, "tiles"), depthwise=3)
    assert asked


@pytest.mark.parametrize("channels", [64, 128])
def test_tiles_of_an_older_triton(channels):
    """It needs smaller ones on compute capability 9.0, and only there."""
    for products in (False, True):
        shape = configs.Shape(channels, channels, 17, "bfloat16", products)
        older = replace(shape, triton=(3, 6))
        assert older.crowded and not shape.crowded
        for keys in (False, True):
            few, many = configs.backward(older, keys), configs.backward(shape, keys)
            assert few.BM * few.BN <= many.BM * many.BN and few.NEAR <= many.NEAR
            assert (few.BN if keys else few.BM) == (many.BN if keys else many.BM) == 64
        for architecture in (80, 100):
            assert not replace(older, architecture=architecture).crowded


@pytest.mark.parametrize("channels", [64, 128])
def test_programs_of_128_rows(channels):
    """On compute capability 9.0, for calls that need few registers beside the tiles; fewer in an older Triton."""
    for products, window in ((False, 1), (True, 17)):
        shape = configs.Shape(channels, channels, window, "bfloat16", products, simple=True)
        assert configs.forward(shape).BM == configs.backward(shape, keys=False).BM == 128
        assert configs.backward(shape, keys=True).BN == 128
        older = replace(shape, triton=(3, 6))
        assert configs.forward(older).BM == 128
        assert (configs.backward(older, keys=False).BM == 128) == (channels == 64 or not products)
        assert (configs.backward(older, keys=True).BN == 128) == (channels == 64)
        for changes in ({"simple": False}, {"architecture": 100}, {"window": 33, "products": True}):
            assert configs.backward(replace(shape, **changes), keys=False).BM == 64


@pytest.mark.parametrize("channels", [64, 128])
def test_results_of_programs_of_128_rows(channels, ops, monkeypatch):
    if not ops.interpreted:
        pytest.skip("on a GPU the tiles are those of its architecture")
    from convkernels.backends.triton.attention import launch as attention_launch

    monkeypatch.setattr(attention_launch, "interpreting", lambda: False)  # which takes the least tiles
    problem = AttentionProblem(
        batch=1, length=160, keys=160, groups=1, head_size=channels, left=8, right=8, seed=3, dtype=torch.bfloat16,
        table_dtype=torch.bfloat16, bias=True, query_rel=1,
    )  # fmt: skip
    compare.attention_large(ops, problem)


EDGES = {
    "one query": dict(length=1, keys=50),
    "one key": dict(length=50, keys=1),
    "whole tiles": dict(length=32, keys=32),
    "no key in sight": dict(length=40, keys=3, causal=True),
    "window of one": dict(length=40, keys=40, left=0, right=0),
    "window behind all keys": dict(length=20, keys=20, left=0, right=40, causal=True),
    "table of many parts": dict(length=33, keys=33, left=60, right=3),
    "no product of queries and keys": dict(length=33, keys=33, qk=False),
}


@pytest.mark.parametrize("edge", EDGES)
def test_edges_of_tiles(edge, ops):
    rest = dict(batch=1, groups=1, head_size=4, left=2, right=3, seed=3, dtype=torch.float64, table_dtype=torch.float64)
    compare.attention_large(
        ops, AttentionProblem(**(rest | EDGES[edge]), bias=True, query_rel=1, key_rel=1, value_conv=3)
    )


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scale_may_be_negative_or_zero(scale, backend):
    problem = AttentionProblem(length=40, keys=40, batch=1, head_size=4, left=2, right=2, bias=True, query_rel=1,
                               key_rel=1, padding=1, dtype=torch.float64, table_dtype=torch.float64)  # fmt: skip
    t = problem.tensors()
    results = {}
    for name in (backend, "reference"):
        leaves = {n: t[n].detach().clone().requires_grad_() for n in INPUTS if t[n] is not None}
        y = ck.composite_attention(**leaves, window=2, key_mask=t["key_mask"], scale=scale, backend=name)
        results[name] = (y, *torch.autograd.grad(y, list(leaves.values()), t["grad"]))
    for a, b in zip(results[backend], results["reference"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", [7, -(2**62) - 5])
def test_dropout_mask_is_that_of_the_definition(seed, backend):
    """Uniform probabilities and the unit matrix for values show each element of the mask, in both directions."""
    B, T, S, H = 2, 37, 21, 2
    q, k = torch.zeros(B, T, H, 4), torch.zeros(B, S, H, 4)
    q, k = (torch.cat([x, torch.zeros(*x.shape[:3], S - 4)], 3) for x in (q, k))
    v = torch.eye(S)[None, :, None].expand(B, S, H, S).clone().requires_grad_()
    seed = torch.tensor([seed])
    y = ck.composite_attention(q, k, v, dropout=0.4, training=True, seed=seed, backend=backend)
    kept = torch.as_tensor(keep_mask(int(seed), 0.4, B, T, H, S)).to(y.device)
    assert torch.equal(y != 0, kept) and 0.5 < kept.float().mean() < 0.7
    # One query's gradient at a time reaches exactly the values that it kept.
    rows = torch.zeros_like(y)
    rows[1, 33, 1] = 1.0
    (found,) = torch.autograd.grad(y, v, rows)
    assert torch.equal(found[1, :, 1] != 0, kept[1, 33, 1][:, None].expand(S, S)) and not found[0].any()


def test_heads_of_any_width(ops):
    """Widths that are no powers of two, up to the widest."""
    for number, width in enumerate((1, 40, 96) if ops.interpreted else (1, 40, 80, 96, 130, 256)):
        problem = AttentionProblem(batch=1, length=5, keys=5, groups=1, head_size=width, bias=True, query_rel=1,
                                   key_rel=1, value_conv=3, seed=number)  # fmt: skip
        compare.attention(ops, problem)
