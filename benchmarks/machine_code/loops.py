"""The main loops of the CUDA kernels that do most of the work, and what one pass of them makes: in the middle of a
tensor, unless the case says so without a gate, a mask, packed sequences, a state, dropout, relative terms or gradients
of a bias. Numbers are those of a thread and follow from the kernels' constants: a change to how rows are copied,
multiplied or stored is a change here."""

from dataclasses import dataclass

from benchmarks.machine_code.control_flow import Work
from benchmarks.machine_code.tiles import KEYS_NEAR, QUERIES_NEAR

COPY, STORE = "LDGSTS.E.BYPASS.128", "STG.E.128"  # 16 bytes
BULK_COPY = "UBLKCP.S.G"  # of as many as an instruction says, by one thread
VECTORS = {"bf16": 4, "float": 8}  # of 16 bytes in 32 numbers
QUAD = {"bf16": "LDS.64", "float": "LDS.128"}  # reads 4 numbers
NUMBER = {"bf16": ".E.U16", "float": ".E"}


@dataclass(frozen=True)
class MainLoop:
    """A pass makes `makes` outputs per thread, or meets one tile of pairs per warp."""

    kernel: str
    variant: str
    case: str
    work: Work
    per: str = "output"
    makes: int = 32


def exists(kernel: str, variant: str, architecture: str) -> bool:
    """Whether an architecture has more of a kernel than what stops the launch: 9.0 alone of those of warpgroups, 9.0
    and up of those that copy in bulk."""
    if kernel.endswith("_warpgroups"):
        return architecture == "90a"
    in_bulk = kernel.startswith("time_") and variant.endswith(", true")
    return not in_bulk or int(architecture.rstrip("af")) >= 90


def _stream(t: str, taps: int) -> list[MainLoop]:
    """32 rows of 128 channels by 128 threads with 8 rows of 4 channels each. Backward: d(x) and d(filters); reads the
    thread's rows of x, and the rows of d(y) that they meet."""
    n, case = VECTORS[t], f"{taps} taps"
    forward = Work({COPY: n, STORE: n, "FFMA": 32 * taps, "FADD": 0, "LDG": 0})
    backward = Work({COPY: 2 * n, STORE: n, "FFMA": 64 * taps, QUAD[t]: 8 + 7 + taps, "MUFU.EX2": 0, "LDG": 0})
    return [
        MainLoop("stream_forward", f"{t}, true, false", case, forward),
        MainLoop("stream_backward", f"{t}, true, true", case, backward),
    ]


def _matrices(steps: int) -> tuple[tuple[float, Work], ...]:
    """A tile of 16 filters, in three terms of bfloat16, times the tiles of 64 channels that it meets: first the two
    smaller terms, then the large one."""
    return (steps, Work({"HMMA": 16, "LDSM": 6})), (steps, Work({"HMMA": 8, "LDSM": 5}))


def _band(taps: int) -> list[MainLoop]:
    """16 rows of 64 channels by a warp. Backward d(filters) besides, a product of the rows of d(y) and x."""
    steps, case = (taps + 30) // 16, f"{taps} taps"
    rest = {STORE: 4, "F2FP": 16, "STS": 16, "LDG": 0}
    forward = Work({COPY: 4, **rest}, _matrices(steps))
    backward = Work({COPY: 8, "HMMA": 8 * steps, **rest}, _matrices(steps))
    return [
        MainLoop("band_forward", "bf16, 64, false, false", case, forward),
        MainLoop("band_backward", "bf16, 64, false, false, 3", case, backward),
    ]


def _own_filters(taps: int) -> list[MainLoop]:
    """The same, with the softmax of a filter for each row by two lanes, which split it into its terms, and backward
    keep its probabilities and store gradients. Logits are copied for four heads, 8 bytes at a time. The last two of a
    lane's exponentials are one piece of code, in which the second may be left out."""
    steps, case, each = (taps + 30) // 16, f"{taps} taps", (taps + 1) // 2
    pieces = (16 * taps + 127) // 128
    exponentials = each + (each == 16)
    copies = (pieces, Work({"LDGSTS.E.64": 1}))
    rest = {STORE: 4, "LDS.U16": each, "MUFU.EX2": exponentials, "LDG": 0}
    forward = Work({COPY: 4, "STS.U16": 3 * each, **rest}, (*_matrices(steps), copies))
    backward = Work(
        {COPY: 8, "HMMA": 8 * steps, "STS.U16": 4 * each, **rest},
        (*_matrices(steps), copies, (pieces, Work({"STG.E.64": 1}))),
    )
    return [
        MainLoop("band_forward", "bf16, 64, false, true", case, forward),
        MainLoop("band_backward", "bf16, 64, false, true, 3", case, backward),
    ]


def _gated(taps: int) -> list[MainLoop]:
    """With a gate and a mask. stream: a thread has 4 channels of 8 rows of z to make, two rows at a time; backward it
    makes those that it owns twice. band: 32 channels, whose z is in three terms. A warp reads the mask of all rows that
    it copies at once, and of those that it owns."""
    steps, case = (taps + 30) // 16, f"{taps} taps, gate + mask"
    if taps < 12:
        own = (4, Work({"MUFU.EX2": 8, "STS.128": 2}))
        forward = Work({COPY: 8, STORE: 4, "FFMA": 32 * taps, "LDG.E.U8": 2}, (own,))
        rows = {QUAD["bf16"]: 32 + 7 + taps, "MUFU.EX2": 64, "LDG.E.U8": 3}
        backward = Work({COPY: 12, STORE: 8, "FFMA": 64 * taps, **rows})
        return [
            MainLoop("stream_forward", "bf16, true, true", case, forward),
            MainLoop("stream_backward", "bf16, true, true", case, backward),
        ]
    large = (steps, Work({"HMMA": 4, "LDSM": 3}))
    rest = {"F2FP": 32, "STS.128": 6, "LDG": 1}
    forward = Work({COPY: 4, STORE: 2, "MUFU.EX2": 16, **rest}, ((steps, Work({"HMMA": 20, "LDSM": 9})), large))
    rest = {"F2FP": 40, "STS.128": 6, "LDG": 2, "HMMA": 12 * steps}
    backward = Work({COPY: 6, STORE: 4, "MUFU.EX2": 32, **rest}, ((steps, Work({"HMMA": 8, "LDSM": 4})), large))
    return [
        MainLoop("band_forward", "bf16, 32, true, false", case, forward, makes=16),
        MainLoop("band_backward", "bf16, 32, true, false, 3", case, backward, makes=16),
    ]


def _rows(t: str) -> list[MainLoop]:
    """As the stream kernels, with 7 taps and heads of 64 channels. A warp has 16 filters of 7 logits, or gradients, in
    8 rows, of which its lanes copy 4 numbers each; a lane each makes softmax of, and finishes, and products are summed
    over 16 lanes. Walks have 8 taps unrolled, of which 7 are run through, others 4."""
    n, number = VECTORS[t], r"LDGSTS\.E(?!\.)"
    copy = (1, Work({"LDG": 0, "FMUL": 0}, ((2, Work({number: 2, "LDG": 0})),)))
    loops = [{"LDS": 4, "STS": 0}, {"MUFU.EX2": 4, "STS": 4}, {"FMUL": 4, "STS": 4, "FADD": 0}]
    make = (1, Work({"MUFU.EX2": 0, "LDG": 0, "FMNMX3?": 0}, tuple((7 / 4, Work(loop)) for loop in loops)))
    loops = [{"LDS": 8, "FFMA": 4, "STS": 0}, {"LDS": 8, "FADD": 4, "FMUL": 4, "STS": 4, "MUFU": 0}]
    finish = (1, Work({"MUFU.EX2": 0, "LDG": 0, "FMUL": 0}, tuple((7 / 4, Work(loop)) for loop in loops)))
    store = (1, Work({"FMUL": 0}, ((2, Work({"STG": 2, "LDS": 2})),)))
    products = (7 / 8, Work({"FFMA": 256, "SHFL": 64, QUAD[t]: 8}))
    gradient = (7 / 8, Work({"FFMA": 256, "SHFL": 0, "STS": 0, QUAD[t]: 8}))
    rest = {STORE: n, "SHFL": 8 if t == "bf16" else 0, "LDG": 0}
    forward, backward = {COPY: n, "FFMA": 224, **rest}, {COPY: 2 * n, **rest}
    return [
        MainLoop("rows_forward", f"{t}, false", "7 taps", Work(forward, (copy, make))),
        MainLoop(
            "rows_backward", f"{t}, false", "7 taps", Work(backward, (copy, make, finish, store, products, gradient))
        ),
    ]


def _time(t: str) -> list[MainLoop]:
    """8 positions of a lane, whose chunk of each tensor it copies; those that windows reach to the left are in the tile
    before. 7 taps, all of which a lane has in registers with their window; and 16 whose windows are two whole chunks of
    8 elements: what others cost depends on where they lie. In bulk a warp gets four tiles at a time, and what they
    reach with them."""
    n, products = VECTORS[t] // 4, (2, Work({"LDS.U8": 1, "FFMA": 64}))
    few, many, ungated = {"LDS.U8": 0}, {"LDS.U8": 2, "LDS.128": 5 * n}, {"MUFU.EX2": 0, "LDG": 0}
    found = []
    for case, forward, backward, loops in (
        ("7 taps", {"FFMA": 56, **few}, {"FFMA": 112, **few}, ()),
        ("16 taps", {"FFMA": 0}, {"FFMA": 128, **many}, (products,)),
    ):
        tiles = {
            ("time_forward", f"{t}, false, false"): ({STORE: n, **forward}, 1),
            ("time_backward", f"{t}, false, 2"): ({STORE: n, **ungated, **backward}, 2),
        }
        for (kernel, variant), (tile, copies) in tiles.items():
            work = Work({COPY: copies * n, **tile}, loops)
            found.append(MainLoop(kernel, f"{variant}, false", case, work, makes=8))
            if t == "bf16":
                work = Work({BULK_COPY: copies, "LDG": 0}, ((4, Work(tile, loops)),))
                found.append(MainLoop(kernel, f"{variant}, true", case, work))
    return found


def _plain(t: str) -> list[MainLoop]:
    """8 rows of a phase by a thread, 7 taps, with filters that were made before."""
    rest = {"MUFU.EX2": 0, "LDG.E.U8": 0}
    products = (1, Work({"FFMA": 56, **rest}))
    return [
        MainLoop("plain_forward", t, "7 taps", Work({"STG": 8, **rest}, (products,)), makes=8),
        MainLoop("plain_input", t, "7 taps", Work({"STG": 8}, (products,)), makes=8),
        MainLoop("plain_weight", t, "7 taps", Work({"FFMA": 64, **rest}), makes=8),
    ]


def _attention(channels: int) -> list[MainLoop]:
    """32 keys, or queries in the pass over keys, and 16 of a warp's own; forward 32 with up to 64 channels. No row
    finds a larger score than in the tiles before, which is rare."""
    product, copies, variant = channels // 4, channels // 16, f"bf16, {channels}"
    own = 32 if channels <= 64 else 16
    forward = Work({COPY: copies, "HMMA": 2 * product * own // 16, "MUFU.EX2": 18 * own // 16, "FMUL": 0, "LDG": 0})
    queries = Work({COPY: copies, "HMMA": 3 * product, "MUFU.EX2": 16, "LDG": 0})
    keys = Work({COPY: copies, "HMMA": 4 * product, "MUFU.EX2": 16, "LDG": 1})
    return [
        MainLoop("attention_forward", variant, f"{own} x 32 pairs", forward, "tile", 1),
        MainLoop("attention_backward_queries", variant, "16 x 32 pairs", queries, "tile", 1),
        MainLoop("attention_backward_keys", f"{variant}, true, true", "16 x 32 pairs", keys, "tile", 1),
    ]


def _backward_warpgroups(channels: int) -> list[MainLoop]:
    """64 keys and 16 queries of a warp; 16 keys and 64 queries, or 32 of more than 64 channels. Where the window
    crosses a tile each pair of queries reads its column of a strip and stores the gradient of its score. Keys make two
    strips, of 16 queries and 32 columns, for each part of 32 queries. Of a long window, with a term of rank 16, queries
    make a strip of 80 columns for each tile, and add up one of gradients."""
    variant, steps, met = f"bf16, {channels}", channels // 16, 64 if channels <= 64 else 32
    matrices = {"HGMMA": channels // 8 + 4, "MUFU.EX2": 32}
    queries = {**matrices, "R2P": 0, "LDG": 0}
    keys = {"HGMMA": channels // 8 + met // 8, "MUFU.EX2": met // 2}
    rounded = {"F2FP": met // 2}

    def strip(steps: int, stores: int) -> Work:
        products = Work({"LDSM": 1, "HMMA": 2})
        return Work({"STS": stores}, ((1, Work({}, ((steps, products),))),))

    of_queries = {
        "": Work({**queries, "CS2R": 0}),
        QUERIES_NEAR[0]: Work({**queries, "FADD": 66}),
        QUERIES_NEAR[1]: Work({**queries, "LDS": 16, "STS": 32, "HMMA": 0, "F2FP": 16}),
    }
    of_keys = {"": Work({**keys, "LDG": 0}), KEYS_NEAR[0]: Work({**keys, **rounded}, ((4, strip(steps, 5)),))}
    if channels == 128:
        of_rows, of_columns = Work({"LDSM": 1}, ((1, Work({"HMMA": 2})),)), Work({"LDSM": 1, "HMMA": 2})
        gradients = Work({}, ((5, of_rows), (5, of_columns)))
        of_queries[QUERIES_NEAR[2]] = Work({**matrices, "F2FP": 32, "STS.U16": 40}, ((5, strip(1, 4)), (1, gradients)))
        of_keys[KEYS_NEAR[1]] = Work({**keys, **rounded}, ((4, strip(1, 5)),))
    return [
        MainLoop(kernel, variant, f"16 x {others} pairs{', ' if case else ''}{case}", work, "tile", 1)
        for kernel, others, cases in (
            ("attention_backward_queries_warpgroups", 64, of_queries),
            ("attention_backward_keys_warpgroups", met, of_keys),
        )
        for case, work in cases.items()
    ]


# Of the loops below, those over tiles that the window crosses, and what else a tile of queries takes.
NEAR, BEGINNING = ("{} of 4 near", "{} of 4 near, rank 16"), ("16 queries", "16 queries, 17 columns")


def _warpgroups(channels: int) -> list[MainLoop]:
    """128 keys and 16 queries of a warp. Tiles that the window crosses have parts of 32 keys of which each pair reads
    its column, 16 of them by a lane, others on one side of it. Where the window is longer than the pairs of a part have
    columns, 47, a strip is made of those for each near part, here with a term of rank 16. All that is not done for each
    tile of keys: queries that have nothing but products, or also the strip of 17 columns, 24 at once."""
    variant, matrices, exponentials = f"bf16, {channels}", {"HGMMA": channels // 16 + 8}, {"MUFU.EX2": 66}
    far = Work({**matrices, **exponentials, "FMUL": 0, "LDG": 0})

    def strip(rank: int) -> Work:
        return Work({"STS": 12}, ((rank // 16, Work({"LDSM": 1}, ((1, Work({"HMMA": 3, "LDG": 6})),))),))

    cases = {"16 x 128 pairs": far}
    for near in (1, 4):
        work = {**matrices, **exponentials, "LDS": 16 * near, "LDS.128": 0, "STS": 0}
        cases[NEAR[0].format(near)] = Work({**work, "LDG": 0, "FMUL": 0})
        if channels == 128:
            counts = {"LDG": 16 * near, "FMUL": 16 * near}
            cases[NEAR[1].format(near)] = Work({**work, **counts}, ((2 * near, strip(16)),))
    once = {"HGMMA": channels // 16, STORE: channels // 16, "LDS.128": channels // 16, "LDG": 0}
    cases[BEGINNING[0]] = Work(once, ((0, far),))
    cases[BEGINNING[1]] = Work(once, ((0, far), (1, strip(channels))))
    return [MainLoop("attention_forward_warpgroups", variant, case, work, "tile", 1) for case, work in cases.items()]


MAIN_LOOPS = (
    *_stream("bf16", 3), *_stream("bf16", 7), *_stream("float", 7), *_band(15), *_band(31),
    *_own_filters(7), *_own_filters(31), *_gated(7), *_gated(31), *_rows("float"), *_plain("bf16"), *_plain("float"),
    *_time("bf16"), *_time("float"), *_attention(64), *_attention(128), *_warpgroups(64), *_warpgroups(128),
    *_backward_warpgroups(64), *_backward_warpgroups(128),
)  # fmt: skip
