"""Enter measurements of a GPU into what backend="auto" takes there: python -m benchmarks.prefer FILE.json

FILE holds the results of `convkernels bench --suite streaming --device cuda --backend triton` and of `--backend cuda`.
For each op the backend with the smaller geometric mean of times, forward and backward, over all cases that both have
measured is entered, unless it is the one that comes first anyway.
"""

import json
import math
import sys
from pathlib import Path

from convkernels import backends
from convkernels._bench.streaming import COPY, OURS
from convkernels.backends import preference


def times(section: dict) -> dict[str, dict[tuple[str, str], float]]:
    """Op -> (case, direction) -> time as a multiple of the copy that ran beside it."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for r in section["records"]:
        op = f"{r['case'].split()[0]}_conv1d"
        found.setdefault(op, {})[r["case"], r["direction"]] = r["seconds"][OURS] / r["seconds"][COPY]
    return found


def preferences(content: dict) -> dict[str, str]:
    """Op -> the fastest backend, by a geometric mean; ops that fewer than two backends have measured are left out."""
    sections = {name: content[f"streaming {name}"] for name in backends.names() if f"streaming {name}" in content}
    measured = {name: times(section) for name, section in sections.items()}
    chosen = {}
    for op in sorted(set().union(*measured.values())):
        both = {name: ops[op] for name, ops in measured.items() if op in ops}
        cases = set.intersection(*(set(values) for values in both.values()))
        if len(both) > 1 and cases:
            chosen[op] = min(both, key=lambda name: sum(math.log(both[name][case]) for case in cases))
    return chosen


def main(path: str) -> None:
    content = json.loads(Path(path).read_text())
    section = next(value for name, value in content.items() if name.startswith("streaming "))
    device, dtype = section["environment"]["device"], section["shape"]["dtype"]
    table = dict(preference.measured())
    ops = {op: dict(entries) for op, entries in table.get(device, {}).items()}
    usual = next(name for name in backends.names() if f"streaming {name}" in content)
    for op, name in preferences(content).items():
        entries = {key: value for key, value in ops.get(op, {}).items() if key != dtype}
        ops[op] = entries if name == usual else entries | {dtype: name}
        print(f"{device}: {op} in {dtype}: {name}")
    table[device] = {op: entries for op, entries in sorted(ops.items()) if entries}
    table = {name: entries for name, entries in sorted(table.items()) if entries}
    preference.FILE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
