"""Fixtures. Tests that take `backend` run once per entry of the backends table; the unusable ones are skipped with the
reasons that the package itself gives.
"""

import collections
import importlib.util
import os
import signal
import sys
import types

# Results do not depend on the number of threads (tests/test_determinism.py), and several pytest workers with more
# threads each are slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Outputs of the native library start as NaN, so that every test notices elements that a kernel does not write.
os.environ.setdefault("CONVKERNELS_POISON", "1")
# Without this, torch's own matrix products may differ from run to run on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import instruction_sets
import pytest
import torch
from sample_texts import NOVELS, sentences
from training_scripts import once

import convkernels
from convkernels.testing.compare import Operators

torch.set_num_threads(1)
# A shell has what it starts in the background ignore Ctrl-C, which tests send to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Results are compared with float32, which TF32 is not.
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


QUICK = False
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from quick_interpreter import quicken
    from triton.runtime import interpreter

    QUICK = quicken(interpreter)


def pytest_addoption(parser):
    parser.addoption(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="of the cases of each test run the first and then every N-th (kernels for GPUs are slow on a CPU)",
    )
    parser.addoption("--full", action="store_true", help="also the cases that tests marked thin(n) leave out")
    parser.addoption(
        "--require", metavar="BACKEND", help="fail where this backend does not run, instead of skipping tests"
    )
    parser.addoption(
        "--second-device",
        action="store_true",
        help="with the kernels simulated: fail where tensors of the host meet those that a GPU would have",
    )


def pytest_configure(config):
    if config.getoption("--second-device"):
        import second_device

        config.pluginmanager.register(second_device)
        _SIMULATED.device = str(second_device.DEVICE)
    if required := config.getoption("--require"):
        reasons = {
            op: convkernels.why_not(required, op=op, device=device_of(required)) for op in ("tap_conv", "attention")
        }
        if any(reasons.values()):
            raise pytest.UsageError(f"--require {required}: {reasons}")


@pytest.hookimpl(trylast=True)  # after -k and -m have made their choice
def pytest_collection_modifyitems(config, items):
    every, full = config.getoption("--every"), config.getoption("--full")
    seen, kept, dropped = collections.Counter(), [], []
    for item in items:
        case = getattr(item, "callspec", None)
        test = item.nodeid.partition("[")[0], case and case.params.get("backend")
        thin = None if full else item.get_closest_marker("thin")
        step = every if thin is None else max(every, *thin.args)
        (kept if seen[test] % step == 0 else dropped).append(item)
        seen[test] += 1
    if dropped:
        items[:] = kept
        config.hook.pytest_deselected(items=dropped)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """An error that a kernel leaves behind belongs to the test that launched it, and ends this process, since no call
    of CUDA works in it any more. pytest-xdist starts another for the tests that are left."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            raise
        # pytest captures standard error here, and that text is lost when the process ends.
        with item.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"{item.nodeid}: {error}", file=sys.stderr, flush=True)
        os._exit(70)


_SIMULATED = types.SimpleNamespace(device="cpu")  # the device of simulated kernels


def device_of(name):
    """A device that the backend runs on, the CPU where it can."""
    if simulated(name):
        return _SIMULATED.device
    devices = convkernels.backends.BACKENDS[name].devices
    return "cpu" if devices is None or "cpu" in devices else devices[0]


def interpreted(name):
    """Whether the backend's kernels run in Triton's interpreter: as they are, and slowly."""
    return name == "triton" and device_of(name) == "cpu"


def simulated(name):
    """Whether the backend's kernels are the CUDA ones on the CPU, which is slow: a fiber switch at each wait."""
    return name == "cuda" and "cpu" in convkernels.backends.BACKENDS[name].devices


@pytest.fixture(params=list(convkernels.backends.BACKENDS))
def backend(request):
    """Name of a backend that runs here; the default device is one that it runs on. A module whose tests need another
    operator than the convolution names it: OP = "attention_grad"."""
    name = request.param
    device = device_of(name)
    reasons = convkernels.why_not(name, op=getattr(request.module, "OP", "tap_conv"), device=device)
    if reasons:
        pytest.skip("; ".join(reasons))
    if device == "cpu":
        yield name
        return
    before = torch.get_default_device()
    torch.set_default_device(device)
    yield name
    torch.set_default_device(before)


@pytest.fixture
def ops(backend, request):
    """The raw operators of a backend, by name: ops.tap_conv, ops.tap_grad, ops.tap_step, ..."""
    return RawOps(backend, request.config.getoption("--full"))


class RawOps(Operators):
    """slow: tests run fewer repeats, because the backend is the reference, runs GPU kernels on a CPU, or runs the C++
    kernels a second time, under a sanitizer or on a lower instruction set. full: --full is given, for more repeats."""

    def __init__(self, backend, full):
        super().__init__(backend)
        self.full = full
        self.device = device_of(backend)
        self.interpreted = interpreted(backend)
        self.simulated = simulated(backend)
        sanitized = "libasan" in os.environ.get("LD_PRELOAD", "")  # scripts/run_asan.sh
        again = sanitized or "CONVKERNELS_CPU_ISA" in os.environ
        self.slow = backend == "reference" or self.interpreted or self.simulated or again


@pytest.fixture(params=instruction_sets.NAMES)
def isa(request):
    reasons = convkernels.why_not("cpu")
    if reasons:
        pytest.skip("; ".join(reasons))
    if request.param not in instruction_sets.available():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


@pytest.fixture
def lower_isa(isa):
    """Not the best instruction set: the rest of the suite runs on that."""
    if isa == instruction_sets.available()[-1]:
        pytest.skip("the suite itself runs on it")
    return isa


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """Folders of a tokenizer of each kind."""
    import train_tokenizer

    found = {}
    for kind in ("seq2seq", "bert"):
        folder = tmp_path_factory.mktemp(kind)
        made = train_tokenizer.train(train_tokenizer.Arguments([str(NOVELS)], str(folder), kind, 700, 32))
        made.save_pretrained(folder)
        found[kind] = folder
    return found


@pytest.fixture(scope="session")
def tables(tmp_path_factory):
    """Tables made of real sentences: questions or not, pairs that follow each other or not."""
    folder, lines = tmp_path_factory.mktemp("tables"), sentences(200)
    rows = {"question": ["text\tlabel"], "follows": ["first\tsecond\tlabel"]}
    for i, line in enumerate(lines[:-1]):
        line = line.replace("\t", " ")
        rows["question"].append(f"{line}\t{'yes' if '?' in line or i % 7 == 0 else 'no'}")
        rows["follows"].append(f"{line}\t{lines[i + 1] if i % 2 else lines[-i]}\t{i % 2}")
    for name, content in rows.items():
        (folder / f"{name}.tsv").write_text("\n".join(content) + "\n")
    return folder


@pytest.fixture
def run(monkeypatch):
    """Runs a script in this process."""

    def call(script, *options):
        monkeypatch.setattr("sys.argv", [script.__name__, *once(options)])
        script.run()

    return call
