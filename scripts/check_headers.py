"""Checks that the bindings compile against a torch, and that this torch has every function they then need.

    python scripts/check_headers.py                      # the torch that is installed
    python scripts/check_headers.py TORCH [TORCH ...]    # wheels, or unpacked: folders with include/ and lib/

Compiles bind_cpu.cpp and bind_cuda.cpp as the build does, for TORCH_TARGET_VERSION 2.10 and the latter with USE_CUDA,
without nvcc and without linking. What belongs to CUDA is looked for only in a torch that was built with it. Every
function must also be on the allow-list of check_abi.py, so whichever torch a library is built against, it loads in all.

Passed with GCC 12: 2.10.0, 2.11.0, 2.12.1, 2.14.1 and 2.15.0 with CUDA, 2.13.0 without.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from check_abi import ALLOW_LIST, CUDA_SHIMS, SHIM, TARGET, output

ROOT = Path(__file__).resolve().parent.parent
BINDINGS = {"bind_cpu.cpp": [], "bind_cuda.cpp": ["-DUSE_CUDA"]}
LIBRARIES = ("libtorch_cpu.so", "libtorch_cuda.so")


def flags(include: Path) -> list[str]:
    return ["-std=c++20", "-O1", "-w", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TARGET}", f"-I{ROOT}",
            "-isystem", str(include)]  # fmt: skip


def shims(*nm: str) -> set[str]:
    """The functions of torch's C interface among the symbols that nm lists."""
    return {name for name in re.findall(r"\S+$", output("nm", *nm), re.MULTILINE) if SHIM.fullmatch(f"{name}(")}


def version(include: Path) -> str:
    header = include / "torch/headeronly/version.h"
    numbers = re.findall(r"#define TORCH_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header.read_text())
    return ".".join(numbers)


def problems(torch: Path) -> list[str]:
    include = torch / "include"
    libraries = [torch / "lib" / name for name in LIBRARIES if (torch / "lib" / name).exists()]
    if not (include / "torch/csrc/stable/library.h").exists() or not libraries:
        return ["expected include/torch/csrc/stable/library.h and lib/libtorch_cpu.so in it"]
    there = set.union(*(shims("-D", "--defined-only", str(library)) for library in libraries))
    there |= set() if len(libraries) == len(LIBRARIES) else CUDA_SHIMS
    allowed, found = CUDA_SHIMS.union(ALLOW_LIST.read_text().split()), []
    for name, extra in BINDINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            compiled = Path(folder) / "binding.o"
            command = ["g++", *flags(include), *extra, "-c", f"{ROOT}/csrc/torch/{name}", "-o", str(compiled)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                errors = [line for line in done.stderr.splitlines() if "error:" in line]
                found += [f"{name} does not compile: {line}" for line in errors[:3] or [done.stderr.strip()]]
                continue
            needed = shims("--undefined-only", str(compiled))
        found += [f"{name} needs {function}, which is not there" for function in sorted(needed - there)]
        found += [f"{name} needs {function}, which is not on the allow-list" for function in sorted(needed - allowed)]
        if not found:
            kind = "a torch with CUDA" if len(libraries) == len(LIBRARIES) else "a torch without CUDA"
            print(f"torch {version(include)}, {kind}: {name} compiles, its {len(needed)} functions are there")
    return found


def unpack(wheel: Path, folder: Path) -> Path:
    """What is needed of a wheel."""
    wanted = re.compile(rf"torch/(include/.+|lib/({'|'.join(map(re.escape, LIBRARIES))}))")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if wanted.fullmatch(name)])
    return folder / "torch"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the bindings against one torch after the other")
    parser.add_argument("torch", nargs="*", type=Path, help="an unpacked torch or a wheel (default: what is installed)")
    failed = False
    for torch in parser.parse_args().torch or [Path(find_spec("torch").origin).parent]:
        with tempfile.TemporaryDirectory() as folder:
            for problem in problems(unpack(torch, Path(folder)) if torch.is_file() else torch):
                print(f"{torch}: {problem}", file=sys.stderr)
                failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
