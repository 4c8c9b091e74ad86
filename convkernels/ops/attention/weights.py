"""The weights that ``composite_attention`` gives its values; the kernels themselves never hold them."""

import torch
from torch import Tensor

from .api import composite_attention


def attention_weights(q: Tensor, k: Tensor, **options) -> Tensor:
    """q [B,T,H,D], k [B,S,G,D] and arguments of ``composite_attention`` but those of the values -> [B,H,T,S].

    Attention is linear in the values: where these are unit vectors, the output is their weights. D keys at a time, so
    this costs S/D passes, and memory for T*S numbers per head. A row that sees no key is zero.
    """
    B, S, G, D = k.shape
    unit = torch.eye(S, S + -S % D, dtype=q.dtype, device=q.device)
    parts = [
        composite_attention(q, k, columns[None, :, None].expand(B, S, G, D), **options)
        for columns in unit.split(D, dim=1)
    ]
    return torch.cat(parts, -1)[..., :S].transpose(1, 2) if parts else q.new_zeros(B, q.shape[2], q.shape[1], 0)
