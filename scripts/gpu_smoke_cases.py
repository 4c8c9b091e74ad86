"""The cases of gpu_smoke.py: problems of every family of kernels."""

import itertools
from dataclasses import dataclass

import torch

from convkernels.ops._dtypes import dtype_name
from convkernels.testing.attention import AttentionProblem
from convkernels.testing.inputs import Problem, StepProblem

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """families: the families of kernels, forward and backward, that the case is meant for; None: any."""

    group: str
    name: str
    problem: object
    families: tuple


# Lengths and channels are no multiples of a block's.

CONVOLUTIONS = {
    "k1 gate": {"taps": 1, "gate": True},
    "k3": {"taps": 3},
    "k7 bias softmax": {"taps": 7, "bias": True, "softmax": True},
    "k15": {"taps": 15},
    "k31": {"taps": 31},
    "k3 gate+mask": {"taps": 3, "gate": True, "padding_mask": 2},
    "k15 gate+mask bias": {"taps": 15, "gate": True, "padding_mask": 1, "bias": True},
    "k31 gate softmax dropout": {"taps": 31, "gate": True, "softmax": True, "dropout": 0.3},
    "k7 packed": {"taps": 7, "lengths": (40, 0, 1, 31)},
    "k31 packed": {"taps": 31, "lengths": (40, 0, 1, 31)},
    "k15 packed gate+mask": {"taps": 15, "lengths": (7, 65), "gate": True, "padding_mask": 2},
    "k7 dilation 3 dropout": {"taps": 7, "dilation": 3, "dropout": 0.3},
    "k31 dilation 2": {"taps": 31, "dilation": 2, "bias": True},
    "k3 state": {"taps": 3, "state": True},
    "k15 state dilation 2": {"taps": 15, "dilation": 2, "state": True, "bias": True},
    "k15 filters per row": {"taps": 15, "kind": "row"},
    "k4 silu": {"taps": 4, "bias": True, "activation": 2},
    "k15 silu gates residual": {
        "taps": 15, "gate": True, "gate_activation": 2, "activation": 1, "out_gate": True, "residual": True,
    },
}  # fmt: skip


# Rows that are read 2, 4 or 8 bytes at a time in 16-bit types, and a slice of wider rows.
PIECES = {
    " C=135": {"heads": 135, "head_size": 1},
    " C=134": {"heads": 67, "head_size": 2},
    " C=140": {"heads": 35, "head_size": 4},
    " sliced": {"heads": 17, "head_size": 8, "layout": "sliced"},
}


def convolution(group, name, families, dtype, length=77, **options):
    if "lengths" in options:
        options["batch"] = 1
    if options.get("layout"):
        options["grad_layout"] = options["layout"]
    span = (options["taps"] - 1) * options.get("dilation", 1)
    problem = Problem(**{
        "batch": 2, "length": length, "left": span if options.get("state") else span // 2, "dtype": dtype,
        "weight_dtype": dtype, "seed": len(name), **options,
    })  # fmt: skip
    return Case(f"{group}-{dtype_name(dtype)}", name, problem, families)


def convolutions(group, family, dtype, possible=lambda own: True, backward=lambda own: True, suffix="", **options):
    """One case for each entry of CONVOLUTIONS that is `possible`. The family computes the backward pass of those that
    `backward` says."""
    for name, own in CONVOLUTIONS.items():
        if possible(own):
            families = (family, family if backward(own) else None)
            yield convolution(group, name + suffix, families, dtype, **{**own, **options})


def convolution_cases():
    for dtype in (BF16, F16, F32):
        # In float32 some backward passes do not fit in shared memory and fall to other families.
        wide = dtype == F32
        yield from convolutions(
            "stream", "stream", dtype, heads=17, head_size=8,
            backward=lambda own, wide=wide: not (wide and own.get("gate") and own["taps"] > 1),
        )  # fmt: skip
        for suffix, channels in PIECES.items():
            few = [CONVOLUTIONS[name] for name in ("k7 packed", "k3 gate+mask", "k3 state")]
            yield from convolutions(
                "stream", "stream", dtype, suffix=suffix, possible=lambda own, few=few: own in few,
                backward=lambda own, wide=wide: not (wide and own.get("gate")), **channels,
            )  # fmt: skip
            if channels["head_size"] % 4 == 0:
                yield from convolutions(
                    "rows", "rows", dtype, suffix=suffix, possible=lambda own, few=few: own in few,
                    backward=lambda own, wide=wide: not (wide and own.get("gate")), kind="dynamic", **channels,
                )  # fmt: skip
        for taps, gate in ((3, False), (15, False), (31, False), (7, True)):
            families = ("stream", None if wide and (gate or taps == 31) else "stream")
            name = f"k{taps} depthwise{' gate' if gate else ''}"
            yield convolution("stream", name, families, dtype, taps=taps, gate=gate, heads=136, head_size=1)
        yield from convolutions(
            "rows", "rows", dtype, heads=9, head_size=12, kind="dynamic",
            backward=lambda own, wide=wide: not (wide and own.get("gate")),
        )  # fmt: skip
        for name, options in {
            "mask": {"padding_mask": 2},
            "state": {"state": True, "padding_mask": 2},
            "packed": {"lengths": (90, 0, 7, 120), "bias": True},
            "filters per row, dropout": {"kind": "row", "head_size": 160, "dropout": 0.3},
            "dynamic": {"kind": "dynamic", "padding_mask": 2},
        }.items():
            yield convolution(
                "rows", f"k7 renormalize, {name}", ("rows",) * 2, dtype,
                **{"taps": 7, "heads": 2, "head_size": 64, "softmax": True, "renormalize": True, **options},
            )  # fmt: skip
        for head_size in (8, 20, 36, 260):
            yield convolution(
                "rows", f"k7 heads of {head_size}", ("rows",) * 2, dtype, taps=7, heads=3, head_size=head_size,
                kind="dynamic", softmax=True, bias=True,
            )  # fmt: skip
        yield from convolutions(
            "time", "time", dtype, length=72, heads=5, head_size=8, layout="swap_last",
            possible=lambda own: not own.get("state"),
        )  # fmt: skip
        for length, name in itertools.product((77, 66, 68), ("k7 bias softmax", "k3 gate+mask")):
            yield convolution(
                "time", f"{name} T={length}", ("time",) * 2, dtype, heads=5, head_size=8, layout="swap_last",
                **{"length": length, **CONVOLUTIONS[name]},
            )  # fmt: skip
        yield from convolutions("plain", "plain", dtype, heads=3, head_size=3, layout="step2")
    yield from convolutions("plain", "plain", F64, heads=2, head_size=8)
    for dtype in (F32, F64):
        yield from convolutions("plain-dynamic", "plain", dtype, heads=3, head_size=3, kind="dynamic", softmax=True)
    for dtype in (BF16, F16):
        yield from convolutions("band", "band", dtype, heads=3, head_size=24, possible=lambda own: own["taps"] >= 12)
        yield convolution("band", "k31 wide", ("band",) * 2, dtype, length=140, taps=31, heads=1, head_size=72)
        yield convolution("band", "k63", ("band",) * 2, dtype, length=140, taps=63, heads=2, head_size=24)
        yield convolution(
            "band", "k63 gate", ("band",) * 2, dtype, length=140, taps=63, gate=True, heads=2, head_size=24
        )
        for name in ("k15 gate+mask bias", "k31", "k15 state dilation 2"):
            yield convolution(
                "band", f"{name} sliced", ("band",) * 2, dtype, heads=3, head_size=24, layout="sliced",
                **CONVOLUTIONS[name],
            )  # fmt: skip
        yield from convolutions("band-dynamic", "band", dtype, heads=5, head_size=32, kind="dynamic")
        for head_size in (24, 48, 72, 96, 256):
            yield convolution(
                "band-dynamic", f"k7 heads of {head_size}", ("band",) * 2, dtype, taps=7, heads=3, head_size=head_size,
                kind="dynamic", softmax=True, bias=True,
            )  # fmt: skip
    for dtype in (BF16, F32):
        # Few channels and many rows: a reduction in several splits.
        yield convolution("reduce", "k7", ("stream",) * 2, dtype, length=300, batch=4, taps=7, heads=2, head_size=8)


def step_cases():
    for dtype in (BF16, F16, F32, F64):
        for name, options in {
            "k3": {"taps": 3},
            "k7 bias gate": {"taps": 7, "bias": True, "gate": True},
            "k15 state_index": {"taps": 15, "indexed": True},
            "k31 state_index softmax": {"taps": 31, "indexed": True, "softmax": True, "gate": True},
            "k7 dynamic dilation 2": {"taps": 7, "kind": "dynamic", "dilation": 2},
            "k7 dynamic position state_index": {
                "taps": 7, "kind": "dynamic", "softmax": True, "renormalize": True, "position": 2, "indexed": True,
            },
            # More rows, and longer states, than shared memory holds.
            "k31 state_index 400 rows": {"taps": 31, "indexed": True, "batch": 400},
            "k4 slots accepted": {
                "taps": 4, "length": 4, "extra": 4, "slots": 2, "accepted": True, "activation": 2, "wide": False,
            },
            "k4 slots channels first": {"taps": 4, "extra": 1, "slots": 1, "state_layout": "swap_last"},
            "k7 packed saves": {"taps": 7, "lengths": (1, 70, 0, 9), "slots": 2, "saves": 3},
            "k31 packed dynamic": {"taps": 31, "kind": "dynamic", "softmax": True, "lengths": (40, 3), "slots": 1},
        }.items():  # fmt: skip
            for head_size in (25, 32):  # in vectors or not
                problem = StepProblem(**{
                    "batch": 5, "heads": 6, "head_size": head_size, "dtype": dtype, "weight_dtype": dtype,
                    "seed": len(name), **options,
                })  # fmt: skip
                yield Case("step", f"{name} {dtype_name(dtype)} {6 * head_size} channels", problem, ())


ATTENTIONS = {
    "no terms": {},
    "many keys": {"length": 40, "keys": 300, "groups": 1},
    "bias+query_rel": {"bias": True, "query_rel": 2},
    "query_rel+key_rel": {"query_rel": 1, "key_rel": 1},
    "key_rel per head, wide": {"bias": True, "query_rel": 2, "key_rel": 2, "left": 40, "right": 40},
    "rel_query": {"query_rel": 2, "rank": 20, "bias": True},
    "value_conv": {"value_conv": 3, "bias": True, "padding": 1},
    "causal": {"causal": True, "bias": True, "query_rel": 2},
    "outside zero": {"outside": 1, "query_rel": 1, "key_rel": 1},
    "outside mask": {"outside": 2, "bias": True, "query_rel": 1},
    "key_mask": {"padding": 2, "batch": 2, "length": 100, "keys": 100, "bias": True, "key_rel": 1, "query_rel": 1},
    "dropout": {"dropout": 0.3},
    "dropout, terms": {"dropout": 0.3, "bias": True, "query_rel": 2, "key_rel": 2},
    "packed": {"lengths": (70, 0, 1, 33), "key_lengths": (33, 5, 64, 40), "bias": True, "query_rel": 1},
    "packed causal, value_conv": {"lengths": (20, 65), "causal": True, "value_conv": 1, "key_rel": 2, "query_rel": 2},
    "shared keys": {"sharing": 2, "groups": 1, "bias": True, "query_rel": 2, "key_rel": 2, "value_conv": 2},
}


def attentions(group, family, dtype, head_size, names=tuple(ATTENTIONS), **options):
    for number, name in enumerate(names):
        # Tables in the tensors' type and in float32 by turns; every third seed has a gradient of lse.
        problem = AttentionProblem(**{
            "batch": 1, "length": 140, "keys": 140, "groups": 2, "left": 6, "right": 6, "head_size": head_size,
            "dtype": dtype, "table_dtype": dtype if number % 2 else torch.promote_types(dtype, F32), "seed": number,
            **ATTENTIONS[name], **options,
        })  # fmt: skip
        yield Case(group, f"d{head_size} {dtype_name(dtype)} {name}", problem, (family,) * 2)


def attention_cases():
    for dtype in (BF16, F16):
        for head_size in (64, 96, 128):
            yield from attentions(f"attention-{dtype_name(dtype)}-{head_size}", "tensor", dtype, head_size)
        few = ("bias+query_rel", "query_rel+key_rel", "dropout, terms", "packed")
        yield from attentions("attention-others", "tensor", dtype, 20, few)
        yield from attentions("attention-others", "tensor", dtype, 80, few)
        yield from attentions("attention-wide", "tensor", dtype, 160, (*few, "rel_query"))
        yield from attentions("attention-wide", "tensor", dtype, 256, (*few, "key_rel per head, wide", "value_conv"))
        yield from attentions("attention-others", "plain", dtype, 264, few)
    yield from attentions("attention-float32", "tensor", F32, 64)
    yield from attentions("attention-float32", "tensor", F32, 40, ("packed", "packed causal, value_conv"))
    yield from attentions("attention-float32", "tensor", F32, 128, ("bias+query_rel", "dropout", "packed"))
    yield from attentions("attention-plain", "plain", F32, 136)
    yield from attentions("attention-plain", "plain", F64, 64, ("dropout, terms", "packed", "value_conv"))


def all_cases():
    return [*convolution_cases(), *step_cases(), *attention_cases()]
