"""Span denoising, the objective of T5 (Raffel et al. 2020), in which Tay et al. 2021 pre-train."""

import zlib
from dataclasses import dataclass

import numpy as np
import torch


def split(rng: np.random.Generator, total: int, parts: int) -> np.ndarray:
    """Lengths, 1 or more, of ``parts`` pieces that make ``total``, all divisions being equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], cuts, [total])))


def counts(length: int, rate: float, mean: float) -> tuple[int, int]:
    """How many of ``length`` tokens are taken out, and in how many spans: round(rate * length) and round(that / mean),
    each 1 or more, and so few that something is kept between any two."""
    noise = min(max(round(rate * length), 1), length - 1)
    return noise, min(max(round(noise / mean), 1), noise, length - noise)


def spans(rng: np.random.Generator, length: int, rate: float, mean: float) -> np.ndarray:
    """Lengths of the pieces of a text, which are kept and taken out by turns: as in T5, the first token is always kept,
    the last one always taken out."""
    noise, count = counts(length, rate, mean)
    pieces = np.empty(2 * count, dtype=int)
    pieces[0::2], pieces[1::2] = split(rng, length - noise, count), split(rng, noise, count)
    return pieces


def lengths(tokens: int, rate: float, mean: float) -> tuple[int, int]:
    """Lengths of the source and of the target that are made of so many tokens, the end of each included."""
    noise, count = counts(tokens, rate, mean)
    return tokens - noise + count + 1, noise + count + 1


def block_length(source: int, rate: float, mean: float) -> int:
    """The number of tokens from which a source of at most this length is made. ValueError if there is no such."""
    if not 0 < rate < 1 or mean < 1 or source < 3:
        raise ValueError(
            "span denoising: expected a rate between 0 and 1, spans of 1 or more and sources of 3 tokens or more, got "
            f"{rate}, {mean} and {source}"
        )
    tokens = source - 1
    while lengths(tokens + 1, rate, mean)[0] <= source:
        tokens += 1
    return tokens


@dataclass
class SpanDenoising:
    """Collates rows with ``input_ids``, texts without special tokens, into batches of ``input_ids`` [B,S],
    ``attention_mask`` [B,S] and ``labels`` [B,T], -100 where there is nothing to predict.

    Source: the text, each span that is taken out replaced by a sentinel of its own, and the end. Target: of each span
    its sentinel and its tokens, and the end. sentinels: their ids, in the order of use. rate: the part of tokens taken
    out; mean: the mean length of a span. What is taken out of a text depends on the seed, the epoch and the text alone,
    so that neither batches nor processes nor a run that goes on where it was stopped change it.
    """

    sentinels: list[int]
    end: int
    pad: int
    rate: float = 0.15
    mean: float = 3.0
    seed: int = 0
    epoch: int = 0

    def corrupt(self, tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Source and target of one text of 2 tokens or more."""
        if len(tokens) < 2:
            raise ValueError(f"SpanDenoising: expected texts of 2 tokens or more, got {len(tokens)}")
        pieces = spans(rng, len(tokens), self.rate, self.mean)
        count = len(pieces) // 2
        if count > len(self.sentinels):
            raise ValueError(
                f"SpanDenoising: a text of {len(tokens)} tokens has {count} spans, and there are {len(self.sentinels)} "
                "sentinels: take shorter blocks or a tokenizer with more sentinels"
            )
        starts = np.cumsum(pieces) - pieces
        taken = np.repeat(np.arange(len(pieces)) % 2 == 1, pieces)
        sentinels = np.asarray(self.sentinels[:count])
        source = tokens.copy()
        source[starts[1::2]] = sentinels
        keep = ~taken
        keep[starts[1::2]] = True
        first = np.concatenate(([0], np.cumsum(pieces[1::2])[:-1]))
        target = np.insert(tokens[taken], first, sentinels)
        return np.append(source[keep], self.end), np.append(target, self.end)

    def _generator(self, text: np.ndarray) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.epoch, zlib.crc32(text.tobytes())))

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        texts = [np.asarray(row["input_ids"]) for row in rows]
        sources, targets = zip(*(self.corrupt(text, self._generator(text)) for text in texts), strict=True)
        return {
            "input_ids": padded(sources, self.pad),
            "attention_mask": padded([np.ones_like(source) for source in sources], 0),
            "labels": padded(targets, -100),
        }


def padded(rows, value: int) -> torch.Tensor:
    """Rows of different lengths as one tensor, ``value`` behind the shorter ones."""
    result = np.full((len(rows), max(map(len, rows))), value)
    for i, row in enumerate(rows):
        result[i, : len(row)] = row
    return torch.from_numpy(result)
