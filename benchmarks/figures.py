"""Plots in the manner of Figures 1 and 2 of Tay et al. 2021: speed and FLOPs against sequence length, log axes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.suites import BOTH, FORWARD, OURS, models_tables
from benchmarks.suites.attention_tables import COMPOSITE, DTYPES, EAGER, FLASH, FLEX, PLAIN, SDPA, SDPA_BIAS, shape
from benchmarks.suites.models_tables import (
    COMPOSITE_BERT,
    DILATED,
    PUBLISHED,
    STOCK_BERT,
    STOCK_T5,
    T5_BIAS,
    TRANSFORMER,
)
from benchmarks.suites.sweep import LINES, MORE_LINES
from convkernels.cli import environment
from convkernels.cli.console import Mistake

_OURS = {
    "lightweight": "#0b6fb8",
    "dynamic": "#d1570c",
    "depthwise": "#2a8f3c",
    COMPOSITE: "#c2185b",
    PLAIN: "#5c6bc0",
    DILATED: "#2a8f3c",
    T5_BIAS: "#5c6bc0",
    COMPOSITE_BERT: "#00838f",
}
_PEERS = ("#7a7a7a", "#8d5bb5", "#c2185b", "#a08000", "#00838f", "#5d4037", "#9e9d24", "#455a64", "#ad1457", "#6a1b9a")
_MODELS = (TRANSFORMER, STOCK_BERT, PUBLISHED, STOCK_T5)  # of others, in figures of their own
_MARKERS = "sD^vPX*<>h"


def _style(label: str) -> dict[str, Any]:
    if label in _OURS:
        return {"color": _OURS[label], "marker": "o", "linewidth": 2.4, "markersize": 5.5, "zorder": 3}
    others = [line.label for line in LINES + MORE_LINES if line.form != OURS]
    others += [SDPA, SDPA_BIAS, FLEX, EAGER, FLASH]
    places = {name: i for names in (others, _MODELS) for i, name in enumerate(names)}
    i = places.get(label, 0)
    return {
        "color": _PEERS[i % len(_PEERS)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "linewidth": 1.4,
        "markersize": 5,
        "linestyle": "--",
        "zorder": 2,
    }


def _draw(axes, records: list[dict[str, Any]], value: Callable[[dict[str, Any]], float | None], nested: bool) -> None:
    from matplotlib import ticker

    lengths = sorted({r["length"] for r in records})
    labels = list(dict.fromkeys(r["line"] for r in records))
    for i, label in enumerate(labels):
        values = {r["length"]: value(r) for r in records if r["line"] == label and value(r)}
        points = [(length, values.get(length, math.nan)) for length in lengths]  # no line over what was not measured
        style = _style(label)
        if nested:
            # Lines that coincide stay visible when each is drawn thinner than the one below it.
            style |= {"linewidth": 9.0 * 0.62**i, "markersize": 12.0 * 0.75**i, "zorder": 3 + i}
        if values:
            name = f"{label} (convkernels)" if label in _OURS else label
            axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 100 * low:  # whole powers of ten would be one label or two
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.minorticks_off()
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


@dataclass(frozen=True)
class Plot:
    """What a figure shows: a value of every record of a list, a row of panels per dtype, a column per direction or per
    model, where the section has several."""

    records: str
    heading: str
    label: str
    value: Callable[[dict[str, Any]], float | None]
    nested: bool = False
    by_dtype: bool = True
    column: str = "direction"

    def columns(self, section: dict[str, Any]) -> dict[str, str]:
        """What the records of each column have there, and its title."""
        return {way: way for way in (FORWARD, BOTH)} if self.column == "direction" else models_tables.shapes(section)

    def remarks(self, section: dict[str, Any]) -> list[str]:
        """What the curves do not say themselves."""
        if not self.nested:
            return list(section.get("notes", ()))
        curves: dict[str, list] = {}
        for r in section[self.records]:
            curves.setdefault(r["line"], []).append((r[self.column], r["dtype"], r["length"], self.value(r)))
        alike: dict[tuple, list[str]] = {}
        for label, values in curves.items():
            alike.setdefault(tuple(values), []).append(label)
        found = []
        for values, labels in reversed(alike.items()):
            if not any(value[-1] for value in values):
                found.append(f"not drawn, as nothing but element-wise work is left to count: {'; '.join(labels)}")
            elif len(labels) > 1:
                found.append(f"on one line, as they do the same multiplications: {'; '.join(sorted(labels))}")
        return found


SPEED = Plot("records", "Speed against sequence length", "speed [examples/s]", lambda r: r["batch"] / r["seconds"])
WORK = Plot(
    "work",
    "FLOPs against sequence length",
    "work [FLOPs per example]",
    lambda r: r["flops"] and r["flops"] / r["batch"],
    nested=True,
    by_dtype=False,
)

MEMORY = Plot(
    "records",
    "Memory against sequence length",
    "extra memory at the peak of a call [MB]",
    lambda r: r["peak_extra_bytes"] and r["peak_extra_bytes"] / 1e6,
)
PLOTS = {
    "sweep": {"speed.png": SPEED, "flops.png": WORK},
    "attention": {
        "attention-speed.png": SPEED,
        "attention-flops.png": replace(WORK, records="records"),
        "attention-memory.png": MEMORY,
    },
    "models": {
        "models-speed.png": replace(SPEED, heading="Training steps against sequence length", column="case"),
        "models-flops.png": replace(WORK, heading="FLOPs of a training step", column="case"),
    },
}

_HEADER, _PANEL, _LEGEND_ROW, _REMARK_ROW = 0.85, 3.1, 0.26, 0.135


def _save(plot: Plot, section: dict[str, Any], dtypes: list[str], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = dtypes if plot.by_dtype else dtypes[:1], plot.columns(section)
    lines = len({r["line"] for r in section["records"]})
    remarks = [line for remark in plot.remarks(section) for line in textwrap.wrap(remark, 150, subsequent_indent="   ")]
    under_legend = 0.1 + _REMARK_ROW * len(remarks)
    footer = 0.1 + _LEGEND_ROW * -(-lines // 3) + under_legend
    height = _HEADER + _PANEL * len(rows) + footer
    sharing = {"sharex": True, "sharey": "row"} if plot.column == "direction" else {}
    figure, grid = plt.subplots(len(rows), len(columns), figsize=(10.5, height), squeeze=False, **sharing)
    for row, dtype in enumerate(rows):
        for axes, (column, title) in zip(grid[row], columns.items(), strict=True):
            chosen = [r for r in section[plot.records] if (r[plot.column], r["dtype"]) == (column, dtype)]
            _draw(axes, chosen, plot.value, plot.nested)
            suffix = f", {DTYPES[dtype]}" if plot.by_dtype else ""
            axes.set_title(title + suffix, fontsize=10.5)
        grid[row][0].set_ylabel(plot.label)
    found = [r for r in section[plot.records] if not plot.by_dtype or r["dtype"] in rows]
    # The panels of directions share them.
    for axes, column in zip(grid[0], columns, strict=True):
        lengths = sorted({r["length"] for r in found if sharing or r[plot.column] == column})
        axes.set_xticks(lengths, [str(length) for length in lengths])
    for axes in grid[-1]:
        axes.set_xlabel("sequence length [tokens]")
    entries = {}
    for axes in grid.flat:
        entries.update({name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)})
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, (under_legend - 0.1) / height)}
    figure.legend(entries.values(), entries.keys(), ncols=3, frameon=False, fontsize=9.5, **place)
    figure.text(0.06, 0.07 / height, "\n".join(remarks), fontsize=7.5, color="#555555", va="bottom", linespacing=1.2)
    under = "; ".join([environment.title(section["environment"]), *_shape(section["settings"])])
    figure.text(0.5, 1 - 0.3 / height, plot.heading, ha="center", fontsize=13, fontweight="bold")
    figure.text(0.5, 1 - 0.55 / height, under, ha="center", fontsize=9)
    figure.tight_layout(rect=(0, footer / height, 1, 1 - (_HEADER - 0.2) / height))
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})
    plt.close(figure)
    return path


def _shape(settings: dict[str, Any]) -> list[str]:
    if "shapes" in settings:
        return []  # the panels' titles name them
    if "window" in settings:
        return [shape(settings)]
    sizes = f"C={settings['channels']}, H={settings['heads']}, K={settings['taps']}"
    return [f"{sizes}, {settings['tokens']} tokens per batch, of real text"]


def draw(suite: str, section: dict[str, Any], folder: Path, dtypes: list[str] | None = None) -> list[Path]:
    """Write the plots of a suite's results; `dtypes` limits the rows of panels."""
    measured = list(dict.fromkeys(record["dtype"] for record in section["records"]))
    unknown = [dtype for dtype in dtypes or () if dtype not in measured]
    if unknown:
        raise Mistake(f"--dtypes {','.join(unknown)}: the results are for {', '.join(measured)}")
    chosen = [dtype for dtype in measured if dtypes is None or dtype in dtypes]
    return [_save(plot, section, chosen, folder / name) for name, plot in PLOTS[suite].items()]
