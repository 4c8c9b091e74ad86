"""The main loops of the CUDA kernels that do most of the work, and what one pass makes: the cases without a gate, a
mask, packed sequences or a state, in the middle of a tensor. Numbers are those of a thread and come from the kernels'
constants in csrc/cuda: a change to how rows are copied, multiplied or stored is a change here."""

from dataclasses import dataclass

from .control_flow import Work

COPY, STORE = "LDGSTS.E.BYPASS.128", "STG.E.128"  # 16 bytes


@dataclass(frozen=True)
class MainLoop:
    """A pass makes `makes` outputs ("output") or meets one tile of pairs ("tile")."""

    kernel: str
    variant: str
    case: str
    work: Work
    per: str = "output"
    makes: int = 32


def _stream(t: str, vectors: int, taps: int) -> list[MainLoop]:
    """32 rows of 128 channels, 128 threads with 8 rows of 4 channels each. `vectors`: 16 bytes in 32 numbers. Backward:
    gradients of x and of a shared filter; reads z once, and rows of d(y) for 8 rows and `taps` taps."""
    quad = "LDS.64" if vectors == 4 else "LDS.128"
    forward = Work({COPY: vectors, STORE: vectors, "FFMA": 32 * taps, "FADD": 0, "LDG": 0})
    backward = Work(
        {COPY: 2 * vectors, STORE: vectors, "FFMA": 64 * taps, quad: 8 + 7 + taps, "MUFU.EX2": 0, "LDG": 0}
    )
    return [
        MainLoop("stream_forward", f"{t}, true, false", f"{taps} taps", forward),
        MainLoop("stream_backward", f"{t}, true, true", f"{taps} taps", backward),
    ]


def _band(taps: int) -> list[MainLoop]:
    """64 rows of 64 channels: a warp has 16 rows, in pieces of 32 channels. Filters are three terms of bfloat16. Two
    vectors at a time are looked through for what is not finite."""
    steps = (taps + 30) // 16
    x, dy = (Work({"LDS.128": 2, "FSETP": 16, "FADD": adds}) for adds in (0, 16))
    rest = {STORE: 4, "LDS.128": 6 * steps, "FSETP": 0, "STS": 0, "LDG": 0}
    return [
        MainLoop("band_forward", "bf16, false", f"{taps} taps", Work({COPY: 4, "HMMA": 24 * steps, **rest}, ((2, x),))),
        MainLoop(
            "band_backward",
            "bf16, 3, false",
            f"{taps} taps",
            Work({COPY: 8, "HMMA": 32 * steps, **rest}, ((2, x), (2, dy))),
        ),
    ]


def _rows(t: str, vectors: int) -> list[MainLoop]:
    """As the stream kernels, with 7 taps and heads of 64 channels: a warp makes softmax of the filters of 8 rows and 2
    heads, 4 at a time, 8 lanes each. Walks have 8 taps unrolled, of which 7 are run through."""
    kind = "U16" if vectors == 4 else "E"
    load, store = (f"{name}.E.U16" if kind == "U16" else f"{name}.E" for name in ("LDG", "STG"))
    other = {} if kind == "U16" else {"LDG.E.U16": 0, "LDG.E.64": 0, "STG.E.U16": 0, "STG.E.64": 0}
    quad, shuffles = ("LDS.64", 8) if vectors == 4 else ("LDS.128", 0)
    fill = Work({load: 3, "MUFU.EX2": 2, "SHFL": 9, "STS": 1, "STG": 0, "LDG": 3, **other})
    finish = Work({load: 4, "MUFU.EX2": 3, "SHFL": 12, "STS": 1, store: 1, "STG": 1, "LDG": 4, **other})
    products = Work({"FFMA": 256, "SHFL": 64, quad: 8})
    gradient = Work({"FFMA": 256, "SHFL": 0, quad: 8})
    rest = {STORE: vectors, "SHFL": shuffles, "LDG": 0}
    return [
        MainLoop(
            "rows_forward", f"{t}, false", "7 taps", Work({COPY: vectors, "FFMA": 224, **rest}, ((4, fill),))
        ),
        MainLoop(
            "rows_backward",
            f"{t}, false",
            "7 taps",
            Work({COPY: 2 * vectors, **rest}, ((4, fill), (4, finish), (7 / 8, products), (7 / 8, gradient))),
        ),
    ]  # fmt: skip


def _time(t: str, vectors: int) -> list[MainLoop]:
    """8 positions of a lane, `vectors` times 16 bytes. 16 taps whose windows are two whole chunks of 8 elements: what
    others cost depends on where they lie. A lane copies its chunk and a part of those to the right of all."""
    copy, correlate = (1 + vectors, Work({COPY: 1})), (2, Work({"LDS.U8": 1, "FFMA": 64}))
    collect = {"FFMA": 128, "LDS.U8": 2, "LDS.128": 4 * vectors, "MUFU.EX2": 0, "LDG": 0}
    return [
        MainLoop(
            "time_forward",
            f"{t}, false, false",
            "16 taps",
            Work({STORE: vectors, COPY: 0, "FFMA": 0}, (copy, correlate)),
            makes=8,
        ),
        MainLoop(
            "time_backward",
            f"{t}, false, 2",
            "16 taps",
            Work({STORE: vectors, COPY: vectors, **collect}, (copy, correlate)),
            makes=8,
        ),
    ]


def _attention(d: int) -> list[MainLoop]:
    """Tiles of 32 others (keys, or queries in the pass over the keys) and 16 of a warp's own, or 32 forward with up to
    64 channels; no relative terms. After the first tiles no row finds a larger score."""
    own = 2 if d <= 64 else 1
    copies, products, exponentials = d // 16, d // 4, 16
    kinds = {COPY: copies}
    tile = f"16 x 32, {d} channels"
    return [
        MainLoop(
            "attention_forward",
            f"bf16, {d}",
            f"{16 * own} x 32, {d} channels",
            Work({**kinds, "HMMA": 2 * products * own, "MUFU.EX2": (exponentials + 2) * own, "LDG": 0}),
            "tile",
            1,
        ),
        MainLoop(
            "attention_backward_queries",
            f"bf16, {d}",
            tile,
            Work({**kinds, "HMMA": 3 * products, "MUFU.EX2": exponentials, "LDG": 0}),
            "tile",
            1,
        ),
        MainLoop(
            "attention_backward_keys",
            f"bf16, {d}",
            tile,
            Work({**kinds, "HMMA": 4 * products, "MUFU.EX2": exponentials, "LDG": 1}),
            "tile",
            1,
        ),
    ]


MAIN_LOOPS = (
    *_stream("bf16", 4, 3), *_stream("bf16", 4, 7), *_stream("float", 8, 7), *_band(15), *_band(31),
    *_rows("bf16", 4), *_rows("float", 8), *_time("bf16", 1), *_time("float", 2), *_attention(64), *_attention(128),
)  # fmt: skip
