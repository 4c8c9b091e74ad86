"""Real text as batches: paragraphs of public-domain novels, so that lengths and padding are those of real use."""

from __future__ import annotations

import collections
import functools
import itertools
import lzma
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.training.spans import SpanDenoising, block_length

PAD, UNKNOWN = 0, 1
END = UNKNOWN  # of a sequence in span denoising, as T5 has it; the text has no unknown words
NOISE, SPAN = 0.15, 3  # of span denoising: the part that is dropped, and how much at a place on average
SHORTEST = 3  # source of span denoising: a token that is kept, one that stands for a span, the end


@functools.cache
def paragraphs() -> list[str]:
    """All paragraphs of the bundled sample, in reading order (data/README.md names the books)."""
    packed = (Path(__file__).parent / "data" / "novels.txt.xz").read_bytes()
    books = lzma.decompress(packed).decode().strip().split("\f")
    return [line for book in books for line in book.split("\n")[1:]]


@functools.cache
def _tokens() -> tuple[list[list[int]], int]:
    words = [re.findall(r"\w+|[^\w\s]", paragraph.lower()) for paragraph in paragraphs()]
    counts = collections.Counter(itertools.chain.from_iterable(words))
    ids = {word: i for i, (word, _) in enumerate(counts.most_common(), start=UNKNOWN + 1)}
    return [[ids[word] for word in paragraph] for paragraph in words], len(ids) + UNKNOWN + 1


def vocabulary_size() -> int:
    """Number of word types in the sample, plus the padding and unknown entries."""
    return _tokens()[1]


@dataclass(frozen=True)
class Batch:
    """tokens [B, T] int64 (0 = padding), mask [B, T] bool (True = a real token), lengths [B]."""

    tokens: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor

    @property
    def padding(self) -> float:
        return 1.0 - self.mask.double().mean().item()


def batch(size: int, length: int) -> Batch:
    """`size` rows of at most `length` tokens. A row takes whole paragraphs while the next one still fits; a paragraph
    longer than a row is cut. The text starts again when it runs out.
    """
    rows: list[list[int]] = []
    row: list[int] = []
    for paragraph in itertools.cycle(_tokens()[0]):
        for start in range(0, len(paragraph), length):
            piece = paragraph[start : start + length]
            if len(row) + len(piece) > length:
                rows.append(row)
                row = []
            row = row + piece
        if len(rows) >= size:
            break
    tokens = torch.full((size, length), PAD)
    for i, ids in enumerate(rows[:size]):
        tokens[i, : len(ids)] = torch.tensor(ids)
    mask = tokens != PAD
    return Batch(tokens, mask, mask.sum(1))


def rows(size: int, length: int) -> torch.Tensor:
    """[size, length] tokens, paragraph behind paragraph without padding. The text starts again when it runs out."""
    stream = itertools.cycle(itertools.chain.from_iterable(_tokens()[0]))
    return torch.tensor(list(itertools.islice(stream, size * length))).view(size, length)


def span_denoising(size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """T5's task (Raffel et al. 2020): source [size, S], in which a token of its own stands for each span, and target
    [size, T] with these and the spans. S is `length`, or one less where no text has such a source.
    """
    count, marks = block_length(length, NOISE, SPAN), vocabulary_size()
    collate = SpanDenoising(list(range(marks, marks + count)), END, PAD, NOISE, SPAN)
    batch = collate([{"input_ids": row} for row in rows(size, count).tolist()])
    return batch["input_ids"], batch["labels"]


def masked(size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """BERT's task: tokens [size, length] of which 15 % are hidden by a token of its own, and labels with the words
    there, -100 elsewhere."""
    tokens = rows(size, length)
    hidden = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < NOISE
    hidden[:, 0] = True  # a row without labels has no loss
    return tokens.masked_fill(hidden, vocabulary_size()), tokens.masked_fill(~hidden, -100)


def embed(tokens: torch.Tensor, channels: int) -> torch.Tensor:
    """[B, T] -> [B, T, C] through a real embedding table over the whole vocabulary (padding row zero)."""
    torch.manual_seed(0)
    table = torch.nn.Embedding(vocabulary_size(), channels, padding_idx=PAD)
    with torch.no_grad():
        return table(tokens)
