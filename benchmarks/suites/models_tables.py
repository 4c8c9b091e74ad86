"""What the suite `models` compares: the names of its models, their targets, the lengths from which on one is faster
than another, and the tables that the suite prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers import DYNAMIC, LIGHTWEIGHT
from benchmarks.suites import BOTH
from benchmarks.suites.attention_tables import DTYPES, Table, Target, on_gpu, ratio_rows
from convkernels.cli import environment
from convkernels.cli.console import quantity, say, table

SEQ2SEQ, BERT = "seq2seq", "bert"
TRANSFORMER, T5_BIAS = "transformer, SDPA without positions", "transformer, T5's bias"
STOCK_T5 = "T5 of transformers, SDPA"
DILATED = "dilated"
COMPOSITE_BERT, STOCK_BERT, PUBLISHED = "BERT, composite attention", "BERT, SDPA", "BERT, eager formulation"
LINES = {
    SEQ2SEQ: (LIGHTWEIGHT, DYNAMIC, DILATED, TRANSFORMER, T5_BIAS),
    BERT: (COMPOSITE_BERT, STOCK_BERT, PUBLISHED),
}
MORE_LINES = {SEQ2SEQ: (STOCK_T5,), BERT: ()}
OWN_LINES = (LIGHTWEIGHT, DYNAMIC, DILATED, T5_BIAS, COMPOSITE_BERT)
# What is to be faster than what.
RIVALS = {**dict.fromkeys((LIGHTWEIGHT, DYNAMIC, DILATED), TRANSFORMER), COMPOSITE_BERT: STOCK_BERT}
TITLES = {SEQ2SEQ: "ConvSeq2Seq", BERT: "CompositeBert"}
STACKS = {SEQ2SEQ: 2, BERT: 1}
SIZES = ("tiny", "small", "base")


@dataclass(frozen=True)
class Shape:
    """A model's size, the source tokens of a batch, the layers of each stack."""

    size: str
    tokens: int
    layers: int

    def batch(self, length: int) -> int:
        return max(1, self.tokens // length)


SHAPES = {SEQ2SEQ: Shape("small", 4096, 6), BERT: Shape("base", 1024, 12)}
LENGTHS = {SEQ2SEQ: (64, 128, 256, 512, 1024, 2048, 4096), BERT: (128, 512, 2048)}


def targets(dtypes: Sequence[str]) -> Iterator[Target]:
    """Those of CPUs, the same in every dtype."""

    def bounds(by_length: dict[int, float]) -> dict[int, tuple[float, ...]]:
        return {length: (bound,) * len(dtypes) for length, bound in by_length.items()}

    ours, stock = COMPOSITE_BERT, STOCK_BERT
    for line in (LIGHTWEIGHT, DYNAMIC, DILATED):
        yield Target(f"{TRANSFORMER} / {line}", BOTH, TRANSFORMER, line, bounds({64: 1.0, 2048: 2.0}), least=True)
    yield Target(f"{ours} / {stock}", BOTH, ours, stock, bounds({128: 1.05, 512: 1.05}))
    yield Target(f"{PUBLISHED} / {ours}", BOTH, PUBLISHED, ours, bounds({128: 2.0, 512: 2.0}), least=True)


def target_rows(section: dict[str, Any]) -> Table:
    dtypes = section["settings"]["dtypes"]
    usual = [case for case in cases(section) if Shape(**section["settings"]["shapes"][case]) == SHAPES[case]]
    measured = {line for case in usual for line in LINES[case]}  # targets are for these shapes
    chosen = [t for t in targets(dtypes) if {t.over, t.under} <= measured]
    return ratio_rows(chosen, section["records"], dtypes)


def cases(section: dict[str, Any]) -> list[str]:
    """The models that the section has records of."""
    found = {r["case"] for r in section["records"]}
    return [case for case in LINES if case in found]


def _from_where(section: dict[str, Any], line: str, rival: str, dtype: str) -> str:
    def seconds(name: str) -> dict[int, float]:
        return {r["length"]: r["seconds"] for r in section["records"] if (r["line"], r["dtype"]) == (name, dtype)}

    ours, theirs = seconds(line), seconds(rival)
    lengths = sorted(ours.keys() & theirs.keys())
    slower = [n for n in lengths if ours[n] >= theirs[n]]
    if not lengths or (slower and slower[-1] == lengths[-1]):
        return "not measured" if not lengths else f"at none up to {lengths[-1]}"
    return f"T = {lengths[0]}, the shortest" if not slower else f"T = {lengths[lengths.index(slower[-1]) + 1]}"


def crossover_rows(section: dict[str, Any]) -> Table:
    """Columns and rows: the length of those measured from which on a model is faster than its rival."""
    dtypes = section["settings"]["dtypes"]
    rows = [
        (f"{line} faster than {rival}", *(_from_where(section, line, rival, dtype) for dtype in dtypes))
        for line, rival in RIVALS.items()
        if any(line in LINES[case] for case in cases(section))
    ]
    return ("from which length on", *(DTYPES[dtype] for dtype in dtypes)), rows


def shapes(section: dict[str, Any]) -> dict[str, str]:
    """The title of each model that was measured, with its shape."""
    found = {case: Shape(**section["settings"]["shapes"][case]) for case in cases(section)}
    return {
        case: f"{TITLES[case]}, {shape.size}, {' + '.join([str(shape.layers)] * STACKS[case])} layers, "
        f"{shape.tokens} tokens per batch"
        for case, shape in found.items()
    }


def speed(record: dict[str, Any]) -> str:
    """Examples per second, also below one."""
    return f"{record['batch'] / record['seconds']:.3g}"


def _rows(section: dict[str, Any], case: str, dtype: str) -> list[tuple[str, ...]]:
    chosen = [r for r in section["records"] if (r["case"], r["dtype"]) == (case, dtype)]
    lines = list(dict.fromkeys(r["line"] for r in chosen))
    return [
        (
            r["line"],
            str(r["length"]),
            str(r["batch"]),
            quantity(r["seconds"], "s"),
            *([quantity(r["host_seconds"], "s") + " !" * r["host_bound"]] if on_gpu(section) else []),
            speed(r),
            quantity(r["flops"]),
            "-" if r["flops"] is None else f"{r['flops'] / r['seconds'] / 1e9:.0f}",
            quantity(r["peak_extra_bytes"], "B"),
        )
        for r in sorted(chosen, key=lambda r: (lines.index(r["line"]), r["length"]))
    ]


def print_tables(section: dict[str, Any]) -> None:
    title, host = environment.title(section["environment"]), ["host"] if on_gpu(section) else []
    columns = ("model", "T", "B", "time", *host, "examples/s", "FLOPs", "GFLOP/s", "memory")
    for case, shape in shapes(section).items():
        for dtype in section["settings"]["dtypes"]:
            table(f"training step, {dtype}, {shape}, {title}", columns, _rows(section, case, dtype))
    if not on_gpu(section):
        table(f"targets, {title}", *target_rows(section))
    table(f"crossover, {title}", *crossover_rows(section))
    for note in section["notes"]:
        say(f"note: {note}")
    for error in section["errors"]:
        say(f"failed: {error}")
