"""Pre-trains an encoder-decoder of Tay et al. 2021 by span denoising (Raffel et al. 2020): 15 % of the tokens, in
spans of 3 on average. Adafactor takes steps relative to the size of each parameter, of a learning rate that falls with
the inverse square root: at step t, with w steps of warm-up, learning_rate * min(t / w, sqrt(w / t)).

    python examples/pretrain_seq2seq.py --texts books.jsonl.xz --tokenizer tokenizer --mixer lightweight --size small \\
        --output_dir lightweight --max_steps 10000

All options of transformers' TrainingArguments are taken. The same command goes on where it was stopped.
torchrun or accelerate launch run it in several processes.
"""

from dataclasses import asdict, dataclass, field

from datasets import Dataset
from transformers import Adafactor, TrainerCallback, TrainingArguments, set_seed

from convkernels.models import ConvSeq2SeqConfig, ConvSeq2SeqForConditionalGeneration
from training import architectures
from training.files import TEXTS, DataError, documents, paragraphs, read
from training.running import Trainer, alone, defaults, main, parsed, refuse, train
from training.spans import SpanDenoising, block_length, counts

DEFAULTS = defaults(
    optim="adafactor",
    lr_scheduler_type="inverse_sqrt",
    learning_rate=1e-2,
    warmup_steps=1000,
    max_steps=100_000,
    per_device_train_batch_size=16,
    save_steps=1000,
)


@dataclass
class Arguments:
    texts: list[str] = field(metadata={"help": TEXTS})
    tokenizer: str = field(metadata={"help": "folder or Hub name of a tokenizer with sentinels <extra_id_0> ..."})
    mixer: str = field(default="lightweight", metadata={"help": "transformer, lightweight, dilated or dynamic"})
    size: str = field(default="small", metadata={"help": "base, small or tiny"})
    style: str = field(default="paper", metadata={"help": "paper, fairseq or released"})
    config: str | None = field(default=None, metadata={"help": "fields of ConvSeq2SeqConfig, as JSON"})
    length: int = field(default=512, metadata={"help": "tokens of a source"})
    rate: float = field(default=0.15, metadata={"help": "part of the tokens that is taken out"})
    span: float = field(default=3.0, metadata={"help": "mean length of what is taken out"})


class CountEpochs(TrainerCallback):
    """Tells a collator the epoch, so that each takes something else out of the same text."""

    def __init__(self, collator: SpanDenoising) -> None:
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.collator.epoch = int(state.epoch or 0)


def adafactor(training: TrainingArguments) -> tuple[type, dict] | None:
    """T5's, where the training arguments name Adafactor: theirs takes absolute steps, of which 0.01 is far too long."""
    if training.optim != "adafactor":
        return None
    return Adafactor, dict(lr=training.learning_rate, scale_parameter=True, relative_step=False)


def sentinels(tokenizer) -> list[int]:
    """Ids of the sentinels, in the order of use. ValueError if the tokenizer has none."""
    vocabulary, found = tokenizer.get_vocab(), []
    while (token := f"<extra_id_{len(found)}>") in vocabulary:
        found.append(vocabulary[token])
    if not found:
        raise ValueError("--tokenizer: expected one with sentinels <extra_id_0>, <extra_id_1>, ..., got one without")
    return found


def blocks(tokenizer, texts: list[str], length: int) -> Dataset:
    """Rows of ``length`` tokens, without special tokens: the texts one behind the other, cut."""

    def tokenize(batch):
        return {"input_ids": tokenizer(batch["text"], add_special_tokens=False).input_ids}

    def cut(batch):
        tokens = [token for row in batch["input_ids"] for token in row]
        return {"input_ids": [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]}

    lines = read(_lines, texts, "paragraphs")
    tokens = lines.map(tokenize, batched=True, remove_columns=["text"], desc="tokenize")
    rows = tokens.map(cut, batched=True, batch_size=10_000, desc="cut into blocks")
    if not len(rows):
        raise DataError(f"{', '.join(texts)}: expected {length} tokens or more, got less")
    return rows


def _lines(texts: list[str]):
    for text in documents(texts):
        for line in paragraphs(text):
            yield {"text": line}


@alone
def pretrain(arguments: Arguments, training: TrainingArguments) -> Trainer:
    refuse(training, {
        "dataloader_persistent_workers": (training.dataloader_persistent_workers, "workers that hear of the epoch"),
        "label_smoothing_factor": (training.label_smoothing_factor, "0, because the model's own loss is trained"),
        "optim_args": (training.optim == "adafactor" and training.optim_args, "another --optim than adafactor"),
    })  # fmt: skip
    set_seed(training.seed)
    tokenizer = architectures.tokenizer(arguments.tokenizer, "seq2seq")
    changes = architectures.fields(arguments.config, ConvSeq2SeqConfig)
    config = architectures.seq2seq(arguments.mixer, arguments.size, arguments.style, tokenizer, **changes)
    architectures.fitting("--length", arguments.length, config)
    tokens = block_length(arguments.length, arguments.rate, arguments.span)
    found, needed = sentinels(tokenizer), counts(tokens, arguments.rate, arguments.span)[1]
    if len(found) < needed:
        raise ValueError(f"--tokenizer: expected {needed} sentinels for --length {arguments.length}, got {len(found)}")
    collator = SpanDenoising(
        found, tokenizer.eos_token_id, tokenizer.pad_token_id, arguments.rate, arguments.span,
        training.seed,
    )  # fmt: skip
    model = ConvSeq2SeqForConditionalGeneration(config)
    with training.main_process_first(desc="reading texts"):
        rows = blocks(tokenizer, arguments.texts, tokens)
    trainer = Trainer(
        model, training, collator, rows, processing_class=tokenizer, callbacks=[CountEpochs(collator)],
        optimizer_cls_and_kwargs=adafactor(training),
    )  # fmt: skip
    return train(trainer, asdict(arguments))


def run() -> None:
    pretrain(*parsed((Arguments, TrainingArguments), DEFAULTS, __doc__))


if __name__ == "__main__":
    main(run)
