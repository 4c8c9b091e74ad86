"""Random problems of the convolutions within the a-priori bounds: 5,000 per op and backend, 10,000 with --full, no
exceptions, no reruns.

A failing problem is printed as a constructor call: `compare.conv_forward(ops, Problem(...))` repeats it.
"""

from functools import partial

import pytest
import torch

from convkernels.testing import compare
from convkernels.testing.random_problems import for_each, random_conv, random_step, with_few_taps

FULL, QUICK, LARGE, WIDE = 5_000, 300, 240, 300
# The reference is slower than the oracle and simpler than a kernel, CUDA kernels on a CPU and sanitized ones are slow:
# they get fewer.
FULL_OF_SLOW, WIDE_OF_SLOW, ROWS_OF_SLOW, TIME = 1_500, 120, 60, 60
# Triton's interpreter takes half a second for a case; with --full it gets twice as many.
INTERPRETED, INTERPRETED_LARGE, INTERPRETED_WIDE = 90, 2, 4
BOTH = pytest.mark.parametrize("check", [compare.conv_forward, compare.conv_gradients])


def run(check, make, ops, count, first=0, interpreted=INTERPRETED):
    if ops.interpreted:
        count = min(count, interpreted * (1 + ops.full))
        for_each(partial(check, ops), lambda number: with_few_taps(make(number)), range(first, first + count))
    else:
        for_each(partial(check, ops), make, range(first, first + count))


def full(ops):
    return (FULL_OF_SLOW if ops.slow else FULL) * (1 + ops.full)


@pytest.mark.slow
def test_forward(ops):
    run(compare.conv_forward, random_conv, ops, full(ops), QUICK)


@pytest.mark.slow
def test_gradients(ops):
    run(compare.conv_gradients, random_conv, ops, full(ops), QUICK)


@pytest.mark.slow
def test_step(ops):
    run(compare.conv_step, random_step, ops, full(ops), QUICK)


def test_forward_quick(ops):
    run(compare.conv_forward, random_conv, ops, QUICK)


def test_gradients_quick(ops):
    run(compare.conv_gradients, random_conv, ops, QUICK)


def test_step_quick(ops):
    run(compare.conv_step, random_step, ops, QUICK)


@BOTH
def test_wide_quick(check, ops):
    """Tensors that are read in vectors, or in pieces of them."""
    count = WIDE_OF_SLOW if ops.slow and not ops.full else WIDE
    run(check, partial(random_conv, size="wide"), ops, count, interpreted=INTERPRETED_WIDE)


@BOTH
def test_rows_quick(check, ops):
    """Filters that differ between positions, for heads of many widths."""
    count = ROWS_OF_SLOW if ops.slow and not ops.full else WIDE
    run(check, partial(random_conv, size="rows"), ops, count, interpreted=INTERPRETED_WIDE)


@BOTH
def test_bands_quick(check, ops):
    """Long filters of bfloat16, in heads of 32 channels and more."""
    count = ROWS_OF_SLOW if ops.slow and not ops.full else WIDE
    run(check, partial(random_conv, size="bands"), ops, count, interpreted=INTERPRETED_WIDE)


@BOTH
def test_bands_of_older_gpus(check, ops, monkeypatch):
    """Long filters of elements that matrix units of sm_80 multiply in lower tiles."""
    if not ops.interpreted:
        pytest.skip("on a GPU the tiles are those of its architecture")
    from convkernels.backends.triton.conv import launch

    def make(number):
        dtype = (torch.float16, torch.float32)[number % 2]
        problem = random_conv(number, size="large")
        changes = {"heads": 2, "head_size": 16, "taps": 18, "left": 9 * problem.dilation, "kind": "light"}
        return problem.with_(**changes, renormalize=False, dtype=dtype, weight_dtype=dtype, bias_dtype=None)

    asked = []
    monkeypatch.setattr(launch, "architecture_of", lambda device: asked.append(device) or 80)
    for_each(partial(check, ops), make, range(INTERPRETED_WIDE))
    assert asked


@pytest.mark.parametrize("architecture", ["80", "90"])
@BOTH
def test_time_quick(check, architecture, ops, monkeypatch):
    """Long rows of positions side by side, on GPUs without bulk copies and with them."""
    monkeypatch.setenv("CONVKERNELS_SIMT_ARCH", architecture)
    run(check, partial(random_conv, size="time"), ops, TIME * (1 + 2 * ops.full), interpreted=INTERPRETED_WIDE)


@pytest.mark.parametrize("threads", [1, 2])
@BOTH
def test_large(check, threads, ops):
    """Fewer, but past every block size of the kernels, and on threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        count = LARGE // (4 * threads if ops.slow else threads)
        run(check, partial(random_conv, size="large"), ops, count, interpreted=INTERPRETED_LARGE)
    finally:
        torch.set_num_threads(before)
