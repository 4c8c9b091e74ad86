"""Chooses the committed selection of golden tensors: python scripts/select_golden.py <full set> [tests/golden]

Within a group the next case is the one that shows the most pairs of option values not yet seen, until the group's
share of the budget is used up; cases with a quirk come first. In groups of many different modules the smallest case of
each module comes before all others. The result is a directory of the same form with a
shortened index.json.
"""

import argparse
import itertools
import json
import shutil
from pathlib import Path

BUDGET = {
    "fairseq_lightconv": 520_000,
    "fairseq_dynconv": 680_000,
    "fairseq_dropconnect": 100_000,
    "mesh_paper1": 250_000,
    "bertconv_attention": 1_680_000,
    "hf": 280_000,
    "fairseq_block": 500_000,
    "bertconv_model": 480_000,
}
MANY_MODULES = ("bertconv_attention", "hf")


def features(record):
    """Pairs of option values of a case, T reduced to its relation to K."""
    options = dict(record["options"], op=record["op"], stored=len(record["tensors"]))
    if "T" in options:
        span = options["T"] - options.get("kernel_size", 0)
        options["T"] = "1" if options["T"] == 1 else "T<K" if span < 0 else "T=K" if span == 0 else "T>K"
    items = sorted((key, str(value)) for key, value in options.items())
    return set(itertools.combinations(items, 2))


def choose(records, root, budget):
    """Greedy cover of option pairs within a number of bytes."""
    size = {r["id"]: (root / r["file"]).stat().st_size for r in records}
    left = {r["id"]: features(r) for r in records}
    by_id = {r["id"]: r for r in records}
    seen, chosen, used = set(), [], 0
    while left:
        done = {by_id[i]["op"] for i in chosen}
        key = [
            (bool(by_id[i].get("quirk")), len(left[i] - seen), -size[i])
            if by_id[i]["group"] not in MANY_MODULES
            else (by_id[i]["op"] not in done, -size[i])
            for i in left
        ]
        best = max(zip(key, left, strict=True))[1]
        gain = left.pop(best) - seen
        if not gain:
            break
        if used + size[best] <= budget:
            chosen.append(best)
            used += size[best]
            seen |= gain
    return [r for r in records if r["id"] in chosen]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="directory with the full index.json")
    parser.add_argument(
        "target", type=Path, nargs="?", default=Path(__file__).resolve().parents[1] / "tests" / "golden"
    )
    arguments = parser.parse_args()
    index = json.loads((arguments.source / "index.json").read_text())
    chosen = []
    for group, budget in BUDGET.items():
        records = [r for r in index["cases"] if r["group"] == group]
        picked = choose(records, arguments.source, budget)
        print(f"{group}: {len(picked)} of {len(records)}")
        chosen += picked
    if arguments.target.exists():
        shutil.rmtree(arguments.target)
    for record in chosen:
        destination = arguments.target / record["file"]
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(arguments.source / record["file"], destination)
        record["tensors"] = sorted(record["tensors"])
    kept = {key: index[key] for key in ("description", "commits")}
    lines = ",\n".join(json.dumps(r) for r in chosen)
    (arguments.target / "index.json").write_text(f'{json.dumps(kept)[:-1]}, "cases": [\n{lines}\n]}}\n')
    total = sum(path.stat().st_size for path in arguments.target.rglob("*") if path.is_file())
    print(f"{len(chosen)} cases, {total / 1e6:.2f} MB in {arguments.target}")


if __name__ == "__main__":
    main()
