"""The targets of composite attention, ratios of times of the suite attention, and the tables that the suite prints. The
targets of GPUs hold for bfloat16 and differ a little between the backends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.suites import BACKWARD, BOTH, FORWARD
from convkernels.cli import environment
from convkernels.cli.console import quantity, say, table

# The forms that are compared, what is timed of them, and the workloads of targets for GPUs.
COMPOSITE, PLAIN, SDPA = "composite attention", "attention, no positions", "SDPA, no positions"
FLASH = "FlashAttention-2 in torch, no positions"
SDPA_BIAS, FLEX, EAGER = "SDPA, materialised bias", "FlexAttention, compiled", "eager formulation"
BANDED = "banded, T=8192, 64/8 heads of 128, 1024 columns of rank 16"
PAPER = "paper, B=32, T=128, H={}, dropout, padding"
SECONDS, MEMORY = "seconds", "peak_extra_bytes"
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


@dataclass(frozen=True)
class Target:
    """A ratio of two lines, and per length its bound in each dtype, from above or (`least`) from below."""

    text: str
    direction: str
    over: str
    under: str
    bounds: dict[int, tuple[float, ...]]
    least: bool = False
    of: str = SECONDS


@dataclass(frozen=True)
class WorkloadTarget:
    """The time of a line in a workload, or its ratio to that of another."""

    text: str
    workload: str
    over: str
    bound: float
    under: str | None = None
    least: bool = False


CPU = (
    Target(
        "forward with relative terms / SDPA without positions", FORWARD, COMPOSITE, SDPA,
        {128: (0.85, 0.80), 512: (0.85, 0.72), 2048: (0.87, 0.75)},
    ),
    Target(
        "forward with relative terms / own forward without", FORWARD, COMPOSITE, PLAIN,
        {128: (1.10, 1.12), 512: (1.04, 1.06), 2048: (1.02, 1.04)},
    ),
    Target(
        "backward with all tables / SDPA's without positions", BACKWARD, COMPOSITE, SDPA,
        dict.fromkeys((128, 512, 2048), (0.95, 0.85)),
    ),
    Target(
        "FlexAttention with the same terms / ours, forward", FORWARD, FLEX, COMPOSITE,
        {512: (4.0, 5.5), 2048: (4.5, 6.5)}, least=True,
    ),
    Target(
        "SDPA with a materialised learnable bias / ours, training", BOTH, SDPA_BIAS, COMPOSITE,
        {2048: (2.5, 9.0)}, least=True,
    ),
)  # fmt: skip


def _by_length(*bounds: float) -> dict[int, tuple[float]]:
    return {length: (bound,) for length, bound in zip((512, 1024, 2048, 4096), bounds, strict=True)}


def _gpu(*own_forward: float) -> tuple[Target, ...]:
    return (
        Target("forward with relative terms / own forward without", FORWARD, COMPOSITE, PLAIN,
               _by_length(*own_forward)),
        Target("backward with all tables / own backward without", BACKWARD, COMPOSITE, PLAIN,
               _by_length(1.20, 1.10, 1.06, 1.04)),
        Target("forward with relative terms / FlashAttention-2 without positions", FORWARD, COMPOSITE, FLASH,
               _by_length(1.10, 1.00, 0.95, 0.92)),
        Target("backward with all tables / FlashAttention-2's without positions", BACKWARD, COMPOSITE, FLASH,
               _by_length(1.30, 1.20, 1.15, 1.10)),
        Target("FlexAttention with the same terms / ours, forward", FORWARD, FLEX, COMPOSITE,
               _by_length(*[1.4] * 4), least=True),
        Target("FlexAttention with the same terms / ours, backward", BACKWARD, FLEX, COMPOSITE,
               _by_length(*[3.0] * 4), least=True),
        Target("SDPA with a materialised learnable bias / ours, training", BOTH, SDPA_BIAS,
               COMPOSITE, {1024: (2.0,), 4096: (3.0,)}, least=True),
        Target("peak memory of training / FlashAttention-2's without positions", BOTH, COMPOSITE, FLASH,
               _by_length(*[1.1] * 4), of=MEMORY),
    )  # fmt: skip


TARGETS = {"cpu": CPU, "triton": _gpu(1.15, 1.08, 1.05, 1.03), "cuda": _gpu(1.08, 1.05, 1.03, 1.02)}
WORKLOADS = (
    WorkloadTarget("forward [ms]", BANDED, FORWARD, 2.4),
    WorkloadTarget("backward / forward", BANDED, BACKWARD, 2.8, under=FORWARD),
    *(
        WorkloadTarget(f"{line} / ours", PAPER.format(heads), line, bound, under=COMPOSITE, least=True)
        for heads in (4, 12)
        for line, bound in ((EAGER, 3.0), (SDPA_BIAS, 1.3))
    ),
)
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


def _cells(value: float, bound: float, least: bool) -> tuple[str, str, str]:
    met = value >= bound if least else value <= bound
    verdict = "not measured" if math.isnan(value) else "PASS" if met else "miss"
    return f"{'>=' if least else '<='} {bound:.2f}", "-" if math.isnan(value) else f"{value:.2f}", verdict


def ratio_rows(targets: Iterable[Target], records: list[dict[str, Any]], dtypes: Sequence[str]) -> Table:
    """Columns and rows of targets whose bounds are for these dtypes."""
    found = {(r["line"], r["direction"], r["dtype"], r["length"]): r for r in records}
    rows = []
    for target in targets:
        for length, bounds in target.bounds.items():
            row = [target.text, str(length)]
            for dtype, bound in zip(dtypes, bounds, strict=True):
                over, under = (
                    found.get((line, target.direction, dtype, length), {}).get(target.of) or math.nan
                    for line in (target.over, target.under)
                )
                row += _cells(over / under, bound, target.least)
            rows.append(tuple(row))
    names = [name for dtype in dtypes for name in (f"{DTYPES[dtype]} target", DTYPES[dtype], "verdict")]
    return ("ratio", "T", *names), rows


def target_rows(section: dict[str, Any]) -> Table:
    """Columns and rows: a ratio, its length, then per dtype target, value and verdict."""
    settings, gpu = section["settings"], on_gpu(section)
    kind = "cpu" if not gpu else "cuda" if settings["backend"] == "cuda" else "triton"
    dtypes = ("bfloat16",) if gpu else ("float32", "bfloat16")
    columns, result = ratio_rows(TARGETS[kind], section["records"], dtypes)
    times = {(w["workload"], w["line"]): w["seconds"] for w in section["workloads"]}
    for target in WORKLOADS if gpu else ():
        value = times.get((target.workload, target.over), math.nan)
        value = value * 1e3 if target.under is None else value / times.get((target.workload, target.under), math.nan)
        result.append((f"{target.workload}: {target.text}", "", *_cells(value, target.bound, target.least)))
    return columns, result


def shape(settings: dict[str, Any]) -> str:
    return f"B={settings['batch']}, H={settings['heads']}, D={settings['head_size']}, window {settings['window']}"


def _rows(section: dict[str, Any], dtype: str, direction: str) -> list[tuple[str, ...]]:
    chosen = [r for r in section["records"] if (r["dtype"], r["direction"]) == (dtype, direction)]
    lines = list(dict.fromkeys(r["line"] for r in chosen))
    return [
        (
            r["line"],
            str(r["length"]),
            quantity(r["seconds"], "s"),
            *([quantity(r["host_seconds"], "s") + " !" * r["host_bound"]] if on_gpu(section) else []),
            quantity(r["flops"]),
            "-" if r["flops"] is None else f"{r['flops'] / r['seconds'] / 1e9:.0f}",
            quantity(r["peak_extra_bytes"], "B"),
        )
        for r in sorted(chosen, key=lambda r: (lines.index(r["line"]), r["length"]))
    ]


def on_gpu(section: dict[str, Any]) -> bool:
    return section["settings"]["device"] == "cuda"


def columns(section: dict[str, Any]) -> tuple[str, ...]:
    """On a GPU with the time of the host, marked with ! where the host was not ahead of the device."""
    return ("form", "T", "time", *(["host"] if on_gpu(section) else []), "FLOPs", "GFLOP/s", "memory")


def print_tables(section: dict[str, Any]) -> None:
    title = environment.title(section["environment"])
    for dtype in section["settings"]["dtypes"]:
        for direction in (FORWARD, BACKWARD, BOTH):
            table(
                f"{direction}, {dtype}, {shape(section['settings'])}, {title}",
                columns(section),
                _rows(section, dtype, direction),
            )
    if section["workloads"]:
        rows = [(w["workload"], w["line"], quantity(w["seconds"], "s")) for w in section["workloads"]]
        table(f"workloads, {title}", ("workload", "form", "time"), rows)
    table(f"targets, {title}", *target_rows(section))
    for note in section["notes"]:
        say(f"note: {note}")
    for error in section["errors"]:
        say(f"failed: {error}")
