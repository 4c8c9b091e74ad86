"""Checks that an operator library needs nothing of torch but its stable C interface as of torch 2.10.

    python scripts/check_abi.py convkernels/_native/libconvkernels_cpu.so convkernels/_native/libconvkernels_cuda.so
    python scripts/check_abi.py --update INCLUDE [INCLUDE ...]     # rewrite the allow-list

The allow-list, ``stable_shims.txt``, holds the functions that ``torch/csrc/stable/c/shim.h`` and the header it includes
declare for ``TORCH_TARGET_VERSION`` 2.10, in every torch whose include folder was given. It was written from 2.10.0 and
2.13.0: both are needed, because the included header gains functions without saying in which version. Whatever is on the
list exists in torch 2.10 and is promised to every later release, so a library that passes here loads in all of them
without being rebuilt.

A library for GPUs may also use ``CUDA_SHIMS``, which the same headers declare where USE_CUDA is defined. It has to name
libtorch_cuda.so, where they are. Nothing may need the CUDA runtime: it is linked in.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ALLOW_LIST = Path(__file__).with_name("stable_shims.txt")
CUDA_SHIMS = {"aoti_torch_get_current_cuda_stream"}
TARGET = "0x020a000000000000"
# Symbols that carry a version of these come with the platform.
PLATFORM = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_")
WEAK_HOOKS = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__cxa_finalize"}
LIBRARIES = re.compile(r"(libtorch_c(pu|uda)|lib(c|m|stdc\+\+|gcc_s|pthread|dl)|ld-linux-[\w-]+)\.so(\.\d+)*")
SHIM = re.compile(r"\b((?:aoti_torch|torch)_\w+)\s*\(")


def output(*command: str, stdin: str = "") -> str:
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True).stdout


def declared_shims(include: Path) -> set[str]:
    """The functions declared for the target version, as the preprocessor sees them."""
    flags = ["-std=c++20", "-E", "-P", "-xc++", f"-DTORCH_TARGET_VERSION={TARGET}", f"-I{include}", "-"]
    return set(SHIM.findall(output("g++", *flags, stdin="#include <torch/csrc/stable/c/shim.h>\n")))


def undefined_symbols(library: Path) -> set[str]:
    lines = output("nm", "-D", "--undefined-only", str(library)).splitlines()
    return {line.split()[-1] for line in lines if line.strip()}


def needed_libraries(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-d", str(library)))


def newest_glibc(symbols: set[str]) -> str:
    versions = [tuple(map(int, v.split("."))) for s in symbols for v in re.findall(r"@GLIBC_([\d.]+)", s)]
    return ".".join(map(str, max(versions, default=(0,))))


def problems(library: Path) -> list[str]:
    allowed = set(ALLOW_LIST.read_text().split())
    symbols, needed = undefined_symbols(library), needed_libraries(library)
    if "libtorch_cuda.so" in needed:
        allowed |= CUDA_SHIMS
    unknown = sorted(s for s in symbols if not PLATFORM.search(s) and s not in allowed | WEAK_HOOKS)
    found = [f"symbol outside the stable interface of torch 2.10: {name}" for name in unknown]
    found += [f"needs the library {name}" for name in needed if not LIBRARIES.fullmatch(name)]
    if not found:
        used = len(symbols & allowed)
        print(f"{library}: {used} stable shims, needs {', '.join(needed)}, glibc >= {newest_glibc(symbols)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the undefined symbols of an operator library")
    parser.add_argument("library", nargs="*", type=Path)
    parser.add_argument("--update", nargs="+", type=Path, metavar="INCLUDE", help="rewrite the allow-list")
    arguments = parser.parse_args()
    if arguments.update:
        shims = set.intersection(*map(declared_shims, arguments.update))
        ALLOW_LIST.write_text("\n".join(sorted(shims)) + "\n")
    elif not arguments.library:
        parser.error("expected a library to check")
    failed = False
    for library in arguments.library:
        for problem in problems(library):
            print(f"{library}: {problem}", file=sys.stderr)
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
