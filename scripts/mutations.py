"""Seeds faults in the C++ and CUDA kernels, one at a time, and shows that the tests catch each: python
scripts/mutations.py [--backend cpu|cuda] [--only NAME]

Every mutation is a textual replacement that must match exactly once, so that a changed source cannot silently turn it
into nothing (tests/test_mutations.py checks that on every run). A mutant is the package copied to build/mutants/<name>
with a native library of its own. For the cpu backend that holds the mutated kernels for the portable instruction set
only; the CUDA kernels run on the CPU. The quick tests of the backend then run in the copy until the first failure. The
unchanged kernels go first and have to pass. Exit status 1 if a mutant survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
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
    "tests/test_attention_fuzz.py",
    "tests/test_attention_blocks.py",
    "tests/test_attention_fragments.py",
]


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    before: str
    after: str

    @property
    def tests(self):
        """Those that can see it."""
        attention = [test for test in TESTS if "attention" in test]
        return attention if self.name.startswith("attention: ") else TESTS


CPU_MUTATIONS = [
    Mutation(
        "padding off by one",
        "csrc/common/taps.h",
        "return t + dilation * j - left; }",
        "return t + dilation * j - left + (left > 0 ? 1 : 0); }",
    ),
    Mutation(
        "mask not selected",
        "csrc/cpu/conv/rows.h",
        "if (position >= s.length() || masked(s, position)) return nullptr;",
        "if (position >= s.length()) return nullptr;",
    ),
    Mutation(
        "one halo row of a window dropped",
        "csrc/cpu/conv/rows.h",
        "static_cast<size_t>(halo_ * width_) * sizeof(Elem));",
        "static_cast<size_t>((halo_ > 0 ? halo_ - 1 : 0) * width_) * sizeof(Elem));",
    ),
    Mutation(
        "accumulation with 12 bits",
        "csrc/cpu/conv/convolve_tiles.h",
        "sum[i][u * kWidth + p] += held[k] * x[u * kWidth + p];",
        "sum[i][u * kWidth + p] = (sum[i][u * kWidth + p] + held[k] * x[u * kWidth + p]"
        " + splat(static_cast<C>(4096 * sizeof(C) / 4))) - splat(static_cast<C>(4096 * sizeof(C) / 4));",
    ),
    Mutation(
        "channel stride ignored",
        "csrc/cpu/conv/rows.h",
        "const int64_t stride = position < 0 ? 1 : rows.channel;",
        "const int64_t stride = 1;",
    ),
    Mutation(
        "taps of d(input) not reversed",
        "csrc/cpu/conv/forward.h",
        "sign_ = transpose ? -1 : 1;",
        "sign_ = 1, last_ = 0;",
    ),
    Mutation(
        "last rows left out of d(weight)",
        "csrc/cpu/conv/backward.h",
        "last = work.size() * (split + 1) / splits;",
        "last = work.size() * (split + 1) / splits - (splits > 1 && split + 1 == splits ? 1 : 0);",
    ),
    Mutation(
        "words of a Philox block in the wrong order",
        "csrc/cpu/conv/filters.h",
        "random.word[i] >= threshold",
        "random.word[3 - i] >= threshold",
    ),
    Mutation(
        "tail channels missing",
        "csrc/cpu/conv/forward.h",
        "ceil_div(plan.main, plan.per_block) + (plan.main < p.channels ? 1 : 0);",
        "max(1, ceil_div(plan.main, plan.per_block));",
    ),
    Mutation(
        "softmax without the maximum",
        "csrc/cpu/conv/filters.h",
        "vexp(load_bytes<Vec<C>>(out + k * pitch) - top);",
        "vexp(load_bytes<Vec<C>>(out + k * pitch));",
    ),
    Mutation(
        "softmax of another head's row",
        "csrc/cpu/conv/filters.h",
        "const C* row = logits + h * K;",
        "const C* row = logits + (h > 0 ? h - 1 : 0) * K;",
    ),
    Mutation(
        "windows reach into the next packed sequence",
        "csrc/cpu/conv/rows.h",
        "s.end = p.offsets != nullptr ? p.offsets[i + 1] : p.time;",
        "s.end = p.time;",
    ),
    Mutation(
        "state read one row too early",
        "csrc/cpu/conv/rows.h",
        "return state + (s.state_row * span + span + position) * channels;",
        "return state + (s.state_row * span + (span + position > 0 ? span + position - 1 : 0)) * channels;",
    ),
    Mutation(
        "derivative of the sigmoid without its second factor",
        "csrc/cpu/conv/rows.h",
        "xv[part] * (sig * (splat(C{1}) - sig));",
        "xv[part] * sig;",
    ),
    Mutation(
        "attention: edge not repeated left of the window",
        "csrc/cpu/attention/block.h",
        "c.window_first) > 0 ? left_[r] : C{0},",
        "c.window_first) > 0 ? C{0} : C{0},",
    ),
    Mutation(
        "attention: sum of a row not rescaled",
        "csrc/cpu/attention/forward.h",
        "sum_[r] = sum_[r] * factor + sum;",
        "sum_[r] = sum_[r] + sum;",
    ),
    Mutation(
        "attention: the next key is seen",
        "csrc/cpu/attention/positions.h",
        "visible.end = min(visible.end, position.at + 1);",
        "visible.end = min(visible.end, position.at + 2);",
    ),
    Mutation(
        "attention: padding is seen",
        "csrc/cpu/attention/block.h",
        "if (d_.count_real(batch(), first + c.first, first + c.end) < c.end - c.first) {",
        "if (d_.count_real(batch(), first + c.first, first + c.end) < 0) {",
    ),
    Mutation(
        "attention: the gradient of lse taken the other way",
        "csrc/cpu/attention/backward.h",
        "delta_[r] / total_[r]) - grad_lse_[r];",
        "delta_[r] / total_[r]) + grad_lse_[r];",
    ),
    Mutation(
        "attention: dropout of another block of words",
        "csrc/cpu/attention/dropout.h",
        "static_cast<uint32_t>((first + j) / 4)};",
        "static_cast<uint32_t>(j / 4)};",
    ),
    Mutation(
        "attention: the sums of a second task not added",
        "csrc/cpu/attention/sums.h",
        "if (first != task) add_to(",
        "if (first + 1 < task) add_to(",
    ),
]

CUDA_MUTATIONS = [
    Mutation(
        "no barrier before a block's sums are read",
        "csrc/cuda/conv/plain.cuh",
        "sums[threadIdx.x] = total[u];\n      __syncthreads();",
        "sums[threadIdx.x] = total[u];",
    ),
    Mutation(
        "no barrier before a block's sums are overwritten",
        "csrc/cuda/conv/plain.cuh",
        "* K + j0 + u] = all;\n      }\n      __syncthreads();",
        "* K + j0 + u] = all;\n      }",
    ),
    Mutation(
        "no barrier in the last sums",
        "csrc/cuda/conv/reduce.cuh",
        "sums[threadIdx.x] = total;\n    __syncthreads();",
        "sums[threadIdx.x] = total;",
    ),
    Mutation(
        "barrier that some threads leave out",
        "csrc/cuda/conv/reduce.cuh",
        "  sums[threadIdx.x] = total;\n  __syncthreads();\n  if (warp > 0 || c >= p.channels) return;",
        "  sums[threadIdx.x] = total;\n  if (warp > 0 || c >= p.channels) return;\n  __syncthreads();",
    ),
    Mutation(
        "shuffle with the wrong lane",
        "csrc/cuda/device/reduce.cuh",
        "value += __shfl_xor_sync(kAllLanes, value, distance);",
        "value += __shfl_xor_sync(kAllLanes, value, distance > 1 ? distance : 2);",
    ),
    Mutation(
        "shuffle that waits for lanes that are not there",
        "csrc/cuda/conv/reduce.cuh",
        "    inner = lane_sum(inner);",
        "    if (lane < 16) inner = lane_sum(inner);",
    ),
    Mutation(
        "read past the end of the row",
        "csrc/cuda/conv/inputs.cuh",
        "return s >= begin && s < end; }",
        "return s >= begin && s <= end; }",
    ),
    Mutation(
        "write past the last channel",
        "csrc/cuda/conv/plain.cuh",
        "if (c < p.channels && s < p.time)",
        "if (s < p.time)",
    ),
    Mutation(
        "too little shared memory",
        "csrc/cuda/conv/instantiate/reduce.cu",
        "static_cast<size_t>(p.taps.taps) * sizeof(C)",
        "static_cast<size_t>(p.taps.taps - 1) * sizeof(C)",
    ),
    Mutation(
        "last group of partial sums left out",
        "csrc/cuda/conv/reduce.cuh",
        "group < p.groups; group += group_step",
        "group < max(int64_t{1}, p.groups - 1); group += group_step",
    ),
    Mutation(
        "mask not selected, only multiplied",
        "csrc/cuda/conv/inputs.cuh",
        "return masked(p, b, s) ? Compute<T>{0} : gated<T>(p, b, s, c);",
        "return gated<T>(p, b, s, c) * Compute<T>(masked(p, b, s) ? 0 : 1);",
    ),
    Mutation(
        "copies not waited for",
        "csrc/cuda/conv/stream.cuh",
        "      cp_async_wait<kAhead - 1>();",
        "      cp_async_wait<kAhead + 1>();",
    ),
    Mutation(
        "no barrier after the copies of other threads",
        "csrc/cuda/conv/stream_backward.cuh",
        "        cp_async_wait<kAhead - 1>();\n        __syncthreads();",
        "        cp_async_wait<kAhead - 1>();",
    ),
    Mutation(
        "channels stored that do not exist",
        "csrc/cuda/device/vectors.cuh",
        "if (e < count) to[e] =",
        "to[e] =",
    ),
    Mutation(
        "gradients of the state one row late",
        "csrc/cuda/conv/walk.cuh",
        "row = phase.position(n) + span;",
        "row = phase.position(n) + span + 1;",
    ),
    Mutation(
        "halves exchanged with the wrong lane",
        "csrc/cuda/conv/quads.cuh",
        "__shfl_xor_sync(kAllLanes, give.x, 1)",
        "__shfl_xor_sync(kAllLanes, give.x, 2)",
    ),
    Mutation(
        "rows: gradients added before all lanes have finished theirs",
        "csrc/cuda/conv/rows.cuh",
        "  __syncwarp();\n  if (!p.per_position) {",
        "  if (!p.per_position) {",
    ),
    Mutation(
        "rows: pieces of a head written to one place",
        "csrc/cuda/conv/rows.cuh",
        "(cut ? piece * p.batch : 0)",
        "(cut ? 0 * p.batch : 0)",
    ),
    Mutation(
        "state overwritten while others read it",
        "csrc/cuda/conv/step.cuh",
        "p.state_row == nullptr ? p.next_state : p.scratch",
        "p.next_state",
    ),
    Mutation(
        "attention: keys read before they have come",
        "csrc/cuda/attention/forward.cuh",
        "        cp_async_wait<1>();\n        __syncthreads();\n        const T* const k_rows",
        "        __syncthreads();\n        const T* const k_rows",
    ),
    Mutation(
        "attention: no barrier before keys are overwritten",
        "csrc/cuda/attention/forward.cuh",
        "        __syncthreads();\n      }\n      // Values of other sequences",
        "      }\n      // Values of other sequences",
    ),
    Mutation(
        "attention: no barrier before queries are overwritten, backward",
        "csrc/cuda/attention/backward_keys.cuh",
        "        cp_async_wait<0>();\n        __syncthreads();\n        if (has_strip && works",
        "        cp_async_wait<0>();\n        if (has_strip && works",
    ),
    Mutation(
        "attention: the last column taken for the edge",
        "csrc/cuda/attention/scores.cuh",
        "is_right = all_right || c >= W;",
        "is_right = all_right || c >= W - 1;",
    ),
    Mutation(
        "attention: sums of a row not shrunk",
        "csrc/cuda/attention/forward.cuh",
        "total[half] = total[half] * shrink[half] + sum;",
        "total[half] = total[half] + sum;",
    ),
    Mutation(
        "attention: dropout of the wrong row of a pair",
        "csrc/cuda/attention/scores.cuh",
        "pairs.own + lane / 4 + (odd ? 8 : 0)",
        "pairs.own + lane / 4 + (odd ? 0 : 8)",
    ),
    Mutation(
        "attention: strips of gradients keep an earlier tile",
        "csrc/cuda/attention/gradient_strip.cuh",
        "  if (!to.whole) to.clear();\n  const int base",
        "  const int base",
    ),
    Mutation(
        "attention: padding is seen",
        "csrc/cuda/attention/scores.cuh",
        "const bool sees = there && other",
        "const bool sees = other",
    ),
    Mutation(
        "attention: no barrier in the plain products",
        "csrc/cuda/attention/plain.cuh",
        "      stage_keys(keys, d0);\n      __syncthreads();",
        "      stage_keys(keys, d0);",
    ),
]

# The CPU library chooses among instruction sets at run time; a mutant has only one of them.
STUB = """
#include "csrc/cpu/kernels.h"
namespace ck::cpu {
namespace avx2 { extern const Kernels kKernels; const Kernels kKernels = {"avx2"}; }
namespace avx512 { extern const Kernels kKernels; const Kernels kKernels = {"avx512"}; }
}
"""


@dataclass(frozen=True)
class Library:
    """How the library of a backend is made of files, and tested."""

    name: str
    mutations: list[Mutation]
    flags: tuple[str, ...]
    units: Callable[[Path], list[Path]]
    environment: dict[str, str]


def cpu_units(root):
    names = ("cpu/dispatch.cpp", "common/poison.cpp", "torch/bind_cpu.cpp")
    return [*sorted((root / "csrc/cpu/isa").glob("*.cpp")), *(root / "csrc" / name for name in names)]


def cuda_units(root):
    csrc = root / "csrc"
    host = [*sorted(csrc.glob("cuda/*/families.cpp")), csrc / "common/poison.cpp", csrc / "torch/bind_cuda.cpp"]
    return [*sorted(csrc.glob("cuda/**/*.cu")), *host, *sorted(csrc.glob("simt/*.cpp"))]


PORTABLE = ("-DCK_ISA=portable", "-DCK_VECTOR_BYTES=16")
LIBRARIES = {
    "cpu": Library("libconvkernels_cpu.so", CPU_MUTATIONS, PORTABLE, cpu_units, {"CONVKERNELS_CPU_ISA": "portable"}),
    "cuda": Library("libconvkernels_simt.so", CUDA_MUTATIONS, ("-DCK_SIMT",), cuda_units, {"CONVKERNELS_SIMT": "1"}),
}


def run(command, **kwargs):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def mutate(mutation, sources):
    """Applies a mutation in a copy of csrc; ValueError unless its text occurs exactly once."""
    path = sources / mutation.file
    text = path.read_text()
    count = text.count(mutation.before)
    if count != 1:
        raise ValueError(f"{mutation.name}: expected one occurrence in {mutation.file}, got {count}: {mutation.before}")
    path.write_text(text.replace(mutation.before, mutation.after))


def object_name(unit):
    return str(unit.with_suffix(".o")).replace("/", "-")


class Mutants:
    """Builds copies of the package in a folder. Files that a mutation does not reach are compiled once."""

    def __init__(self, library, folder, torch_dir):
        self.library, self.folder, self.torch_dir = library, folder, torch_dir
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stub.cpp").write_text(STUB)
        self.stub = folder / "stub.o"
        self.compile(folder / "stub.cpp", self.stub, ROOT)
        self.shared = {}
        self.reads = {}
        for unit in library.units(ROOT):
            name = unit.relative_to(ROOT)
            self.shared[name] = folder / object_name(name)
            self.compile(unit, self.shared[name], ROOT)
            rule = run([*self.command(unit, ROOT), "-MM"]).replace("\\\n", " ").split(":", 1)[1]
            self.reads[name] = {Path(os.path.normpath(ROOT / file)).relative_to(ROOT) for file in rule.split()}

    def command(self, source, root):
        includes = [f"-I{root}", "-isystem", self.torch_dir / "include"]
        target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
        return [COMPILER, *FLAGS, *self.library.flags, *includes, target, "-x", "c++", source]

    def compile(self, source, target, root):
        run([*self.command(source, root), "-c", "-o", target])

    def build(self, mutation):
        """A copy of the package with a mutated library."""
        work = self.folder / (mutation.name.replace(" ", "_") if mutation else "unchanged")
        if work.exists():
            shutil.rmtree(work)
        skip = shutil.ignore_patterns("_native", "__pycache__", "*.so")
        for name in ("convkernels", "tests", "csrc"):
            shutil.copytree(ROOT / name, work / name, ignore=skip)
        shutil.copy(ROOT / "pyproject.toml", work)
        objects = dict(self.shared)
        if mutation is not None:
            mutate(mutation, work)
            for name in objects:
                if Path(mutation.file) in self.reads[name]:
                    objects[name] = work / object_name(name)
                    self.compile(work / name, objects[name], work)
        library = work / "convkernels" / "_native" / self.library.name
        library.parent.mkdir()
        stub = [self.stub] if self.library.name == "libconvkernels_cpu.so" else []
        run([COMPILER, "-shared", "-pthread", "-o", library, *objects.values(), *stub, f"-L{self.torch_dir / 'lib'}",
             "-l:libtorch_cpu.so"])  # fmt: skip
        return work


def first_failure(work, backend, tests):
    """Name of the first test that fails, 'crash' for a process that died, None if all pass."""
    environment = {
        **os.environ,
        **LIBRARIES[backend].environment,
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
        backend,
        *tests,
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
    parser.add_argument("--backend", choices=LIBRARIES, default="cpu")
    parser.add_argument("--only", help="run the mutations whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "mutants")
    arguments = parser.parse_args()
    import torch

    library = LIBRARIES[arguments.backend]
    mutants = Mutants(library, arguments.build / arguments.backend, Path(torch.__file__).parent)

    chosen = [m for m in library.mutations if arguments.only is None or arguments.only in m.name]

    def attempt(mutation):
        start = time.perf_counter()
        work = mutants.build(mutation)
        seeing = {test for m in chosen for test in m.tests} if mutation is None else mutation.tests
        caught = first_failure(work, arguments.backend, [test for test in TESTS if test in seeing])
        shutil.rmtree(work)
        return mutation, caught, time.perf_counter() - start

    _, failure, seconds = attempt(None)
    if failure is not None:
        print(f"the unchanged kernels fail: {failure}")
        return 2
    print(f"unchanged: all tests pass ({seconds:.0f} s)", flush=True)
    survivors = 0
    print(f"{'mutation':52} {'file':32} {'s':>4}  caught by")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutation, caught, seconds in pool.map(attempt, chosen):
            survivors += caught is None
            print(f"{mutation.name:52} {mutation.file:32} {seconds:4.0f}  {caught or 'SURVIVED'}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
