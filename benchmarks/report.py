"""Rewrite the generated part of docs/performance.md from a results file: python -m benchmarks.report RESULTS.json"""

import json
import sys
from pathlib import Path

from convkernels._bench import acceptance

BEGIN, END = "<!-- targets: begin -->", "<!-- targets: end -->"


def main(results: str) -> None:
    section = json.loads(Path(results).read_text())["acceptance"]
    page = Path(__file__).parent.parent / "docs" / "performance.md"
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{acceptance.markdown(section)}\n\n{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1])
