"""Rewrite the generated parts of docs/performance.md: python -m benchmarks.report FILE.json

FILE is the results of `bench --suite acceptance`, of `--suite attention`, or of both; on a GPU of the
suites streaming and attention with `--backend cuda` and `--backend triton`; or what `python -m benchmarks.machine_code
--backend NAME --json FILE` writes.
"""

import json
import sys
from pathlib import Path

from benchmarks.suites import acceptance, attention
from benchmarks.suites.streaming import OURS
from benchmarks.suites.targets import BACKWARD, COMPOSITE, EAGER, FLASH, FLEX, FORWARD, SDPA_BIAS
from convkernels.cli.console import markdown_table, quantity

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
SHOWN = ("90", "90a")  # the architecture whose kernels the page lists


def kernels(content: dict) -> str:
    columns = ("variant", "kernel", "registers", "spilled bytes", "shared bytes", "loads of 16 bytes / fewer",
               "stores of 16 bytes / fewer", "matrix instructions")  # fmt: skip
    rows = []
    for r in content["kernels"]:
        if r["architecture"] in SHOWN and not r["kernel"].startswith("reduce"):
            loads, stores = (f"{r[f'wide_{what}']} / {r[f'narrow_{what}']}" for what in ("loads", "stores"))
            cells = (r["variant"], r["kernel"], r["registers"], r["spills"], r["shared"], loads, stores, r["matrix"])
            rows.append(tuple(str(cell) for cell in cells))
    return f"{content['compiler']}, sm_{SHOWN[0]}:\n\n{markdown_table(columns, rows)}"


def of_backends(content: dict, suite: str) -> dict[str, dict]:
    return {name: content[f"{suite} {name}"] for name in ("cuda", "triton") if f"{suite} {name}" in content}


def gpu_convolutions(content: dict) -> str:
    """Times of the backends, the fraction of a copy, and F.conv1d's time in units of the first one's."""
    found = {
        name: {(r["case"], r["direction"]): r for r in section["records"]}
        for name, section in of_backends(content, "streaming").items()
    }
    rows = []
    for case in next(iter(found.values())):
        cells, times = list(case), next(iter(found.values()))[case]["seconds"]
        for records in found.values():
            r = records.get(case)
            cells += [f"{r['seconds'][OURS] * 1e6:.0f}", f"{r['fraction']:.2f}"] if r else ["-", "-"]
        rows.append((*cells, f"{times['conv1d'] / times[OURS]:.1f}" if "conv1d" in times else ""))
    titles = [title for name in found for title in (f"{name}, us", "of a copy")]
    return markdown_table(("case", "direction", *titles, "times faster than conv1d"), rows)


def gpu_attention(content: dict) -> str:
    """Times of the backends, and of what others offer: from the last section that has them."""
    sections = of_backends(content, "attention")
    times = {}
    for name, section in sections.items():
        for r in section["records"]:
            line = name if r["line"] == COMPOSITE else r["line"]
            times[line, r["direction"], r["length"]] = quantity(r["seconds"], "s")
    lines = (*sections, FLASH, FLEX, SDPA_BIAS, EAGER)
    lengths = sorted({length for _, _, length in times})
    rows = [
        (str(length), direction, *(times.get((line, direction, length), "-") for line in lines))
        for direction in (FORWARD, BACKWARD)
        for length in lengths
    ]
    return markdown_table(("T", "direction", *lines), rows)


def parts(content: dict) -> dict[str, str]:
    """The page's parts that can be written from a file, by name."""
    if "kernels" in content:
        return {f"{content['compiler'].split()[0]} kernels": kernels(content)}
    writers = {"acceptance": ("targets", acceptance.markdown), "attention": ("attention", attention.markdown)}
    found = {part: write(content[key]) for key, (part, write) in writers.items() if key in content}
    if of_backends(content, "streaming"):
        found["GPU convolutions"] = gpu_convolutions(content)
    if of_backends(content, "attention"):
        found["GPU attention"] = gpu_attention(content)
    return found


def main(path: str) -> None:
    written = parts(json.loads(Path(path).read_text()))
    if not written:
        sys.exit(f"{path} holds nothing that {PAGE.name} shows")
    for part, text in written.items():
        before, begin, rest = PAGE.read_text().partition(f"<!-- {part}: begin -->")
        _, end, after = rest.partition(f"<!-- {part}: end -->")
        if not begin or not end:
            raise ValueError(f"{PAGE} has no part '{part}'")
        PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


if __name__ == "__main__":
    main(sys.argv[1])
