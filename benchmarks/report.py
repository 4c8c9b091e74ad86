"""Rewrite the generated parts of docs/performance.md: python -m benchmarks.report FILE.json

FILE is the results of `convkernels bench --suite acceptance`, or what `convkernels check --kernels
--backend NAME --json FILE` writes.
"""

import json
import sys
from pathlib import Path

from convkernels._bench import acceptance

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
    return f"{content['compiler']}, sm_{SHOWN[0]}:\n\n{acceptance._markdown_table(columns, rows)}"


def main(path: str) -> None:
    content = json.loads(Path(path).read_text())
    if "kernels" in content:
        part, text = f"{content['compiler'].split()[0]} kernels", kernels(content)
    else:
        part, text = "targets", acceptance.markdown(content["acceptance"])
    before, begin, rest = PAGE.read_text().partition(f"<!-- {part}: begin -->")
    _, end, after = rest.partition(f"<!-- {part}: end -->")
    if not begin or not end:
        raise ValueError(f"{PAGE} has no part '{part}'")
    PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


if __name__ == "__main__":
    main(sys.argv[1])
