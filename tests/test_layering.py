"""The house rules: data flows one way, importing is cheap, and every backend is complete."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convkernels as ck
from convkernels import backends

PACKAGE = Path(ck.__file__).parent
ROOT = PACKAGE.parent

# Who may import whom, most specific prefix first. A module may always import itself, its own sub-modules, torch and
# the standard library.
ALLOWED = {
    "convkernels.testing": {"numpy", "safetensors"},
    "convkernels.backends.triton": {"triton", "convkernels.backends.switches"},
    "convkernels.backends": {"convkernels._C"},
    "convkernels.ops": {"convkernels.backends"},
    "convkernels.nn": {"convkernels.ops"},
    "convkernels.models": {"convkernels.nn", "convkernels.ops", "transformers"},
    "convkernels.interop": {"convkernels.models", "convkernels.nn", "convkernels.ops", "numpy", "transformers"},
}
FREE = ("convkernels.cli", "convkernels.__main__")


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Absolute names of everything a file imports, also inside functions."""
    package = path.relative_to(PACKAGE.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            stem = f"{base}.{node.module}" if base and node.module else base or node.module
            for alias in node.names:
                joined = f"{stem}.{alias.name}"
                target = ROOT.joinpath(*joined.split("."))
                is_module = target.with_suffix(".py").exists() or (target / "__init__.py").exists()
                yield joined if is_module else stem


FILES = sorted(PACKAGE.rglob("*.py"))


def test_the_package_does_not_need_its_benchmarks():
    """They are not installed: nothing imports them, and only the command line names them, to start them."""
    for path in FILES:
        assert not [name for name in imports(path) if name.split(".")[0] in ("benchmarks", "scripts", "tests")], path
        named = '"benchmarks"' in path.read_text()
        assert named == (path == PACKAGE / "cli" / "__init__.py"), path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_one_way(path):
    name = module_name(path)
    if name == "convkernels" or name.startswith(FREE):
        return
    owner = next((prefix for prefix in ALLOWED if name == prefix or name.startswith(f"{prefix}.")), None)
    for imported in imports(path):
        top = imported.split(".")[0]
        if top in sys.stdlib_module_names or top == "torch":
            continue
        if imported in ("convkernels._version", "convkernels._namespace"):
            continue
        assert owner is not None, f"{name}: where may it import {imported} from? Add it to the table"
        fine = {owner, *ALLOWED[owner]}
        assert any(imported == f or imported.startswith(f"{f}.") for f in fine), f"{name} must not import {imported}"


def test_backends_do_not_know_each_other():
    for path in (PACKAGE / "backends").rglob("*.py"):
        own = module_name(path)
        siblings = {entry.module for entry in backends.BACKENDS.values() if entry.module}
        siblings = {name for name in siblings if own != name and not own.startswith(f"{name}.")}
        assert not siblings & set(imports(path)), own


def test_operators_do_not_know_each_other():
    """conv/ and attention/ are rooms beside each other wherever they are; what both use stands above them."""
    for path in FILES:
        rooms = {"conv", "attention"} & set(path.relative_to(PACKAGE).parts[:-1])
        for imported in imports(path) if rooms else ():
            assert not ({"conv", "attention"} - rooms) & set(imported.split(".")), f"{path}: {imported}"
    for path in (ROOT / "csrc").rglob("*.*"):
        rooms = {"conv", "attention"} & set(path.relative_to(ROOT).parts)
        for included in re.findall(r'^ *#include "csrc/(.+)"', path.read_text(), re.M) if rooms else ():
            assert not ({"conv", "attention"} - rooms) & set(included.split("/")), f"{path}: {included}"
    shared = [*(ROOT / "csrc/cuda/device").glob("*.cuh"), *(ROOT / "csrc/cuda/device").glob("*.h")]
    assert shared and not [
        path for path in shared if re.search(r'#include "csrc/cuda/(conv|attention)/', path.read_text())
    ]


def python(code, **environment):
    """Runs code in a fresh interpreter; returns what it prints."""
    import os

    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = ("triton", "transformers", "matplotlib", "pytest", "rich", "safetensors", "torch._dynamo",
         "torch._inductor")  # fmt: skip


def test_cold_import():
    """Neither importing the package nor a first call on the CPU loads anything heavy beside torch."""
    loaded = python(f"""
import sys, torch
before = set(sys.modules)
import convkernels, convkernels.nn, convkernels.interop, convkernels.interop.fairseq
y = convkernels.lightweight_conv1d(torch.randn(1, 4, 4), torch.randn(2, 3), backend="reference")
new = set(sys.modules) - before
print([m for m in {HEAVY!r} if any(n == m or n.startswith(m + ".") for n in new)])
""")
    assert loaded == "[]"


def test_parts_are_imported_when_they_are_named():
    """import convkernels is enough; without transformers what needs it says how to install it."""
    assert (
        python("""
import sys, torch, convkernels as ck
sys.modules["transformers"] = None
assert not any(f"convkernels.{name}" in sys.modules for name in ("nn", "models", "interop"))
assert {"nn", "models", "interop"} <= set(dir(ck)) and not hasattr(ck, "nothing")
assert ck.nn.LightweightConv1d and ck.interop.fairseq.LightweightConv1dTBC and not hasattr(ck.interop, "nothing")
assert ck.models.__name__ == "convkernels.models"
for ask in (lambda: ck.interop.huggingface, lambda: ck.models.ConvSeq2SeqConfig):
    try:
        ask()
    except ImportError as error:
        assert "needs transformers: pip install" in str(error)
        print("told")
""")
        == "told\ntold"
    )


def test_import_with_optional_packages_blocked():
    """The package works where no extra is installed."""
    assert (
        python("""
import sys
for name in ("triton", "transformers", "matplotlib", "rich", "safetensors", "pytest", "numpy",
"pybind11"):
    sys.modules[name] = None
import torch, convkernels, convkernels.nn, convkernels.models, convkernels.interop.fairseq
print(tuple(convkernels.nn.LightweightConv1d(4, 3, 2, backend="reference")(torch.randn(1, 5, 4)).shape))
""")
        == "(1, 5, 4)"
    )


def test_works_without_the_python_extension_module():
    assert (
        python("""
import sys
sys.modules["convkernels._C"] = None
import torch, convkernels
print(len(convkernels.why_not("reference")))
""")
        == "0"
    )


def test_table_of_backends():
    assert list(backends.BACKENDS) == list(backends.names())
    for name, entry in backends.BACKENDS.items():
        assert entry.name == name and entry.dtypes
        assert all(isinstance(d, torch.dtype) for d in entry.dtypes)
        if entry.module is not None:
            stem = ROOT.joinpath(*entry.module.split("."))
            path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
            defined = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}
            assert "load" in defined, f"{entry.module} has no load()"


@pytest.mark.parametrize("name", list(backends.BACKENDS))
@pytest.mark.parametrize("op", ["tap_conv", "tap_activation_grad", "tap_grad", "tap_step"])
def test_every_backend_has_every_op_with_one_schema(op, name):
    """Parity: the same schema under both names for all backends, so they are interchangeable."""

    def schema(full, backend):
        text = str(getattr(getattr(torch.ops.convkernels, full), backend)._schema)
        return text[text.index("(") :]

    reference = schema(op, "reference")
    assert schema(op, name) == schema(f"_{op}", name) == reference
    if not ck.why_not(name):
        for full in (op, f"_{op}"):
            overload = getattr(getattr(torch.ops.convkernels, full), name)
            entry = backends.BACKENDS[name]
            key = entry.dispatch_key or entry.devices[0].upper()
            assert torch._C._dispatch_has_kernel_for_dispatch_key(overload._schema.name + f".{name}", key)


@pytest.mark.parametrize("name", list(backends.BACKENDS))
@pytest.mark.parametrize("op", ["attention", "attention_grad"])
def test_every_backend_may_implement_attention(op, name):
    """The schemas are there, under both names; whether a kernel is, why_not tells."""
    overloads = [getattr(getattr(torch.ops.convkernels, full), name) for full in (op, f"_{op}")]
    reference = str(getattr(torch.ops.convkernels, op).reference._schema)
    texts = {str(overload._schema) for overload in overloads} | {reference}
    assert len({text[text.index("(") :] for text in texts}) == 1
    if not ck.why_not(name, op=op):
        entry = backends.BACKENDS[name]
        key = entry.dispatch_key or entry.devices[0].upper()
        for overload in overloads:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{overload._schema.name}.{name}", key)


def test_public_names():
    assert set(ck.__all__) <= set(dir(ck))
    for name in ck.__all__:
        value = getattr(ck, name)
        if callable(value):
            assert value.__doc__ and len(value.__doc__) > 80, f"{name} is not documented"
    assert (PACKAGE / "py.typed").exists()


def test_no_workplace_left_in_the_sources():
    """No absolute paths of one machine in anything that is shipped."""
    for path in (*FILES, *(ROOT / "csrc").rglob("*.*"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"):
        if path.suffix in (".py", ".h", ".cpp", ".md", ".cu", ".cuh"):
            text = path.read_text()
            assert "/home/" not in text and "/root/" not in text, path
