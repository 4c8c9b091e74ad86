"""FlopCounterMode sees attention, forward and backward, with the analytic integers."""

import torch
from attention_inputs import B, D, H, T
from helpers import flops_of

import convkernels as ck

OP = "attention_grad"


def test_flops(backend):
    S, G, R, E = 7, 2, 5, 3
    q, k, v = (torch.randn(B, n, h, D, requires_grad=True) for n, h in ((T, H), (S, G), (S, G)))
    terms = dict(query_rel=torch.randn(R, E), rel_query=torch.randn(B, T, H, R), key_rel=torch.randn(H, D, E),
                 bias=torch.randn(H, E), value_conv=torch.randn(H, D, E))  # fmt: skip
    pairs, taps = 2 * B * H * T * S * D, 2 * B * H * T * D * E
    by_query, by_key = 2 * B * H * T * R * E, 2 * B * H * S * D * E

    def call(**more):
        return ck.composite_attention(q, k, v, backend=backend, **more)

    with torch.no_grad():
        assert flops_of(call) == 2 * pairs
        assert flops_of(lambda: call(**terms)) == 2 * pairs + by_query + by_key + taps
        assert flops_of(lambda: call(bias=terms["bias"], qk=False)) == pairs
    assert flops_of(lambda: call().sum().backward()) == 2 * pairs + 5 * pairs
    forward = 2 * pairs + by_query + by_key + taps
    every = {name: value.requires_grad_() for name, value in terms.items()}
    backward = 5 * pairs + 3 * by_query + 3 * by_key + 2 * taps
    assert flops_of(lambda: call(**every).sum().backward()) == forward + backward
    q.requires_grad_(False), k.requires_grad_(False)
    assert flops_of(lambda: call().sum().backward()) == 2 * pairs + 2 * pairs
