"""Attention over many tiles of queries and keys: before, at and behind the window, of whole and of parted tables.

The small random problems of tests/test_attention_fuzz.py fit into one tile of most kernels; these do not, and are
compared with the reference in float64.
"""

import random

import pytest
import torch
from test_attention_fuzz import check

import convkernels as ck
from convkernels.ops.attention import reference
from convkernels.testing.attention import INPUTS, AttentionProblem
from convkernels.testing.inputs import LAYOUTS

OP = "attention_grad"
COUNT, INTERPRETED = 160, 8
LIMITS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
SMALL = (torch.float32, torch.bfloat16, torch.float16)


def random_problem(number):
    """Any call of attention or attention_grad of a few tiles in both directions."""
    rng = random.Random(number)

    def choose(*options):
        return rng.choice(options)

    dtype = choose(torch.float64, *SMALL)
    length = choose(18, 33, 48, 61)
    bias, query_rel, key_rel = choose(False, True), choose(0, 1, 2), choose(0, 0, 1, 2)
    groups, sharing = choose((1, 1), (2, 1), (1, 2))
    left, right = choose(0, 1, 4, 12, 40), choose(0, 2, 3, 12, 30)
    return AttentionProblem(
        batch=1,
        length=length,
        keys=choose(length, length, 1, 37, 50),
        groups=groups,
        sharing=sharing,
        head_size=choose(3, 16, 17, 24),
        left=left,
        right=right,
        outside=choose(0, 0, 1, 2),
        causal=choose(False, True),
        qk=choose(True, True, False) or not (bias or query_rel or key_rel),
        dropout=choose(0.0, 0.0, 0.3),
        bias=bias,
        query_rel=query_rel,
        rank=choose(0, 0, 5, 16),
        key_rel=key_rel,
        value_conv=choose(0, 1, 3) if left + right < 20 else 0,
        padding=choose(0, 0, 1),
        lengths=choose((), (), (), (20, 0, 3, 30), (1, 47)),
        dtype=dtype,
        table_dtype=torch.float64 if dtype == torch.float64 else choose(dtype, *SMALL),
        layout=choose(*LAYOUTS),
        table_layout=choose(*LAYOUTS),
        grad_layout=choose(*LAYOUTS),
        seed=rng.randrange(1 << 20),
    )


def in_double(arguments):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]


def near(name, found, expected, limit, size):
    """size: what the result would be large compared to, if its terms did not cancel."""
    error = (found.double() - expected).norm()
    assert error <= limit * max(expected.norm(), size), f"{name}: off by {error:.3g} of {expected.norm():.3g}"


def compare(ops, problem):
    t = problem.tensors()
    out, lse = ops.attention(*problem.op_arguments(t))
    found = ops.attention_grad(*problem.grad_arguments(t, out, lse))
    expected_out, expected_lse = reference.attention(*in_double(problem.op_arguments(t)))
    expected = reference.attention_grad(*in_double(problem.grad_arguments(t, expected_out, expected_lse)))
    limit = LIMITS[problem.dtype]
    # delta may carry the rounding of out, and with it that of the depthwise term.
    backward = limit * (3 if problem.value_conv and problem.dtype in SMALL[1:] else 1)
    near("out", out, expected_out, limit, 0.0)
    seen = expected_lse.isfinite()
    assert torch.equal(seen, lse.isfinite())
    torch.testing.assert_close(lse[seen].double(), expected_lse[seen], rtol=10 * limit, atol=10 * limit)
    size = t["grad"].double().norm() * problem.head_size**-0.5
    for name, a, b in zip(INPUTS, found, expected, strict=True):
        if t[name] is not None:
            near(f"grad of {name}", a, b, max(backward, LIMITS[t[name].dtype]), size)


def test_many_tiles(ops):
    for number in range(INTERPRETED if ops.interpreted else COUNT):
        problem = random_problem(number)
        try:
            compare(ops, problem)
        except Exception as error:
            raise AssertionError(f"problem {number}: {problem!r}") from error


def test_tiles_of_older_gpus(ops, monkeypatch):
    """Matrix units that read registers walk the same tiles in another way."""
    if not ops.interpreted:
        pytest.skip("on a GPU the tiles are those of its architecture")
    from convkernels.backends.triton.attention import launch as attention_launch

    asked = []
    monkeypatch.setattr(attention_launch, "architecture_of", lambda device: asked.append(device) or 80)
    for number in range(2):
        compare(ops, random_problem(number))
    assert asked


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
    compare(ops, AttentionProblem(**(rest | EDGES[edge]), bias=True, query_rel=1, key_rel=1, value_conv=3))


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
    kept = reference._dropout(seed, 0.4, torch.zeros(B, H, T, S)).transpose(1, 2) != 0
    assert torch.equal(y != 0, kept) and 0.5 < kept.float().mean() < 0.7
    # One query's gradient at a time reaches exactly the values that it kept.
    rows = torch.zeros_like(y)
    rows[1, 33, 1] = 1.0
    (found,) = torch.autograd.grad(y, v, rows)
    assert torch.equal(found[1, :, 1] != 0, kept[1, 33, 1][:, None].expand(S, S)) and not found[0].any()


def test_heads_of_any_width(ops):
    """Widths that are no powers of two, up to the widest."""
    for number, width in enumerate((1, 40, 96) if ops.interpreted else (1, 40, 80, 96, 130, 256)):
        check(ops, AttentionProblem(batch=1, length=5, keys=5, groups=1, head_size=width, bias=True, query_rel=1,
                                    key_rel=1, value_conv=3, seed=number))  # fmt: skip
