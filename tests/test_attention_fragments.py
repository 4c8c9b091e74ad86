"""Random problems of attention in 16-bit types that span several tiles of the kernels for matrix units, against the
reference in float64; and the same bits every time.
"""

from functools import partial

import pytest
import torch

from convkernels.testing import compare
from convkernels.testing.random_problems import for_each, random_attention

OP = "attention_grad"
CASES, WIDE = 48, 12


def check(ops, problem):
    found = compare.attention_large(ops, problem)
    again = compare.attention_results(ops, problem, problem.tensors())
    assert all(torch.equal(again[name], value) for name, value in found.items()), "not the same bits"


def run(ops, numbers):
    if ops.backend == "reference" or ops.interpreted:
        pytest.skip("for kernels that compute in tiles, at some speed")
    for_each(partial(check, ops), partial(random_attention, size="large"), numbers)


@pytest.mark.parametrize("number", range(CASES))
def test_random_problems(number, ops):
    run(ops, [number])


def test_wide_problems(ops):
    """In one test, so that it can be repeated for other orders of the simulated threads."""
    run(ops, range(CASES, CASES + WIDE))
