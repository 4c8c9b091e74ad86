"""FlopCounterMode sees every op, forward and backward, with the analytic integers."""

import pytest
import torch
from helpers import flops_of

import convkernels as ck
from convkernels.ops.conv.schema import packed

B, T, C, H, K = 2, 11, 12, 3, 5
CALLS = {
    "depthwise": (ck.depthwise_conv1d, (C, K)),
    "lightweight": (ck.lightweight_conv1d, (H, K)),
    "dynamic": (ck.dynamic_conv1d, (B, T, H, K)),
}
ONE_PASS = 2 * B * T * C * K


@pytest.mark.parametrize("function", CALLS)
def test_forward_and_backward(function, backend):
    """A multiply and an add per tap and output; the input side and the weights cost as much again each."""
    call, shape = CALLS[function]
    x, weight = torch.randn(B, T, C), torch.randn(shape)
    assert flops_of(lambda: call(x, weight, backend=backend)) == ONE_PASS
    for requires, passes in (((True, True), 3), ((True, False), 2), ((False, True), 2)):
        leaves = [t.clone().requires_grad_(r) for t, r in zip((x, weight), requires, strict=True)]
        assert flops_of(lambda leaves=leaves: call(*leaves, backend=backend).sum().backward()) == passes * ONE_PASS


def test_gate_state_and_bias_share_the_pass_of_x(backend):
    x, gate = torch.randn(B, T, C), torch.randn(B, T, C, requires_grad=True)
    weight, bias = torch.randn(H, K), torch.randn(C, requires_grad=True)
    state = torch.randn(B, K - 1, C, requires_grad=True)
    total = flops_of(
        lambda: (
            ck.lightweight_conv1d(x, weight, bias, gate=gate, initial_state=state, padding="causal", backend=backend)
            .sum()
            .backward()
        )
    )
    assert total == 2 * ONE_PASS


def test_step(backend):
    state = torch.zeros(B, K - 1, C)
    call = lambda: ck.lightweight_conv1d_step(torch.randn(B, C), state, torch.randn(H, K), backend=backend)  # noqa: E731
    assert flops_of(call) == 2 * B * C * K


def test_public_op(backend):
    op = getattr(torch.ops.convkernels.tap_conv, backend)
    assert flops_of(lambda: op(torch.randn(B, T, C), torch.randn(H, K), 2)) == ONE_PASS


def test_plain_op(backend):
    plain = getattr(torch.ops.convkernels._plain_tap_conv, backend)
    assert flops_of(lambda: plain(torch.randn(B, T, C), torch.randn(H, K), packed(2, 1, True))) == ONE_PASS


def test_vmap_counts_the_folded_work(backend):
    x, weight = torch.randn(4, B, T, C), torch.randn(H, K)
    total = flops_of(lambda: torch.vmap(lambda v: ck.lightweight_conv1d(v, weight, backend=backend))(x))
    assert total == 4 * ONE_PASS


def test_nothing_to_do_costs_nothing(backend):
    assert flops_of(lambda: ck.lightweight_conv1d(torch.randn(0, T, C), torch.randn(H, K), backend=backend)) == 0
