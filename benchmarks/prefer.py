"""Enter measurements of a GPU into what backend="auto" takes there: python -m benchmarks.prefer FILE.json

FILE holds the results of `bench --device cuda --backend triton` and of `--backend cuda`, of the suites
streaming and attention. For each op, and for each class of attention problems, the backend with the smaller geometric
mean of times over all cases that both have measured is entered, unless it is the one that comes first anyway.
"""

import copy
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.suites.streaming import COPY, OURS
from benchmarks.suites.targets import BACKWARD, BANDED, BOTH, COMPOSITE, FORWARD
from convkernels import backends
from convkernels.backends import preference

# (op, dtype, class of problems), a name of the case, a time
Sample = tuple[tuple[str, str, str | None], tuple, float]
INFERENCE, TRAINING = "attention", "attention_grad"


def of_streaming(section: dict) -> Iterator[Sample]:
    """Times as multiples of the copy that ran beside them."""
    for r in section["records"]:
        op = f"{r['case'].split()[0]}_conv1d"
        yield (
            (op, section["shape"]["dtype"], None),
            (r["case"], r["direction"]),
            r["seconds"][OURS] / r["seconds"][COPY],
        )


def of_attention(section: dict) -> Iterator[Sample]:
    """Seconds: of the forward pass alone, and of both passes."""
    ops = {FORWARD: INFERENCE, BOTH: TRAINING}
    for r in section["records"]:
        if r["line"] == COMPOSITE and r["direction"] in ops:
            problem = preference.problem_of(r["length"], section["settings"]["head_size"])
            yield (ops[r["direction"]], r["dtype"], problem), (r["length"],), r["seconds"]
    times = {(w["workload"], w["line"]): w["seconds"] for w in section["workloads"]}
    if (BANDED, FORWARD) in times:
        problem, forward = preference.problem_of(8192, 128), times[BANDED, FORWARD]
        yield (INFERENCE, "bfloat16", problem), (BANDED,), forward
        if (BANDED, BACKWARD) in times:
            yield (TRAINING, "bfloat16", problem), (BANDED,), forward + times[BANDED, BACKWARD]
    for (name, line), seconds in times.items():
        if line == COMPOSITE:  # the paper's, of both passes
            yield (TRAINING, "bfloat16", preference.problem_of(128, 64)), (name,), seconds


SUITES: dict[str, Callable[[dict], Iterator[Sample]]] = {"streaming": of_streaming, "attention": of_attention}


def preferences(content: dict) -> dict[tuple[str, str, str | None], str]:
    """(op, dtype, class of problems) -> the fastest backend, by a geometric mean; what fewer than two backends have
    measured is left out."""
    measured: dict[tuple[str, str, str | None], dict[str, dict[tuple, float]]] = {}
    for suite, samples in SUITES.items():
        for name in backends.names():
            for key, case, time in samples(content[f"{suite} {name}"]) if f"{suite} {name}" in content else ():
                measured.setdefault(key, {}).setdefault(name, {})[case] = time
    chosen = {}
    for key, times in measured.items():
        cases = set.intersection(*(set(values) for values in times.values()))
        if len(times) > 1 and cases:
            chosen[key] = min(times, key=lambda name: sum(math.log(times[name][case]) for case in cases))
    return chosen


def without_empty(table: dict) -> dict:
    inner = {key: without_empty(value) if isinstance(value, dict) else value for key, value in table.items()}
    return {key: value for key, value in inner.items() if value}


def main(path: str) -> None:
    content = json.loads(Path(path).read_text())
    sections = [value for name, value in content.items() if name.split()[0] in SUITES and " " in name]
    if not sections:
        sys.exit(f"{path}: expected results of `bench --suite streaming` or `attention` with --backend")
    device = sections[0]["environment"]["device"]
    table = copy.deepcopy(preference.measured())
    usual = next(name for name in backends.names() if any(f"{suite} {name}" in content for suite in SUITES))
    for (op, dtype, problem), name in preferences(content).items():
        entries, key = table.setdefault(device, {}).setdefault(op, {}), dtype
        if problem is not None:
            entries, key = entries.setdefault(dtype, {}), problem
        entries.pop(key, None)
        if name != usual:
            entries[key] = name
        print(f"{device}: {op} in {dtype}{f', {problem}' if problem else ''}: {name}")
    preference.FILE.write_text(json.dumps(without_empty(table), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
