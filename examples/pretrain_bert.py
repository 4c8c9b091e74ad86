"""Pre-trains a BERT of Chang et al. 2021 by masked language modelling: 15 % of the tokens, of these 80 % replaced by
[MASK], 10 % by others, 10 % left; pairs of sentences that follow each other; the settings of its table 4.

    python examples/pretrain_bert.py --texts books.jsonl.xz --tokenizer tokenizer --variant composite --size small \\
        --output_dir composite --max_steps 10000

All options of transformers' TrainingArguments are taken. The same command goes on where it was stopped. torchrun or
accelerate launch run it in several processes.
"""

from dataclasses import asdict, dataclass, field

from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, TrainingArguments, set_seed

from convkernels.models import CompositeBertConfig, CompositeBertForMaskedLM
from training import architectures
from training.files import TEXTS, documents, read, sentences
from training.running import Trainer, alone, defaults, main, parsed, train

DEFAULTS = defaults(
    learning_rate=1e-4,
    warmup_steps=10_000,
    max_steps=1_000_000,
    adam_epsilon=1e-6,
    weight_decay=0.01,
    per_device_train_batch_size=32,
    save_steps=25_000,
    train_sampling_strategy="group_by_length",
)


@dataclass
class Arguments:
    texts: list[str] = field(metadata={"help": TEXTS})
    tokenizer: str = field(metadata={"help": "folder or Hub name of a tokenizer with [CLS], [SEP] and [MASK]"})
    variant: str = field(default="composite", metadata={"help": "none, absolute, fixed, dynamic, composite, ..."})
    size: str = field(default="small", metadata={"help": "base, small or tiny"})
    config: str | None = field(default=None, metadata={"help": "fields of CompositeBertConfig, as JSON"})
    length: int = field(default=128, metadata={"help": "tokens of a pair; longer ones are cut"})
    rate: float = field(default=0.15, metadata={"help": "part of the tokens to predict"})


def pairs(tokenizer, texts: list[str], length: int) -> Dataset:
    """Rows of tokens, each of two sentences that follow each other in a text."""

    def tokenize(batch):
        return tokenizer(batch["first"], batch["second"], truncation=True, max_length=length)

    lines = read(_pairs, texts, "pairs of sentences")
    return lines.map(tokenize, batched=True, remove_columns=["first", "second"], desc="tokenize")


def _pairs(texts: list[str]):
    for text in documents(texts):
        line = sentences(text)
        for first, second in zip(line, line, strict=False):
            yield {"first": first, "second": second}


@alone
def pretrain(arguments: Arguments, training: TrainingArguments) -> Trainer:
    if arguments.length < 5:
        raise ValueError(f"--length: expected 5 or more, got {arguments.length}")
    if not 0 < arguments.rate < 1:
        raise ValueError(f"--rate: expected a part between 0 and 1, got {arguments.rate}")
    set_seed(training.seed)
    tokenizer = architectures.tokenizer(arguments.tokenizer, "bert")
    changes = dict(max_position_embeddings=arguments.length)
    changes |= architectures.fields(arguments.config, CompositeBertConfig)
    config = architectures.bert(arguments.variant, arguments.size, tokenizer, **changes)
    architectures.fitting("--length", arguments.length, config)
    model = CompositeBertForMaskedLM(config)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=arguments.rate)
    with training.main_process_first(desc="reading texts"):
        rows = pairs(tokenizer, arguments.texts, arguments.length)
    return train(Trainer(model, training, collator, rows, processing_class=tokenizer), asdict(arguments))


def run() -> None:
    pretrain(*parsed((Arguments, TrainingArguments), DEFAULTS, __doc__))


if __name__ == "__main__":
    main(run)
