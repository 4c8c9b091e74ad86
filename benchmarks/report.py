"""Rewrite the generated parts of docs/performance.md: python -m benchmarks.report FILE.json

FILE is the results of `convkernels bench --suite acceptance`, or what `convkernels check --kernels --json FILE` writes.
"""

import json
import sys
from pathlib import Path

from convkernels._bench import acceptance

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
SHOWN = 90  # the architecture whose kernels the page lists


def kernels(content: dict) -> str:
    columns = ("variant", "kernel", "registers", "spilled bytes", "shared bytes", "loads of 16 bytes / fewer",
               "stores of 16 bytes / fewer", "matrix instructions")  # fmt: skip
    rows = []
    for r in content["kernels"]:
        if r["architecture"] == SHOWN and not r["kernel"].startswith("reduce"):
            loads, stores = (f"{r[f'wide_{what}']} / {r[f'narrow_{what}']}" for what in ("loads", "stores"))
            cells = (r["variant"], r["kernel"], r["registers"], r["spills"], r["shared"], loads, stores, r["matrix"])
            rows.append(tuple(str(cell) for cell in cells))
    return f"Triton {content['triton']}, sm_{SHOWN}:\n\n{acceptance._markdown_table(columns, rows)}"


def main(path: str) -> None:
    content = json.loads(Path(path).read_text())
    part, text = ("kernels", kernels(content)) if "kernels" in content else (
        "targets", acceptance.markdown(content["acceptance"]))  # fmt: skip
    before, begin, rest = PAGE.read_text().partition(f"<!-- {part}: begin -->")
    _, end, after = rest.partition(f"<!-- {part}: end -->")
    if not begin or not end:
        raise ValueError(f"{PAGE} has no part '{part}'")
    PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


if __name__ == "__main__":
    main(sys.argv[1])
