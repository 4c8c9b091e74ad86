"""Random problems of attention against the float64 definition, element by element, within a-priori bounds.

A failure prints its problem; `check(ops, AttentionProblem(...))` repeats it.
"""

import random

import pytest
import torch

from convkernels.testing.attention import DELTA_THROUGH_OUT, INPUTS, AttentionProblem, Elements
from convkernels.testing.inputs import LAYOUTS

OP = "attention_grad"
QUICK, FULL, INTERPRETED = 120, 1500, 100
LOW = (torch.float32, torch.bfloat16, torch.float16)


def random_problem(number):
    """Any call of attention or attention_grad with small tensors; most have pairs to attend to and some terms."""
    rng = random.Random(number)

    def choose(*options):
        return rng.choice(options)

    dtype = choose(torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)
    lengths = key_lengths = ()
    if choose(0, 0, 0, 1):
        lengths = tuple(choose(0, 1, 2, 3, 4) for _ in range(choose(1, 2, 3)))
        if choose(0, 0, 1):
            key_lengths = tuple(choose(0, 1, 2, 3, 4) for _ in lengths)
    length = choose(0, 1, 2, 3, 4, 5, 6, 7)
    bias, query_rel, key_rel = choose(False, True), choose(0, 1, 2), choose(0, 0, 1, 2)
    return AttentionProblem(
        batch=choose(0, 1, 1, 2, 2, 2),
        length=length,
        keys=choose(length, length, 0, 1, 3, 6, 8),
        groups=choose(1, 2, 3),
        sharing=choose(1, 1, 2),
        head_size=choose(1, 2, 3, 4, 5, 8, 9, 16),
        left=choose(0, 1, 2, 3, 9),
        right=choose(0, 1, 2, 9),
        outside=choose(0, 1, 2),
        causal=choose(False, False, True),
        qk=choose(True, True, False) or not (bias or query_rel or key_rel),
        dropout=choose(0.0, 0.0, 0.3, 0.9, 1.0),
        bias=bias,
        query_rel=query_rel,
        rank=choose(0, 0, 2, 5),
        key_rel=key_rel,
        value_conv=choose(0, 1, 2, 3),
        padding=choose(0, 0, 1, 2, 3),
        lengths=lengths,
        key_lengths=key_lengths,
        dtype=dtype,
        table_dtype=torch.float64 if dtype == torch.float64 else choose(dtype, *LOW),
        layout=choose(*LAYOUTS),
        table_layout=choose(*LAYOUTS),
        grad_layout=choose(*LAYOUTS),
        seed=rng.randrange(1 << 20),
    )


def check(ops, problem):
    t = problem.tensors()
    elements = Elements(problem, t)
    out, lse = ops.attention(*problem.op_arguments(t))
    assert out.dtype == t["q"].dtype and out.stride() == torch.empty_like(t["q"]).stride()
    elements.check_out(out, lse)
    needs = 1023 if problem.seed % 4 else problem.seed // 4 % 1024
    found = dict(zip(INPUTS, ops.attention_grad(*problem.grad_arguments(t, out, lse, needs)), strict=True))
    asked = {name for bit, name in enumerate(INPUTS) if needs & 1 << bit and t[name] is not None}
    for name in set(INPUTS) - asked:
        assert tuple(found[name].shape) == (0,), f"grad of {name} was not asked for"
    assert all(found[name].dtype == t[name].dtype for name in asked)
    elements.check_gradients({name: found[name] for name in asked}, through_out=ops.backend in DELTA_THROUGH_OUT)


def run(ops, first, count):
    for number in range(first, first + count):
        problem = random_problem(number)
        try:
            check(ops, problem)
        except Exception as error:
            raise AssertionError(f"problem {number}: {problem!r}") from error


def test_quick(ops):
    run(ops, 0, INTERPRETED * (1 + ops.full) if ops.interpreted else QUICK)


@pytest.mark.slow
@pytest.mark.thin(3)
@pytest.mark.parametrize("chunk", range(4))
def test_full(chunk, ops):
    run(ops, QUICK + chunk * FULL // 4, 50 if ops.interpreted else FULL // 4)
