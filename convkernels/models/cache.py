"""What decoding keeps between steps, as layers of transformers' caches."""

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, EncoderDecoderCache


class ConvState(CacheLayerMixin):
    """The last inputs of one causal convolution, [B, dilation*(K-1), C]: of the same size at every step.

    Beam search reorders it without a copy: the rows to continue from go to the next step's kernel.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.state: Tensor | None = None
        self.rows: Tensor | None = None  # row b continues from rows[b]; None: from b
        self.length = 0

    def step(self, block, x: Tensor) -> Tensor:
        """One position through ``block``, x [B,1,C]; without gradient."""
        if self.state is None:
            self.state = block.init_state(x.shape[0], device=x.device)
        y = block.step(x[:, 0], self.state, state_index=self.rows)
        self.rows, self.length = None, self.length + 1
        return y[:, None]

    def extend(self, forward, x: Tensor, mask: Tensor | None) -> Tensor:
        """Several positions through a block's ``forward``, x [B,T,C]."""
        y, state = forward(x, mask, initial_state=self._select(), return_state=True)
        self.state, self.length = state.contiguous(), self.length + x.shape[1]
        return y

    def _select(self) -> Tensor | None:
        if self.rows is not None:
            self.state, self.rows = self.state.index_select(0, self.rows), None
        return self.state

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("ConvState: a convolution has no keys and values")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        raise NotImplementedError("ConvState: a convolution has no keys and values")

    def reset(self) -> None:
        self.state, self.rows, self.length = None, None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            beam_idx = beam_idx.to(self.state.device, torch.int64)
            self.rows = beam_idx if self.rows is None else self.rows[beam_idx]

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._select() is not None:
            self.state = self.state[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._select() is not None:
            self.state = self.state.repeat_interleave(repeats, 0)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise NotImplementedError("ConvState.crop: a convolution's state does not hold what came before it")

    def offload(self) -> None:
        raise NotImplementedError("ConvState.offload: the state of a convolution is small and stays where it is")


def decoder_cache(config) -> EncoderDecoderCache:
    """An empty cache for a ConvSeq2Seq decoder."""
    own = DynamicCache()
    kind = DynamicLayer if config.mixer == "transformer" else ConvState
    own.layers = [kind() for _ in range(config.decoder_layers)]
    return EncoderDecoderCache(own, DynamicCache())


def attention_update(layer: DynamicLayer | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """All keys and values so far, [B,S,H,D], after adding k and v; transformers keeps them as [B,H,S,D]."""
    if layer is None:
        return k, v
    k, v = layer.update(k.transpose(1, 2), v.transpose(1, 2))
    return k.transpose(1, 2), v.transpose(1, 2)


def may_step(x: Tensor) -> bool:
    """Whether x [B,T,C] can go through a step, which has no gradient."""
    return x.shape[1] == 1 and not torch.is_grad_enabled()
