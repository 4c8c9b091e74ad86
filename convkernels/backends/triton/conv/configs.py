"""Launch configurations: plain data, chosen by pure functions of the problem and the architecture."""

import math
from dataclasses import dataclass

from ..host import ceil_div, power_of_2

MATRIX_CHANNELS = 16  # least width of a matrix unit's operand
MATRIX_TAPS = 65  # filters longer than this need band matrices that no longer fit into the registers
WINDOW_TAPS = 32  # filters longer than this would leave a window of filters few rows of its own
FEW_TAPS = 8  # filters longer than this are cheaper as banded matrices
MAX_SPAN = 2**30  # the greatest dilation and span, so that positions fit into 32 bits
PROGRAMS = 1024  # about as many programs as keep the largest device busy, where a program may walk many tiles


@dataclass(frozen=True)
class Shape:
    """What the choice depends on. per_row: filters differ between positions. architecture: 10 times the major compute
    capability."""

    batch: int
    time: int
    channels: int
    heads: int
    taps: int
    dilation: int = 1
    dtype: str = "float32"
    per_row: bool = False
    gate: bool = False
    packed: bool = False
    state: bool = False
    dropout: bool = False
    architecture: int = 90

    @property
    def head_channels(self) -> int:
        return self.channels // self.heads

    @property
    def span(self) -> int:
        return (self.taps - 1) * self.dilation

    @property
    def phased(self) -> bool:
        """Whether tiles can hold positions a dilation apart: none is empty, and 32 bits count them."""
        return self.dilation <= self.time and self.time + 512 * self.dilation < 2**31


@dataclass(frozen=True)
class Groups:
    """BG groups of ROWS positions, whose rows a thread has."""

    ROWS: int
    BG: int

    @property
    def BT(self) -> int:
        return self.BG * self.ROWS


@dataclass(frozen=True)
class Tile(Groups):
    """conv_tile, grad_tile: groups of positions by BV vectors of V channels, a vector for each thread; TAPS taps at a
    time. maxnreg: as in ``Band``."""

    BV: int
    V: int
    TAPS: int
    num_warps: int
    num_stages: int = 1
    maxnreg: int = 255

    @property
    def BC(self) -> int:
        return self.BV * self.V


@dataclass(frozen=True)
class Band:
    """conv_band, grad_band: BT positions, a window of BT + HALO, BC channels, filters padded to KP taps, TILES tiles
    per program. maxnreg: without it the assembler spills a register or two to fit one more block of threads."""

    BT: int
    HALO: int
    BC: int
    KP: int
    TILES: int
    num_warps: int
    num_stages: int = 1
    maxnreg: int = 255


@dataclass(frozen=True)
class Window:
    """grad_window: filters of BT outputs by BH heads, padded to KP taps, and heads padded to RP channels. maxnreg: as
    in ``Band``."""

    BT: int
    BH: int
    RP: int
    KP: int
    num_warps: int
    num_stages: int = 1
    maxnreg: int = 255


@dataclass(frozen=True)
class Heads(Groups):
    """grad_heads: groups of positions by BH heads of RV vectors of V channels, a vector for each thread. maxnreg: as in
    ``Band``."""

    BH: int
    RV: int
    V: int
    num_warps: int
    num_stages: int = 1
    maxnreg: int = 255


Config = Tile | Band | Window | Heads


@dataclass(frozen=True)
class Rows:
    """grad_filter_rows, filter_sums: BT positions by BH heads of RP channels at a time."""

    BT: int
    BH: int
    RP: int
    num_warps: int = 4


@dataclass(frozen=True)
class Step:
    """conv_step: BP positions by BC channels at a time; BS rows of the state at a time. Positions from ``head`` on are
    left to programs of their own, BT to each."""

    BC: int
    BP: int
    BS: int
    head: int
    BT: int = 32
    num_warps: int = 4
    maxnreg: int = 255


def itemsize(dtype: str) -> int:
    return {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}[dtype]


def parts(dtype: str, gated: bool = False) -> int:
    """How many bfloat16 numbers hold an element exactly: 1 for bfloat16, 2 for float16, 3 for float32 (a gated input is
    float32)."""
    return 3 if gated else {"bfloat16": 1, "float16": 2, "float32": 3}[dtype]


def band_possible(shape: Shape) -> bool:
    """Whether the matrix kernels can serve a problem: float64 has no split, a packed state no common window."""
    return (
        shape.dtype != "float64"
        and shape.phased
        and shape.head_channels >= MATRIX_CHANNELS
        and 1 < shape.taps <= MATRIX_TAPS
        and not (shape.packed and shape.state)
    )


def forward_uses_band(shape: Shape) -> bool:
    """Few taps are cheaper as shifted tiles, unless every shift would gate its input, or weigh its rows, anew: those
    of packed sequences, whose positions share no rows."""
    return band_possible(shape) and (shape.taps > FEW_TAPS or (shape.packed and (shape.gate or shape.per_row)))


def backward_uses_band(shape: Shape) -> bool:
    """As forward; but positions that share no rows, and filters or inputs of which ``grad_tile`` leaves the sums over
    channels to others, are cheaper in matrix products."""
    alone = shape.packed or shape.per_row or shape.state
    return band_possible(shape) and (shape.taps > FEW_TAPS or alone)


def choose(shape: Shape, backward: bool) -> Config:
    """The kernel for a problem, by the type of the result, and its blocks."""
    own = (heads(shape) or window(shape)) if backward else None
    if own:
        return own
    uses_band = backward_uses_band if backward else forward_uses_band
    return band(shape, backward) if uses_band(shape) else tile(shape, backward)


def tile(shape: Shape, backward: bool = False) -> Tile:
    """A thread loads 16 bytes of a row at a time; 8 in the backward pass, which has a sum for each tap and channel in
    registers; of filters that differ by position no more than a head has. It owns eight positions, fewer
    of short sequences, which share the rows that they meet, unless these could lie in different sequences or need
    filters of their own backward."""
    V = (8 if backward else 16) // itemsize(shape.dtype)
    if shape.per_row:
        V = math.gcd(V, shape.head_channels)
    V = min(V, power_of_2(shape.channels))
    alone = shape.packed or not shape.phased or (backward and (shape.per_row or shape.state))
    phase = ceil_div(shape.time, shape.dilation)
    TAPS = shape.taps if shape.taps <= FEW_TAPS * (1 if backward else 2) else FEW_TAPS
    most = 8 >> (shape.gate + (TAPS > FEW_TAPS) if shape.per_row else 0)
    ROWS = 1 if alone else min(most, max(1, power_of_2(phase) // 16))
    # 128 bytes of a row side by side, if there are as many.
    BV = min(power_of_2(ceil_div(shape.channels, V)), max(8, 64 // V) if backward else 8 if V > 1 else 32)
    BG = min(128 // BV, power_of_2(ceil_div(shape.time if ROWS == 1 else phase, ROWS)))
    return Tile(ROWS, BG, BV, V, TAPS, 4)


def band(shape: Shape, backward: bool = False) -> Band:
    """The window's halo holds K - 1 rows; a tile as high as its halo, or twice as high, costs little more to read than
    its rows, and 64 rows by four warps are what the matrix units of sm_90 and sm_100 multiply at once, out of shared
    memory; older ones lack the registers for these if several bfloat16 numbers make up an element. The backward pass is
    bound by registers (`benchmarks/machine_code` counts them), the more so the more bfloat16 numbers make up an
    element; as many warps share a tile as leave 16 bytes of a row to each thread. Filters of one position are made by
    two warps, so that a thread has enough of them."""
    HALO = max(16, power_of_2(shape.taps - 1))
    BT, BC, warps = max(64, HALO), 64, 4
    many = shape.gate or shape.dtype != "bfloat16"
    if shape.per_row and HALO <= 32:
        BT, warps = 32, 4 if backward and shape.dropout else 2
    elif many and shape.architecture < 90:
        BT = max(32, HALO)
    if backward:
        if shape.dtype == "bfloat16":
            tall = shape.gate and HALO == 32
        else:
            tall = shape.architecture >= 90 and HALO <= 32 and not shape.packed
        if tall and not shape.per_row:
            BT, BC, warps = 64, 16 if shape.dtype == "float32" and HALO == 32 else 32, 4
        elif shape.dtype == "float32":
            BT, BC, warps = (16, 32, 2) if shape.per_row else (16 if HALO > 32 else 32, 32, 4)
        elif many and (HALO > 16 or shape.per_row):
            BT, BC, warps = 16, 32, 2
        elif many:
            BT, BC, warps = 32, 32, 4
        elif HALO > 32:
            BT, BC, warps = 16, 64, 4
        elif not shape.per_row:
            BT, warps = 2 * HALO, 4
    if BC > shape.head_channels:
        narrow = power_of_2(shape.head_channels)
        warps, BC = max(1, warps * narrow // BC), narrow
    TILES = 1 if shape.per_row or backward else min(8, ceil_div(shape.time, BT * shape.dilation))
    # Triton up to 3.6 gathers along the rows of a tile only if it has an element for each thread.
    KP = max(power_of_2(shape.taps), 32 * warps // min(BT, HALO))
    return Band(BT, HALO, BC, KP, TILES, warps)


def heads(shape: Shape) -> Heads | None:
    """For short filters of one position, unless a head takes more than a warp. A thread has up to 16 bytes of a row,
    128 bytes lie side by side, and it owns as many positions as it has registers for, fewer of short sequences. Where
    positions look for their sequences, matrix products, whose threads share what they find, are cheaper."""
    V = math.gcd(16 // itemsize(shape.dtype), shape.head_channels)
    RV = power_of_2(shape.head_channels // V)
    served = shape.per_row and shape.phased and not shape.state and shape.taps <= FEW_TAPS
    if not served or RV > 32 or (shape.packed and band_possible(shape)):
        return None
    heavy = shape.gate or shape.dropout or shape.packed or shape.dtype == "float64"
    ROWS = min(4 if heavy else 8, max(1, power_of_2(ceil_div(shape.time, shape.dilation)) // 16))
    BH = min(power_of_2(shape.heads), max(1, 8 // RV))
    return Heads(ROWS, 128 // (BH * RV), BH, RV, V, 4)


def window(shape: Shape) -> Window | None:
    """For longer filters of one position in narrow heads, unless a program cannot hold them for all outputs that its
    inputs reach. Half of the rows of a window or more are the program's own, K - 1 are its neighbour's. A thread holds
    32 elements of each tile, twice that where channels share filters, half of it where registers are short."""
    KP, RP = power_of_2(shape.taps), power_of_2(shape.head_channels)
    if (
        not (shape.per_row and shape.phased)
        or shape.state
        or shape.taps > WINDOW_TAPS
        or shape.head_channels >= MATRIX_CHANNELS
    ):
        return None
    heavy = shape.dropout or shape.packed or shape.dtype == "float64"
    held, warps = (64 if shape.head_channels % 4 == 0 else 32) // (2 if heavy else 1), 8
    BT = min(max(32, 2 * KP), power_of_2(ceil_div(shape.time, shape.dilation) + shape.taps - 1))
    heads = 32 * warps * held // (BT * RP * KP)
    return Window(BT, min(power_of_2(shape.heads), heads), RP, KP, warps) if heads else None


def rows(shape: Shape) -> Rows:
    RP = min(power_of_2(shape.head_channels), 64)
    BH = max(1, min(power_of_2(shape.heads), 64 // RP))
    return Rows(max(1, min(32, power_of_2(shape.time))), BH, RP)


def step(shape: Shape, width: int) -> Step:
    """A tile has a row or a few, of a few channels for each thread; of a state that is not wide all rows are moved at
    once. Few positions are not worth a program of their own."""
    BC = min(power_of_2(shape.channels), 256)
    return Step(BC, min(power_of_2(shape.time), 4), min(power_of_2(width), 4096 // BC), max(shape.span, 16))


def groups(tiles: int, units: int, owners: int = 1) -> int:
    """Programs that share the tiles of a unit: enough to fill a device, and no more than there are tiles."""
    return max(1, min(tiles, PROGRAMS // max(1, units * owners)))
