"""Lays this package out as a repository that the Hugging Face ``kernels`` library loads.

    python scripts/hub_kernel.py build/hub          # after `make install`; then, for example:
    python -c "from kernels import get_local_kernel; from pathlib import Path; get_local_kernel(Path('build/hub'))"

Writes build.toml, README.md, and below build/ one variant: the CPU library, for every torch from 2.10 on, and the
Python files that need no other package. Its operators have a namespace of their own, made from all that the variant
holds, so that it can be loaded beside an installed convkernels or another version of itself. ``kernels upload``
publishes the folder.
"""

import argparse
import hashlib
import json
import platform
import shutil
from pathlib import Path

import convkernels
from convkernels._namespace import NAMESPACE
from convkernels._version import __version__
from convkernels.backends.library import path_of

PACKAGE = Path(convkernels.__file__).parent
NAME, LICENSE, TORCH, BACKEND = "convkernels", "Apache-2.0", "2.10", "cpu"
# Without the command line, and what needs packages beside torch.
LEFT_OUT = ("cli", "models", "testing", "__main__.py", "bert_convolutions.py", "fairseq.py", "huggingface", "onnx.py")
CARD = f"""---
library_name: kernels
license: {LICENSE.lower()}
---
# {NAME}

Lightweight, dynamic and depthwise convolutions and attention with relative positions, forward and backward, in C++ for
CPUs: `causal_conv1d_fn` and `causal_conv1d_update`, and the functions that the documentation of the package describes.

```python
from kernels import get_kernel

kernel = get_kernel("...", version=VERSION)
y = kernel.depthwise_conv1d(x, weight, padding="causal")
```
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a folder, whose contents are replaced")
    output = parser.parse_args(arguments).output
    if output.exists() and any(output.iterdir()) and not _written_here(output / "build.toml"):
        parser.error(f"output: expected an empty folder, or one that this program has written, got {output}")
    library = path_of(BACKEND)
    if not library.exists():
        parser.error(f"expected {library}, which `make cpu` builds")
    print(f"wrote {write(output, library)}")


def write(output: Path, library: Path) -> Path:
    """Write the repository; returns the folder of its variant."""
    shutil.rmtree(output, ignore_errors=True)
    system, stable = f"{platform.machine()}-{platform.system().lower()}", TORCH.replace(".", "")
    variant = output / "build" / f"torch-stable-abi{stable}-{BACKEND}-{system}"
    shutil.copytree(PACKAGE, variant, ignore=_left_out)
    shutil.copy2(library, variant / library.parent.name)
    with (variant / "__init__.py").open("a") as file:  # under the names by which other kernels of this task go
        file.write("\nfrom .interop.causal_conv1d import causal_conv1d_fn, causal_conv1d_update  # noqa: E402, F401\n")
    version = int(__version__.partition(".")[0]) + 1  # the Hub counts from 1, and breaking changes alone
    name = f"_{NAME}_{BACKEND}_{_digest(variant)}"
    path = variant / "_namespace.py"
    text = path.read_text()
    path.write_text(text.replace(f'"{NAMESPACE}"', f'"{name}"'))
    metadata = {
        "name": NAME, "id": name, "version": version, "license": LICENSE, "python-depends": [],
        "backend": {"type": BACKEND},
    }  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (output / "build.toml").write_text(
        f'[general]\nedition = 5\nname = "{NAME}"\nversion = {version}\nlicense = "{LICENSE}"\n'
        f'backends = ["{BACKEND}"]\n\n[torch]\nstable-abi = "{TORCH}"\nsrc = []\n'
    )
    (output / "README.md").write_text(CARD.replace("VERSION", str(version)))
    return variant


def _written_here(path: Path) -> bool:
    """Whether a build.toml is of this package, and not of somebody's own kernel, which would be lost."""
    return path.exists() and f'name = "{NAME}"' in path.read_text()


def _left_out(folder: str, names: list[str]) -> set[str]:
    """Of a folder of the package what the variant does not have; of the libraries it gets its own."""
    if Path(folder).name == "_native":
        return set(names)
    return {name for name in names if name in LEFT_OUT or name == "__pycache__" or name.endswith((".so", ".pyd"))}


def _digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:10]


if __name__ == "__main__":
    main()
