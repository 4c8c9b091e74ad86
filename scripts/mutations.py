"""Seeds faults in the C++ kernels, one at a time, and shows that the tests catch each: python scripts/mutations.py
[--only NAME]

Every mutation is a textual replacement that must match exactly once, so that a changed source cannot silently turn it
into nothing (tests/test_mutations.py checks that on every run). A mutant is the package copied to build/mutants/<name>
with a native library of its own, which holds the mutated kernels for the portable instruction set only. The quick
tests of the cpu backend then run in the copy until the first failure. The unchanged kernels go first and have to pass.
Exit status 1 if a mutant survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-w"]
TIMEOUT = 600

# In this order: the first file to fail ends the run, so what sees most faults soonest stands first.
TESTS = [
    "tests/test_fuzz.py",
    "tests/test_equivalences.py",
    "tests/test_memory.py",
    "tests/test_philox.py",
    "tests/test_decoding.py",
    "tests/test_golden.py",
]


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    before: str
    after: str


MUTATIONS = [
    Mutation(
        "padding off by one",
        "csrc/common/taps.h",
        "return t + dilation * j - left; }",
        "return t + dilation * j - left + (left > 0 ? 1 : 0); }",
    ),
    Mutation(
        "mask not selected",
        "csrc/cpu/rows.h",
        "if (position >= s.length() || masked(s, position)) return nullptr;",
        "if (position >= s.length()) return nullptr;",
    ),
    Mutation(
        "one halo row of a window dropped",
        "csrc/cpu/rows.h",
        "static_cast<size_t>(halo_ * width_) * sizeof(Elem));",
        "static_cast<size_t>((halo_ > 0 ? halo_ - 1 : 0) * width_) * sizeof(Elem));",
    ),
    Mutation(
        "accumulation with 12 bits",
        "csrc/cpu/convolve.h",
        "sum[i][u * kWidth + p] += held[k] * x[u * kWidth + p];",
        "sum[i][u * kWidth + p] = (sum[i][u * kWidth + p] + held[k] * x[u * kWidth + p]"
        " + splat(static_cast<C>(4096 * sizeof(C) / 4))) - splat(static_cast<C>(4096 * sizeof(C) / 4));",
    ),
    Mutation(
        "channel stride ignored",
        "csrc/cpu/rows.h",
        "const int64_t stride = position < 0 ? 1 : rows.channel;",
        "const int64_t stride = 1;",
    ),
    Mutation(
        "taps of d(input) not reversed",
        "csrc/cpu/tap_conv.h",
        "sign_ = transpose ? -1 : 1;",
        "sign_ = 1, last_ = 0;",
    ),
    Mutation(
        "last rows left out of d(weight)",
        "csrc/cpu/tap_grad.h",
        "last = work.size() * (group + 1) / groups;",
        "last = work.size() * (group + 1) / groups - (groups > 1 && group + 1 == groups ? 1 : 0);",
    ),
    Mutation(
        "words of a Philox block in the wrong order",
        "csrc/cpu/filters.h",
        "random.word[i] >= threshold",
        "random.word[3 - i] >= threshold",
    ),
    Mutation(
        "tail channels missing",
        "csrc/cpu/tap_conv.h",
        "ceil_div(plan.main, plan.per_block) + (plan.main < p.channels ? 1 : 0);",
        "most(1, ceil_div(plan.main, plan.per_block));",
    ),
    Mutation(
        "softmax without the maximum",
        "csrc/cpu/filters.h",
        "vexp(load_bytes<Vec<C>>(out + k * pitch) - top);",
        "vexp(load_bytes<Vec<C>>(out + k * pitch));",
    ),
    Mutation(
        "softmax of another head's row",
        "csrc/cpu/filters.h",
        "const C* row = logits + h * K;",
        "const C* row = logits + (h > 0 ? h - 1 : 0) * K;",
    ),
    Mutation(
        "windows reach into the next packed sequence",
        "csrc/cpu/rows.h",
        "s.end = p.offsets != nullptr ? p.offsets[i + 1] : p.time;",
        "s.end = p.time;",
    ),
    Mutation(
        "state read one row too early",
        "csrc/cpu/rows.h",
        "return state + (s.state_row * span + span + position) * channels;",
        "return state + (s.state_row * span + (span + position > 0 ? span + position - 1 : 0)) * channels;",
    ),
    Mutation(
        "derivative of the sigmoid without its second factor",
        "csrc/cpu/rows.h",
        "xv[part] * (sig * (splat(C{1}) - sig));",
        "xv[part] * sig;",
    ),
]

# The library chooses among instruction sets at run time; a mutant has only one of them.
STUB = """
#include "csrc/cpu/problem.h"
namespace ck::cpu {
extern const Kernels kKernels_avx2, kKernels_avx512;
const Kernels kKernels_avx2 = {"avx2"}, kKernels_avx512 = {"avx512"};
}
"""


def run(command, **kwargs):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def mutate(mutation, sources):
    """Applies a mutation in a copy of csrc; ValueError unless its text occurs exactly once."""
    path = sources / mutation.file
    text = path.read_text()
    count = text.count(mutation.before)
    if count != 1:
        raise ValueError(f"{mutation.name}: expected one occurrence in {mutation.file}, got {count}: {mutation.before}")
    path.write_text(text.replace(mutation.before, mutation.after))


def compile_object(source, target, root, torch_dir):
    run([COMPILER, *FLAGS, f"-I{root}", "-isystem", torch_dir / "include", "-DTORCH_TARGET_VERSION=0x020a000000000000",
         "-c", source, "-o", target])  # fmt: skip


def build(mutation, work, shared, torch_dir):
    """A copy of the package with a mutated library."""
    if work.exists():
        shutil.rmtree(work)
    skip = shutil.ignore_patterns("_native", "__pycache__", "*.so")
    for name in ("convkernels", "tests", "csrc"):
        shutil.copytree(ROOT / name, work / name, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", work)
    if mutation is not None:
        mutate(mutation, work)
    library = work / "convkernels" / "_native" / "libconvkernels_cpu.so"
    library.parent.mkdir()
    kernels = work / "portable.o"
    compile_object(work / "csrc/cpu/isa/portable.cpp", kernels, work, torch_dir)
    run([COMPILER, "-shared", "-o", library, kernels, *shared, f"-L{torch_dir / 'lib'}", "-l:libtorch_cpu.so"])


def first_failure(work):
    """Name of the first test that fails, 'crash' for a process that died, None if all pass."""
    environment = {
        **os.environ,
        "CONVKERNELS_CPU_ISA": "portable",
        "CONVKERNELS_GOLDEN": str(work / "tests" / "golden"),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        "-k",
        "cpu",
        *TESTS,
    ]
    try:
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return "timeout"
    if done.returncode == 0:
        if " passed" not in done.stdout:
            raise RuntimeError(f"no test ran: {done.stdout}{done.stderr}")
        return None
    if done.returncode == 1:
        lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
        if lines:
            return lines[0].removeprefix("FAILED tests/").split(" - ")[0]
    if done.returncode < 0 or done.returncode > 128:
        return f"crash (exit status {done.returncode})"
    raise RuntimeError(f"pytest did not run: {done.stdout}{done.stderr}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="run the mutations whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "mutants")
    arguments = parser.parse_args()
    import torch

    torch_dir = Path(torch.__file__).parent
    arguments.build.mkdir(parents=True, exist_ok=True)
    shared = []
    (arguments.build / "stub.cpp").write_text(STUB)
    for source in (ROOT / "csrc/cpu/dispatch.cpp", ROOT / "csrc/torch/bind_cpu.cpp", arguments.build / "stub.cpp"):
        shared.append(arguments.build / f"{source.stem}.o")
        compile_object(source, shared[-1], ROOT, torch_dir)

    def attempt(mutation):
        start = time.perf_counter()
        work = arguments.build / ("unchanged" if mutation is None else mutation.name.replace(" ", "_"))
        build(mutation, work, shared, torch_dir)
        caught = first_failure(work)
        shutil.rmtree(work)
        return mutation, caught, time.perf_counter() - start

    _, failure, seconds = attempt(None)
    if failure is not None:
        print(f"the unchanged kernels fail: {failure}")
        return 2
    print(f"unchanged: all tests pass ({seconds:.0f} s)")
    chosen = [m for m in MUTATIONS if arguments.only is None or arguments.only in m.name]
    survivors = 0
    print(f"{'mutation':52} {'file':24} {'s':>4}  caught by")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutation, caught, seconds in pool.map(attempt, chosen):
            survivors += caught is None
            print(f"{mutation.name:52} {mutation.file:24} {seconds:4.0f}  {caught or 'SURVIVED'}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
