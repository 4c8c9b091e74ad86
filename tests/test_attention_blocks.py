"""Attention on tensors that span several blocks of queries and of keys: against the reference in float64, and the same
bits for any number of threads and on every instruction set that the machine has.
"""

import itertools

import pytest
import torch
from conftest import interpreted

from convkernels.testing import compare
from convkernels.testing.attention import INPUTS, AttentionProblem

OP = "attention_grad"
BASE = AttentionProblem(batch=2, length=75, keys=301, groups=2, sharing=2, head_size=20, left=5, right=3,
                        dtype=torch.float64, table_dtype=torch.float64, seed=3)  # fmt: skip
PROBLEMS = {
    "plain": {},
    "causal": {"causal": True, "length": 301},
    "clip": {"bias": True, "query_rel": 2, "key_rel": 2, "length": 301},
    "clip_wide": {"bias": True, "query_rel": 1, "key_rel": 1, "left": 140, "right": 37, "length": 170, "keys": 170},
    "zero": {"bias": True, "query_rel": 1, "rank": 6, "key_rel": 1, "outside": 1, "causal": True},
    "mask": {"bias": True, "key_rel": 2, "outside": 2, "left": 40, "right": 30, "length": 333},
    "padding": {"bias": True, "query_rel": 2, "key_rel": 1, "padding": 2, "value_conv": 3, "length": 150},
    "dropout": {"bias": True, "key_rel": 1, "dropout": 0.3, "value_conv": 2, "padding": 1},
    "packed": {"batch": 1, "lengths": (100, 3, 0, 40, 64), "key_lengths": (131, 0, 5, 150, 64), "bias": True,
               "query_rel": 2, "key_rel": 2, "value_conv": 3, "causal": True},
    "no_qk": {"qk": False, "bias": True, "key_rel": 1, "value_conv": 1, "causal": True, "length": 300},
    "long_queries": {"length": 301, "keys": 75, "bias": True, "query_rel": 1, "key_rel": 1, "value_conv": 3},
    "one_query": {"length": 1, "keys": 400, "bias": True, "query_rel": 1, "key_rel": 1, "value_conv": 3},
}  # fmt: skip


@pytest.fixture(autouse=True)
def not_interpreted(request):
    if "backend" in request.fixturenames and interpreted(request.getfixturevalue("backend")):
        pytest.skip("these sizes take the interpreter minutes; tests/test_attention_tiles.py has some for it")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PROBLEMS)
def test_close_to_float64(name, dtype, ops):
    problem = BASE.with_(**PROBLEMS[name], **{"dtype": dtype, "table_dtype": dtype})
    compare.attention_large(ops, problem, elementwise=True, depthwise=3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["clip", "padding", "dropout", "packed"])
def test_any_number_of_threads(name, dtype, ops):
    if ops.backend == "reference" or ops.simulated:
        pytest.skip("PyTorch's own sums, or kernels for which threads of the CPU do nothing")
    problem = BASE.with_(**PROBLEMS[name], **{"dtype": dtype, "table_dtype": dtype})
    tensors = problem.tensors()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = compare.attention_results(ops, problem, tensors)
        for count, _ in itertools.product((2, 3, 5), range(2)):
            torch.set_num_threads(count)
            again = compare.attention_results(ops, problem, tensors)
            assert all(torch.equal(first[n], again[n]) for n in first), f"{count} threads differ from one"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("needs", [1, 2, 4, 8, 16, 64, 128, 256, 512, 2 + 4, 1 + 64])
def test_any_gradient_alone_has_the_same_bits(needs, ops):
    problem = BASE.with_(**PROBLEMS["padding"])
    tensors = problem.tensors()
    everything = compare.attention_results(ops, problem, tensors)
    found = ops.attention_grad(*problem.grad_arguments(tensors, everything["out"], everything["lse"], needs))
    for bit, (name, value) in enumerate(zip(INPUTS, found, strict=True)):
        if needs & 1 << bit:
            assert torch.equal(value, everything[name]), name
