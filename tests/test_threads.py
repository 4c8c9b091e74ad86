"""Several Python threads at once, worker processes, and the note on fork."""

import multiprocessing
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import device_of, interpreted

import convkernels as ck
from convkernels.testing.inputs import values


def on_a_gpu(backend):
    return device_of(backend) != "cpu"


def problem(salt):
    x = values((2, 65, 24), torch.float32, salt).clone().requires_grad_()
    weight = values((3, 7), torch.float32, salt + 100).clone().requires_grad_()
    return x, weight


def forward_backward(x, weight, backend):
    y = ck.lightweight_conv1d(x, weight, backend=backend)
    return (y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight)))


def test_four_python_threads(backend):
    """Each thread its own problem, many times; results are those of one thread."""
    expected = [forward_backward(*problem(n), backend) for n in range(4)]
    start = threading.Barrier(4)

    def work(n):
        torch.set_default_device(device_of(backend))  # a thread has its own
        start.wait()
        return all(
            torch.equal(a, b)
            for _ in range(3 if interpreted(backend) else 50)
            for a, b in zip(forward_backward(*problem(n), backend), expected[n], strict=True)
        )

    with ThreadPoolExecutor(4) as pool:  # which hands on what a thread raises
        assert list(pool.map(work, range(4))) == [True] * 4


def in_child(backend, queue):
    torch.set_num_threads(1)
    queue.put([t.numpy() for t in forward_backward(*problem(0), backend)])


def in_forked_child(backend, queue):
    """A process of its own forks: in one whose backward passes have met another device, as those of the other tests may
    have, autograd has threads, and torch refuses backward passes after a fork."""
    forward_backward(*problem(0), backend)
    process = multiprocessing.get_context("fork").Process(target=in_child, args=(backend, queue))
    process.start()
    process.join(120)
    sys.exit(process.exitcode)


@pytest.mark.parametrize("target", [in_child, in_forked_child], ids=["spawn", "fork"])
def test_worker_processes(target, backend):
    """spawn always works. A forked child works with one thread: after a fork OpenMP's pool is gone, for PyTorch's own
    kernels too, so that a child has to call torch.set_num_threads(1) first, as DataLoader workers do.
    """
    if on_a_gpu(backend):
        pytest.skip("CUDA cannot be used after a fork, nor shared with a process that is started here")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=target, args=(backend, queue))
    process.start()
    found = queue.get(timeout=120)
    process.join(120)
    assert process.exitcode == 0
    for a, b in zip(found, forward_backward(*problem(0), backend), strict=True):
        assert torch.equal(torch.from_numpy(a), b)


class Windows(torch.utils.data.Dataset):
    def __init__(self, backend):
        self.backend = backend

    def __len__(self):
        return 6

    def __getitem__(self, index):
        with torch.no_grad():
            return ck.lightweight_conv1d(problem(index)[0][:1], problem(index)[1], backend=self.backend)[0]


def test_data_loader_workers(backend):
    if on_a_gpu(backend):
        pytest.skip("workers that are forked cannot use CUDA")
    loaded = torch.stack(list(torch.utils.data.DataLoader(Windows(backend), batch_size=None, num_workers=2)))
    assert torch.equal(loaded, torch.stack([Windows(backend)[n] for n in range(6)]))
