"""Steps over chunks of sequences that are longer than a program, a tile or a block takes at once."""

import dataclasses

import pytest
import torch

from convkernels.testing import compare
from convkernels.testing.inputs import StepProblem

CHUNKS = {
    "rows": {"batch": 2, "length": 70},
    "rows reordered": {"batch": 3, "length": 40, "indexed": True},
    "rows of a pool": {"batch": 3, "length": 33, "slots": 2, "accepted": True, "extra": 20},
    "sequences": {"lengths": (40, 0, 1, 77, 16, 17), "accepted": True, "extra": 3},
    "sequences of a pool": {"lengths": (33, *[1] * 12, 64, 2, 50), "slots": 2, "saves": 6},
    "one sequence": {"lengths": (100,), "slots": 1, "saves": 3, "wide": False},
}
FILTERS = {
    "short": {"taps": 4, "bias": True, "activation": 2},
    "long": {"taps": 31, "softmax": True},
    "dilated": {"taps": 3, "dilation": 10, "gate": True, "residual": True},
    "dynamic": {"taps": 3, "kind": "dynamic", "softmax": True, "renormalize": True, "position": 2},
}


@pytest.mark.parametrize("layout", ["contiguous", "swap_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("chunks", CHUNKS)
def test_long_chunks(chunks, filters, dtype, layout, ops):
    options = {"dtype": dtype, "weight_dtype": dtype, "state_layout": layout, "seed": 7}
    compare.conv_step(ops, StepProblem(heads=3, head_size=7, **CHUNKS[chunks], **FILTERS[filters], **options))


@pytest.mark.parametrize("taken_back", [0, 1, 5])
def test_rows_of_a_state_move_block_by_block(taken_back, ops, monkeypatch):
    """Up or down, in place: no row is overwritten before it has been read."""
    if ops.backend == "triton":
        from convkernels.backends.triton.conv import configs

        step = configs.step
        monkeypatch.setattr(configs, "step", lambda *args: dataclasses.replace(step(*args), BS=2))
    for length in (0, 1, 3):
        problem = StepProblem(length=length, taps=4, extra=9, slots=1)
        t = problem.tensors()
        t["accepted"] = torch.full((problem.batch,), max(length, 1) - taken_back)
        compare.conv_step(ops, problem, t)


@pytest.mark.parametrize("layout", ["contiguous", "swap_last"])
@pytest.mark.parametrize("saves", [0, 2])
def test_no_positions_after_some_that_were_taken_back(saves, layout, ops):
    problem = StepProblem(lengths=(0, 1, 7), taps=4, extra=2, slots=1, saves=saves, state_layout=layout)
    for taken_back in (0, 1, 2):
        t = problem.tensors()
        t["accepted"] = torch.tensor(problem.lengths) - taken_back
        compare.conv_step(ops, problem, t)
