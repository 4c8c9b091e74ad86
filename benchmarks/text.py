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

PAD, UNKNOWN = 0, 1


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


def embed(tokens: torch.Tensor, channels: int) -> torch.Tensor:
    """[B, T] -> [B, T, C] through a real embedding table over the whole vocabulary (padding row zero)."""
    torch.manual_seed(0)
    table = torch.nn.Embedding(vocabulary_size(), channels, padding_idx=PAD)
    with torch.no_grad():
        return table(tokens)
