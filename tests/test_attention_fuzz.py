"""Random problems of attention on small tensors against the float64 definition, element by element, within a-priori
bounds.

A failing problem is printed as a constructor call: `compare.attention(ops, AttentionProblem(...))` repeats it.
"""

from functools import partial

import pytest

from convkernels.testing import compare
from convkernels.testing.random_problems import for_each, random_attention

OP = "attention_grad"
QUICK, FULL, INTERPRETED = 120, 1500, 100


def run(ops, first, count):
    for_each(partial(compare.attention, ops), random_attention, range(first, first + count))


def test_quick(ops):
    run(ops, 0, INTERPRETED * (1 + ops.full) if ops.interpreted else QUICK)


@pytest.mark.slow
@pytest.mark.thin(3)
@pytest.mark.parametrize("chunk", range(4))
def test_full(chunk, ops):
    run(ops, QUICK + chunk * FULL // 4, 50 if ops.interpreted else FULL // 4)
