"""fairseq (Wu et al. 2019): its LightConv and DynamicConv translation models, and its two convolutions as modules.

The modules need torch alone; loading a model needs transformers.
"""

import argparse
import re
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..nn import DynamicConv1d, LightweightConv1d
from ..ops._validate import describe, fail, positive
from . import _files

# Names inside a layer; older checkpoints number the encoder's norms.
ENCODER_LAYER = {
    "linear1": "mixer.linear1",
    "conv": "mixer.conv",
    "linear2": "mixer.linear2",
    "layer_norm1": "mixer_norm",
    "layer_norms.0": "mixer_norm",
    "fc1": "feed_forward.wi",
    "fc2": "feed_forward.wo",
    "layer_norm2": "feed_forward_norm",
    "layer_norms.1": "feed_forward_norm",
}
DECODER_LAYER = {
    **{name: ENCODER_LAYER[name] for name in ("linear1", "conv", "linear2", "fc1", "fc2")},
    "conv_layer_norm": "mixer_norm",
    "encoder_attn.q_proj": "cross_attention.q",
    "encoder_attn.k_proj": "cross_attention.k",
    "encoder_attn.v_proj": "cross_attention.v",
    "encoder_attn.out_proj": "cross_attention.o",
    "encoder_attn_layer_norm": "cross_attention_norm",
    "final_layer_norm": "feed_forward_norm",
}
_POSITIONS = "embed_positions.weight"


class _Stepping:
    """fairseq's calling convention for both convolutions: inputs T x B x C, and a dictionary of decoding states, in
    which every module, also a copy of another, has a key of its own. Loads the state_dict of each of fairseq's forms of
    the module."""

    def _make_key(self) -> None:
        self._key = f"{type(self).__name__}.{uuid.uuid4()}.input_buffer"

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._make_key()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.dim() == 2:  # the CUDA form
            state_dict[f"{prefix}weight"] = weight[:, None]
        unused = state_dict.get(f"{prefix}conv_bias")
        if unused is not None and unused.dim() == 3 and getattr(self, "conv_bias", None) is None:
            del state_dict[f"{prefix}conv_bias"]  # the scriptable form owns it and never adds it
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _run(self, x: Tensor, incremental_state: dict | None, **query) -> Tensor:
        if incremental_state is None:
            return super().forward(x.transpose(0, 1), **query).transpose(0, 1)
        if x.shape[0] != 1:
            fail(type(self).__name__, "x", "one position, because of incremental_state", x.shape[0])
        state, position = incremental_state.get(self._key, (None, 0))
        if state is None:
            state = self.init_state(x.shape[1], dtype=x.dtype, device=x.device)
        if self.renormalize:
            query["position"] = torch.full((1,), position, device=x.device)
        with torch.no_grad():
            y = self.step(x[0], state, **{name: v[0] if name == "query" else v for name, v in query.items()})
        incremental_state[self._key] = state, position + 1
        return y[None]

    def step(self, x: Tensor, state: Tensor, *, mask: Tensor | None = None, **options) -> Tensor:
        """As in the base class, whose ``forward`` it calls, because ``forward`` has fairseq's arguments here."""
        return super().forward(x, mask, step=dict(state=state, **options))

    def reorder_incremental_state(self, incremental_state: dict, new_order: Tensor) -> None:
        """Let row b continue from row new_order[b], as beam search does."""
        if self._key in incremental_state:
            state, position = incremental_state[self._key]
            incremental_state[self._key] = state.index_select(0, new_order), position


def _left(name: str, kernel_size: int, padding_l: int | None) -> int:
    positive(name, "kernel_size", kernel_size)
    if padding_l is None:
        return kernel_size // 2
    if not isinstance(padding_l, int) or not 0 <= padding_l < kernel_size:
        fail(name, "padding_l", f"None or an integer from 0 to {kernel_size - 1}", repr(padding_l))
    return padding_l


class LightweightConv1dTBC(_Stepping, LightweightConv1d):
    """fairseq's module of that name: the same arguments, the same names in state_dict, inputs T x B x C.

    It computes what ``lightweight_conv1d`` computes. Weight dropout has one mask for the whole batch; fairseq's module
    draws one for each output, or, in its CUDA form, this one. padding_l: by default K//2.
    """

    def __init__(
        self, input_size, kernel_size=1, padding_l=None, num_heads=1, weight_dropout=0.0, weight_softmax=False,
        bias=False, backend="auto",
    ):  # fmt: skip
        super().__init__(
            input_size, kernel_size, num_heads, softmax=weight_softmax, bias=bias, weight_dropout=weight_dropout,
            padding=_left(type(self).__name__, kernel_size, padding_l), backend=backend,
        )  # fmt: skip
        self._make_key()

    def forward(self, x: Tensor, incremental_state: dict | None = None, unfold: bool | None = None) -> Tensor:
        """x [T,B,C] -> [T,B,C]. unfold: selects one of two forms in fairseq; ignored here."""
        return self._run(x, incremental_state)


class DynamicConv1dTBC(_Stepping, DynamicConv1d):
    """fairseq's module of that name: the same arguments, the same names in state_dict, inputs T x B x C.

    It computes what ``dynamic_conv1d`` computes; where T < K and the padding is causal fairseq's unfolded form takes
    the softmax over fewer taps while training than while decoding, and this module over all of them always.
    """

    def __init__(
        self, input_size, kernel_size=1, padding_l=None, num_heads=1, weight_dropout=0.0, weight_softmax=False,
        renorm_padding=False, bias=False, conv_bias=False, query_size=None, in_proj=False, backend="auto",
    ):  # fmt: skip
        super().__init__(
            input_size, kernel_size, num_heads, softmax=weight_softmax, renormalize=renorm_padding and weight_softmax,
            bias=bias, conv_bias=conv_bias, query_size=query_size, in_proj=in_proj, weight_dropout=weight_dropout,
            padding=_left(type(self).__name__, kernel_size, padding_l), backend=backend,
        )  # fmt: skip
        self._make_key()

    def forward(
        self,
        x: Tensor,
        incremental_state: dict | None = None,
        query: Tensor | None = None,
        unfold: bool | None = None,
    ) -> Tensor:
        """x [T,B,C] -> [T,B,C]; query [T,B,query_size]. unfold: selects one of two forms in fairseq; ignored."""
        if query is None:
            return self._run(x, incremental_state)
        return self._run(x, incremental_state, query=query if incremental_state is not None else query.transpose(0, 1))


def layer_state(state: dict[str, Tensor], stack: str) -> dict[str, Tensor]:
    """The parameters of one of fairseq's layers under the names of ``EncoderLayer`` or ``DecoderLayer``.

    Left out: the bias that DynamicConv owns and never adds. ValueError for a name that no layer has.
    """
    names = ENCODER_LAYER if stack == "encoder" else DECODER_LAYER
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "conv.conv_bias":
            continue
        if name in ("encoder_attn.in_proj_weight", "encoder_attn.in_proj_bias"):
            leaf = name.rpartition("_")[2]
            result |= {f"cross_attention.{p}.{leaf}": part for p, part in zip("qkv", value.chunk(3), strict=True)}
            continue
        prefix = next((known for known in names if name.startswith(f"{known}.")), None)
        if prefix is None:
            raise ValueError(f"layer_state: {name!r} is no parameter of a LightConv {stack} layer")
        if name == "conv.weight":
            value = value.reshape(value.shape[0], 1, -1)  # fairseq's CUDA module has no middle dimension
        result[names[prefix] + name.removeprefix(prefix)] = value
    return result


def model_state(state: dict[str, Tensor], config) -> dict[str, Tensor]:
    """The parameters of fairseq's LightConvModel under the names of ``ConvSeq2SeqForConditionalGeneration``."""
    _embeddings("model_state", state)
    result: dict[str, Tensor] = {}
    layers: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, value in state.items():
        found = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.+)", name)
        if found:
            layers.setdefault((found[1], found[2]), {})[found[3]] = value
        elif name == "decoder.embed_tokens.weight":
            result["model.shared.weight"] = value
        elif name == "encoder.embed_tokens.weight":
            if config.source_vocab_size is not None:
                result["model.source.weight"] = value
        elif name in ("decoder.embed_out", "decoder.output_projection.weight"):
            result["lm_head.weight"] = value
        elif name.endswith(_POSITIONS):
            result[f"model.{name.split('.')[0]}.positions.weight"] = value
        elif name in ("encoder.layer_norm.weight", "encoder.layer_norm.bias", "decoder.layer_norm.weight",
                      "decoder.layer_norm.bias"):  # fmt: skip
            result["model." + name.replace("layer_norm", "norm")] = value
        elif not name.endswith((".version", "embed_positions._float_tensor")):
            raise ValueError(f"model_state: {name!r} is no parameter of a LightConvModel that can be loaded")
    for (stack, number), own in layers.items():
        prefix = f"model.{stack}.layers.{number}."
        result |= {prefix + name: value for name, value in layer_state(own, stack).items()}
    result.setdefault("lm_head.weight", result["model.shared.weight"])
    return result


def _embeddings(function: str, state: dict[str, Tensor]) -> list[Tensor]:
    """The encoder's and the decoder's."""
    names = [f"{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")]
    for name in names:
        if name not in state or state[name].dim() != 2:
            fail(function, "state", f"parameters of a LightConvModel with a matrix {name!r}", describe(sorted(state)))
    return [state[name] for name in names]


def config_from_args(args, state: dict[str, Tensor], *, padding_index: int = 1, eos_index: int = 2, **changes):
    """``ConvSeq2SeqConfig`` for a checkpoint's arguments; sizes of vocabularies come from the parameters.

    padding_index, eos_index: of fairseq's dictionary; decoding starts with eos. changes: fields to set otherwise.
    ValueError for what these models cannot do: adaptive softmax, stacks of different widths, projected embeddings.
    """
    from ..models import ConvSeq2SeqConfig

    get = (args if isinstance(args, Mapping) else vars(args)).get

    def both(name: str, default):
        encoder, decoder = get(f"encoder_{name}", default), get(f"decoder_{name}", None)
        decoder = encoder if decoder is None else decoder
        if encoder != decoder:
            fail("config_from_args", name, "one value for both stacks", f"{encoder} and {decoder}")
        return encoder

    for name in ("adaptive_softmax_cutoff", "tie_adaptive_weights"):
        if get(name):
            fail("config_from_args", name, "None", repr(get(name)))
    layers = {}  # of each stack: their number, and the taps of each
    for stack in ("encoder", "decoder"):
        numbers = {found[1] for found in (re.match(rf"{stack}\.layers\.(\d+)\.", name) for name in state) if found}
        taps = get(f"{stack}_kernel_size_list", [3, 7, 15, 31, 31, 31, 31])
        taps = list(taps if not isinstance(taps, str) else map(int, re.findall(r"\d+", taps)))
        layers[stack] = (len(numbers), taps * len(numbers) if len(taps) == 1 else taps[: len(numbers)])
    width = both("embed_dim", 512)
    for name in ("decoder_input_dim", "decoder_output_dim"):
        if get(name, width) != width:
            fail("config_from_args", name, str(width), get(name))
    heads, pre = both("attention_heads", 8), both("normalize_before", False)
    source, target = _embeddings("config_from_args", state)
    shared = source.shape == target.shape and torch.equal(source, target)
    positions = None
    if not get("no_token_positional_embeddings", False):
        positions = "learned" if both("learned_pos", False) else "sinusoidal"
    offset = padding_index + 1
    length = _max_positions(state, get, offset)
    untied = any(name in state for name in ("decoder.embed_out", "decoder.output_projection.weight"))
    if "decoder.output_projection.weight" in state:
        untied = not torch.equal(state["decoder.output_projection.weight"], target)
    options = dict(
        vocab_size=target.shape[0], source_vocab_size=None if shared else source.shape[0], d_model=width,
        d_ff=both("ffn_embed_dim", 2048), num_heads=heads, num_filters=heads, conv_dim=both("conv_dim", width),
        encoder_layers=layers["encoder"][0], encoder_kernel_size=layers["encoder"][1],
        decoder_layers=layers["decoder"][0], decoder_kernel_size=layers["decoder"][1],
        mixer=both("conv_type", "dynamic"), glu=bool(both("glu", True)),
        kernel_softmax=bool(get("weight_softmax", True)),
        mask_query=True, use_bias=True, norm="layer", norm_eps=1e-5, norm_placement="pre" if pre else "post",
        final_norm=bool(pre), positions=positions, position_offset=offset, max_positions=length, scale_attention=True,
        scale_embedding=True, scale_output=False, tie_word_embeddings=not untied, dropout=get("dropout", 0.1),
        attention_dropout=get("attention_dropout", 0.0), activation_dropout=get("relu_dropout", 0.0),
        input_dropout=get("input_dropout", 0.0), weight_dropout=get("weight_dropout", 0.0), pad_token_id=padding_index,
        eos_token_id=eos_index, decoder_start_token_id=eos_index,
    )  # fmt: skip
    return ConvSeq2SeqConfig(**(options | changes))


def _max_positions(state: dict[str, Tensor], get, offset: int) -> int:
    """The number of positions a model is made for."""
    learned = [value.shape[0] - offset for name, value in state.items() if name.endswith(_POSITIONS)]
    return min(learned) if learned else min(get("max_source_positions", 1024), get("max_target_positions", 1024))


def _plain_types() -> list:
    """Types in fairseq's files beside tensors and plain values: its arguments, numbers and arrays of numpy. numpy's
    functions are listed under the names of both versions, before and after 2.0."""
    try:
        import numpy
    except ImportError:
        return [argparse.Namespace]
    functions = [
        (value.__reduce__()[0], f"numpy.{core}.multiarray.{function}")
        for value, function in ((numpy.float64(), "scalar"), (numpy.zeros(0), "_reconstruct"))
        for core in ("core", "_core")
    ]
    dtypes = {type(numpy.dtype(code)) for code in numpy.typecodes["AllInteger"] + numpy.typecodes["AllFloat"] + "?SU"}
    return [argparse.Namespace, numpy.ndarray, numpy.dtype, *functions, *dtypes]


def load_checkpoint(checkpoint: str | Path | dict, **changes):
    """A ``ConvSeq2SeqForConditionalGeneration`` with the parameters of a fairseq LightConv or DynamicConv checkpoint.

    checkpoint: a file written by fairseq, or its contents: the parameters under "model", the arguments under "args"
    or, in newer ones, "cfg". changes: fields of the configuration to set otherwise, as for ``config_from_args``.
    Of a file only tensors, plain values, argparse's arguments and numbers and arrays of numpy are read; ValueError for
    one with anything else in it, and for one without arguments.
    """
    from ..models import ConvSeq2SeqForConditionalGeneration

    name, argument = "load_checkpoint", "checkpoint"
    if not isinstance(checkpoint, Mapping):
        checkpoint = _files.read(name, argument, checkpoint, _plain_types())
    expected = "the parameters under 'model' and fairseq's arguments under 'args' or 'cfg'"
    if not isinstance(checkpoint, Mapping):
        fail(name, argument, expected, describe(checkpoint))
    args, cfg = checkpoint.get("args"), checkpoint.get("cfg")
    if args is None and isinstance(cfg, Mapping):
        args = cfg.get("model")
    if args is None or "model" not in checkpoint:
        fail(name, argument, expected, sorted(map(str, checkpoint)))
    if not isinstance(args, Mapping | argparse.Namespace):
        fail(name, argument, f"{expected}, in a dict or a Namespace", describe(args))
    state = checkpoint["model"]
    _files.parameters(name, argument, state)
    config = config_from_args(args, state, **changes)
    model = ConvSeq2SeqForConditionalGeneration(config).to(state["decoder.embed_tokens.weight"].dtype)
    model.load_state_dict(model_state(state, config), strict=True)
    return model.eval()
