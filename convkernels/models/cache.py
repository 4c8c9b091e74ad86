"""The cache of decoding: the state of a convolution as a layer of transformers' caches, and checks of caches."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, EncoderDecoderCache

from ..ops._validate import fail
from .base import CACHE


class ConvState(CacheLayerMixin):
    """The last inputs of one causal convolution, [B, dilation*(K-1), C]: of the same size at every step.

    Beam search reorders it without a copy: the next step reads the rows to continue from by their index. Assisted
    decoding takes positions back (``crop``); for this the state can record its inputs since the last ``crop``.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.state: Tensor | None = None
        self.rows: Tensor | None = None  # row b continues from rows[b]; None: from b
        self.length = 0
        self.record_past = False
        self.past: list[tuple] = []  # calls since the last crop: x, mask, the state before them
        self.again: tuple | None = None  # a part of a call that is to be repeated from ``state`` on: x, mask

    def step(self, block, x: Tensor, mask: Tensor | None) -> Tensor:
        """One position through ``block``, x [B,1,C], mask bool [B,1]; without gradient."""
        self._repeat(block.forward_with_state)
        if self.state is None:
            self.state = block.init_state(x.shape[0], dtype=x.dtype, device=x.device)
        mask = None if mask is None else mask[:, 0]
        y = block.step(x[:, 0], self.state, mask=mask, state_index=self.rows)
        self.rows, self.length, self.past = None, self.length + 1, []
        return y[:, None]

    def extend(self, block, x: Tensor, mask: Tensor | None) -> Tensor:
        """Several positions through ``block``, x [B,T,C], mask bool [B,T]."""
        self._repeat(block.forward_with_state)
        before = self._select()
        y, state = block.forward_with_state(x, mask, before)
        if self.record_past:
            self.past.append((x.detach(), mask, before))
        self.state, self.length = state.contiguous(), self.length + x.shape[1]
        return y

    def _repeat(self, forward) -> None:
        if self.again is not None:
            (x, mask), self.again = self.again, None
            self.state = forward(x, mask, self._select())[1].contiguous()

    def _select(self) -> Tensor | None:
        if self.rows is not None:
            self.state, self.rows = self.state.index_select(0, self.rows), None
        return self.state

    def _change(self, change) -> None:
        """Replace every tensor, whose first dimension is the batch, by ``change`` of it."""
        self._select()
        self.state, self.past, self.again = tree_map_only(Tensor, change, (self.state, self.past, self.again))

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
        self.state, self.rows, self.length, self.past, self.again = None, None, 0, [], None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.past or self.again is not None:
            self._change(lambda value: value.index_select(0, beam_idx.to(value.device)))
        elif self.state is not None:
            beam_idx = beam_idx.to(self.state.device, torch.int64)
            self.rows = beam_idx if self.rows is None else self.rows[beam_idx]

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda value: value[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda value: value.repeat_interleave(repeats, 0))

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove positions, which must have come since the last ``crop``."""
        remove = -tokens_to_remove
        if not 0 <= remove <= sum(x.shape[1] for x, _, _ in self.past):
            raise NotImplementedError(
                f"ConvState.crop({tokens_to_remove}): the state does not hold what came before it, but for positions"
                " that were given since activate_past_recording() and the last crop()"
            )
        self.length -= remove
        while remove:
            x, mask, before = self.past.pop()
            self.state, kept = before, x.shape[1] - remove
            if kept > 0:
                self.again = (x[:, :kept], None if mask is None else mask[:, :kept])
            remove = max(-kept, 0)
        self.past = []

    def offload(self) -> None:
        raise NotImplementedError("ConvState.offload: the state of a convolution is small and stays where it is")


def _kind(config) -> type[CacheLayerMixin]:
    return DynamicLayer if config.mixer == "transformer" else ConvState


def decoder_cache(config) -> EncoderDecoderCache:
    """An empty cache for a ConvSeq2Seq decoder."""
    own = DynamicCache()
    own.layers = [_kind(config)() for _ in range(config.decoder_layers)]
    return EncoderDecoderCache(own, DynamicCache())


def check_cache(call: str, cache, config) -> None:
    """Check that a ConvSeq2Seq decoder can use a cache; an empty one gets the layers."""
    parts = [getattr(cache, f"{name}_attention_cache", None) for name in ("self", "cross")]
    if not all(isinstance(part, DynamicCache) and not part.offloading for part in parts):
        got = type(cache).__name__
        if isinstance(cache, EncoderDecoderCache):
            got += f" of {' and '.join(type(part).__name__ for part in parts)}"
        fail(call, CACHE, "an EncoderDecoderCache of two DynamicCaches that are not offloaded", got, TypeError)
    own, kind = parts[0], _kind(config)
    if own.get_seq_length() == 0:
        own.layers += [kind() for _ in range(config.decoder_layers - len(own.layers))]
    layers = own.layers[: config.decoder_layers]
    if len(layers) < config.decoder_layers or not all(type(layer) is kind for layer in layers):
        expected = f"{config.decoder_layers} layers {kind.__name__}, because of mixer={config.mixer!r}"
        got = [type(layer).__name__ for layer in layers]
        fail(call, CACHE, f"{expected} (an empty DynamicCache() gets them)", got, TypeError)


def check_held(call: str, cache, sizes: dict[str, int]) -> None:
    """Check that a cache holds as many rows B, and positions S of the encoder, as the inputs have."""
    own, cross = cache.self_attention_cache.layers[:1], cache.cross_attention_cache.layers[:1]
    held = [getattr(layer, name, None) for layer in own for name in ("rows", "state", "keys")]
    found = [{"B": value.shape[0]} for value in held if value is not None and value.numel()][:1]
    if cache.is_updated.get(0):
        found += [{"B": layer.keys.shape[0], "S": layer.keys.shape[2]} for layer in cross if layer.is_initialized]
    for some in found:
        wanted = {letter: sizes.get(letter, size) for letter, size in some.items()}
        if some != wanted:
            what = "one that holds B rows" + (" of S positions in the encoder" if "S" in some else "")
            fail(call, CACHE, f"{what}, {_equations(wanted)}", _equations(some))


def _equations(sizes: dict[str, int]) -> str:
    return ", ".join(f"{letter} = {size}" for letter, size in sizes.items())


def cross_layer(cache: EncoderDecoderCache, layer: int) -> DynamicLayer:
    """A decoder layer's keys and values of the encoder's states; empty until the first call, and after a reset."""
    layers = cache.cross_attention_cache.layers
    layers += [DynamicLayer() for _ in range(layer + 1 - len(layers))]
    if not cache.is_updated.get(layer):
        layers[layer], cache.is_updated[layer] = DynamicLayer(), True
    return layers[layer]


def attention_update(layer: DynamicLayer | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """All keys and values so far, [B,S,H,D], after adding k and v; transformers keeps them as [B,H,S,D]."""
    if layer is None:
        return k, v
    k, v = layer.update(k.transpose(1, 2), v.transpose(1, 2))
    return k.transpose(1, 2), v.transpose(1, 2)


def may_step(x: Tensor) -> bool:
    """Whether x [B,T,C] is one position without gradient, as a step needs."""
    return x.shape[1] == 1 and not torch.is_grad_enabled()
