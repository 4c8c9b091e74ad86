"""The numeric tests once more on every instruction set of the native library that this machine can run, each in its
own process because the choice is made once.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convkernels as ck
from convkernels.testing.inputs import Problem

ROOT = Path(ck.__file__).parents[1]
NAMES = ("portable", "avx2", "avx512")
SUBSET = [
    "tests/test_fuzz.py",
    "tests/test_memory.py",
    "tests/test_equivalences.py",
]
FEATURES = {"portable": "", "avx2": "avx2", "avx512": "avx512_bf16"}


def available():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return [name for name in NAMES if FEATURES[name] in flags]


def run(command, isa):
    env = {**os.environ, "CONVKERNELS_CPU_ISA": isa, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=ROOT)


@pytest.fixture(params=NAMES)
def isa(request):
    reasons = ck.why_not("cpu")
    if reasons:
        pytest.skip("; ".join(reasons))
    if request.param not in available():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


@pytest.fixture
def lower_isa(isa):
    """The best one is what the rest of the suite runs on."""
    if isa == available()[-1]:
        pytest.skip("the suite itself runs on it")
    return isa


@pytest.mark.slow
def test_suite_on_every_instruction_set(lower_isa):
    done = run(
        [
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-k",
            "cpu and not grow and not any_strides and not degenerate",
            "-m",
            "not slow",
            *SUBSET,
        ],
        lower_isa,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


SHOW = """
import sys, torch
sys.path.insert(0, "tests")
from test_instruction_sets import digest
print(digest())
"""


def digest():
    """Results of a few problems, all dtypes, as one line of numbers."""
    assert not ck.why_not("cpu")
    found = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        problem = Problem(length=33, heads=3, head_size=13, taps=9, left=4, softmax=True, gate=True, bias=True,
        dtype=dtype,
                          weight_dtype=dtype)  # fmt: skip
        t = problem.tensors()
        y = torch.ops.convkernels._tap_conv.cpu(*problem.op_arguments(t))
        grads = torch.ops.convkernels._tap_grad.cpu(*problem.grad_arguments(t))
        found += [float(v.double().abs().sum()) for v in (y, *grads) if v.numel()]
    return " ".join(f"{value:.9e}" for value in found)


def test_instruction_sets_agree(isa):
    """Sums over whole results, to the rounding of the types; bitwise equality between instruction sets is not
    promised.
    """
    done = run(["-c", SHOW], isa)
    assert done.returncode == 0, done.stderr
    numbers = [float(v) for v in done.stdout.split()]
    expected = [float(v) for v in digest().split()]
    torch.testing.assert_close(torch.tensor(numbers), torch.tensor(expected), rtol=2e-3, atol=0)
    torch.testing.assert_close(torch.tensor(numbers[:4]), torch.tensor(expected[:4]), rtol=1e-6, atol=0)
