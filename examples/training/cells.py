"""What the study consists of: tokenizers, pre-trained models, and fine-tuned ones, each a cell with a name."""

from collections.abc import Sequence
from dataclasses import dataclass, field

MIXERS = ("transformer", "lightweight", "dilated", "dynamic")
VARIANTS = ("none", "absolute", "fixed", "dynamic", "composite", "depthwise", "composite-depthwise", "conv-qk")
START = {"raw": "no pre-training", "pretrained": "pre-trained"}
# Of what fine-tuning measures, what is shown.
METRICS = {"accuracy", "matthews", "exact_match"}
CORPUS = ("novels_1.jsonl", "novels_2.jsonl", "wikinews.jsonl")
# Of each task: its tables by their role, and which of the results is shown.
FILES = {
    "trec": {"train": "trec_train.tsv", "test": "trec_test.tsv"},
    "sst2": {"train": "sst2_train.tsv", "test": "sst2_dev.tsv"},
    "cogs": {"train": "cogs_train.tsv", "test": "cogs_test.tsv", "generalization": "cogs_gen.tsv"},
    "cola": {"train": "cola_train.tsv", "test": "cola_dev.tsv"},
    "rte": {"train": "rte_train.tsv", "test": "rte_dev.tsv"},
}
SEQ2SEQ_TASKS, BERT_TASKS = ("trec", "sst2", "cogs"), ("cola", "sst2", "rte")


@dataclass(frozen=True)
class Scale:
    """Sizes and settings. seq2seq, bert: fields of the configurations, changes: of those of a task; pretrain, tasks,
    common: fields of TrainingArguments."""

    vocabulary: int
    seq2seq: dict
    bert: dict
    length: int
    pretrain: dict
    tasks: dict
    # In the pilot four epochs over COGS brought the transformer to a loss of 0.037 without dropout, 0.066 with it.
    changes: dict = field(default_factory=lambda: {"cogs": {"dropout": 0.0}})
    common: dict = field(default_factory=dict)
    size: str = "small"
    seeds: tuple[int, ...] = (1, 2, 3)


SCALES = {
    "cpu": Scale(
        vocabulary=2048,
        seq2seq=dict(d_model=128, d_ff=512, num_heads=4, encoder_layers=2, decoder_layers=2),
        bert=dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3),
        length=128,
        pretrain={
            "seq2seq": dict(max_steps=3000, per_device_train_batch_size=32, learning_rate=3e-2, warmup_steps=300),
            "bert": dict(max_steps=5000, per_device_train_batch_size=32, learning_rate=1e-3, warmup_steps=500),
        },
        tasks={
            "seq2seq": {
                "trec": dict(num_train_epochs=10, learning_rate=1e-3),
                "sst2": dict(num_train_epochs=1, learning_rate=1e-3),
                "cogs": dict(num_train_epochs=8, learning_rate=2e-3),
            },
            "bert": {
                "cola": dict(num_train_epochs=10, learning_rate=3e-4),
                "sst2": dict(num_train_epochs=1, learning_rate=3e-4),
                "rte": dict(num_train_epochs=5, learning_rate=3e-4),
            },
        },
        common=dict(use_cpu=True, dataloader_pin_memory=False),
    ),
    "gpu": Scale(
        vocabulary=8000,
        seq2seq=dict(d_model=256, d_ff=1024, num_heads=8, encoder_layers=4, decoder_layers=4),
        bert=dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=6),
        length=256,
        pretrain={
            "seq2seq": dict(max_steps=3000, per_device_train_batch_size=128, learning_rate=2e-2, warmup_steps=300),
            "bert": dict(max_steps=4000, per_device_train_batch_size=256, learning_rate=1e-3, warmup_steps=400),
        },
        tasks={
            "seq2seq": {
                "trec": dict(num_train_epochs=10, learning_rate=1e-3),
                "sst2": dict(num_train_epochs=1, learning_rate=1e-3, per_device_train_batch_size=128),
                "cogs": dict(num_train_epochs=8, learning_rate=2e-3, per_device_train_batch_size=128),
            },
            "bert": {
                "cola": dict(num_train_epochs=10, learning_rate=3e-4, per_device_train_batch_size=64),
                "sst2": dict(num_train_epochs=1, learning_rate=3e-4, per_device_train_batch_size=128),
                "rte": dict(num_train_epochs=5, learning_rate=3e-4),
            },
        },
        common=dict(bf16=True, dataloader_num_workers=1),
    ),
}


@dataclass(frozen=True)
class Cell:
    """family: "seq2seq" or "bert"; model: a mixer or a variant, None for a tokenizer; task: None for that and for
    pre-training."""

    family: str
    model: str | None = None
    task: str | None = None
    start: str = "pretrained"
    seed: int = 1

    @property
    def name(self) -> str:
        if self.model is None:
            return f"{self.family}-tokenizer"
        if self.task is None:
            return f"{self.family}-{self.model}-pretraining"
        return f"{self.family}-{self.model}-{self.start}-{self.task}-{self.seed}"

    @property
    def needs(self) -> tuple["Cell", ...]:
        """The cells whose results this one reads."""
        if self.model is None:
            return ()
        tokenizer = Cell(self.family)
        return (tokenizer, Cell(self.family, self.model)) if self.task and self.start == "pretrained" else (tokenizer,)


def cells(seeds: Sequence[int]) -> list[Cell]:
    """All of them, in the order in which they are run: seed by seed, the longest last."""
    found = [Cell("bert"), Cell("seq2seq")]
    found += [Cell("bert", variant) for variant in VARIANTS]
    found += [Cell("seq2seq", mixer) for mixer in MIXERS]
    for seed in seeds:
        for task in ("trec", "sst2", "cola", "rte", "cogs"):
            if task in BERT_TASKS:
                found += [Cell("bert", variant, task, seed=seed) for variant in VARIANTS]
            if task in SEQ2SEQ_TASKS:
                found += [Cell("seq2seq", mixer, task, start, seed) for mixer in MIXERS for start in START]
    return found
