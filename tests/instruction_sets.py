"""The instruction sets of the native library: which this machine has, a process for one, results to compare."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import convkernels as ck
from convkernels.testing.inputs import Problem

ROOT = Path(ck.__file__).parents[1]
# That which is taken where none is named last.
FEATURES = {"portable": "", "amx-emulated": "avx2", "avx2": "avx2", "amx": "amx_bf16", "avx512": "avx512_bf16"}
NAMES = tuple(FEATURES)


def available():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return [name for name in NAMES if FEATURES[name] in flags]


def run_on(isa, *command):
    """The choice is made once per process, and so in one of its own."""
    env = {**os.environ, "CONVKERNELS_CPU_ISA": isa, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def run_tests_on(isa, chosen, *files):
    """The tests of the cpu backend in these files, but for slow ones."""
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", f"cpu and {chosen}", "-m", "not slow"]
    assert " passed" in run_on(isa, *command, *files)


def digest():
    """Results of a few problems, all dtypes, as one line of numbers."""
    assert not ck.why_not("cpu")
    found = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        problem = Problem(length=33, heads=3, head_size=13, taps=9, left=4, softmax=True, gate=True, bias=True,
                          dtype=dtype, weight_dtype=dtype)  # fmt: skip
        t = problem.tensors()
        y = torch.ops.convkernels._tap_conv.cpu(*problem.op_arguments(t))
        grads = torch.ops.convkernels._tap_grad.cpu(*problem.grad_arguments(t))
        found += [float(v.double().abs().sum()) for v in (y, *grads) if v.numel()]
    return " ".join(f"{value:.9e}" for value in found)
