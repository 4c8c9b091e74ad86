"""Tiles of the attention kernels: plain data, chosen by pure functions of the problem and the architecture."""

from dataclasses import dataclass

from ..host import ceil_div, power_of_2

MATRIX = 16  # least side of a matrix unit's operand
COLUMNS = 32  # of a tile of relative terms where programs have 128 rows
PROGRAMS = 2048  # as many as keep the largest device busy, where programs have sums of tables of their own
SUMS = 1 << 24  # about as many elements as these sums may have in all
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Shape:
    """What the choice depends on. rank: channels of what meets query_rel. window: columns of the tables. products:
    whether queries or keys are multiplied by tables. architecture: 10 times the major compute capability. small: the
    least tiles, for tests of many of them. triton: its version. simple: nothing is hidden or dropped, and there is no
    key_rel, separate rel_query or depthwise term; they take registers."""

    channels: int
    rank: int
    window: int
    dtype: str
    products: bool = False
    architecture: int = 90
    small: bool = False
    triton: tuple[int, ...] = (3, 9)
    simple: bool = False

    @property
    def padded(self) -> int:
        return max(MATRIX, power_of_2(self.channels))

    @property
    def padded_rank(self) -> int:
        return max(MATRIX, power_of_2(self.rank))

    @property
    def in_registers(self) -> bool:
        """Whether matrix units read operands from registers, not from shared memory."""
        return self.architecture < 90

    @property
    def crowded(self) -> bool:
        """Whether registers are short: an older Triton keeps there what a later loop needs."""
        return self.architecture == 90 and self.triton < (3, 9)

    @property
    def roomy(self) -> bool:
        """Whether a program of 8 warps has the registers for 128 rows, two warpgroups with 64 each. With 64 rows both
        make the same scores, since each has whole rows of them."""
        fits = self.padded <= 128 and self.window <= COLUMNS and SIZES[self.dtype] == 2
        return self.architecture == 90 and self.simple and fits and not self.small

    @property
    def row(self) -> int:
        """Bytes of a row of channels."""
        return self.padded * SIZES[self.dtype]

    @property
    def sliding(self) -> bool:
        """Whether the tables are too wide to be held for a tile of queries: its tiles of pairs make their own."""
        return self.window > (MATRIX if self.small or self.row > 512 else 64)


@dataclass(frozen=True)
class Pairs:
    """Tiles of BM queries by BN keys; a program keeps one of the two and walks over the other, NEAR at a time where
    pairs look up their columns, which takes many registers. maxnreg: without it the assembler spills a few of them to
    fit one more block of threads."""

    BM: int
    BN: int
    NEAR: int
    num_warps: int
    num_stages: int = 2
    NEAR_STAGES: int = 1
    maxnreg: int = 255


def width(shape: Shape, pairs: Pairs, kept: int) -> int:
    """Columns of a tile of relative terms: the whole table's, or those of all offsets between the rows that a program
    keeps and NEAR others."""
    if shape.sliding:
        return power_of_2(kept + pairs.NEAR)
    return COLUMNS if shape.roomy else max(MATRIX, power_of_2(shape.window))  # with fewer the compiler spills


def piece(shape: Shape, columns: int, kept: int) -> int:
    """Rows of a table whose sums for so many columns a program that keeps so many rows adds at a time."""
    return MATRIX if shape.small else max(MATRIX, 64 * kept // columns)


def exact(shape: Shape) -> Pairs:
    """For float32 and float64, which matrix units do not serve. Shared memory is what is short."""
    if shape.row <= 256 or (shape.row <= 512 and (shape.window <= 32 or not shape.products)):
        return Pairs(32, 32, 32, 8)
    return Pairs(16, 16, 16, 4, 2 if shape.row <= 1024 else 1)


def forward(shape: Shape) -> Pairs:
    if shape.small:
        return Pairs(16, 16, 16, 4)
    if SIZES[shape.dtype] > 2:
        return exact(shape)
    old = shape.in_registers
    if shape.roomy:
        return Pairs(128, 64, 32, 8, 3)
    if shape.padded > 128:
        return Pairs(32 if old and shape.products else 64, 32, 16, 8)
    if shape.sliding and shape.products:
        if shape.padded <= 64:
            return Pairs(32 if old else 64, 64, 32, 8, 2, 2)
        # Reading ahead takes more registers than the newest has.
        stages = 2 if shape.architecture < 100 else 1
        return Pairs(64, 64, 32, 8, stages, stages)
    if shape.padded <= 64:
        return Pairs(128, 64, 32, 8, 3)
    return Pairs(64, 64, 16, 8, 3)


def backward(shape: Shape, keys: bool) -> Pairs:
    """keys: for the pass that keeps tiles of keys."""
    if shape.small:
        return Pairs(16, 16, 16, 4)
    if SIZES[shape.dtype] > 2:
        return exact(shape)
    old, wide = shape.in_registers, shape.padded > 64
    if shape.padded > 128:
        kept = 32 if old else 64
        return Pairs(32, kept, 16, 8) if keys else Pairs(kept, 32, 16, 8)
    if shape.roomy and not (wide and shape.crowded and (keys or shape.products)):
        if keys:
            return Pairs(32, 128, 16, 8) if wide else Pairs(64, 128, 16 if shape.crowded else 32, 8)
        return Pairs(128, 64, 32, 8)
    if old and keys:
        return Pairs(64, (16 if shape.products else 64) if wide else 32, 16, 8)
    if old:
        return Pairs(32 if shape.products else 64, 64, 16, 8)
    if keys and shape.crowded:
        if not wide:
            return Pairs(32, 64, 16, 8, 1)
        return Pairs(64, 64, 16, 8, 1) if shape.simple else Pairs(32, 64, 16, 8)
    if keys:
        return Pairs(64 if wide else 32, 64, 16, 8)
    if wide and shape.products:
        if shape.sliding:
            return Pairs(32 if shape.crowded else 64, 64, 32, 8, 1)
        return Pairs(64, 32, 16, 8) if shape.crowded else Pairs(64, 64, 32, 8)
    return Pairs(64, 64, 16, 8)


def groups(tiles: int, units: int, elements: int) -> int:
    """Programs that share the tiles of a unit, where each has ``elements`` sums of its own; without any, one each."""
    if elements == 0:
        return tiles
    return max(1, min(tiles, min(PROGRAMS, SUMS // elements) // max(1, units)))


def tiles(rows: int, height: int, sequences: int | None) -> int:
    """How many tiles of ``height`` cover the rows; those of packed sequences are not known, so as many as may be."""
    return ceil_div(rows, height) if sequences is None else rows // height + sequences
