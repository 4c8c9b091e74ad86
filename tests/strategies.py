"""Hypothesis strategies for the problems of convkernels.testing.inputs."""

import random

import torch
from hypothesis import strategies as st

from convkernels.testing.inputs import LAYOUTS, Problem, StepProblem

DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)
LOW = (torch.float32, torch.bfloat16, torch.float16)
# Mostly the sizes that people use; rarely a kernel far longer than the sequence.
TAPS = (*range(1, 41), 7, 15, 31, 64, 129, 255)
# A decoding state is contiguous by contract; it may still be unaligned.
STATE_LAYOUTS = ("contiguous", "offset1")
DROPOUTS = (0.0, 0.0, 0.25, 0.9, 1.0)


@st.composite
def problems(draw, kinds=("light", "light", "dynamic", "row")):
    """Any call of tap_conv or tap_grad with small tensors."""
    pick = draw(st.integers(0, 2**48))

    def choose(options):
        nonlocal pick
        pick, index = divmod(pick, len(options))
        return options[index]

    taps = draw(st.sampled_from(TAPS))
    dilation = draw(st.sampled_from((1, 1, 1, 2, 3))) if taps < 41 else 1
    span = (taps - 1) * dilation
    heads = draw(st.integers(1, 4))
    # Widths around the vector lengths: whole vectors, tails, and single channels.
    head_size = draw(st.sampled_from((1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 24, 33)))
    length = draw(st.integers(0, 24 if taps < 41 else 6))
    lengths = ()
    batch = draw(st.integers(0, 3))
    if draw(st.integers(0, 4)) == 0:
        lengths = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)))
    softmax = choose((False, True))
    dtype = draw(st.sampled_from(DTYPES))
    return Problem(
        batch=batch,
        length=length,
        heads=heads,
        head_size=head_size,
        taps=taps,
        left=draw(st.sampled_from((span // 2, span, 0, min(dilation * (taps // 2), span), span // 3))),
        dilation=dilation,
        kind=draw(st.sampled_from(kinds)),
        softmax=softmax,
        renormalize=softmax and choose((False, True)),
        dropout=choose(DROPOUTS),
        bias=choose((False, True)),
        gate=choose((False, False, True)),
        padding_mask=choose((0, 0, 0, 1, 2, 2, 3)),
        lengths=lengths,
        state=choose((False, False, True)),
        dtype=dtype,
        weight_dtype=torch.float64 if dtype == torch.float64 else choose((dtype, dtype, *LOW)),
        bias_dtype=None if dtype == torch.float64 else choose((None, None, *LOW)),
        layout=choose(LAYOUTS),
        weight_layout=choose(LAYOUTS),
        grad_layout=choose(LAYOUTS),
        seed=draw(st.integers(0, 2**20)),
    )


@st.composite
def large_problems(draw):
    """Sizes past the blocks of a kernel: several row blocks, channel blocks and groups of partial sums, enough work
    for threads.
    """
    problem = draw(problems())
    taps = draw(st.sampled_from((1, 2, 3, 5, 7, 15, 31)))
    span = (taps - 1) * problem.dilation
    head_size = draw(st.sampled_from((1, 3, 8, 16, 24, 32, 64, 65)))
    heads = draw(st.sampled_from((1, 2, 3, 5, 12))) if head_size > 1 else draw(st.sampled_from((16, 70, 300)))
    length = draw(st.sampled_from((31, 64, 65, 130, 257)))
    lengths = draw(st.sampled_from(((), (), (200, 3, 0, 61), (17, 17, 17, 16, 90)))) if problem.lengths else ()
    return problem.with_(
        batch=draw(st.integers(1, 3)),
        length=length,
        lengths=lengths,
        taps=taps,
        left=draw(st.sampled_from((span // 2, span, 0))),
        heads=heads,
        head_size=head_size,
    )


@st.composite
def wide_problems(draw):
    """Tensors whose channels or positions lie side by side, mostly in whole vectors: what the fast kernels of the GPU
    backends serve, around their numbers of channels, positions and taps.
    """
    problem = draw(problems())
    # Hypothesis likes to repeat what it has drawn; these are to be met evenly.
    choose = random.Random(draw(st.integers(0, 2**60))).choice
    heads, head_size = choose(
        ((1, 8), (2, 8), (8, 1), (3, 16), (16, 1), (2, 64), (260, 1), (2, 4), (4, 2), (40, 5), (2, 72), (16, 16),
         (2, 16), (1, 40), (3, 32), (1, 104))
        if choose((False, True, True))
        else ((1, 1), (3, 1), (2, 3), (6, 5), (3, 4), (15, 4), (131, 1), (2, 75), (5, 26), (3, 33), (2, 65), (1, 14),
              (2, 12), (3, 36), (1, 132))
    )  # fmt: skip
    taps = choose((1, 2, 3, 4, 7, 8, 9, 12, 15, 17, 31, 33, 63))
    span = (taps - 1) * problem.dilation
    dtype = choose(LOW)
    kind = choose(("light", "light", "light", "row", "dynamic", "dynamic"))
    layout = choose(("contiguous",) * 4 + ("swap_last",) * 3 + ("sliced", "offset1", "step2_time"))
    return problem.with_(
        batch=choose((1, 2, 3)),
        length=choose((8, 16, 32, 40, 64, 136, 264) if choose((False, True)) else (1, 7, 18, 33, 77, 100, 129)),
        lengths=choose(((64, 3, 0, 5), (1, 7), (17, 40, 31))) if problem.lengths else (),
        heads=heads,
        head_size=head_size,
        taps=taps,
        left=choose((span // 2, span, 0, span // 3)),
        kind=kind,
        renormalize=problem.renormalize and kind == "dynamic",
        state=problem.state and choose((False, True)),
        dtype=dtype,
        weight_dtype=choose((dtype, torch.float32)),
        bias_dtype=None,
        layout=layout,
        grad_layout=choose((layout, layout, layout, "contiguous")),
    )


@st.composite
def row_problems(draw):
    """Filters that differ between positions, dynamic or renormalized, for heads around what lanes and blocks of a GPU
    backend hold.
    """
    problem = draw(wide_problems())
    choose = random.Random(draw(st.integers(0, 2**60))).choice
    heads, head_size = choose(
        ((40, 4), (9, 8), (4, 12), (5, 24), (3, 36), (3, 48), (3, 64), (2, 96), (2, 100), (2, 136), (1, 140), (2, 160),
         (1, 256))
    )  # fmt: skip
    taps = choose((1, 3, 4, 7, 9, 15, 31))
    kind = choose(("light", "row", "dynamic", "dynamic"))
    return problem.with_(
        heads=heads,
        head_size=head_size,
        taps=taps,
        left=choose(((taps - 1) * problem.dilation // 2, (taps - 1) * problem.dilation, 0)),
        kind=kind,
        softmax=problem.softmax or kind != "dynamic",
        renormalize=problem.renormalize or kind != "dynamic",
        layout="contiguous",
        grad_layout="contiguous",
    )


@st.composite
def step_problems(draw):
    """Any call of tap_step."""
    pick = draw(st.integers(0, 2**40))

    def choose(options):
        nonlocal pick
        pick, index = divmod(pick, len(options))
        return options[index]

    taps = draw(st.sampled_from(TAPS))
    softmax = choose((False, True))
    renormalize = softmax and choose((False, True))
    dtype = draw(st.sampled_from(DTYPES))
    return StepProblem(
        batch=draw(st.integers(0, 5)),
        heads=draw(st.integers(1, 4)),
        head_size=draw(st.sampled_from((1, 2, 3, 4, 7, 8, 9, 16, 17, 33))),
        taps=taps,
        dilation=draw(st.sampled_from((1, 1, 2, 3))) if taps < 41 else 1,
        kind=choose(("light", "dynamic")),
        softmax=softmax,
        renormalize=renormalize,
        bias=choose((False, True)),
        gate=choose((False, True)),
        indexed=choose((False, True)),
        position=choose((0, 1, 2)) if renormalize else 0,
        dtype=dtype,
        weight_dtype=torch.float64 if dtype == torch.float64 else choose((dtype, dtype, *LOW)),
        bias_dtype=None if dtype == torch.float64 else choose((None, None, *LOW)),
        layout=choose(LAYOUTS),
        state_layout=choose(STATE_LAYOUTS),
        weight_layout=choose(LAYOUTS),
        seed=draw(st.integers(0, 2**20)),
    )
