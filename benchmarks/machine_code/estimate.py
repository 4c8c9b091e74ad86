"""How long each unit of an H100 is busy with a launch, as far as counts tell: an estimate of the best that could be."""

from dataclasses import dataclass, fields

from benchmarks.machine_code.counters import SECTOR

# What an H100 does per second: sizes and clock by its data sheet, bytes as measured. Matrix units reach 62 % of their
# rate through mma.sync, and 83 % by products of warpgroups (790 of 949 TFLOP/s, large ones): measurements of others.
# The estimate depends on these.
PROCESSORS, CLOCK = 132, 1.755e9
COPY_BYTES, CACHE_BYTES = 3.0e12, 5.5e12
WAVEFRONTS = PROCESSORS * CLOCK
PRODUCT = 16 * 8 * 16  # multiplications of a product that is counted
DENSE = PROCESSORS * CLOCK * 2048 / PRODUCT
PRODUCTS, WARPGROUP_PRODUCTS = 0.62 * DENSE, 0.83 * DENSE
INSTRUCTIONS = PROCESSORS * CLOCK * 4


@dataclass(frozen=True)
class Estimate:
    """Seconds that each unit of an H100 takes for a launch."""

    memory: float
    cache: float
    shared: float
    matrix: float
    issue: float | None
    integers: float | None
    special: float | None

    def bound(self) -> tuple[str, float]:
        times = {name: value for name, value in vars(self).items() if value is not None}
        name = max(times, key=times.__getitem__)
        return name, times[name]


def of_counts(
    least: float,
    cached: float,
    wavefronts: float,
    products: tuple[float, float],
    executed: tuple[float, float, float] | None,
) -> Estimate:
    """least: bytes that are met; cached: sectors that reach the second cache; wavefronts: of shared memory, and
    shuffles, which use the same unit; products: by mma.sync, and of warpgroups; executed: instructions of warps, all,
    those of the integer units, which take twice as long, and those of the units for special functions, which take
    eight times as long."""
    return Estimate(
        memory=least / COPY_BYTES,
        cache=SECTOR * cached / CACHE_BYTES,
        shared=wavefronts / WAVEFRONTS,
        matrix=products[0] / PRODUCTS + products[1] / WARPGROUP_PRODUCTS,
        issue=executed and executed[0] / INSTRUCTIONS,
        integers=executed and 2 * executed[1] / INSTRUCTIONS,
        special=executed and 8 * executed[2] / INSTRUCTIONS,
    )


COLUMNS = ("case", "kernel", *(f"{unit.name} us" for unit in fields(Estimate)), "issue over memory",
           "bytes over least", "bound", "at most")  # fmt: skip


def ratio(a: float, b: float) -> str:
    return f"{a / b:.2f}" if b else "-"


def of_a_copy(least: float, seconds: float) -> str:
    return f"{least / COPY_BYTES / seconds:.2f} of a copy"


def of_products(products: float, seconds: float) -> str:
    """products: all that are counted, those of pairs that a window hides and of tables included."""
    return f"{2 * PRODUCT * products / seconds / 1e12:.0f} TFLOP/s"


def row(case: str, kernel: str, e: Estimate, moved: float, least: float, reached: str) -> tuple[str, ...]:
    """reached: what the bound lets a kernel reach."""
    times = ("-" if t is None else f"{t * 1e6:.0f}" for t in vars(e).values())
    busy = "-" if e.issue is None else ratio(max(e.issue, e.integers), e.memory)
    return (case, kernel, *times, busy, ratio(moved, least), e.bound()[0], reached)
