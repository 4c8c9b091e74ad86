"""Fine-tunes a model of this package: classification of texts or pairs of texts, or text to text.

    python examples/finetune.py --task sst2 --train sst2_train.tsv --test dev=sst2_dev.tsv \\
        --model lightweight --output_dir sst2
    python examples/finetune.py --text question --pair passage --label answer --train train.tsv --test dev=dev.tsv ...
    python examples/finetune.py --source english --target french --train train.tsv --test dev=dev.tsv ...

--model is a folder or Hub name of what pretrain_seq2seq.py or pretrain_bert.py has made, or of what this script has
made on another task (intermediate-task initialisation). Without it --mixer or --variant name an architecture, whose
weights are drawn, and --tokenizer its tokenizer. Results are in results.json in the output folder. All options of
transformers' TrainingArguments are taken. The same command goes on where it was stopped. torchrun or accelerate launch
run it in several processes.
"""

import json
import os
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import transformers
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

from convkernels.models import CompositeBertConfig, ConvSeq2SeqConfig
from training import architectures
from training.files import DataError, replace, tables
from training.running import Trainer, alone, defaults, main, parsed, train

# Columns of the files that people have of these tasks, and what is measured.
TASKS = {
    "trec": dict(text="text", label="coarse"),
    "sst2": dict(text="sentence", label="label"),
    "cola": dict(text="sentence", label="label", metric="matthews"),
    "rte": dict(text="sentence1", pair="sentence2", label="label"),
    "qnli": dict(text="question", pair="sentence", label="label"),
    "cogs": dict(source="source", target="target", category="type"),
}
METRICS = {
    "accuracy": accuracy_score,
    "f1": lambda labels, found: f1_score(labels, found, average="macro"),
    "matthews": matthews_corrcoef,
}


LENGTH = 128
# What a model for another task may lack.
HEAD = ("classifier.", "dense.", "bert.pooler.")
DEFAULTS = defaults(
    learning_rate=3e-4,
    warmup_steps=0.1,
    num_train_epochs=10,
    per_device_train_batch_size=32,
    per_device_eval_batch_size=64,
    train_sampling_strategy="group_by_length",
    save_strategy="epoch",
)


@dataclass
class Arguments:
    train: str = field(
        metadata={"help": "a table, .tsv or .jsonl, also .gz or .xz, or name:configuration:split of the Hub"}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "folder or Hub name; without it that in the folder of --model"}
    )
    test: list[str] = field(default_factory=list, metadata={"help": "tables to measure on, each as name=table"})
    task: str | None = field(default=None, metadata={"help": f"columns and metric of one of: {', '.join(TASKS)}"})
    text: str | None = field(default=None, metadata={"help": "column of the text to classify"})
    pair: str | None = field(default=None, metadata={"help": "column of a second text"})
    label: str | None = field(default=None, metadata={"help": "column of the class"})
    source: str | None = field(default=None, metadata={"help": "text to text: column of the source"})
    target: str | None = field(default=None, metadata={"help": "text to text: column of the target"})
    category: str | None = field(default=None, metadata={"help": "text to text: column by which results are split up"})
    metric: str | None = field(
        default=None, metadata={"help": f"of classes: {', '.join(METRICS)}; without it that of the task, or accuracy"}
    )
    model: str | None = field(default=None, metadata={"help": "folder or Hub name of a trained model"})
    mixer: str | None = field(default=None, metadata={"help": "without --model: transformer, lightweight, ..."})
    variant: str | None = field(default=None, metadata={"help": "without --model: none, absolute, composite, ..."})
    size: str | None = field(default=None, metadata={"help": "without --model: base, small (the default) or tiny"})
    style: str | None = field(default=None, metadata={"help": "with --mixer: paper (the default), fairseq or released"})
    redraw: list[str] | None = field(
        default=None, metadata={"help": "with --model: beginnings of names of weights to draw anew, as model.decoder"}
    )
    config: str | None = field(default=None, metadata={"help": "fields of the configuration to set otherwise, as JSON"})
    length: int | None = field(
        default=None, metadata={"help": f"tokens of a text or pair ({LENGTH}, if the model can); longer ones are cut"}
    )
    target_length: int | None = field(
        default=None, metadata={"help": f"text to text: tokens of a target ({2 * LENGTH}); longer ones are not matched"}
    )

    def __post_init__(self):
        columns = ("text", "pair", "label", "source", "target", "category")
        if self.task is not None:
            if self.task not in TASKS:
                raise ValueError(f"--task: expected one of {', '.join(TASKS)}, got {self.task!r}")
            given = [name for name in columns if getattr(self, name) is not None]
            if given:
                raise ValueError(f"--{given[0]}: expected it without --task, which names the columns")
            for name, value in TASKS[self.task].items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
        classes = [name for name in ("text", "label") if getattr(self, name)]
        texts = [name for name in ("source", "target") if getattr(self, name)]
        if (len(classes), len(texts)) not in ((2, 0), (0, 2)):
            got = ", ".join(f"--{name}" for name in classes + texts) or "none of them"
            raise ValueError(f"expected --task, or --text and --label, or --source and --target, got {got}")
        if sum(value is not None for value in (self.model, self.mixer, self.variant)) != 1:
            raise ValueError("expected one of --model, --mixer and --variant")
        self._without_effect()
        self.metric = self.metric or "accuracy"
        if self.metric not in METRICS:
            raise ValueError(f"--metric: expected one of {', '.join(METRICS)}, got {self.metric!r}")
        if self.model is None:
            if self.tokenizer is None:
                raise ValueError("--tokenizer: expected it, because there is no --model that has one")
            self.size, self.style = self.size or "small", self.style or "paper"
        if self.target and self.variant:
            raise ValueError("--variant: expected a --mixer, because BERT does not write texts")
        for name in ("length", "target_length"):
            if getattr(self, name) is not None and getattr(self, name) < 3:
                raise ValueError(f"--{name}: expected 3 or more, got {getattr(self, name)}")
        names = [text.partition("=")[0] for text in self.test]
        for name, text in zip(names, self.test, strict=True):
            if "=" not in text or not name or name == "train" or names.count(name) > 1:
                raise ValueError(f"--test: expected name=table, the names different and none 'train', got {text!r}")

    def _without_effect(self) -> None:
        """ValueError for an option that would have none."""
        classes, drawn = "classes, with --text and --label", "--mixer or --variant, which draw weights"
        for name, used, where in (
            ("pair", self.text, classes),
            ("metric", self.text, classes),
            ("category", self.source, "text to text, with --source and --target"),
            ("target_length", self.source, "text to text, with --source and --target"),
            ("size", self.model is None, drawn),
            ("style", self.mixer, "--mixer"),
            ("redraw", self.model, "--model"),
        ):
            if getattr(self, name) is not None and not used:
                raise ValueError(f"--{name}: expected it only for {where}, got {getattr(self, name)}")

    @property
    def columns(self) -> tuple[str, ...]:
        named = (self.text, self.pair, self.label) if self.text else (self.source, self.target, self.category)
        return tuple(filter(None, named))


def family(arguments: Arguments) -> type:
    """The configuration's class of the model to load or to make. ValueError if it is not one of this package."""
    if arguments.model is None:
        return CompositeBertConfig if arguments.variant else ConvSeq2SeqConfig
    found = type(architectures.loaded("--model", arguments.model, AutoConfig.from_pretrained))
    if found not in (CompositeBertConfig, ConvSeq2SeqConfig) or (arguments.target and found is CompositeBertConfig):
        wanted = ConvSeq2SeqConfig.model_type
        wanted += "" if arguments.target else f" or {CompositeBertConfig.model_type}"
        raise ValueError(f"--model {arguments.model}: expected a model of type {wanted}, got {found.model_type}")
    return found


def tokenizer_of(arguments: Arguments, family: str):
    """That which is named, or the model's. ValueError if their tokens differ."""
    if arguments.tokenizer is None:
        return architectures.tokenizer(arguments.model, family, "--model")
    found = architectures.tokenizer(arguments.tokenizer, family)
    if arguments.model is not None:
        architectures.check_tokens(found, arguments.tokenizer, arguments.model)
    return found


def configuration(arguments: Arguments, tokenizer, **changes):
    """Of the model to load, or of the architecture to make."""
    given = architectures.fields(arguments.config, family(arguments))
    for name in given:
        if name in changes:
            raise ValueError(f"--config: expected no {name}, because --train has the classes")
    changes |= given
    if arguments.model is not None:
        found = AutoConfig.from_pretrained(arguments.model, **changes)
    elif arguments.variant is not None:
        changes = dict(max_position_embeddings=arguments.length or LENGTH) | changes
        found = architectures.bert(arguments.variant, arguments.size, tokenizer, **changes)
    else:
        found = architectures.seq2seq(arguments.mixer, arguments.size, arguments.style, tokenizer, **changes)
    arguments.length = architectures.fitting("--length", arguments.length, found, LENGTH)
    arguments.target_length = architectures.fitting("--target_length", arguments.target_length, found, 2 * LENGTH)
    return found


def made(kind, arguments: Arguments, config):
    """The model, with loaded weights where there are some, and a new classifier unless its classes are the same.
    ValueError if anything else does not fit."""
    if arguments.model is None:
        return kind.from_config(config)
    before = AutoConfig.from_pretrained(arguments.model)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would report what is checked here, and warn of a new head
    try:
        model, report = architectures.loaded(
            "--model", arguments.model, kind.from_pretrained, config=config, ignore_mismatched_sizes=True,
            output_loading_info=True,
        )  # fmt: skip
    finally:
        transformers.logging.set_verbosity(level)
    wrong = [name for name, *_ in report["mismatched_keys"] if not name.startswith("classifier.")]
    wrong += [name for name in report["missing_keys"] if not name.startswith(HEAD)]
    if wrong:
        raise ValueError(
            f"--model {arguments.model}: expected weights for all of the model but its head, got none that fit "
            f"{wrong[0]}"
        )
    redrawn = list(arguments.redraw or [])
    loaded = "classifier.weight" not in report["missing_keys"]
    if arguments.label and loaded and before.id2label != config.id2label:
        redrawn.append("classifier.")
    if redrawn:
        redraw(model, kind.from_config(config), redrawn)
    return model


def redraw(model, drawn, beginnings: list[str]) -> None:
    """Take the weights whose names begin so from another model. ValueError for a beginning that none has."""
    weights = drawn.state_dict()
    for beginning in beginnings:
        found = {name: weight for name, weight in weights.items() if beginning and name.startswith(beginning)}
        if not found:
            parts = sorted({".".join(name.split(".")[:2]) for name in weights})
            raise ValueError(f"--redraw: expected the beginning of a name, as of {', '.join(parts)}, got {beginning!r}")
        model.load_state_dict(found, strict=False)


def highest(logits, labels):
    """The class, or the token at each position, with the highest score: all that is kept of the scores."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


class Classification:
    """Texts, or pairs of texts, and their classes."""

    def __init__(self, arguments: Arguments, tokenizer, data) -> None:
        self.arguments, self.tokenizer = arguments, tokenizer
        self.labels = sorted(set(data["train"][arguments.label]))
        for label in self.labels:
            if label != label.strip():
                raise DataError(f"{arguments.train}: expected classes without spaces around them, got {label!r}")
        if len(self.labels) < 2:
            raise DataError(f"{arguments.train}: expected 2 classes or more, got {', '.join(self.labels)}")
        names = dict(enumerate(self.labels))
        ids = {name: i for i, name in names.items()}
        config = configuration(arguments, tokenizer, num_labels=len(self.labels), id2label=names, label2id=ids)
        self.model = made(AutoModelForSequenceClassification, arguments, config)
        self.collator = DataCollatorWithPadding(tokenizer)

    def encode(self, split: str, rows: Dataset) -> Dataset:
        a = self.arguments
        ids, labels = self.model.config.label2id, rows[a.label][:]
        for number, label in enumerate(labels, 1):
            if label not in ids:
                source = dict(text.split("=", 1) for text in a.test)[split]
                raise DataError(
                    f"{source}, row {number}: expected a class of {a.train}, which are {', '.join(self.labels)}, got "
                    f"{label!r}"
                )
        texts = [rows[column][:] for column in (a.text, a.pair) if column]
        encoded = self.tokenizer(*texts, truncation=True, max_length=a.length)
        return Dataset.from_dict({**encoded, "labels": [ids[label] for label in labels]})

    def measure(self, found: np.ndarray, labels: np.ndarray, rows: Dataset) -> dict:
        return {self.arguments.metric: float(METRICS[self.arguments.metric](labels, found))}


class TextToText:
    """Sources and targets. A target counts as matched if greedy decoding gives it exactly, which is so if and only if,
    of each of its tokens, the model gives the highest score behind those before: one pass shows it. Text that the
    tokenizer does not know does not come out."""

    labels = None

    def __init__(self, arguments: Arguments, tokenizer, data) -> None:
        self.arguments, self.tokenizer = arguments, tokenizer
        self.model = made(AutoModelForSeq2SeqLM, arguments, configuration(arguments, tokenizer))
        self.collator = DataCollatorForSeq2Seq(tokenizer, self.model)

    def encode(self, split: str, rows: Dataset) -> Dataset:
        a = self.arguments
        encoded = self.tokenizer(rows[a.source][:], truncation=True, max_length=a.length)
        targets = [target[: a.target_length] for target in self.tokenizer(rows[a.target][:]).input_ids]
        unknown = sum(self.tokenizer.unk_token_id in target for target in targets)
        if unknown and int(os.environ.get("RANK", 0)) == 0:
            print(
                f"{split}: {unknown} of {len(targets)} targets have text that the tokenizer does not know, which "
                "no model can write",
                file=sys.stderr,
            )
        # The Trainer groups by this column; by sources alone the targets of COGS are padded by 50 %, not by 8 %.
        lengths = [len(source) + len(target) for source, target in zip(encoded.input_ids, targets, strict=True)]
        return Dataset.from_dict({**encoded, "labels": targets, "length": lengths})

    def measure(self, found: np.ndarray, labels: np.ndarray, rows: Dataset) -> dict:
        ends = labels == self.tokenizer.eos_token_id  # decoding stops at the first; a target that was cut lacks its own
        whole = ends.any(1) & (ends.argmax(1) == (labels != -100).sum(1) - 1)
        whole &= ~(labels == self.tokenizer.unk_token_id).any(1)
        matched = ((found == labels) | (labels == -100)).all(1) & whole
        result = {"exact_match": float(matched.mean())}
        if self.arguments.category:
            groups = defaultdict(list)
            for category, one in zip(rows[self.arguments.category], matched, strict=True):
                groups[category].append(one)
            result["by_category"] = {name: float(np.mean(group)) for name, group in sorted(groups.items())}
        return result


@alone
def finetune(arguments: Arguments, training: TrainingArguments) -> dict:
    """Train, measure on each test, write results.json, and return what it holds."""
    set_seed(training.seed)
    kind = "bert" if family(arguments) is CompositeBertConfig else "seq2seq"
    tokenizer = tokenizer_of(arguments, kind)
    tests = dict(text.split("=", 1) for text in arguments.test)
    with training.main_process_first(desc="reading tables"):
        data = tables({"train": arguments.train, **tests}, arguments.columns)
        task = (Classification if arguments.text else TextToText)(arguments, tokenizer, data)
        option = "model" if arguments.tokenizer is None else "tokenizer"
        architectures.check_size(task.model.config, tokenizer, f"--{option} {getattr(arguments, option)}")
        encoded = {split: task.encode(split, rows) for split, rows in data.items()}
    losses = [f"{name}_loss" for name in tests]
    if training.metric_for_best_model in ("loss", "eval_loss") and tests:
        training.metric_for_best_model = losses[0]
    if training.metric_for_best_model and not losses:
        raise ValueError("--load_best_model_at_end and --metric_for_best_model: expected a --test to choose it by")
    if training.metric_for_best_model not in (None, *losses):
        raise ValueError(
            f"--metric_for_best_model: expected one of {', '.join(losses)}, got {training.metric_for_best_model}"
        )
    trainer = Trainer(
        task.model,
        training,
        task.collator,
        encoded["train"],
        {split: encoded[split] for split in tests} or None,
        processing_class=tokenizer,
        preprocess_logits_for_metrics=highest,
    )
    options = asdict(arguments)
    decisive = {name: options[name] for name in options if name not in ("test", "metric", "category")}
    chosen_by = arguments.test[:1] if training.load_best_model_at_end else []
    train(trainer, decisive | {"train classes": task.labels, "test to choose by": chosen_by})
    results = {}
    for split in tests:
        found = trainer.predict_in_order(encoded[split], split)
        results[split] = {
            "rows": len(encoded[split]),
            "loss": found.metrics[f"{split}_loss"],
            **task.measure(found.predictions, found.label_ids, data[split]),
        }
    if results and trainer.is_world_process_zero():
        replace(Path(training.output_dir) / "results.json", json.dumps(results, indent=1) + "\n")
        for split, values in results.items():
            print(split, *(f"{name} {value:.4g}" for name, value in values.items() if name != "by_category"))
    return results


def run() -> None:
    finetune(*parsed((Arguments, TrainingArguments), DEFAULTS, __doc__))


if __name__ == "__main__":
    main(run)
