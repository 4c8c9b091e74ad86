"""The package as a repository of the Hugging Face ``kernels`` library, loaded by that library."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("kernels")
import hub_kernel

import convkernels as ck
from convkernels.backends.library import path_of

pytestmark = pytest.mark.skipif(bool(ck.why_not("cpu")), reason="the CPU kernels are not built")

LOADED = """
import sys
from pathlib import Path

import torch
from kernels import get_local_kernel

repository, installed = Path(sys.argv[1]), sys.argv[2] == "beside"
if installed:
    import convkernels
kernel = get_local_kernel(repository)
assert kernel.__name__.startswith("_convkernels_cpu_") and kernel.__file__.startswith(str(repository))
assert not kernel.why_not("cpu"), kernel.why_not("cpu")
assert installed or not any(name.partition(".")[0] == "convkernels" for name in sys.modules)
x, weight = torch.randn(2, 9, 8, requires_grad=True), torch.randn(8, 4, requires_grad=True)
y = kernel.depthwise_conv1d(x, weight, padding="causal", backend="cpu")
expected = torch.nn.functional.conv1d(x.transpose(1, 2), weight[:, None], padding=3, groups=8)[..., :9].transpose(1, 2)
torch.testing.assert_close(y, expected)
for found, wanted in zip(*(torch.autograd.grad(v.square().sum(), (x, weight)) for v in (y, expected)), strict=True):
    torch.testing.assert_close(found, wanted)
q, bias = torch.randn(1, 9, 2, 4), torch.randn(2, 5)
attended = kernel.composite_attention(q, q, q, bias=bias, window=(2, 2), backend="cpu")
silu = kernel.causal_conv1d_fn(x.mT, weight, activation="silu")
torch.testing.assert_close(silu, torch.nn.functional.silu(expected).mT)
compiled = torch.compile(lambda x: kernel.depthwise_conv1d(x, weight), backend="aot_eager", fullgraph=True)
assert torch.equal(compiled(x), kernel.depthwise_conv1d(x, weight))
if installed:
    assert torch.equal(attended, convkernels.composite_attention(q, q, q, bias=bias, window=(2, 2), backend="cpu"))
    assert kernel.depthwise_conv1d is not convkernels.depthwise_conv1d
print("loaded")
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "repository"
    hub_kernel.main([str(folder)])
    return folder


@pytest.mark.parametrize("how", ["alone", "beside"])
def test_its_loader_loads_it(repository, how, tmp_path):
    """With and without an installed convkernels in the process."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOADED, str(repository), how], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, "loaded\n"), done.stderr


def test_layout(repository):
    """What its library reads; nothing but one variant, whose name says where it runs, and no package beside torch."""
    from kernels._rust import Build, Metadata

    assert [str(backend) for backend in Build.open(repository).general.backends] == ["cpu"]
    (variant,) = (repository / "build").iterdir()
    metadata = Metadata.read_from_file(variant / "metadata.json")
    assert variant.name.startswith("torch-stable-abi210-cpu-") and metadata.id.isidentifier()
    assert {path.name for path in (variant / "_native").iterdir()} == {path_of("cpu").name}
    assert not {"cli", "models", "testing"} & {path.name for path in variant.iterdir()}
    assert f'NAMESPACE = "{metadata.id}"' in (variant / "_namespace.py").read_text()


def test_the_namespace_follows_the_contents(repository, tmp_path, monkeypatch):
    def name(folder):
        return json.loads(next(folder.glob("build/*/metadata.json")).read_text())["id"]

    hub_kernel.main([str(tmp_path / "same")])
    other = tmp_path / path_of("cpu").name
    other.write_bytes(path_of("cpu").read_bytes() + b"\0")
    hub_kernel.write(tmp_path / "other", other)
    assert name(tmp_path / "same") == name(repository) != name(tmp_path / "other")


@pytest.mark.parametrize("name", ["precious", "build.toml"])
def test_nothing_else_is_replaced(name, tmp_path, capsys):
    (tmp_path / name).write_text('[general]\nname = "relu"\n')
    with pytest.raises(SystemExit):
        hub_kernel.main([str(tmp_path)])
    assert "expected an empty folder, or one that this program has written" in capsys.readouterr().err
    assert (tmp_path / name).exists()
