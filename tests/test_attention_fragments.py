"""Random problems of attention in 16-bit types that span several tiles of the kernels for matrix units, against the
reference in float64; and the same bits every time.

Bounds: 2e-2 in bfloat16 and 5e-3 in float16, of the norm of a result. A result whose terms cancel is held to the size
that such results have.
"""

import random

import pytest
import torch

from convkernels.testing.attention import INPUTS, AttentionProblem
from convkernels.testing.inputs import LAYOUTS

OP = "attention_grad"
LIMIT = {torch.bfloat16: 2e-2, torch.float16: 5e-3}
CASES, WIDE = 48, 12


def tiled_problem(number):
    """Up to some hundred positions, all head sizes, every mode."""
    rng = random.Random(number)

    def choose(*options):
        return rng.choice(options)

    lengths = key_lengths = ()
    if choose(0, 0, 1):
        lengths = tuple(choose(0, 1, 5, 17, 40, 70, 130) for _ in range(choose(1, 2, 3)))
        if choose(0, 1):
            key_lengths = tuple(choose(0, 1, 5, 33, 64, 90, 150) for _ in lengths)
    length = choose(1, 5, 31, 64, 70, 129, 200)
    bias, query_rel, key_rel = choose(False, True), choose(0, 1, 2), choose(0, 0, 1, 2)
    return AttentionProblem(
        batch=choose(1, 2),
        length=length,
        keys=choose(length, length, 3, 40, 100, 260, 300),
        groups=choose(1, 2),
        sharing=choose(1, 1, 2),
        head_size=choose(3, 8, 16, 20, 32, 40, 64, 64, 72, 96, 128, 136),
        left=choose(0, 1, 3, 8, 40, 100),
        right=choose(0, 2, 8, 70),
        outside=choose(0, 0, 1, 2),
        causal=choose(False, False, True),
        qk=choose(True, True, False) or not (bias or query_rel or key_rel),
        dropout=choose(0.0, 0.0, 0.3),
        bias=bias,
        query_rel=query_rel,
        rank=choose(0, 0, 5, 16, 40),
        key_rel=key_rel,
        value_conv=choose(0, 1, 2, 3),
        padding=choose(0, 0, 1, 2),
        lengths=lengths,
        key_lengths=key_lengths,
        dtype=choose(torch.bfloat16, torch.float16),
        table_dtype=choose(torch.float32, torch.bfloat16, torch.float16),
        layout=choose("contiguous", "contiguous", *LAYOUTS),
        table_layout=choose("contiguous", *LAYOUTS),
        grad_layout=choose("contiguous", *LAYOUTS),
        seed=rng.randrange(1 << 20),
    )


def results(attention, attention_grad, problem, tensors):
    out, lse = attention(*problem.op_arguments(tensors))
    found = attention_grad(*problem.grad_arguments(tensors, out, lse))
    return {"out": out, "lse": lse, **dict(zip(INPUTS, found, strict=True))}


def check(ops, problem):
    t = problem.tensors()
    found = results(ops.attention, ops.attention_grad, problem, t)
    exact = {n: v.double() if v is not None and v.is_floating_point() else v for n, v in t.items()}
    reference = torch.ops.convkernels
    expected = results(reference._attention.reference, reference._attention_grad.reference, problem, exact)
    limit = max(LIMIT[problem.dtype], LIMIT.get(problem.table_dtype, 0.0))
    for name, value in found.items():
        wanted = expected[name]
        assert value.shape == wanted.shape
        empty = wanted == float("-inf")
        assert torch.equal(empty, value == float("-inf")), f"{problem}: {name}"
        error = (value.double() - wanted).masked_fill(empty, 0.0).norm().item()
        size = max(wanted.masked_fill(empty, 0.0).norm().item(), 0.5 * wanted.numel() ** 0.5)
        assert error <= limit * size, f"{problem}: {name} is off by {error / size:.3g}"
    again = results(ops.attention, ops.attention_grad, problem, t)
    assert all(torch.equal(again[name], value) for name, value in found.items()), f"{problem}: not the same bits"


def supported(ops):
    if ops.backend == "reference" or ops.interpreted:
        pytest.skip("for kernels that compute in tiles, at some speed")


@pytest.mark.parametrize("number", range(CASES))
def test_random_problems(number, ops):
    supported(ops)
    check(ops, tiled_problem(number))


def test_wide_problems(ops):
    """In one test, so that it can be repeated for other orders of the simulated threads."""
    supported(ops)
    for number in range(CASES, CASES + WIDE):
        check(ops, tiled_problem(number))
