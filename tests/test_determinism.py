"""The same bits every time: run to run, for any number of threads, and for any batch around a row."""

import pytest
import torch

from convkernels.testing.inputs import Problem

PROBLEMS = {
    "light": Problem(batch=3, length=301, heads=4, head_size=24, taps=7, left=3, softmax=True, bias=True),
    "depthwise": Problem(batch=2, length=203, heads=65, head_size=1, taps=15, left=7),
    "dynamic": Problem(batch=2, length=150, heads=4, head_size=17, taps=9, left=8, kind="dynamic", softmax=True,
                       renormalize=True),
    "bands": Problem(batch=3, length=203, heads=3, head_size=64, taps=31, left=15, softmax=True, bias=True),
    "gate_dropout": Problem(batch=3, length=120, heads=2, head_size=20, taps=4, left=3, softmax=True, dropout=0.3,
                            gate=True, padding_mask=2),
    "packed": Problem(batch=1, lengths=(100, 3, 0, 97), heads=2, head_size=33, taps=5, left=4, state=True,
                      renormalize=True, softmax=True),
    "long_heads": Problem(batch=2, length=90, heads=2, head_size=160, taps=9, left=8, kind="dynamic", softmax=True),
    "renormalize": Problem(batch=3, length=120, heads=3, head_size=48, taps=7, left=3, softmax=True, renormalize=True),
    "bct": Problem(batch=2, length=130, heads=2, head_size=16, taps=31, left=15, layout="swap_last",
                   grad_layout="swap_last"),
}  # fmt: skip
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
REPEATS = 100


def results(ops, problem, tensors):
    return (ops.tap_conv(*problem.op_arguments(tensors)), *ops.tap_grad(*problem.grad_arguments(tensors)))


def same_bits(first, second):
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_hundred_runs(name, dtype, ops):
    problem = PROBLEMS[name].with_(dtype=dtype, weight_dtype=dtype)
    tensors = problem.tensors()
    first = results(ops, problem, tensors)
    for _ in range(1 if ops.slow else REPEATS):
        assert same_bits(first, results(ops, problem, tensors))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_any_number_of_threads(name, dtype, ops):
    problem = PROBLEMS[name].with_(dtype=dtype, weight_dtype=dtype)
    tensors = problem.tensors()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = results(ops, problem, tensors)
        for count in (2,) if ops.slow else (2, 3, 5):
            torch.set_num_threads(count)
            assert same_bits(first, results(ops, problem, tensors)), f"{count} threads differ from one"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["light", "depthwise", "dynamic", "bands", "long_heads", "renormalize", "bct"])
def test_a_row_does_not_see_its_batch(name, dtype, ops):
    """Outputs, input gradients and per-position weight gradients of a row are the same bits alone and in a batch."""
    problem = PROBLEMS[name].with_(dtype=dtype, weight_dtype=dtype)
    tensors = problem.tensors()
    together = results(ops, problem, tensors)
    for row in range(problem.batch):
        alone = {n: t[row : row + 1] if t is not None and n in ("x", "grad", "gate") else t for n, t in tensors.items()}
        if problem.kind == "dynamic":
            alone["weight"] = tensors["weight"][row : row + 1]
        single = results(ops, problem, alone)
        assert torch.equal(single[0], together[0][row : row + 1])
        assert torch.equal(single[1], together[1][row : row + 1])
        if problem.kind == "dynamic":
            assert torch.equal(single[2], together[2][row : row + 1])
