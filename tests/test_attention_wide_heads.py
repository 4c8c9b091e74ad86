"""Attention with heads of more than 128 channels, or 64 in float32, whose gradients of keys and values take a launch
each of the kernels for matrix units, against the reference in float64.
"""

import itertools

import pytest
import torch

from convkernels.testing import compare
from convkernels.testing.attention import AttentionProblem
from convkernels.testing.random_problems import random_attention

OP = "attention_grad"
SIZES, CASES = (136, 160, 192, 200, 224, 256), 18
SINGLE_SIZES, SINGLE_CASES = (72, 100, 127, 128), 8
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BASE = AttentionProblem(batch=1, length=70, keys=100, groups=1, sharing=2, left=4, right=3, seed=3)
PROBLEMS = {
    "no terms": {},
    "parted tables": {"bias": True, "query_rel": 2, "key_rel": 1, "left": 50, "right": 20},
    "parted queries": {"bias": True, "query_rel": 1, "left": 50, "right": 20, "outside": 1},
    "whole tables": {"bias": True, "query_rel": 1, "key_rel": 2, "value_conv": 3, "dropout": 0.3},
    "rank": {"bias": True, "query_rel": 2, "rank": 128, "causal": True, "padding": 1},
    "mask": {"query_rel": 2, "outside": 2, "causal": True, "layout": "last"},
    "packed": {"lengths": (0, 1, 70, 31), "query_rel": 1, "value_conv": 1},
    "no product": {"bias": True, "qk": False},
}


@pytest.fixture(autouse=True)
def not_interpreted(ops):
    if ops.backend == "reference" or ops.interpreted:
        pytest.skip("for kernels that compute in tiles, at some speed")


def check(ops, problem):
    found = compare.attention_large(ops, problem)
    again = compare.attention_results(ops, problem, problem.tensors())
    assert all(torch.equal(again[name], value) for name, value in found.items()), "not the same bits"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [160, 256])
@pytest.mark.parametrize("name", PROBLEMS)
def test_terms(name, head_size, dtype, ops):
    if dtype == "float32":
        head_size //= 2
    check(ops, BASE.with_(head_size=head_size, dtype=DTYPES[dtype], table_dtype=DTYPES[dtype], **PROBLEMS[name]))


@pytest.mark.parametrize("number", range(CASES))
def test_random_problems(number, ops):
    problem = random_attention(1000 + number, size="large")
    check(ops, problem.with_(head_size=SIZES[number % len(SIZES)]))


@pytest.mark.parametrize("number", range(SINGLE_CASES))
def test_random_problems_in_float32(number, ops):
    problem = random_attention(2000 + number, size="large")
    check(ops, problem.with_(head_size=SINGLE_SIZES[number % len(SINGLE_SIZES)], dtype=torch.float32))


@pytest.mark.parametrize("needs", ["k", "v", "key_rel"])
def test_single_gradients(needs, ops):
    """Of what a launch of its own makes, without the others."""
    problem = BASE.with_(head_size=192, key_rel=1, dtype=torch.bfloat16)
    t = problem.tensors()
    out, lse = ops.attention(*problem.op_arguments(t))
    every = dict(zip(compare.INPUTS, ops.attention_grad(*problem.grad_arguments(t, out, lse)), strict=True))
    only = ops.attention_grad(*problem.grad_arguments(t, out, lse, 1 << compare.INPUTS.index(needs)))
    for name, value in zip(compare.INPUTS, only, strict=True):
        if name == needs:
            assert torch.equal(value, every[name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("name", "value"), list(itertools.product("qkv", (float("nan"), float("inf")))), ids=str)
def test_hidden_rows(name, value, dtype, ops):
    """What a later tile of keys holds does not reach the queries before."""
    size = 200 if dtype == "bfloat16" else 100
    problem = BASE.with_(head_size=size, length=100, causal=True, query_rel=1, dtype=DTYPES[dtype])
    tensors = problem.tensors()
    expected = compare.attention_results(ops, problem, tensors)
    tensors[name] = tensors[name].clone()
    tensors[name][0, 90, :, 1] = value
    found = compare.attention_results(ops, problem, tensors)
    for result in ("out", "q"):
        torch.testing.assert_close(found[result][:, :90], expected[result][:, :90], rtol=1e-4, atol=1e-4, msg=result)
    if name == "v" or value != value:  # a score of -inf has no weight
        assert not found["out"][0, 90 if name == "q" else slice(90, None), :, 1].isfinite().any()
