"""Forward and backward of the three convolutions beside the stock form that serves each best."""

import pytest
import torch

from benchmarks.peers import DEPTHWISE, DYNAMIC, LIGHTWEIGHT, PEERS, Problem, ours
from benchmarks.suites import BACKWARD, FORWARD
from benchmarks.suites.acceptance import Group
from convkernels.ops._dtypes import dtype_name

PROBLEMS = [
    Problem(op, 8, length, 768, heads, taps, dtype)
    for op, heads in ((LIGHTWEIGHT, 12), (DYNAMIC, 12), (DEPTHWISE, 768))
    for length in (64, 512)
    for taps in (7, 31)
    for dtype in (torch.float32, torch.bfloat16)
]
STOCK = {LIGHTWEIGHT: "conv2d-CL", DEPTHWISE: "conv2d-CL", DYNAMIC: "unfold"}


def name(problem):
    return f"{problem.op}-T{problem.length}-K{problem.taps}-{dtype_name(problem.dtype)}"


@pytest.mark.parametrize("form", ["convkernels", "stock"])
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("problem", PROBLEMS, ids=name)
def test_conv(timed, benchmark, device, problem, direction, form):
    benchmark.group = f"{name(problem)} {direction}"
    peer = STOCK[problem.op]
    group = Group(problem, device, {"convkernels": ours, "stock": PEERS[peer].build()})
    timed(group.forward(form) if direction == FORWARD else group.backward(form))
