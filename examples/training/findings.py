"""Writes the page of findings from the logs of the study: tables in the layout of the papers, and differences."""

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path

from convkernels.cli import environment
from convkernels.cli.console import markdown_table

from .cells import BERT_TASKS, METRICS, MIXERS, SEQ2SEQ_TASKS, START, VARIANTS, Cell, cells
from .files import DataError, logged

# What is shown of a task: its role among the tests, the metric, a title.
SHOWN = {
    "trec": [("test", "accuracy", "TREC")],
    "sst2": [("test", "accuracy", "SST-2")],
    "cogs": [("test", "exact_match", "COGS"), ("generalization", "exact_match", "COGS gen.")],
    "cola": [("test", "matthews", "CoLA")],
    "rte": [("test", "accuracy", "RTE")],
}
# Tay et al. 2021, table 2 (TREC, SST-2), and section 4 on COGS, which gives one figure for convolutions.
PAPER = {
    ("transformer", "raw"): ("78.0", "78.4", "-", "-"),
    ("lightweight", "raw"): ("82.2", "81.7", "-", "-"),
    ("dilated", "raw"): ("79.6", "79.0", "-", "-"),
    ("dynamic", "raw"): ("80.2", "82.8", "-", "-"),
    ("transformer", "pretrained"): ("93.6", "92.1", "95", "77.5"),
    ("lightweight", "pretrained"): ("93.6", "92.2", "95", "76.9"),
    ("dilated", "pretrained"): ("94.2", "92.1", "95", "76.9"),
    ("dynamic", "pretrained"): ("92.4", "91.6", "95", "76.9"),
}
HEAD = """\
# Findings

What the study of `examples/study.py` gave, written by its `--report` from its logs. It repeats the comparisons of
Tay et al. 2021 and Chang et al. 2021 with models and data that fit the machine: the question is whether the order of
the models is the papers', not whether their figures are. Cells are means over seeds, ± the standard deviation between
them, in percent. Targets of COGS with more than 256 tokens, which only its generalization set has, count as not
matched. One model is pre-trained for each row, from which all its seeds are fine-tuned: the spread is that of
fine-tuning. Tokenizers have seen the texts of all training sets. What stands as the paper's is quoted from memory of
Tay et al., for orientation: look it up there before you cite it; on COGS it has one figure for all convolutions. "What
it shows" in docs/training.md reads the tables.
"""
TESTS = """\
In the usual tests, always naming the commonest class is right for 27.6 % of TREC, 50.9 % of SST-2 and 52.7 % of RTE,
and has a correlation of 0 on CoLA. What other rows of the same kind would give differs from a figure by this standard
error, which the spread between seeds does not contain:"""
LOSSES = """\
In nats; in training the mean over the last twentieth of the steps. Pre-training: per token to predict, of the one
model. Fine-tuning: in training / on the test, the mean over seeds; of COGS per token."""

DIFFERENCES = """\
Each, if there are several seeds, ± the root of the sum of the squares of both standard deviations; bold where it is
more than that, both rounded."""


@dataclass(frozen=True)
class Value:
    """Results of several seeds."""

    results: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.results)

    @property
    def spread(self) -> float:
        return statistics.stdev(self.results) if len(self.results) > 1 else 0.0

    def __str__(self) -> str:
        more = f" ± {100 * self.spread:.1f}" if len(self.results) > 1 else ""
        return f"{100 * self.mean:.1f}{more}"


class Log:
    """The lines of one log."""

    def __init__(self, path: Path) -> None:
        lines = logged(path)
        self.runs = [line for line in lines if "run" in line]
        self.cells = {line["cell"]: line for line in lines if "cell" in line}
        if not self.runs or any(run["settings"] != self.runs[0]["settings"] for run in self.runs):
            raise ValueError("its calls have different settings")
        for name, cell in self.cells.items():
            named = Cell(**{field.name: cell[field.name] for field in fields(Cell)}).name
            if named != name:
                raise ValueError(f"the line of {name} is that of {named}")
            for role, values in cell.get("results", {}).items():
                for metric in METRICS & values.keys():
                    if not -(metric == "matthews") <= values[metric] <= 1:
                        raise ValueError(f"{name} has a {metric} of {values[metric]} on {role}")
        self.settings = self.runs[-1]["settings"]
        found = defaultdict(dict)
        for line in self.cells.values():
            for role, values in line.get("results", {}).items():
                for metric in METRICS & values.keys():
                    key = line["family"], line["model"], line["start"], line["task"], role
                    found[key][line["seed"]] = values[metric]
        self.values = {key: Value(tuple(seeds.values())) for key, seeds in found.items()}

    def value(self, family: str, model: str, start: str, task: str, role: str = "test") -> Value | None:
        return self.values.get((family, model, start, task, role))

    def fewer(self, value: Value) -> str:
        """Says of how many seeds a value is, where that is not all of them."""
        count = len(value.results)
        return f" ({count} of {len(self.settings['seeds'])} seeds)" if count < len(self.settings["seeds"]) else ""

    def losses(self, family: str, model: str, start: str, task: str) -> str:
        """At the end of training, and on the test."""
        wanted = dict(family=family, model=model, start=start, task=task)
        found = [cell for cell in self.cells.values() if wanted.items() <= cell.items()]
        pairs = [[cell["loss"] for cell in found], [cell["results"]["test"]["loss"] for cell in found]]
        return " / ".join(f"{statistics.fmean(one):.3f}" for one in pairs) if found else "-"


def _cells(log: Log, family: str, model: str, start: str, tasks) -> list[str]:
    found = [log.value(family, model, start, task, role) for task in tasks for role, _, _ in SHOWN[task]]
    return ["-" if value is None else f"{value}{log.fewer(value)}" for value in found]


def _titles(tasks) -> list[str]:
    return [title for task in tasks for _, _, title in SHOWN[task]]


def seq2seq(log: Log) -> str:
    """In the layout of table 2 of Tay et al. 2021, the paper's figure behind each of ours."""
    titles = [title for one in _titles(SEQ2SEQ_TASKS) for title in (one, "paper")]
    rows = []
    for start, name in START.items():
        for mixer in MIXERS:
            ours = _cells(log, "seq2seq", mixer, start, SEQ2SEQ_TASKS)
            pairs = zip(ours, PAPER[mixer, start], strict=True)
            rows.append((name, mixer, *(cell for pair in pairs for cell in pair)))
    return markdown_table(("", "model", *titles), rows)


def bert(log: Log) -> str:
    """In the layout of tables 1 to 3 of Chang et al. 2021."""
    rows = [
        (variant, *_pretrained(log, "bert", variant), *_cells(log, "bert", variant, "pretrained", BERT_TASKS))
        for variant in VARIANTS
    ]
    return markdown_table(("attention", "parameters", "MLM loss", *_titles(BERT_TASKS)), rows)


def _pretrained(log: Log, family: str, model: str) -> tuple[str, str]:
    """Parameters and loss of a pre-trained model."""
    cell = log.cells.get(f"{family}-{model}-pretraining")
    return (f"{cell['parameters'] / 1e6:.3f}M", f"{cell['loss']:.3f}") if cell else ("-", "-")


def losses(log: Log) -> list[str]:
    """A table for each family."""
    found = []
    for family, models, starts, tasks in (
        ("seq2seq", MIXERS, START, SEQ2SEQ_TASKS),
        ("bert", VARIANTS, ("pretrained",), BERT_TASKS),
    ):
        rows = [
            (START[start], model, *(_pretrained(log, family, model) if start == "pretrained" else ("", "")),
             *(log.losses(family, model, start, task) for task in tasks))
            for start in starts for model in models
        ]  # fmt: skip
        titles = [SHOWN[task][0][-1] for task in tasks]
        found.append(markdown_table(("", "model", "parameters", "pre-training", *titles), rows))
    return found


def tests(log: Log) -> str:
    """Size and metric of each test, and the standard error of a figure in the middle of those found."""
    rows = []
    for task, shown in SHOWN.items():
        for role, metric, title in shown:
            found = [cell["results"][role] for cell in log.cells.values() if cell["task"] == task]
            if found:
                count, mean = found[0]["rows"], statistics.fmean(one[metric] for one in found)
                variance = 1.0 if metric == "matthews" else mean * (1 - mean)
                name = {"matthews": "Matthews correlation", "exact_match": "exact match"}.get(metric, metric)
                rows.append((title, f"{count:,}", name, f"{100 * (variance / count) ** 0.5:.1f}"))
    return markdown_table(("test", "rows", "metric", "standard error"), rows)


def difference(a: Value | None, b: Value | None) -> str:
    """Of two values, with the root of the sum of their squared spreads; bold where it is more, both rounded."""
    if a is None or b is None:
        return "-"
    found, spread = (round(100 * x, 1) for x in (a.mean - b.mean, (a.spread**2 + b.spread**2) ** 0.5))
    if min(len(a.results), len(b.results)) < 2:
        return f"{found:+.1f}"
    mark = "**" if abs(found) > spread else ""
    return f"{mark}{found:+.1f} ± {spread:.1f}{mark}"


def mixers(log: Log, rows: list[tuple]) -> list[tuple]:
    """Rows of differences, each of a title and of two pairs of a mixer and a start."""
    shown = [(task, role) for task in SEQ2SEQ_TASKS for role, _, _ in SHOWN[task]]
    return [
        (*title, *(difference(log.value("seq2seq", *a, *one), log.value("seq2seq", *b, *one)) for one in shown))
        for title, a, b in rows
    ]


def variants(log: Log, pairs: list[tuple[str, str]]) -> list[tuple]:
    """Rows of differences of two variants of attention."""

    def value(variant: str, task: str) -> Value | None:
        return log.value("bert", variant, "pretrained", task)

    return [(a, b, *(difference(value(a, task), value(b, task)) for task in BERT_TASKS)) for a, b in pairs]


def comparisons(log: Log) -> list[str]:
    """What the tables say to each of the papers' claims: a title and a table of differences each."""
    titles = _titles(SEQ2SEQ_TASKS)
    helped = [((mixer,), (mixer, "pretrained"), (mixer, "raw")) for mixer in MIXERS]
    as_good = [
        ((name, mixer), (mixer, start), ("transformer", start)) for start, name in START.items() for mixer in MIXERS[1:]
    ]
    places = [(variant, other) for other in VARIANTS[:2] for variant in VARIANTS[2:]]
    return [
        "Does pre-training help convolutions as it helps the transformer (Tay et al.)? Pre-trained minus raw:",
        markdown_table(("model", *titles), mixers(log, helped)),
        "Are convolutions at least as good as the transformer (Tay et al.)? The model minus the transformer:",
        markdown_table(("", "model", *titles), mixers(log, as_good)),
        "Do convolutions take the place of positions (Chang et al.)? An attention minus one without:",
        markdown_table(("attention", "minus", *_titles(BERT_TASKS)), variants(log, places)),
    ]


def settings(log: Log) -> str:
    """How the log came about."""
    s, run = log.settings, log.runs[-1]
    hours = sum(line["seconds"] for line in log.cells.values()) / 3600
    seeds, total = ", ".join(map(str, s["seeds"])), len(cells(s["seeds"]))
    lines = [
        f"`python examples/study.py --scale {run['scale']} --data DATA --output study --workers {run['workers']}`; "
        f"{len(log.cells)} of {total} cells{'' if len(log.cells) == total else ' so far'} (tokenizers and pre-trained "
        f"models among them), {hours:.1f} hours of "
        f"{'workers with one core each' if run['threads'] == 1 else 'workers'}, seeds {seeds}, "
        f"{' to '.join(sorted({log.runs[0]['run'], run['run']}))}, {environment.title(run['environment'])}.",
        f"Vocabulary: {s['vocabulary']} unigrams. Encoder-decoders: {json.dumps(s['seq2seq'])}; BERTs: "
        f"{json.dumps(s['bert'])}; sequences of {s['length']}. Pre-training: {json.dumps(s['pretrain'])}. Fine-tuning: "
        f"{json.dumps(s['tasks'])}; of the configuration {json.dumps(s['changes'])}.",
    ]
    return "\n\n".join(lines)


def section(log: Log) -> str:
    parts = [f"## {environment.title(log.runs[-1]['environment'])}", settings(log)]
    parts += ["### Encoder-decoders", seq2seq(log), "### BERTs", bert(log)]
    parts += ["### Losses", LOSSES, *losses(log), "### Tests", TESTS, tests(log), "### Differences", DIFFERENCES]
    return "\n\n".join([*parts, *comparisons(log)])


def page(paths: list[Path]) -> str:
    """DataError for a file that is not a log of study.py."""
    parts = [HEAD.rstrip("\n")]
    for path in paths:
        try:
            parts.append(section(Log(path)))
        except KeyError as error:
            raise DataError(f"{path}: expected a log of study.py, got a line without {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: expected a log of study.py: {error}") from None
    return "\n\n".join(parts) + "\n"
