"""Trains a unigram tokenizer (Kudo 2018) with T5's or BERT's special tokens, and saves it for AutoTokenizer.

python examples/train_tokenizer.py --texts books.jsonl.xz news.txt --vocab_size 32000 --output_dir tokenizer
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from training.files import TEXTS, DataError, documents, paragraphs
from training.running import main, parsed

# The first three have the ids 0, 1 and 2, where T5 and the models' configurations expect them.
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
BERT = ["[CLS]", "[SEP]", "[MASK]"]
NORMALIZER = normalizers.NFKC()
LONGEST = 2**14  # characters, of at most 4 bytes: sentencepiece leaves out lines of more bytes than it is told


@dataclass
class Arguments:
    texts: list[str] = field(metadata={"help": TEXTS})
    output_dir: str = field(metadata={"help": "where the tokenizer is saved"})
    kind: str = field(
        default="seq2seq",
        metadata={
            "help": "seq2seq: 'text </s>', bert: '[CLS] text [SEP] pair [SEP]'",
            "choices": ["seq2seq", "bert"],
        },
    )
    vocab_size: int = field(default=32000, metadata={"help": "tokens, special ones and sentinels included"})
    sentinels: int = field(default=100, metadata={"help": "number of sentinels <extra_id_0> ... for span denoising"})
    sample: int = field(default=500_000, metadata={"help": "train on at most so many paragraphs, drawn at random"})
    seed: int = field(default=1, metadata={"help": "of that draw"})


def cut(line: str) -> Iterator[str]:
    """Parts of a line that are not too long, cut between words where there are such."""
    start = 0
    while start < len(line):
        end = min(start + LONGEST, len(line))
        if end < len(line):
            space = line.rfind(" ", start + 1, end)
            end = space if space > 0 else end
        yield line[start:end]
        start = end + 1 if line[end : end + 1] == " " else end


def drawn(parts: Iterator[str], count: int, seed: int) -> list[str]:
    """At most so many, each with the same probability (Vitter 1985, algorithm R)."""
    found, random = [], Random(seed)
    for number, part in enumerate(parts):
        if number < count:
            found.append(part)
        elif (place := random.randrange(number + 1)) < count:
            found[place] = part
    return found


def train(arguments: Arguments) -> PreTrainedTokenizerFast:
    """The tokenizer: pieces found by sentencepiece. DataError if the texts do not give so many. ValueError if an
    argument is out of range."""
    for name, least, most in (
        ("vocab_size", 1, 2**31 - 1),
        ("sentinels", 0, 2**31 - 1),
        ("sample", 1, 2**31 - 1),
        ("seed", 0, 2**32 - 1),
    ):
        if not least <= getattr(arguments, name) <= most:
            raise ValueError(f"--{name}: expected {least} to {most}, got {getattr(arguments, name)}")
    sentinels = [f"<extra_id_{i}>" for i in range(arguments.sentinels)]
    model = io.BytesIO()
    parts = drawn(
        (part for text in documents(arguments.texts) for line in paragraphs(text)
         for part in cut(NORMALIZER.normalize_str(line))),
        arguments.sample, arguments.seed,
    )  # fmt: skip
    if not parts:
        raise DataError(f"{', '.join(arguments.texts)}: expected text, got none")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(parts), model_writer=model, model_type="unigram", vocab_size=arguments.vocab_size,
            normalization_rule_name="identity", character_coverage=0.99999,
            max_sentence_length=4 * LONGEST,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece=PAD, eos_piece=END, unk_piece=UNKNOWN,
            control_symbols=[*BERT, *sentinels], minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        reason = re.sub(r"^\w+: \S+\(\d+\) \[.*?\] ", "", str(error).strip().splitlines()[-1])
        raise DataError(f"{', '.join(arguments.texts)}, --vocab_size {arguments.vocab_size}: {reason}") from None
    found = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [(found.id_to_piece(i), found.get_score(i)) for i in range(found.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=found.unk_id()))
    tokenizer.normalizer = NORMALIZER
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    if arguments.kind == "bert":
        single, pair = "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
        inputs = ["input_ids", "token_type_ids", "attention_mask"]
    else:
        single, pair = f"$A {END}", f"$A {END} $B {END}"
        inputs = ["input_ids", "attention_mask"]
    used = [token for token in (*BERT, END) if token in single]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, found.piece_to_id(token)) for token in used]
    )
    names = ("pad_token", "eos_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=inputs,
        extra_special_tokens=sentinels,
        clean_up_tokenization_spaces=False,
        **dict(zip(names, (PAD, END, UNKNOWN, *BERT), strict=True)),
    )


def run() -> None:
    (arguments,) = parsed((Arguments,), {}, __doc__)
    folder = Path(arguments.output_dir)
    if (folder / "config.json").exists() or (folder / "run.json").exists():
        raise ValueError(f"--output_dir {folder}: expected a folder for the tokenizer alone, got one of a model")
    tokenizer = train(arguments)
    tokenizer.save_pretrained(arguments.output_dir)
    print(f"{len(tokenizer)} tokens, saved in {arguments.output_dir}")


if __name__ == "__main__":
    main(run)
