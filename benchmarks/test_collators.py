"""Batches for pre-training: how long making one takes, which has to be little beside a training step."""

import pytest

pytest.importorskip("datasets")
import torch

from training.spans import SpanDenoising, block_length


@pytest.mark.parametrize("rows, source", [(32, 128), (64, 512)])
def test_span_denoising(timed, benchmark, rows, source):
    benchmark.group = "span denoising"
    tokens = torch.randint(200, 32_000, (rows, block_length(source, 0.15, 3.0))).tolist()
    collate = SpanDenoising(list(range(100)), end=1, pad=0)
    timed(lambda: collate([{"input_ids": row} for row in tokens]))
