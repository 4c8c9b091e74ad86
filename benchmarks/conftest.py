"""Options of the pytest-benchmark suites. Run them with `pytest benchmarks`; a plain `pytest` runs only the tests."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device to measure on: cpu or cuda")


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def timed(benchmark, device):
    """Benchmark a callable; on a GPU until its work is done."""

    def run(fn):
        if device.type == "cpu":
            return benchmark(fn)

        def synchronised():
            fn()
            torch.cuda.synchronize(device)

        return benchmark(synchronised)

    return run
