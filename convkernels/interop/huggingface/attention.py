"""This package's attention as an attention function of transformers, with the mask that it takes."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from ...models.base import PreTrained
from ...ops._validate import fail
from ...ops.attention.api import composite_attention

NAME = "convkernels"
_CALL = f"attn_implementation={NAME!r}"
# Models whose position_bias is a function of the distance alone.
_RELATIVE = ("t5", "mt5", "umt5")
# Models that call transformers' interface in one part alone, or with a mask that they make themselves.
_MIXED = ("bigbird_pegasus", "deepseek_v4", "layoutlm", "markuplm")
# Arguments of transformers' attention functions that change results, and that composite_attention does not have.
_UNKNOWN = (
    "softcap", "indices", "block_indices", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "head_mask",
    "output_attentions",
)  # fmt: skip
_registered: set[str] = set()


def register(name: str = NAME) -> None:
    """Make this package's attention known to transformers, as ``attn_implementation=name``.

    Models then call ``composite_attention``: padding and causality without a mask of T x T, sliding windows, shared
    key heads, T5's relative bias. Models that compute their attention themselves refuse the name: ValueError. Calling
    it again does no harm.
    """
    if not _registered:
        method = "get_correct_attn_implementation"
        setattr(PreTrainedModel, method, _checking(getattr(PreTrainedModel, method)))
    _registered.add(name)
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, padding_mask)


def _checking(original: Callable) -> Callable:
    """``get_correct_attn_implementation`` of transformers, with an error for models that never call the interface and
    would add the mask made for this attention to their scores; transformers itself accepts every registered name."""

    @functools.wraps(original)
    def checked(model: PreTrainedModel, requested_attention: str | None, *args, **options) -> str:
        if requested_attention in _registered and not calls_interface(type(model)):
            expected = "'eager', because the model computes its attention itself (replace_attention may change that)"
            fail(type(model).__name__, "attn_implementation", expected, repr(requested_attention))
        return original(model, requested_attention, *args, **options)

    return checked


def calls_interface(made: type[PreTrainedModel]) -> bool:
    """Whether a model calls the attention it is told to, as it says itself or as transformers finds in its source."""
    if getattr(made.config_class, "model_type", None) in _MIXED:
        return False
    if made._supports_attention_backend or issubclass(made, PreTrained):
        return True
    bases = (base for base in made.__mro__ if issubclass(base, PreTrainedModel) and base is not PreTrainedModel)
    return all(base._can_set_attn_implementation() for base in bases)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    device=None,
    **options,
) -> Tensor | None:
    """transformers' mask for this attention: bool [B,S], or None where nothing hides a key from any query.

    A causal one ends at the last query: a static cache has keys beyond that, and ``attention_mask`` may have columns.
    ``attention_forward`` reads its attributes ``causal``, ``sliding_window`` and ``full`` (True everywhere). For a step
    of one query with a static cache it has a column for each key of the cache and the attribute ``position``, a tensor:
    nothing waits for the device, and compiled code serves every step.
    NotImplementedError for other masks: packed sequences, chunks, windows to both sides, masks of a model's own.
    """
    causal, window = mask_function is not bidirectional_mask_function, None
    if causal and mask_function is not causal_mask_function:
        window = _sliding_window(mask_function, q_length, **options)
    if causal and q_length == 1 and isinstance(q_offset, Tensor) and not hasattr(attention_mask, "causal"):
        return _step_mask(batch_size, kv_length, kv_offset, q_offset, window, attention_mask, device)
    end = int(q_offset) + q_length if causal else kv_offset + kv_length
    if attention_mask is None:
        if not causal:
            return None
        mask = torch.ones(batch_size, end - kv_offset, dtype=torch.bool, device=device)
    elif hasattr(attention_mask, "causal"):  # made here before, as generate does for a static cache
        return attention_mask
    else:
        width = attention_mask.shape[-1]
        if attention_mask.dim() != 2 or (causal and width < end):
            fail(_CALL, "attention_mask", f"shape [B,S] with a column for each of {end} keys", attention_mask)
        mask = torch.nn.functional.pad(attention_mask.bool(), (0, max(end - width, 0)))[:, kv_offset:end].contiguous()
    mask.causal, mask.sliding_window, mask.full = causal, window, attention_mask is None
    return mask


def _step_mask(
    B: int, S: int, kv_offset: int, q_offset: Tensor, window: int | None, attention_mask: Tensor | None, device
) -> Tensor:
    """``padding_mask`` of one query, whose position in the cache is data."""
    position, column = q_offset - kv_offset, torch.arange(S, device=device)
    seen = column <= position
    if window is not None:
        seen = seen & (column > position - window)
    if attention_mask is None:
        mask = seen.expand(B, S).contiguous()
    else:
        width = attention_mask.shape[-1]
        if attention_mask.dim() != 2:
            fail(_CALL, "attention_mask", "shape [B,S] with a column for each key", attention_mask)
        each = f"each of {int(q_offset) + 1} keys" if _at_once(q_offset) else "each key"
        expected = f"shape [B,S] with a column for {each}"
        assert_data(q_offset < width, _CALL, "attention_mask", expected, attention_mask)
        mask = torch.nn.functional.pad(attention_mask.bool(), (0, max(kv_offset + S - width, 0)))
        mask = mask[:, kv_offset : kv_offset + S] & seen
    mask.causal, mask.sliding_window, mask.full, mask.position = False, None, False, position
    return mask


def _sliding_window(
    mask_function, q_length: int, *, allow_is_causal_skip: bool = False, use_vmap: bool = True,
    local_size: int | None = None, config=None, **unused,
) -> int:  # fmt: skip
    """The size of transformers' sliding window under a causal mask; an error for any other function.

    allow_is_causal_skip: False where transformers has combined the mask with others, and for each step of a static
    cache. use_vmap: whether it has combined it with a model's own. local_size: of a window or chunk.
    """
    name = getattr(mask_function, "__qualname__", "")
    if name == sliding_window_causal_mask_function(1).__qualname__:
        if torch.compiler.is_dynamo_compiling():  # which sees no closures
            alone = not use_vmap and (allow_is_causal_skip or q_length == 1)
            if alone and getattr(config, "attention_chunk_size", None) is None:
                return local_size
        else:
            parts = mask_function.__closure__[0].cell_contents
            overlay = sliding_window_overlay(1).__qualname__
            if len(parts) == 2 and parts[0].__qualname__ == overlay and parts[1] is causal_mask_function:
                return parts[0].__closure__[0].cell_contents
    expected = "the causal or bidirectional one or a causal sliding window (use 'sdpa' for this model)"
    fail(_CALL, "mask_function", expected, mask_function, NotImplementedError)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | dict | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B,H,T,D], key and value [B,G,S,D] -> [B,T,H,D], and no weights.

    attention_mask: bool [B,S] as made by ``padding_mask``, which decides whether the attention is causal and has a
    sliding window; without it the other arguments and the module do. position_bias: T5's, or what ``optimize`` lets a
    model hand over. s_aux: [H], the sinks of GPT-OSS and others; sinks: [B,H,T,1], of each token.
    NotImplementedError for what ``composite_attention`` does not compute: soft caps, packed sequences, weights as an
    output, a position_bias that is not T5's.
    """
    unknown = {name: value for name, value in kwargs.items() if name in _UNKNOWN}
    refuse(_CALL, unknown, " (attn_implementation='eager' may)")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)  # as transformers has it
    if attention_mask is not None:
        check_mask(attention_mask)
        causal = getattr(attention_mask, "causal", causal)
        sliding_window = getattr(attention_mask, "sliding_window", sliding_window)
        if causal:  # a static cache is longer than what has been written to it
            k, v = k[:, : attention_mask.shape[1]], v[:, : attention_mask.shape[1]]
        expected = [k.shape[0], k.shape[1]]
        if list(attention_mask.shape) != expected:
            fail(_CALL, "attention_mask", f"shape [B,S] = {expected}, a column for each key", attention_mask)
        if getattr(attention_mask, "full", False):
            attention_mask = None
    T, S = q.shape[1], k.shape[1]
    options = {}
    if isinstance(position_bias, dict):
        options = position_bias
    elif position_bias is not None and hasattr(module, "relative_terms"):
        options = module.relative_terms(position_bias, T, S)
        if hasattr(attention_mask, "position"):
            options = _at(attention_mask.position, S, **options)
    elif position_bias is not None:
        options = _by_distance(module, position_bias, T, S)
    if sliding_window is not None:
        window = (sliding_window - 1, 0)
        if options and options["window"] != window:
            expected = f"None or {options['window'][0] + 1}, because of position_bias"
            fail(_CALL, "sliding_window", expected, sliding_window, NotImplementedError)
        options = options | dict(window=window, outside="mask")
    if sinks is not None:
        expected = [*query.shape[:3], 1]
        if list(sinks.shape) != expected:
            fail(_CALL, "sinks", f"shape [B,H,T,1] = {expected}", sinks)
        s_aux = sinks[..., 0].transpose(1, 2)
    y = composite_attention(
        q,
        k,
        v,
        causal=causal,
        key_mask=attention_mask,
        scale=scaling,
        dropout=dropout,
        training=dropout > 0.0,
        sink=s_aux,
        **options,
    )
    return y, None


def check_mask(mask: Tensor) -> None:
    if mask.dim() != 2 or mask.dtype != torch.bool:
        fail(_CALL, "attention_mask", "a bool tensor [B,S], the padding (for a mask of more: 'eager')", mask)


def _by_distance(module: nn.Module, bias: Tensor, T: int, S: int) -> dict:
    """A bias [1,H,T,S] that depends on the distance alone, as a table [H, S-1 + 1 + T-1]. The last query has the
    distances from -(S-1) to 0, the first one those from T-S to T-1; with T > S the first key has those between."""
    kind = getattr(getattr(module, "config", None), "model_type", None)
    bias = bias[..., :S]
    if kind not in _RELATIVE or bias.shape[0] != 1:
        expected = f"that of one of {_RELATIVE} (optimize(model) may know others)"
        fail(_CALL, "position_bias", expected, f"that of {kind}", NotImplementedError)
    between = bias[0, :, 1 : T - S, 0].flip(1) if T > S else bias[0, :, 0, :0]
    table = torch.cat([bias[0, :, -1], between, bias[0, :, 0, max(S - T + 1, 0) :]], 1)
    return dict(bias=table, window=(S - 1, T - 1))


def _at(position: Tensor, S: int, window: tuple[int, int] = (0, 0), outside: str = "clip", **terms: Tensor) -> dict:
    """Terms of one query that stands at key ``position``, as terms of one that stands at the last key: its tables have
    the column of each key."""
    left, right = window
    offset = torch.arange(S, device=position.device) - position
    for name in terms.keys() & {"bias", "query_rel"}:
        table = terms[name][..., offset.clamp(-left, right) + left]
        terms[name] = table if outside == "clip" else torch.where((offset >= -left) & (offset <= right), table, 0.0)
    return terms | dict(window=(S - 1, 0))


def assert_data(condition: Tensor, function: str, argument: str, expected: str, got) -> None:
    """An error unless a number on a device is true: ValueError on the CPU; RuntimeError on others and in compiled code,
    when the kernels get there, because nothing may wait for them."""
    if not _at_once(condition):
        torch._assert_async(condition, f"{function}: argument '{argument}': expected {expected}")
    elif not condition:
        fail(function, argument, expected, got)


def _at_once(x: Tensor) -> bool:
    """Whether a number may be read."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def refuse(function: str, arguments: dict, instead: str = "") -> None:
    """NotImplementedError for an argument that asks for something; None and False do not. instead: what has it."""
    for argument, value in arguments.items():
        if value is not None and value is not False:
            shown = value if isinstance(value, Tensor | bool | int | float | str) else f"a {type(value).__name__}"
            expected = f"None, because the attention here has no such thing{instead}"
            fail(function, argument, expected, shown, NotImplementedError)
