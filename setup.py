"""Packages convkernels. What is compiled, and how, is in scripts/build_native.py; the rest is in pyproject.toml."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))

from build_native import build, build_in_place, build_mode  # noqa: E402

native = build_mode() != "none"
try:
    import setuptools
except ImportError:
    setuptools = None
oldest = re.search(r"setuptools>=(\d+)", (ROOT / "pyproject.toml").read_text()).group(1)
version = setuptools.__version__ if setuptools else "none"
if not setuptools or int(version.split(".")[0]) < int(oldest):
    raise SystemExit(
        f"convkernels needs setuptools >= {oldest} to be packaged, and {version} is visible to this build: "
        f"`pip install 'setuptools>={oldest}'` and build again. `python scripts/build_native.py` compiles the kernels "
        "into a checkout without setuptools"
    )

from setuptools.command.build_ext import build_ext  # noqa: E402


class CMakeBuild(build_ext):
    """Builds the native targets and installs them into the package."""

    def run(self) -> None:
        if self.inplace:
            build_in_place(module="ON")
        else:
            prefix = Path(self.build_lib).resolve() / "convkernels"
            build(Path(self.build_temp).resolve(), prefix, tests=False, module="ON")

    # setuptools asks for these to copy or map single extension files; CMake has already put everything in its place.
    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


# The Extension holds no sources: it marks the wheel as one for this platform and interpreter.
setuptools.setup(
    ext_modules=[setuptools.Extension("convkernels._C", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild} if native else {},
)
