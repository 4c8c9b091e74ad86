"""The generator behind weight dropout: published vectors, one mask everywhere, the right rate."""

import numpy as np
import pytest
import torch
from conftest import interpreted

import convkernels as ck
from convkernels.ops import _dtypes
from convkernels.testing.philox import keep_mask, philox4x32

# Known-answer test of Random123 (Salmon et al. 2011) for Philox4x32-10: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    assert tuple(int(word) for word in philox4x32(counter, key)) == expected


def test_reference_generator_draws_the_same_words():
    """The known answer at counter 0, and every coordinate of a small tensor."""
    assert int(_dtypes.philox_uniform_bits(torch.tensor([0]), (1, 1, 1, 1))) == KNOWN[0][2][0]
    seed = torch.tensor([-(2**63) + 12345])
    words = _dtypes.philox_uniform_bits(seed, (2, 3, 2, 9))
    unsigned = int(seed) & 0xFFFFFFFFFFFFFFFF
    for b in range(2):
        for t in range(3):
            for h in range(2):
                for j in range(9):
                    block = philox4x32((t, b, h, j // 4), (unsigned & 0xFFFFFFFF, unsigned >> 32))
                    assert int(words[b, t, h, j]) == int(block[j % 4])


def drawn(backend, kind, batch, length, heads, taps, p, seed):
    """The multipliers a backend applies, read off a convolution with ones: one tap of the input is 1, the others are
    0.
    """
    total = length + taps - 1
    found = torch.zeros(batch, length, heads, taps)
    call = ck.dynamic_conv1d if kind == "dynamic" else ck.lightweight_conv1d
    x = torch.zeros(batch, total, heads)
    for tap in range(taps):
        for t in range(length):
            x.zero_()
            x[:, t + tap] = 1.0
            weight = torch.ones(heads, taps) if kind == "light" else torch.ones(batch, total, heads, taps)
            y = call(x, weight, softmax=False, weight_dropout=p, training=True, seed=seed, padding=0, backend=backend)
            found[:, t, :, tap] = y[:, t]
    return found


@pytest.mark.parametrize("p", [0.0, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["light", "dynamic"])
@pytest.mark.parametrize("seed", [0, 1, 2**40 + 17, -1])
def test_every_backend_applies_the_documented_mask(kind, p, seed, backend):
    batch, length, heads, taps = 2, 3, 2, 6
    found = drawn(backend, kind, batch, length, heads, taps, p, torch.tensor([seed]))
    rows = (1, 1) if kind == "light" else (batch, length)
    keep = torch.as_tensor(keep_mask(seed, p, *rows, heads, taps)) if p else torch.ones(*rows, heads, taps, dtype=bool)
    scale = 1 / (1 - p) if p < 1 else 0.0
    torch.testing.assert_close(found, (keep * scale).to(found).expand_as(found), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["light", "dynamic"])
def test_backward_uses_the_mask_of_forward(kind, backend):
    """Raw weights: y is linear in the kept weights, so a dropped weight has gradient zero and a kept one has not."""
    x = torch.rand(2, 9, 4) + 0.5
    shape = (2, 5) if kind == "light" else (2, 9, 2, 5)
    weight = torch.ones(shape, requires_grad=True)
    call = ck.dynamic_conv1d if kind == "dynamic" else ck.lightweight_conv1d
    seed = torch.tensor([99])
    y = call(x, weight, softmax=False, weight_dropout=0.5, training=True, seed=seed, padding=0, backend=backend)
    y.sum().backward()
    rows = (1, 1) if kind == "light" else (2, 9)
    keep = torch.as_tensor(keep_mask(99, 0.5, *rows, 2, 5)).to(weight.device)
    keep = keep[0, 0] if kind == "light" else keep
    inside = torch.ones_like(keep)
    if kind == "dynamic":
        inside = inside & (torch.arange(9)[:, None, None] + torch.arange(5) < 9)
    assert torch.equal(weight.grad != 0, keep & inside)


def test_keep_rate(backend):
    """400,000 draws (8,000 in the interpreter): five standard deviations around 1-p."""
    length, taps = (50, 20) if interpreted(backend) else (500, 100)
    for p in (0.1, 0.5, 0.9):
        leaf = torch.ones(2, length, 4, taps).requires_grad_()
        x = torch.ones(2, length, 4)
        y = ck.dynamic_conv1d(
            x, leaf, softmax=False, weight_dropout=p, training=True, seed=torch.tensor([5]), padding=0, backend=backend
        )
        y.sum().backward()
        inside = (torch.arange(length)[:, None, None] + torch.arange(taps) < length).expand(2, length, 4, taps)
        kept = (leaf.grad[inside] != 0).double()
        deviation = (p * (1 - p) / kept.numel()) ** 0.5
        assert abs(kept.mean().item() - (1 - p)) < 5 * deviation


def test_dropout_needs_training(backend):
    x, weight = torch.randn(1, 6, 4), torch.randn(2, 3)
    plain = ck.lightweight_conv1d(x, weight, backend=backend)
    assert torch.equal(ck.lightweight_conv1d(x, weight, weight_dropout=0.9, backend=backend), plain)
    torch.manual_seed(1)
    first = ck.lightweight_conv1d(x, weight, weight_dropout=0.5, training=True, backend=backend)
    second = ck.lightweight_conv1d(x, weight, weight_dropout=0.5, training=True, backend=backend)
    torch.manual_seed(1)
    again = ck.lightweight_conv1d(x, weight, weight_dropout=0.5, training=True, backend=backend)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_mask_is_uniform_over_words():
    """No word of a block is favoured."""
    keep = keep_mask(7, 0.5, 1, 4000, 1, 4)
    assert np.abs(keep.mean((0, 1, 2)) - 0.5).max() < 0.05
