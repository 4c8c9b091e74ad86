"""Launch plans of the cuda backend: pure functions of a problem, defined for every one, on any machine."""

import collections
import itertools

import pytest
import torch

from convkernels.testing.inputs import Problem, arrange, row_bytes
from convkernels.testing.random_problems import random_conv

plan = pytest.importorskip("convkernels._C").cuda_plan
attention_plan = pytest.importorskip("convkernels._C").cuda_attention_plan

SHAPES = [
    {
        "batch": 2, "time": time, "channels": heads * head_channels, "heads": heads, "taps": taps, "dilation": dilation,
        "dtype": dtype, "per_position": per_position, "renormalize": packed, "gate": per_position, "packed": packed,
        "state": packed != per_position, **layout,
    }
    for time, (heads, head_channels), taps, dilation, dtype, (per_position, packed), layout in itertools.product(
        (1, 33, 4096),
        ((1, 1), (768, 1), (12, 64), (3, 333)),
        (1, 2, 17, 18, 66, 255),
        (1, 3),
        ("bfloat16", "float16", "float32", "float64"),
        ((False, False), (True, False), (False, True)),
        ({"channel_bytes": 16}, {"channel_bytes": 0, "time_bytes": 16}, {"channel_bytes": 0}),
    )
]  # fmt: skip


# Bytes of shared memory that a block may have with compute capability 8.0 and up, but for 8.6, 8.9 and 12.x.
LARGE, SMALL = 160 << 10, 99 << 10


@pytest.mark.parametrize("memory", [LARGE, SMALL])
@pytest.mark.parametrize("backward", [False, True])
def test_every_shape_gets_a_plan(backward, memory):
    for shape in SHAPES:
        chosen = plan(backward, **shape, block_memory=memory)
        assert chosen == plan(backward, **shape, block_memory=memory)
        assert chosen["family"] in {"plain", "stream", "time", "band", "rows"}, shape
        assert chosen["shared_bytes"] <= memory, (shape, chosen)
        # No more pieces of work than positions: an empty piece would be work for nothing.
        assert 1 <= chosen["groups"] <= shape["batch"] * shape["time"], (shape, chosen)


@pytest.mark.parametrize("backward", [False, True])
def test_random_problems_reach_every_family(backward):
    """What tests/test_fuzz.py draws for whole vectors is not all served by the kernels for any problem."""
    problems = (random_conv(number, "wide") for number in range(1000))
    families = collections.Counter(plan(backward, **problem.plan_facts(backward))["family"] for problem in problems)
    assert min(families[name] for name in ("stream", "time", "band", "rows")) >= 12, families


# Tensors that people have, and that no one would think slow: numbers of channels that are no multiple of a vector,
# slices, sequences of one position or of odd length, a batch of one whose stride means nothing.
ORDINARY = {
    "C=300": ({"heads": 75, "head_size": 4}, "contiguous", ("stream", "stream")),
    "C=300, 4 heads": ({"heads": 4, "head_size": 75}, "contiguous", ("stream", "stream")),
    "C=100, depthwise": ({"heads": 100, "head_size": 1}, "contiguous", ("stream", "stream")),
    "C=30": ({"heads": 30, "head_size": 1}, "contiguous", ("stream", "stream")),
    "odd C": ({"heads": 33, "head_size": 1}, "contiguous", ("stream", "stream")),
    "C=1": ({"heads": 1, "head_size": 1}, "contiguous", ("time", "time")),
    "slice": ({"heads": 2, "head_size": 32}, "sliced", ("stream", "stream")),
    "slice, long": ({"heads": 2, "head_size": 32, "taps": 31}, "sliced", ("band", "band")),
    "slice, dynamic": ({"heads": 2, "head_size": 32, "kind": "dynamic"}, "sliced", ("band", "band")),
    "dynamic": ({"heads": 25, "head_size": 4, "kind": "dynamic"}, "contiguous", ("rows", "rows")),
    "dynamic, C=300": ({"heads": 3, "head_size": 100, "kind": "dynamic"}, "contiguous", ("rows", "rows")),
    "misaligned": ({"heads": 2, "head_size": 32}, "offset1", ("stream", "stream")),
    "every second position": ({"heads": 3, "head_size": 5}, "step2_time", ("stream", "stream")),
    "one position": ({"heads": 3, "head_size": 5, "length": 1}, "sliced", ("stream", "stream")),
    "batch of one": ({"heads": 2, "head_size": 32, "batch": 1}, "sliced", ("stream", "stream")),
    "expanded": ({"heads": 2, "head_size": 32}, "expanded", ("stream", "stream")),
    "state": ({"heads": 2, "head_size": 32, "state": True}, "contiguous", ("stream", "stream")),
    "state, odd C": ({"heads": 33, "head_size": 1, "state": True}, "contiguous", ("stream", "stream")),
    "T=1001, channels first": ({"heads": 2, "head_size": 32, "length": 1001}, "swap_last", ("time", "time")),
    "T=50, channels first": ({"heads": 3, "head_size": 3, "length": 50}, "swap_last", ("time", "time")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_tensors_get_fast_kernels(name, dtype):
    options, layout, families = ORDINARY[name]
    if dtype == torch.float32:  # no tensor cores
        other = "rows" if options.get("kind") == "dynamic" else "stream"
        families = tuple(other if family == "band" else family for family in families)
    problem = Problem(**{"length": 100, "taps": 3, "dtype": dtype, "layout": layout, "grad_layout": layout, **options})
    chosen = tuple(plan(backward, **problem.plan_facts(backward))["family"] for backward in (False, True))
    assert chosen == families


@pytest.mark.parametrize(("layout", "shape", "pieces"), [
    ("contiguous", (2, 9, 8), (16, 0)),
    ("contiguous", (2, 9, 300), (8, 0)),
    ("contiguous", (2, 9, 50), (4, 0)),
    ("contiguous", (2, 9, 33), (2, 0)),
    ("offset1", (2, 9, 8), (2, 0)),
    ("sliced", (2, 9, 64), (2, 0)),
    ("sliced", (1, 1, 64), (2, 0)),
    ("step2", (2, 9, 8), (0, 0)),
    ("step2_time", (2, 9, 300), (8, 0)),
    ("swap_last", (2, 16, 3), (0, 16)),
    ("swap_last", (2, 1001, 3), (0, 2)),
    ("contiguous", (2, 16, 1), (2, 16)),
])  # fmt: skip
def test_how_many_bytes_are_read_at_a_time(layout, shape, pieces):
    x = arrange(torch.zeros(shape, dtype=torch.bfloat16), layout)
    assert (row_bytes(x, 2), row_bytes(x, 1)) == pieces


# Channels and heads of filters that differ between positions.
HEADS = [
    (512, 4), (512, 16), (512, 64), (640, 8), (768, 8), (768, 12), (768, 16), (768, 32), (1024, 1), (1024, 4),
    (1024, 16), (1200, 5), (1280, 8), (2048, 4),
]  # fmt: skip


@pytest.mark.parametrize("memory", [LARGE, SMALL])
@pytest.mark.parametrize("backward", [False, True])
def test_heads_of_any_width_have_fast_kernels(backward, memory):
    for (channels, heads), dtype, taps, (per_position, renormalize), gate in itertools.product(
        HEADS, ("bfloat16", "float16", "float32"), (3, 7, 15, 31), ((True, False), (True, True), (False, True)),
        (False, True),
    ):  # fmt: skip
        # The rows of d(y), x, the gate and z fill a block's memory, of less memory two of these.
        if backward + gate + (dtype == "float32") + (memory == SMALL) > 2 or (
            memory == SMALL and dtype == "float32" and backward
        ):
            continue
        chosen = plan(
            backward, batch=8, time=512, channels=channels, heads=heads, taps=taps, dtype=dtype, gate=gate,
            per_position=per_position, renormalize=renormalize, block_memory=memory,
        )  # fmt: skip
        on_matrices = dtype != "float32" and channels // heads >= 16 and not renormalize
        facts = (channels, heads, taps, dtype, gate, per_position, renormalize)
        assert chosen["family"] == ("band" if on_matrices else "rows"), facts
        if on_matrices:
            assert chosen["units"] in (1, 2, 4), facts
            continue
        assert chosen["lanes"] in (1, 2, 4, 8, 16, 32) and chosen["lanes"] * 4 >= min(channels // heads, 128)


def test_heads_are_whole_quads():
    """Nothing else is served by lanes of four channels; eight and more than fifteen are for matrices."""
    for head_channels in (4, 6, 8, 9, 36, 72, 98, 100):
        facts = {"batch": 2, "time": 99, "channels": 8 * head_channels, "heads": 8, "taps": 7, "per_position": True}
        for backward, dtype in itertools.product((False, True), ("bfloat16", "float16", "float32")):
            on_matrices = dtype != "float32" and head_channels >= 16 and head_channels % 8 == 0
            expected = "plain" if head_channels % 4 else "band" if on_matrices else "rows"
            assert plan(backward, **facts, dtype=dtype)["family"] == expected


def test_any_problem_that_is_hard_to_read_or_exact_is_plain():
    for shape in SHAPES:
        if shape["dtype"] == "float64" or not (shape["channel_bytes"] or shape.get("time_bytes")):
            assert plan(False, **shape)["family"] == plan(True, **shape)["family"] == "plain", shape


def test_little_shared_memory_is_enough_for_most_of_16_bits():
    """The same kernels as with much."""
    for dtype, taps, per_position, gate, backward, layout in itertools.product(
        ("bfloat16", "float16"), (3, 7, 31), (False, True), (False, True), (False, True),
        ("channel_bytes", "time_bytes"),
    ):  # fmt: skip
        if per_position and layout == "time_bytes":
            continue
        facts = {"batch": 8, "time": 512, "channels": 768, "heads": 12, "taps": taps, "gate": gate, "dtype": dtype,
                 "per_position": per_position, "channel_bytes": 0, layout: 16}  # fmt: skip
        family = plan(backward, **facts, block_memory=LARGE)["family"]
        assert family != "plain"
        assert plan(backward, **facts, block_memory=SMALL)["family"] == family, facts


def test_sums_are_cut_to_fill_a_device_and_no_finer():
    small = plan(True, batch=1, time=64, channels=32, heads=1, taps=3)
    large = plan(True, batch=8, time=4096, channels=32, heads=1, taps=3)
    assert small["groups"] <= 2 and large["groups"] > 64


def test_unknown_facts_are_refused():
    with pytest.raises(TypeError, match="not a field"):
        plan(False, lenght=3)
    with pytest.raises(ValueError, match="argument 'dtype': expected float64, .*, got 'int8'"):
        plan(False, dtype="int8")


def warpgroup_bytes(stages, channels, rank, window):
    """Shared memory of the forward pass of warpgroups: tiles of 128 rows, of q and of k and v in each stage, a strip of
    16 queries for each of 8 warps, rows of rel_query, and what warps tell each other."""
    columns = -(-min(window, 32 + 15) // 8) * 8 + 1 if window > 1 else 0
    row = 2 * (64 if channels <= 64 else 128)
    rank_row = 2 * (-(-rank // 16) * 16 + 8) if rank else 0
    return 128 * (row + rank_row + 2 * stages * row) + 8 * max(2048, 64 * columns) + 1024


# As much as compute capability 9.0 has.
LARGEST = 227 << 10


@pytest.mark.parametrize("memory", [LARGEST, LARGE, SMALL])
@pytest.mark.parametrize("backward", [False, True])
def test_attention_of_every_shape_gets_a_plan(backward, memory):
    families = collections.Counter()
    for dtype, channels, keys, window, low_rank, positive, packed, (warpgroups, boxes) in itertools.product(
        ("bfloat16", "float16", "float32", "float64"), (1, 20, 64, 96, 128, 257), (0, 1, 128, 256, 257, 8192),
        (1, 17, 1025), (0, 16, 128), (False, True), (False, True), ((True, True), (True, False), (False, True)),
    ):  # fmt: skip
        facts = {
            "batch": 2, "queries": 500, "keys": keys, "heads": 4, "groups": 2, "channels": channels, "dtype": dtype,
            "rank": low_rank or channels, "low_rank": low_rank > 0, "window": window, "relative": window > 1,
            "positive_scale": positive, "packed": packed, "sequences": 3 if packed else 1, "block_memory": memory,
            "warpgroups": warpgroups, "boxes": boxes,
        }  # fmt: skip
        chosen = attention_plan(backward, **facts)
        single = dtype == "float32"
        tensor = dtype != "float64" and channels <= 128 and positive
        if (single and channels > 64) or (memory == SMALL and backward and (single or max(channels, low_rank) > 64)):
            tensor = tensor and chosen["family"] != "plain"  # only with few columns
        of_matrices = "tensor" if tensor else "plain"
        without = attention_plan(backward, **facts | {"warpgroups": False})
        assert without["family"] == of_matrices and without["stages"] == without["key_stages"] == 0, facts
        fitting = [n for n in (4, 3, 2) if warpgroup_bytes(n, channels, low_rank, window) <= memory]
        warpgroups = warpgroups and not single
        of_warpgroups = tensor and warpgroups and boxes and not backward and len(fitting) > 0
        if backward and tensor and warpgroups and boxes:
            # Each pass by itself: as the memory allows.
            for pass_ in ("", "key_"):
                of_warpgroups = chosen[f"{pass_}family"] == "warpgroup"
                assert chosen[f"{pass_}stages"] in ((2, 3, 4) if of_warpgroups else (0,)), (facts, chosen)
                assert of_warpgroups or chosen[f"{pass_}family"] == "tensor", (facts, chosen)
                assert of_warpgroups or memory < LARGEST or window > 17 or max(channels, low_rank) > 64, (facts, chosen)
        else:
            assert chosen["family"] == ("warpgroup" if of_warpgroups else of_matrices), facts
        families[chosen["family"]] += 1
        assert max(chosen["shared_bytes"], chosen["key_shared_bytes"]) <= memory, (facts, chosen)
        assert chosen["query_parts"] >= 1 and chosen["key_parts"] >= 1
        assert not chosen["resident"] or (keys <= 256 and not packed and not backward)
        if tensor:
            assert channels <= chosen["channels"] < channels + 32 and chosen["channels"] <= chosen["kernel_channels"]
        if of_warpgroups and not backward:
            # As many stages as fit; every block of the device has a tile of queries.
            assert chosen["stages"] == fitting[0] and not chosen["resident"], (facts, chosen)
            assert chosen["shared_bytes"] == warpgroup_bytes(fitting[0], channels, low_rank, window), (facts, chosen)
            assert chosen["query_parts"] <= 8 * (500 // 128 + (3 if packed else 1)), (facts, chosen)
        elif not (backward and tensor and warpgroups and boxes):
            assert chosen == without, facts
    assert set(families) == {"plain", "tensor", "warpgroup"} or (backward and memory == SMALL)
    for without in ({"warpgroups": False}, {"boxes": False}):
        assert attention_plan(False, keys=128, queries=128, **without)["resident"]


def test_sums_of_attention_stay_small():
    """However long the sequences are and however wide the window is."""
    for heads, window, rank in ((4, 17, 64), (64, 1024, 16), (64, 4097, 128)):
        facts = {"heads": heads, "groups": heads, "window": window, "rank": rank, "relative": True, "query_rel": True}
        for warpgroups in (False, True):
            long, longer = (
                attention_plan(True, queries=length, keys=length, warpgroups=warpgroups, **facts)
                for length in (1 << 17, 1 << 20)
            )
            parts, warps = longer["query_parts"], 8 if longer["family"] == "warpgroup" else 4
            assert long["query_parts"] == parts
            assert parts == warps or heads * parts * window * rank * 4 <= 64 << 20


def test_unknown_facts_of_attention_are_refused():
    with pytest.raises(TypeError, match="cuda_attention_plan: a fact"):
        attention_plan(False, taps=3)


def wide_bytes(backward, size, channels, rank, window, stages):
    """Shared memory of the tensor kernels with 256 bytes of channels or more and no key_rel: 64 rows of a block (and
    of their gradients), stages of 32 rows of two others, strips, 96 bytes of each warp, and sums of 16 rows where they
    do not lie in the stages. size: of a number."""
    row, rank_row = size * (-(-channels // 64) * 64) + 16, size * (-(-rank // 16) * 16) + 16 if rank else 0
    columns = -(-min(window, 32 + 15) // 8) * 8 + 1 if window > 1 else 0
    if not backward:
        return 64 * (row + rank_row) + 64 * stages * row + 256 * columns
    grads = (window if window <= 64 else 32 + 15) | 1 if window > 1 else 0
    sums = max(-(-channels // 32) * 32, -(-rank // 16) * 16) + 4 if window > 64 else 0
    return 64 * rank_row + 256 * row + 4 * 96 + 256 * columns + max(256 * (grads + sums), 1024)


@pytest.mark.parametrize("memory", [LARGEST, LARGE, SMALL])
@pytest.mark.parametrize("backward", [False, True])
def test_wide_heads_of_attention_take_tensor_cores_where_they_fit(backward, memory):
    families = collections.Counter()
    for (size, channels), keys, window, rank, warpgroups in itertools.product(
        ((2, 129), (2, 160), (2, 192), (2, 200), (2, 256), (4, 65), (4, 96), (4, 128), (4, 129)), (1, 257),
        (1, 17, 64, 1025), (0, 16, 128, 129), (False, True),
    ):  # fmt: skip
        facts = {
            "queries": 500, "keys": keys, "channels": channels, "rank": rank or channels, "low_rank": rank > 0,
            "window": window, "relative": window > 1, "block_memory": memory, "warpgroups": warpgroups,
            "dtype": "bfloat16" if size == 2 else "float32",
        }  # fmt: skip
        chosen = attention_plan(backward, **facts)
        needed = wide_bytes(backward, size, channels, rank, window, 1 if keys == 1 else 2)
        family = "tensor" if size * channels <= 512 and rank <= 128 and needed <= memory else "plain"
        families[family] += 1
        assert chosen["family"] == chosen["key_family"] == family, (facts, chosen)
        assert max(chosen["shared_bytes"], chosen["key_shared_bytes"]) <= memory, (facts, chosen)
        if family == "tensor":
            assert channels <= chosen["channels"] < channels + 32, (facts, chosen)
            assert chosen["kernel_channels"] == -(-channels // 64) * 64, (facts, chosen)
            assert max(chosen["shared_bytes"], chosen["key_shared_bytes"]) == needed or chosen["resident"], facts
    assert set(families) == ({"plain"} if backward and memory == SMALL else {"plain", "tensor"})
    # The gradients of a table of keys take a strip. Of more than 64 columns they are added up while the walk goes on,
    # in sums of their own.
    for window, numbers in ((17, 17), (65, 47 + 256 + 4)):
        facts = {"channels": 256, "relative": True, "window": window, "block_memory": LARGEST}
        without, keys = (attention_plan(True, **facts, key_rel=key_rel) for key_rel in (False, True))
        assert without["family"] == keys["family"] == "tensor"
        assert keys["key_shared_bytes"] - without["key_shared_bytes"] == 256 * numbers


# Kilobytes of a multiprocessor, of which each block takes one.
@pytest.mark.parametrize("memory", [164, 228])
def test_two_blocks_of_backward_passes_fit_on_tensor_cores(memory):
    """With 128 channels in 16 bits, or 64 in float32."""
    for (dtype, channels), (window, key_rel) in itertools.product(
        (("bfloat16", 128), ("float32", 64)), ((1, False), (17, False), (17, True))
    ):
        facts = {"channels": channels, "dtype": dtype, "relative": window > 1, "window": window, "key_rel": key_rel}
        chosen = attention_plan(True, **facts, warpgroups=False)
        assert chosen["family"] == "tensor"
        assert 2 * (max(chosen["shared_bytes"], chosen["key_shared_bytes"]) + 1024) <= memory << 10, (facts, chosen)


@pytest.mark.parametrize("backward", [False, True])
def test_long_rows_of_whole_vectors_come_in_bulk(backward):
    facts = {"batch": 16, "channels": 1024, "heads": 16, "taps": 7, "channel_bytes": 0, "time_bytes": 16}
    facts |= {"time": 4096, "dtype": "bfloat16"}
    chosen = plan(backward, **facts)
    assert chosen["family"] == "time" and chosen["bulk"]
    # Groups have whole stretches of four tiles, where they have more than one.
    assert 16 * 16 % chosen["groups"] == 0 and 16 * 16 // chosen["groups"] % 4 == 0
    for changes in ({"bulk_copies": False}, {"time_bytes": 8}, {"dtype": "float32"}, {"time": 96}):
        assert not plan(backward, **facts | changes)["bulk"], changes
    assert plan(backward, **facts | {"bulk_copies": False})["family"] == "time"
