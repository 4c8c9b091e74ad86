"""Drives CMake, which is the one list of native targets: python scripts/build_native.py compiles the kernels into this
checkout. setup.py calls it too; nothing here needs setuptools.

``CONVKERNELS_BUILD`` chooses what is built: ``cpu``, ``cuda`` (that and the CUDA kernels; needs nvcc, no GPU), ``none``
for a pure-Python package that works through the reference backend, or ``auto`` (the default: the most that this machine
has tools for). ``CMAKE_ARGS`` is passed on to CMake.

torch is looked up but never imported: the metadata must be readable without it, and only its headers are needed.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODES = ("auto", "cpu", "cuda", "none")


def build_mode() -> str:
    """The value of CONVKERNELS_BUILD with ``auto`` resolved for this platform."""
    mode = os.environ.get("CONVKERNELS_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"CONVKERNELS_BUILD: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == "cuda" and nvcc() is None:
        raise SystemExit(
            "CONVKERNELS_BUILD=cuda: there is no nvcc in the bin folder of CUDA_HOME or CUDA_PATH, nor on PATH; "
            "install the CUDA toolkit, or use auto, cpu or none instead"
        )
    if mode == "auto":
        return "none" if not sys.platform.startswith("linux") else "cpu" if nvcc() is None else "cuda"
    return mode


def nvcc() -> str | None:
    """The CUDA compiler: that of the toolkit the environment names, or the one on PATH."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which("nvcc", path=os.pathsep.join([*(f"{home}/bin" for home in homes), os.environ.get("PATH", "")]))


def package_folder(name: str) -> Path | None:
    """Where an installed package lies, without importing it."""
    spec = find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def torch_folder() -> Path:
    """The installed torch, or one sentence that says what to do."""
    folder = package_folder("torch")
    if folder is None:
        raise SystemExit(
            "convkernels compiles against the torch you already have, and none is visible to this build: install torch "
            "first and then run `pip install --no-build-isolation .`, or set CONVKERNELS_BUILD=none for the "
            "pure-Python package"
        )
    return folder


def tool(name: str) -> str:
    """A program on PATH or beside the running interpreter, whose folder need not be on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        raise SystemExit(f"convkernels needs {name} to compile its kernels: `pip install {name}` and build again")
    return found


def run(*command: str) -> None:
    """Runs one build step; the tool has already printed what went wrong when it fails."""
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"native build failed in: {shlex.join(command)}")


def build(folder: Path, prefix: Path, *, tests: bool, module: str) -> None:
    """Configure and build in `folder`, install below `prefix`.

    tests: keep what only the tests use, symbols among it.  module: CK_PYTHON, ON where a build without convkernels._C
    is a failure, AUTO where it is not.
    """
    cmake, mode = tool("cmake"), build_mode()
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "CK_TORCH_DIR": torch_folder(),
        "CK_PYTHON": module,
        "CK_CUDA": "ON" if mode == "cuda" else "OFF",
    }
    if mode == "cuda":
        options["CMAKE_CUDA_COMPILER"] = nvcc()
    pybind11 = package_folder("pybind11")
    if pybind11 is not None:
        options["pybind11_DIR"] = pybind11 / "share" / "cmake" / "pybind11"
    defines = [f"-D{name}={value}" for name, value in options.items()]
    extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    if not tests:
        extra.append("-DCK_SIMT=OFF")
    run(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *defines, *extra)
    run(cmake, "--build", str(folder))
    run(cmake, "--install", str(folder), "--prefix", str(prefix), *([] if tests else ["--strip"]))


def build_in_place(module: str) -> None:
    """The same folder for every caller, so that the build stays incremental."""
    build(ROOT / "build" / "native", ROOT / "convkernels", tests=True, module=module)


if __name__ == "__main__":
    if build_mode() != "none":
        build_in_place(module="AUTO")
