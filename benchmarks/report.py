"""Rewrite the generated parts of docs/performance.md: python -m benchmarks.report FILE.json

FILE is the results of `convkernels bench --suite acceptance`, of `--suite attention`, or of both, or what `convkernels
check --kernels --backend NAME --json FILE` writes.
"""

import json
import sys
from pathlib import Path

from convkernels._bench import acceptance, attention
from convkernels._bench.console import markdown_table

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


def parts(content: dict) -> dict[str, str]:
    """The page's parts that can be written from a file, by name."""
    if "kernels" in content:
        return {f"{content['compiler'].split()[0]} kernels": kernels(content)}
    writers = {"acceptance": ("targets", acceptance.markdown), "attention": ("attention", attention.markdown)}
    return {part: write(content[key]) for key, (part, write) in writers.items() if key in content}


def main(path: str) -> None:
    for part, text in parts(json.loads(Path(path).read_text())).items():
        before, begin, rest = PAGE.read_text().partition(f"<!-- {part}: begin -->")
        _, end, after = rest.partition(f"<!-- {part}: end -->")
        if not begin or not end:
            raise ValueError(f"{PAGE} has no part '{part}'")
        PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


if __name__ == "__main__":
    main(sys.argv[1])
