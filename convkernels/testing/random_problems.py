"""Random problems of each operator: a pure function of a number and of a size, a row of options for each size.

A failing test prints the constructor call of its problem (`for_each`); that call in place of the random one repeats it.
"""

import itertools
import random

import torch

from convkernels.testing.attention import AttentionProblem
from convkernels.testing.inputs import LAYOUTS, Problem, StepProblem

FLOAT64, FLOAT32, BFLOAT16, FLOAT16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SINGLE = (FLOAT32, BFLOAT16, FLOAT16)
"""What is computed in float32."""
ANY_DTYPE = (FLOAT64, FLOAT32, FLOAT32, BFLOAT16, FLOAT16)
# A state is contiguous by contract; it may still be unaligned.
STATE_LAYOUTS = tuple(layout for layout in LAYOUTS if layout != "expanded")


def for_each(check, make, numbers):
    """check(make(number)) for all numbers; a failure names the number and the call that makes the problem."""
    for number in numbers:
        problem = make(number)
        try:
            check(problem)
        except Exception as error:
            raise AssertionError(f"problem {number} fails: {problem!r}") from error


def with_few_taps(problem):
    """The same problem, mostly with few taps, and now and then with so many that another kernel takes it."""
    taps = problem.taps if problem.taps <= 9 or problem.seed % 16 == 0 else problem.taps % 9 + 1
    left = {} if isinstance(problem, StepProblem) else {"left": min(problem.left, (taps - 1) * problem.dilation)}
    return problem.with_(taps=taps, **left)


# Mostly the sizes that people use; rarely a filter far longer than the sequence.
_TAPS = (*range(1, 41), 7, 15, 31, 64, 129, 255)
_CONV = {
    # Widths around the vector lengths: whole vectors, tails, and single channels.
    "small": {
        "batch": range(4),
        "length": range(25),
        "sequence": range(10),
        "width": tuple(itertools.product(range(1, 5), (1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 24, 33))),
        "taps": _TAPS,
        "kind": ("light", "light", "dynamic", "row"),
        "state": (False, False, True),
        "dtype": ANY_DTYPE,
        "layout": LAYOUTS,
    },
}
# Past the blocks of a kernel: several row blocks, channel blocks and groups of partial sums, enough work for threads.
_CONV["large"] = _CONV["small"] | {
    "batch": (1, 2, 3),
    "length": (31, 64, 65, 130, 257),
    "sequence": (0, 3, 16, 17, 61, 90, 200),
    "width": (*itertools.product((1, 2, 3, 5, 12), (3, 8, 16, 24, 32, 64, 65)),
              (16, 1), (16, 1), (70, 1), (70, 1), (300, 1)),
    "taps": (1, 2, 3, 5, 7, 15, 31),
}  # fmt: skip
# Channels or positions side by side, mostly in whole vectors: what the fast kernels of the GPU backends serve, around
# their numbers of channels, positions and taps.
_CONV["wide"] = _CONV["small"] | {
    "batch": (1, 2, 3),
    "length": (8, 16, 32, 40, 64, 136, 264, 1, 7, 18, 33, 77, 100, 129),
    "sequence": (0, 1, 3, 5, 7, 17, 31, 40, 64),
    "width": (
        *((1, 8), (2, 8), (8, 1), (3, 16), (16, 1), (2, 64), (260, 1), (2, 4), (4, 2), (40, 5), (2, 72), (16, 16),
          (2, 16), (1, 40), (3, 32), (1, 104)) * 2,
        (1, 1), (3, 1), (2, 3), (6, 5), (3, 4), (15, 4), (131, 1), (2, 75), (5, 26), (3, 33), (2, 65), (1, 14),
        (2, 12), (3, 36), (1, 132),
    ),
    "taps": (1, 2, 3, 4, 7, 8, 9, 12, 15, 17, 31, 33, 63),
    "kind": ("light", "light", "light", "row", "dynamic", "dynamic"),
    "state": (False,) * 5 + (True,),
    "dtype": SINGLE,
    "layout": ("contiguous",) * 4 + ("swap_last",) * 3 + ("sliced", "offset1", "step2_time"),
}  # fmt: skip
# Filters that differ between positions, dynamic or renormalized, for heads around what lanes and blocks of a GPU
# backend hold.
_CONV["rows"] = _CONV["wide"] | {
    "width": ((40, 4), (9, 8), (4, 12), (5, 24), (3, 36), (3, 48), (3, 64), (2, 96), (2, 100), (2, 136), (1, 140),
              (2, 160), (1, 256)),
    "taps": (1, 3, 4, 7, 9, 15, 31),
    "kind": ("light", "row", "dynamic", "dynamic"),
    "layout": ("contiguous",),
}  # fmt: skip
# Long rows of positions side by side, in whole vectors or not: what the time kernels of a GPU backend copy in bulk.
_CONV["time"] = _CONV["wide"] | {
    "length": (136, 256, 264, 300, 512, 776, 1032, 1280, 1544, 2060, 2312),
    "sequence": (0, 1, 5, 64, 200, 250, 256, 512, 900),
    # Of many channels a warp walks far.
    "width": ((1, 1), (3, 1), (2, 2), (1, 5), (1, 64), (64, 1), (2, 48)),
    "taps": (1, 2, 3, 4, 7, 8, 9, 15, 31, 63, 200),
    "kind": ("light", "light", "row"),
    "dtype": (BFLOAT16, FLOAT16, BFLOAT16, FLOAT16, FLOAT32),
    "state": (False,),
    "layout": ("swap_last",),
}
# Filters of as many taps as matrix units of CPUs multiply as bands, or a few more or less, in rows as they need them.
_CONV["bands"] = _CONV["wide"] | {
    "length": (40, 64, 77, 100, 129, 160, 203),
    "sequence": (0, 5, 17, 40, 64, 90),
    "width": ((1, 32), (2, 32), (3, 64), (1, 96), (2, 160)),
    "taps": (10, 11, 12, 15, 16, 17, 18, 19, 24, 31, 32, 33, 34),
    "kind": ("light", "light", "light", "dynamic", "row"),
    "dtype": (BFLOAT16,),
    "state": (False, False, True),
    "layout": ("contiguous", "contiguous", "sliced", "offset1", "step2_time"),
}


def random_conv(number, size="small"):
    """Any call of tap_conv or tap_grad. size: small, large, wide, rows, time or bands."""
    rng, options = random.Random(number), _CONV[size]

    def choose(*from_these):
        return rng.choice(from_these)

    batch, length, taps, kind, dtype = (
        rng.choice(options[name]) for name in ("batch", "length", "taps", "kind", "dtype")
    )
    heads, head_size = rng.choice(options["width"])
    small, long = size == "small", taps > 40
    dilation = 1 if long and small else choose(1, 1, 1, 2, 3)
    span = (taps - 1) * dilation
    softmax, renormalize = choose(False, True), choose(False, True)
    if size == "rows" and kind != "dynamic":
        softmax = renormalize = True
    layout = rng.choice(options["layout"])
    return Problem(
        batch=batch,
        length=length % 7 if long and small else length,
        heads=heads,
        head_size=head_size,
        taps=taps,
        left=choose(span // 2, span, 0, min(dilation * (taps // 2), span), span // 3),
        dilation=dilation,
        kind=kind,
        softmax=softmax,
        renormalize=softmax and renormalize and (size not in ("wide", "time", "bands") or kind == "dynamic"),
        dropout=choose(0.0, 0.0, 0.25, 0.9, 1.0),
        bias=choose(False, True),
        gate=choose(False, False, True) and size != "bands",
        padding_mask=choose(0, 0, 0, 1, 2, 2, 3),
        lengths=tuple(rng.choices(options["sequence"], k=choose(1, 2, 3, 4))) if choose(0, 0, 0, 0, 1) else (),
        state=rng.choice(options["state"]),
        dtype=dtype,
        weight_dtype=dtype if dtype == FLOAT64 else choose(dtype, dtype, *SINGLE),
        bias_dtype=None if dtype == FLOAT64 else choose(None, None, *SINGLE),
        layout=layout,
        weight_layout=choose(*LAYOUTS),
        grad_layout=choose(*LAYOUTS) if options["layout"] is LAYOUTS else choose(layout, layout, layout, "contiguous"),
        seed=rng.randrange(1 << 20),
        **_activations(choose),
    )


def _activations(choose):
    return {
        "gate_activation": choose(1, 1, 0, 2),
        "activation": choose(0, 0, 2, 2, 1),
        "out_gate": choose(False, False, True),
        "residual": choose(False, False, False, True),
    }


def random_step(number):
    """Any call of tap_step."""
    rng = random.Random(number)

    def choose(*from_these):
        return rng.choice(from_these)

    taps, dtype = choose(*_TAPS), choose(*ANY_DTYPE)
    softmax = choose(False, True)
    renormalize = softmax and choose(False, True)
    length, lengths = choose(0, 0, 1, 2, 3, 5, 9), choose((), (), (4,), (0, 1, 7), (1, 1, 3, 1), (19, 2))
    indexed = not lengths and choose(False, True)
    slots = 0 if indexed else choose(0, 1, 2)
    return StepProblem(
        batch=choose(0, 1, 2, 3, 4, 5),
        length=length,
        lengths=lengths,
        extra=choose(0, 0, 1, 2, 5, length),
        heads=choose(1, 2, 3, 4),
        head_size=choose(1, 2, 3, 4, 7, 8, 9, 16, 17, 33),
        taps=taps,
        dilation=choose(1, 1, 2, 3) if taps < 41 else 1,
        kind=choose("light", "dynamic"),
        softmax=softmax,
        renormalize=renormalize,
        bias=choose(False, True),
        gate=choose(False, True),
        indexed=indexed,
        slots=slots,
        accepted=choose(False, True),
        saves=choose(0, 1, 4) if slots and lengths else 0,
        position=choose(0, 1, 2) if renormalize else 0,
        wide=choose(False, True),
        dtype=dtype,
        weight_dtype=dtype if dtype == FLOAT64 else choose(dtype, dtype, *SINGLE),
        bias_dtype=None if dtype == FLOAT64 else choose(None, None, *SINGLE),
        layout=choose(*LAYOUTS),
        state_layout=choose(*STATE_LAYOUTS),
        weight_layout=choose(*LAYOUTS),
        seed=rng.randrange(1 << 20),
        **_activations(choose),
    )


_ATTENTION = {
    # Most have pairs to attend to and some terms. keys: None for as many as queries.
    "small": {
        "dtype": ANY_DTYPE,
        "packed": (0, 0, 0, 1),
        "sequence": range(5),
        "key_sequence": range(5),
        "length": range(8),
        "batch": (0, 1, 1, 2, 2, 2),
        "keys": (None, None, 0, 1, 3, 6, 8),
        "groups": (1, 2, 3),
        "head_size": (1, 2, 3, 4, 5, 8, 9, 16),
        "left": (0, 1, 2, 3, 9),
        "right": (0, 1, 2, 9),
        "dropout": (0.0, 0.0, 0.3, 0.9, 1.0),
        "rank": (0, 0, 2, 5),
        "padding": (0, 0, 1, 2, 3),
        "layout": LAYOUTS,
    },
}
# A few tiles of queries and of keys, which Triton's interpreter gets through: before, at and behind the window, of
# whole and of parted tables.
_ATTENTION["tiles"] = _ATTENTION["small"] | {
    "dtype": (FLOAT64, *SINGLE),
    "packed": (0, 0, 1),
    "sequence": (0, 1, 3, 20, 30, 47),
    "key_sequence": (0, 1, 5, 21, 40),
    "length": (18, 33, 48, 61),
    "batch": (1,),
    "keys": (None, None, 1, 37, 50),
    "groups": (1, 2),
    "head_size": (3, 16, 17, 24),
    "left": (0, 1, 4, 12, 40),
    "right": (0, 2, 3, 12, 30),
    "dropout": (0.0, 0.0, 0.3),
    "rank": (0, 0, 5, 16),
    "padding": (0, 0, 1),
}
# Several tiles of the kernels for matrix units, in 16-bit types, all head sizes.
_ATTENTION["large"] = _ATTENTION["tiles"] | {
    "dtype": (BFLOAT16, FLOAT16),
    "sequence": (0, 1, 5, 17, 40, 70, 130),
    "key_sequence": (0, 1, 5, 33, 64, 90, 150),
    "length": (1, 5, 31, 64, 70, 129, 200),
    "batch": (1, 2),
    "keys": (None, None, 3, 40, 100, 260, 300),
    "head_size": (3, 8, 16, 20, 32, 40, 64, 64, 72, 96, 128, 136),
    "left": (0, 1, 3, 8, 40, 100),
    "right": (0, 2, 8, 70),
    "rank": (0, 0, 5, 16, 40),
    "padding": (0, 0, 1, 2),
    "layout": ("contiguous", *LAYOUTS),
}


def random_attention(number, size="small"):
    """Any call of attention or attention_grad. size: small, tiles or large."""
    rng, options = random.Random(number), _ATTENTION[size]

    def choose(*from_these):
        return rng.choice(from_these)

    def option(name):
        return rng.choice(options[name])

    dtype = option("dtype")
    lengths = key_lengths = ()
    if option("packed"):
        lengths = tuple(option("sequence") for _ in range(choose(1, 2, 3)))
        if choose(0, 0, 1):
            key_lengths = tuple(option("key_sequence") for _ in lengths)
    length = option("length")
    bias, query_rel, key_rel = choose(False, True), choose(0, 1, 2), choose(0, 0, 1, 2)
    batch, keys = option("batch"), option("keys")
    return AttentionProblem(
        batch=batch,
        length=length,
        keys=length if keys is None else keys,
        groups=option("groups"),
        sharing=choose(1, 1, 2),
        head_size=option("head_size"),
        left=option("left"),
        right=option("right"),
        outside=choose(0, 1, 2) if size == "small" else choose(0, 0, 1, 2),
        causal=choose(False, False, True),
        qk=choose(True, True, False) or not (bias or query_rel or key_rel),
        dropout=option("dropout"),
        bias=bias,
        query_rel=query_rel,
        rank=option("rank"),
        key_rel=key_rel,
        value_conv=choose(0, 1, 2, 3),
        padding=option("padding"),
        lengths=lengths,
        key_lengths=key_lengths,
        dtype=dtype,
        table_dtype=dtype if dtype == FLOAT64 else choose(dtype, *SINGLE),
        layout=option("layout"),
        table_layout=option("layout"),
        grad_layout=option("layout"),
        seed=rng.randrange(1 << 20),
    )
