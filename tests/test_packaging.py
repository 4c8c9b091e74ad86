"""What is built, and what the build promises: metadata without torch, a pure-Python package, honest wheels."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import convkernels
from convkernels.backends.library import missing

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "convkernels",
    "csrc",
    "scripts/build_native.py",
    "setup.py",
    "pyproject.toml",
    "CMakeLists.txt",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
)


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_setup_does_not_import_torch_and_is_short():
    texts = [(ROOT / name).read_text() for name in ("setup.py", "scripts/build_native.py")]
    imported = set()
    for node in ast.walk(ast.parse("\n".join(texts))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert "torch" not in imported
    assert all(len(text.splitlines()) <= 150 for text in texts)


def test_dependencies(project):
    assert not [r for r in project["build-system"]["requires"] if re.match(r"torch\b", r)]
    assert project["project"]["dependencies"] == ["torch>=2.10"]
    assert {"bench", "hf", "test", "test-hf", "dev"} <= set(project["project"]["optional-dependencies"])
    triton = project["project"]["optional-dependencies"]["triton"]
    assert all("platform_system == 'Linux'" in requirement for requirement in triton)


def test_native_module_describes_the_build():
    native = pytest.importorskip("convkernels._C")
    assert native.version == convkernels.__version__
    assert native.torch_target == "2.10"
    assert all(re.fullmatch(r"\d+[af]?(\+PTX|-virtual)?", name) for name in native.cuda_archs)
    assert set(native.compilers) == {"c++", "cuda"} if native.cuda_archs else {"c++"}
    assert all(re.fullmatch(r"\w+ [\d.]+", version) for version in native.compilers.values())
    assert {"portable", native.active_isa()} <= set(native.compiled_isas())
    assert native.isa_supported("portable") and native.isa_supported(native.active_isa())
    assert not native.isa_supported("no such instruction set")


def run(*command, cwd, **environment):
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)


def test_unknown_build_mode_is_one_sentence():
    done = run(sys.executable, "setup.py", "--version", cwd=ROOT, CONVKERNELS_BUILD="gpu")
    assert done.returncode != 0
    assert done.stderr.strip() == "CONVKERNELS_BUILD: expected one of auto, cpu, cuda, none, got 'gpu'"


# Prints what each CONVKERNELS_BUILD means, with `setup` replaced so that nothing is built.
RESOLVE = """
import os, runpy, setuptools
setuptools.setup = lambda **rest: None
build_mode = runpy.run_path("setup.py")["build_mode"]
for mode in ("none", "cpu", "auto", "cuda"):
    os.environ["CONVKERNELS_BUILD"] = mode
    print(build_mode())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="nothing is compiled on other platforms")
def test_cuda_is_built_where_nvcc_is(tmp_path):
    def resolve(**changes):
        environment = {"PATH": str(tmp_path), "CUDA_HOME": "", "CUDA_PATH": "", "CONVKERNELS_BUILD": "none"} | changes
        done = run(sys.executable, "-c", RESOLVE, cwd=ROOT, **environment)
        return done.stdout.split(), done.stderr.strip()

    modes, refused = resolve()
    assert modes == ["none", "cpu", "cpu"]
    assert refused.startswith("CONVKERNELS_BUILD=cuda: there is no nvcc in the bin folder") and "\n" not in refused
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.touch(mode=0o755)
    for place in ({"CUDA_HOME": str(tmp_path)}, {"CUDA_PATH": str(tmp_path)}, {"PATH": str(compiler.parent)}):
        assert resolve(**place) == (["none", "cpu", "cuda", "cuda"], "")


# Loads both libraries as on a machine with a GPU, and finds the kernels that are missing for one.
LOAD = """
import torch
from convkernels.backends.library import load_library
assert not any(map(load_library, ("cpu", "cuda"))), [load_library("cpu"), load_library("cuda")]
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("convkernels::")]
names = [name for name in names if name.endswith(".cuda")]
assert len(names) == 10, names
print(*(name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")))
"""


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")
def test_the_cuda_library_registers_its_operators_without_a_gpu():
    if missing("cuda"):
        pytest.skip(missing("cuda"))
    done = run(sys.executable, "-c", LOAD, cwd=ROOT, CONVKERNELS_SIMT="0")
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


# Runs setup.py where another setuptools is installed.
OTHER_SETUPTOOLS = """
import runpy, setuptools, sys
setuptools.__version__ = "65.5.0"
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""


def test_an_old_setuptools_is_refused_by_its_version():
    done = run(sys.executable, "-c", OTHER_SETUPTOOLS, cwd=ROOT)
    assert done.returncode != 0
    assert done.stderr.startswith("convkernels needs setuptools >= 77 to be packaged, and 65.5.0 is visible")
    assert "pip install 'setuptools>=77'" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_kernels_are_built_without_setuptools():
    program = (
        "import sys\n"
        "sys.modules['setuptools'] = None\n"
        "sys.path.insert(0, 'scripts')\n"
        "import build_native\n"
        "build_native.run = lambda *command: print(*command)\n"
        "build_native.build_in_place('AUTO')\n"
    )
    done = run(sys.executable, "-c", program, cwd=ROOT, CONVKERNELS_BUILD="cpu")
    assert re.search(r"cmake -S \S+ -B \S+build/native -G Ninja .*-DCK_PYTHON=AUTO", done.stdout)
    assert done.returncode == 0, done.stderr
    recipe = re.search(r"^gpu-build:\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    assert recipe.endswith(" $(PYTHON) scripts/build_native.py")


def test_a_package_without_its_module_is_refused(tmp_path):
    """Where pybind11 is missing, a packaged build says what to do; one that needs no packaging warns."""
    command = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(tmp_path),
        "-DCK_TORCH=OFF",
        "-DCMAKE_DISABLE_FIND_PACKAGE_pybind11=ON",
    ]
    assert 'module="ON"' in (ROOT / "setup.py").read_text()
    done = run(*command, "-DCK_PYTHON=ON", cwd=tmp_path)
    assert done.returncode != 0 and "pip install 'pybind11>=3'" in done.stderr
    done = run(*command, "-DCK_PYTHON=AUTO", cwd=tmp_path)
    assert done.returncode == 0 and "convkernels._C is left out" in done.stderr


# torch's headers as 2.10 to 2.12 have them, without the newer name of a macro.
OLDER_TORCH = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#undef STABLE_TORCH_ERROR_CODE_CHECK
"""


@pytest.mark.parametrize("source", ["bind_cpu.cpp", "bind_cuda.cpp"])
def test_bindings_compile_without_the_macros_of_torch_2_13(tmp_path, source):
    torch = Path(importlib.util.find_spec("torch").origin).parent
    (tmp_path / "older.h").write_text(OLDER_TORCH)
    flags = ["-std=c++20", "-fsyntax-only", "-w", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    include = [f"-I{ROOT}", "-isystem", f"{torch}/include", "-include", str(tmp_path / "older.h")]
    done = run("g++", *flags, *include, str(ROOT / "csrc" / "torch" / source), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# Runs setup.py with its arguments where torch cannot be found.
WITHOUT_TORCH = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""


def test_native_build_without_torch_says_what_to_do():
    done = run(sys.executable, "-c", WITHOUT_TORCH, "--quiet", "build_ext", cwd=ROOT)
    assert done.returncode != 0
    assert "install torch first and then run `pip install --no-build-isolation .`" in done.stderr
    assert "CONVKERNELS_BUILD=none" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_metadata_needs_no_torch():
    done = run(sys.executable, "-c", WITHOUT_TORCH, "--version", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == convkernels.__version__


def copy_of_sources(folder):
    """The files a build reads, without what earlier builds left behind."""
    for name in COPIED:
        source = ROOT / name
        files = [source] if source.is_file() else [f for f in source.rglob("*") if f.is_file()]
        for file in files:
            if file.suffix in (".so", ".pyc") or "_native" in file.parts:
                continue
            target = folder / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return folder


@pytest.mark.slow
def test_pure_python_wheel_works_through_the_reference(tmp_path):
    sources = copy_of_sources(tmp_path / "sources")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), "."]
    done = run(*command, cwd=sources, CONVKERNELS_BUILD="none")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert "convkernels/py.typed" in names
    # Sources alone: no data, no benchmarks.
    others = [name for name in names if not name.endswith(".py") and ".dist-info/" not in name]
    assert others == ["convkernels/py.typed"] and all(name.startswith("convkernels") for name in names)
    program = (
        "import json, warnings, torch, convkernels\n"
        "warnings.simplefilter('error')\n"
        "x, w = torch.randn(2, 5, 4), torch.randn(2, 3)\n"
        "y = convkernels.lightweight_conv1d(x, w, backend='reference')\n"
        "print(json.dumps([convkernels.__file__, list(y.shape), convkernels.why_not('cpu')]))\n"
    )
    done = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    where, shape, reasons = json.loads(done.stdout)
    assert where.startswith(str(site)) and shape == [2, 5, 4]
    assert len(reasons) == 1 and f"is not in {site}/convkernels/_native: it was not built" in reasons[0]
    command = [sys.executable, "-m", "convkernels.cli"]
    done = run(*command, "bench", cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 2 and "the benchmarks are not installed: run `make bench`" in done.stderr
    done = run(*command, "info", cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0 and "reference" in done.stdout, done.stderr
