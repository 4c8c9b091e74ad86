"""Fixtures. Tests that take `backend` run once per entry of the backends table; the unusable ones are skipped with the
reasons that the package itself gives.
"""

import os

# Results must not depend on it (tests/test_determinism.py), and with several pytest workers more threads only cost
# time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Outputs of the native library start as NaN: whatever a kernel does not write is noticed by every test.
os.environ.setdefault("CONVKERNELS_POISON", "1")

import hypothesis
import pytest
import torch

import convkernels

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "package",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("package")


def device_of(name):
    """A device type that the backend runs on, the CPU where it can."""
    devices = convkernels.backends.BACKENDS[name].devices
    return "cpu" if devices is None or "cpu" in devices else devices[0]


@pytest.fixture(params=list(convkernels.backends.BACKENDS))
def backend(request):
    """Name of a backend that runs here; the default device is one that it runs on."""
    name = request.param
    device = device_of(name)
    reasons = convkernels.why_not(name, device=device)
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
def ops(backend):
    """The raw operators of a backend, by name: ops.tap_conv, ops.tap_grad, ops.tap_step."""
    return RawOps(backend)


class RawOps:
    """Handles of torch.ops.convkernels._<name>.<backend>."""

    def __init__(self, backend):
        self.backend = backend
        self.device = device_of(backend)

    def __getattr__(self, name):
        return getattr(getattr(torch.ops.convkernels, f"_{name}"), self.backend)
