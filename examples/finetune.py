"""Fine-tunes a model of this package: classification of texts or pairs of texts, or text to text.

    python examples/finetune.py --task sst2 --train sst2_train.tsv --test dev=sst2_dev.tsv \\
        --model lightweight --tokenizer tokenizer --output_dir sst2
    python examples/finetune.py --text question --pair passage --label answer --train train.tsv --test dev=dev.tsv ...
    python examples/finetune.py --source english --target french --train train.tsv --test dev=dev.tsv ...

--model is a folder or Hub name of what pretrain_seq2seq.py or pretrain_bert.py has made, or of what this script has
made on another task (intermediate-task initialisation). Without it --mixer or --variant name an architecture, whose
weights are drawn. Results are in results.json in the output folder. All options of transformers'
Seq2SeqTrainingArguments are taken. The same command goes on where it was stopped. torchrun or accelerate launch run it
in several processes.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

import convkernels.models  # noqa: F401  the Auto classes know its models from here on
from training import architectures
from training.files import DataError, tables
from training.running import defaults, main, parsed, train

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
    tokenizer: str = field(metadata={"help": "folder or Hub name"})
    test: list[str] = field(default_factory=list, metadata={"help": "tables to measure on, each as name=table"})
    task: str | None = field(default=None, metadata={"help": f"columns and metric of one of: {', '.join(TASKS)}"})
    text: str | None = field(default=None, metadata={"help": "column of the text to classify"})
    pair: str | None = field(default=None, metadata={"help": "column of a second text"})
    label: str | None = field(default=None, metadata={"help": "column of the class"})
    source: str | None = field(default=None, metadata={"help": "text to text: column of the source"})
    target: str | None = field(default=None, metadata={"help": "text to text: column of the target"})
    category: str | None = field(default=None, metadata={"help": "text to text: column by which results are split up"})
    metric: str = field(default="accuracy", metadata={"help": f"of classes: {', '.join(METRICS)}"})
    model: str | None = field(default=None, metadata={"help": "folder or Hub name of a trained model"})
    mixer: str | None = field(default=None, metadata={"help": "without --model: transformer, lightweight, ..."})
    variant: str | None = field(default=None, metadata={"help": "without --model: none, absolute, composite, ..."})
    size: str = field(default="small", metadata={"help": "without --model: base, small or tiny"})
    style: str = field(default="paper", metadata={"help": "with --mixer: paper, fairseq or released"})
    config: str | None = field(default=None, metadata={"help": "fields of the configuration to set otherwise, as JSON"})
    length: int = field(default=128, metadata={"help": "tokens of a text or pair; longer ones are cut"})
    target_length: int = field(default=256, metadata={"help": "tokens of a target; longer ones count as not matched"})

    def __post_init__(self):
        if self.task is not None:
            if self.task not in TASKS:
                raise ValueError(f"--task: expected one of {', '.join(TASKS)}, got {self.task!r}")
            for name, value in TASKS[self.task].items():
                setattr(self, name, value)
        ways = [bool(self.text and self.label), bool(self.source and self.target)]
        if sum(ways) != 1:
            raise ValueError("expected --task, or --text and --label, or --source and --target")
        if self.metric not in METRICS:
            raise ValueError(f"--metric: expected one of {', '.join(METRICS)}, got {self.metric!r}")
        if sum(value is not None for value in (self.model, self.mixer, self.variant)) != 1:
            raise ValueError("expected one of --model, --mixer and --variant")
        if self.target and self.variant:
            raise ValueError("--variant: expected a --mixer, because BERT does not write texts")
        wrong = [text for text in self.test if "=" not in text]
        if wrong:
            raise ValueError(f"--test: expected name=table, got {wrong[0]!r}")

    @property
    def columns(self) -> tuple[str, ...]:
        named = (self.text, self.pair, self.label) if self.text else (self.source, self.target, self.category)
        return tuple(filter(None, named))


def configuration(arguments: Arguments, tokenizer, **changes):
    """Of the model to load, or of the architecture to make."""
    changes |= architectures.fields(arguments.config)
    if arguments.model is not None:
        return AutoConfig.from_pretrained(arguments.model, **changes)
    if arguments.variant is not None:
        changes = dict(max_position_embeddings=arguments.length) | changes
        return architectures.bert(arguments.variant, arguments.size, tokenizer, **changes)
    return architectures.seq2seq(arguments.mixer, arguments.size, arguments.style, tokenizer, **changes)


def made(kind, arguments: Arguments, config):
    """The model, with loaded weights where there are some; what belongs to another head is drawn anew."""
    if arguments.model is None:
        return kind.from_config(config)
    return kind.from_pretrained(arguments.model, config=config, ignore_mismatched_sizes=True)


def highest(logits, labels):
    """The class, or the token at each position, with the highest score: all that is kept of the scores."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


class Classification:
    """Texts, or pairs of texts, and their classes."""

    def __init__(self, arguments: Arguments, tokenizer, data) -> None:
        self.arguments, self.tokenizer = arguments, tokenizer
        self.labels = sorted(set(data["train"][arguments.label]))
        if len(self.labels) < 2:
            raise DataError(f"{arguments.train}: expected 2 classes or more, got {', '.join(self.labels)}")
        names = dict(enumerate(self.labels))
        ids = {name: i for i, name in names.items()}
        config = configuration(arguments, tokenizer, num_labels=len(self.labels), id2label=names, label2id=ids)
        self.model = made(AutoModelForSequenceClassification, arguments, config)
        self.collator = DataCollatorWithPadding(tokenizer)

    def encode(self, split: str, rows: Dataset) -> Dataset:
        a = self.arguments
        unknown = set(rows[a.label]) - set(self.labels)
        if unknown:
            raise DataError(
                f"{split}: class {min(unknown)!r} does not occur in {a.train}, which has {', '.join(self.labels)}"
            )

        texts = [rows[column][:] for column in (a.text, a.pair) if column]
        encoded = self.tokenizer(*texts, truncation=True, max_length=a.length)
        ids = self.model.config.label2id
        return Dataset.from_dict({**encoded, "labels": [ids[label] for label in rows[a.label]]})

    def measure(self, found: np.ndarray, labels: np.ndarray, rows: Dataset) -> dict:
        return {self.arguments.metric: float(METRICS[self.arguments.metric](labels, found))}


class TextToText:
    """Sources and targets. A target counts as matched if greedy decoding gives it exactly, which is so if and only if,
    of each of its tokens, the model gives the highest score behind those before: one pass shows it."""

    def __init__(self, arguments: Arguments, tokenizer, data) -> None:
        self.arguments, self.tokenizer = arguments, tokenizer
        self.model = made(AutoModelForSeq2SeqLM, arguments, configuration(arguments, tokenizer))
        self.collator = DataCollatorForSeq2Seq(tokenizer, self.model)

    def encode(self, split: str, rows: Dataset) -> Dataset:
        a = self.arguments
        encoded = self.tokenizer(rows[a.source][:], truncation=True, max_length=a.length)
        targets = self.tokenizer(rows[a.target][:], truncation=True, max_length=a.target_length)
        return Dataset.from_dict({**encoded, "labels": targets.input_ids})

    def measure(self, found: np.ndarray, labels: np.ndarray, rows: Dataset) -> dict:
        whole = (labels == self.tokenizer.eos_token_id).any(1)  # others have been cut
        matched = ((found == labels) | (labels == -100)).all(1) & whole
        result = {"exact_match": float(matched.mean())}
        if self.arguments.category:
            groups = defaultdict(list)
            for category, one in zip(rows[self.arguments.category], matched, strict=True):
                groups[category].append(one)
            result["by_category"] = {name: float(np.mean(group)) for name, group in sorted(groups.items())}
        return result


def finetune(arguments: Arguments, training: Seq2SeqTrainingArguments) -> dict:
    """Train, measure on each test, write results.json, and return what it holds."""
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    files = {"train": arguments.train, **dict(text.split("=", 1) for text in arguments.test)}
    with training.main_process_first(desc="reading tables"):
        data = tables(files, arguments.columns)
        task = (Classification if arguments.text else TextToText)(arguments, tokenizer, data)
        encoded = {split: task.encode(split, rows) for split, rows in data.items()}
    tests = [split for split in encoded if split != "train"]
    trainer = Seq2SeqTrainer(
        task.model,
        training,
        task.collator,
        encoded["train"],
        {split: encoded[split] for split in tests} or None,
        processing_class=tokenizer,
        preprocess_logits_for_metrics=highest,
    )
    train(trainer)
    results = {}
    for split in tests:
        found = trainer.predict(encoded[split], metric_key_prefix=split)
        results[split] = {
            "rows": len(encoded[split]),
            "loss": found.metrics[f"{split}_loss"],
            **task.measure(found.predictions, found.label_ids, data[split]),
        }
    if trainer.is_world_process_zero():
        (Path(training.output_dir) / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        for split, values in results.items():
            print(split, *(f"{name} {value:.4g}" for name, value in values.items() if name != "by_category"))
    return results


def run() -> None:
    finetune(*parsed((Arguments, Seq2SeqTrainingArguments), DEFAULTS, __doc__))


if __name__ == "__main__":
    main(run)
