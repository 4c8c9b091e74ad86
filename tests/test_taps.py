"""The index relation, stated once per language: the hand-made table that the C++ tests read too."""

import re
from pathlib import Path

import pytest
import torch

from convkernels.ops.conv.reference import source_rows

TABLE = Path(__file__).with_name("taps_table.inc")
ROWS = [
    tuple(map(int, re.findall(r"-?\d+", line.split("//")[0])))
    for line in TABLE.read_text().splitlines()
    if line[0] == "{"
]


def test_the_table_is_read_whole():
    assert len(ROWS) >= 20 and {len(row) for row in ROWS} == {9}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_reference_obeys_the_table(row):
    taps, left, dilation, begin, end, t, source, first, last = row
    packed = torch.tensor([0, begin, end]) if begin > 0 else None
    state = -begin if begin < 0 else None
    sources, inside = source_rows(end, taps, left, dilation, torch.device("cpu"), packed, state)
    assert inside[t].tolist() == [first <= j < last for j in range(taps)]
    for j in range(first, last):
        position = source + dilation * j
        # Rows of the state follow the inputs, oldest first.
        assert sources[t, j] == (position if position >= 0 else end + state + position)
