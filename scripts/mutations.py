"""Seeds faults in the C++ and CUDA kernels, one at a time, and shows that the tests catch each: python
scripts/mutations.py [--backend cpu|cuda] [--only NAME]

Every mutation is a textual replacement that must match exactly once, so that a changed source cannot silently turn it
into nothing (tests/test_mutations.py checks that on every run). A mutant is the package copied to build/mutants/<name>
with a native library of its own. For the cpu backend that holds the mutated kernels for the portable instruction set
and, on x86, for emulated tiles on top of it; the CUDA kernels run on the CPU. The quick tests of the backend then run
in the copy until the first failure. The unchanged kernels go first and have to pass. Exit status 1 if a mutant
survives.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutations_cuda import CUDA_MUTATIONS
from mutations_table import CPU_MUTATIONS, TESTS, Mutation

ROOT = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-w"]
TIMEOUT = 600

# The CPU library chooses among instruction sets at run time; a mutant has few of them.
STUB = """
#include "csrc/cpu/kernels.h"
namespace ck::cpu {
namespace avx2 { extern const Kernels kKernels; const Kernels kKernels = {"avx2"}; }
namespace avx512 { extern const Kernels kKernels; const Kernels kKernels = {"avx512"}; }
namespace amx { extern const Kernels kKernels; const Kernels kKernels = {"amx"}; }
}
"""


@dataclass(frozen=True)
class Library:
    """How the library of a backend is built from files, and tested."""

    name: str
    mutations: list[Mutation]
    flags: tuple[str, ...]
    units: Callable[[Path], list[Path]]
    environment: dict[str, str]


def cpu_units(root):
    names = ("cpu/dispatch.cpp", "common/poison.cpp", "torch/bind_cpu.cpp")
    tiles = sorted((root / "csrc/cpu/isa/tiles").glob("*.cpp")) if TILES else []
    return [*sorted((root / "csrc/cpu/isa").glob("*.cpp")), *tiles, *(root / "csrc" / name for name in names)]


def cuda_units(root):
    csrc = root / "csrc"
    host = [*sorted(csrc.glob("cuda/*/families.cpp")), csrc / "common/poison.cpp", csrc / "torch/bind_cuda.cpp"]
    return [*sorted(csrc.glob("cuda/**/*.cu")), *host, *sorted(csrc.glob("simt/*.cpp"))]


PORTABLE = ("-DCK_ISA=portable", "-DCK_VECTOR_BYTES=16")
TILES = ()
if platform.machine() == "x86_64":
    TILES = ("-DCK_ISA=amx_emulated", "-DCK_BASE=portable", '-DCK_NAME="amx-emulated"', "-DCK_VECTOR_BYTES=64",
             "-ffp-contract=off", "-mavx2", "-mfma", "-mf16c")  # fmt: skip
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
        flags = TILES if "isa/tiles" in str(source) else self.library.flags
        return [COMPILER, *FLAGS, *flags, *includes, target, "-x", "c++", source]

    def compile(self, source, target, root):
        run([*self.command(source, root), "-c", "-o", target])

    def build(self, mutation):
        """A copy of the package with a mutated library."""
        work = self.folder / (mutation.name.replace(" ", "_") if mutation else "unchanged")
        if work.exists():
            shutil.rmtree(work)
        skip = shutil.ignore_patterns("_native", "__pycache__", "*.so")
        for name in ("convkernels", "tests", "benchmarks", "csrc"):
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


def first_failure(work, backend, tests, more):
    """Name of the first test that fails, 'crash' for a process that died, None if all pass. more: variables of the
    environment."""
    environment = {
        **os.environ,
        **LIBRARIES[backend].environment,
        "CONVKERNELS_GOLDEN": str(work / "tests" / "golden"),
        "OMP_NUM_THREADS": "1",
        **more,
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
        more = {} if mutation is None else mutation.environment
        caught = first_failure(work, arguments.backend, [test for test in TESTS if test in seeing], more)
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
