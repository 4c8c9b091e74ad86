"""Random problems of attention that span several tiles of the kernels for matrix units, in 16-bit types and in float32,
against the reference in float64; and the same bits every time.
"""

from functools import partial

import pytest
import torch

from convkernels.testing import compare
from convkernels.testing.random_problems import for_each, random_attention

OP = "attention_grad"
CASES, WIDE, SINGLE = 48, 12, 12
large = partial(random_attention, size="large")


def check(ops, problem):
    found = compare.attention_large(ops, problem)
    again = compare.attention_results(ops, problem, problem.tensors())
    assert all(torch.equal(again[name], value) for name, value in found.items()), "not the same bits"


def run(ops, numbers, make=large):
    if ops.backend == "reference" or ops.interpreted:
        pytest.skip("for kernels that compute in tiles, at some speed")
    for_each(partial(check, ops), make, numbers)


@pytest.mark.parametrize("number", range(CASES))
def test_random_problems(number, ops):
    run(ops, [number])


def test_wide_problems(ops):
    """In one test, so that it can be repeated for other orders of the simulated threads."""
    run(ops, range(CASES, CASES + WIDE))


def in_float32(number):
    return large(number).with_(dtype=torch.float32)


@pytest.mark.parametrize("number", range(SINGLE))
def test_random_problems_in_float32(number, ops):
    """On tensor cores, each product of numbers that are split in two; tables of any type."""
    run(ops, [number], in_float32)
