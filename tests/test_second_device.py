"""The device that stands for a GPU where there is none: it refuses what a GPU would, and nothing else."""

import pytest
import torch
from second_device import DEVICE, SecondDevice, WrongDevice

import convkernels

HOST = torch.ones(2, 3)


@pytest.fixture
def second():
    with SecondDevice() as mode, DEVICE:
        yield mode


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x + HOST,
        lambda x: x + x.cpu(),
        lambda x: torch.equal(x, torch.ones(2, 3, device="cpu")),
        lambda x: torch.cat([x.T.contiguous().T * 2, HOST]),
        lambda x: torch.func.vmap(torch.add)(x, HOST),
        lambda x: x.numpy(),
        lambda x: torch.rand(2, generator=torch.Generator().manual_seed(1)),
        lambda x: x.uniform_(generator=torch.Generator().manual_seed(1)),
        lambda x: HOST[x.long()],
        lambda x: torch.testing.assert_close(x, HOST),
    ],
)
def test_refuses(call, second):
    with pytest.raises((WrongDevice, AssertionError)):
        call(torch.ones(2, 3))


def test_allows(second):
    x = torch.ones(2, 3)
    assert x.device == x.T.device == (2 * x).device == torch.zeros_like(x).device == HOST.to(x.device).device == DEVICE
    assert x.cpu().device == HOST.device == x.to("cpu").device == torch.empty(2, device="cpu").device != DEVICE
    assert torch.equal(x.cpu(), HOST) and torch.equal(x, torch.as_tensor(HOST)) and x.cpu().numpy().sum() == 6
    x += torch.tensor(1.0, device="cpu")
    x.copy_(HOST)
    with torch.device("cpu"):
        torch.rand(2, generator=torch.Generator().manual_seed(1)) + torch.ones(2)
    leaf = x.clone().requires_grad_()
    leaf.square().sum().backward()
    assert leaf.grad.device == torch.func.grad(lambda t: t.sum())(x).device == DEVICE
    with torch.device("cpu"):
        layer = torch.nn.Linear(3, 2)
    assert layer.to(DEVICE).weight.device == layer(x).device == DEVICE
    assert not second.refused


def test_operators_of_the_host_are_left_alone(second):
    x, weight = torch.ones(1, 3, 2, device="cpu"), torch.ones(1, 3, device="cpu")
    assert convkernels.lightweight_conv1d(x, weight, backend="reference").device.index is None
