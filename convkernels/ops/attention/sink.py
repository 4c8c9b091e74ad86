"""A term of the softmax's denominator that belongs to no key."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .._functorch import recording, transforming


def sunk(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """What attention gives when its softmax has one more score, whose value is 0.

        total[b,h,i] = log(exp(lse) + exp(s)),     out * exp(lse - total),     s = sink[h] or sink[b,i,h]

    out: [B,T,H,D], overwritten where nothing is recorded. lse: [B,H,T], log(sum_j exp(s_j)), -inf where a query sees no
        key. sink: [H] or [B,T,H].
    Returns the new out, of the same dtype, and total. Gradients are finite where lse or the sink is infinite.
    """
    s = (sink[:, None] if sink.dim() == 1 else sink.transpose(1, 2)).to(lse.dtype)
    blind = lse == float("-inf")
    above = torch.where(blind, 0.0, lse - s)
    share = torch.where(blind, 0.0, torch.sigmoid(above)).transpose(1, 2)[..., None]
    total = torch.where(blind, s, lse - logsigmoid(above))
    if transforming() or recording((out, sink)):
        return (out * share).to(out.dtype), total
    return out.mul_(share), total
