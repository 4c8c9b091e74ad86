"""What the adapters of several families use."""

import torch
from torch import Tensor, nn

from ....ops._validate import fail
from ..attention import NAME, refuse

OPTIMIZED = "a model that optimize changed"
# Arguments that reach attention modules and change nothing in them.
_HARMLESS = (
    "cache_position", "num_items_in_batch", "output_hidden_states", "output_router_logits", "position_ids", "use_cache",
)  # fmt: skip


def refuse_options(options: dict) -> None:
    """NotImplementedError for an option of a module that asks for something, such as attention weights."""
    refuse(OPTIMIZED, {name: value for name, value in options.items() if name not in _HARMLESS}, " (restore it)")


def expect_interface(module: nn.Module) -> None:
    """An error where the model has got another attention function since, which cannot read what ours is given."""
    implementation = module.config._attn_implementation
    if implementation != NAME:
        fail(OPTIMIZED, "attn_implementation", f"{NAME!r} (restore it before it gets another)", repr(implementation))


def rows(embedding: nn.Embedding, device: torch.device, count: int | None = None) -> Tensor:
    """Its weight, by a call, which tools that keep weights elsewhere wait for."""
    return embedding(torch.arange(embedding.num_embeddings if count is None else count, device=device))


def heads(x: Tensor, size: int) -> Tensor:
    """[B,T,C] as [B,T,H,D]."""
    return x.unflatten(-1, (-1, size))
