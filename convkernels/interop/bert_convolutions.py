"""BERT_Convolutions, the code and checkpoints of Chang et al. 2021."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from torch import Tensor

from ..ops._validate import describe, fail
from . import _files

# In every checkpoint, and tables of indices, not parameters.
_INDICES = ("position_ids", "relative_positions_mat")
_SPAN = {
    "convbert_key_depthwise": "span.depthwise",
    "convbert_key_pointwise": "span.pointwise",
    "lightweight_kernel": "span.kernel",
}


def attention_options(options: dict) -> dict:
    """The arguments of ``nn.CompositeAttention`` for the authors' option strings.

    options: of their configuration, "attention_kernel" ("qk_convfixed_convq 8"), "qk" and "value_forward"
    ("convolution_depth_mixed_no_act 8 1"), "remove_qk". ValueError for a word that means nothing to them.
    """
    function = "attention_options"
    for name in ("attention_kernel", "qk", "value_forward"):
        if not isinstance(options.get(name, ""), str):
            fail(function, name, "a string", describe(options[name]))
    kernel, _, reach = options.get("attention_kernel", "dot_product").partition(" ")
    words = set(kernel.split("_"))
    known = {"qk", "dot", "product", "convfixed", "convq", "convk", "convolution", "scaled", "convbert"}
    if words - known:
        fail(function, "attention_kernel", f"words of {sorted(known)}", repr(kernel))
    result = dict(
        bias="convfixed" in words,
        query_rel="convq" in words,
        key_rel="convk" in words,
        value_conv="convolution" in words,
        value_conv_scale="scaled" in words,
        qk=bool({"qk", "dot"} & words) or not {"convfixed", "convq", "convk"} & words,
    )
    if reach:
        if not reach.isdecimal():
            fail(function, "attention_kernel", f"a number behind {kernel!r}", repr(reach))
        result["window"] = int(reach)
    if "convbert" in words:
        result["span"] = "key"
    for argument, name in (("query_key", "qk"), ("value", "value_forward")):
        kind = options.get(name, "")
        if not kind.startswith("convolution"):
            continue
        kind, *numbers = kind.split(" ")
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            fail(function, name, f"two numbers, reach and groups, behind {kind!r}", repr(options[name]))
        reach, groups = numbers
        words = kind.split("_")
        result[argument] = "mixed" if "mixed" in words else "conv"
        result["conv_kernel_size"] = 2 * int(reach) + 1
        if "depth" in words:
            result["activation"] = "act" not in words
        else:
            result[f"{argument}_groups"] = int(groups)
    if options.get("remove_qk"):
        result["query_key"] = "identity"
    return result


def config_from_options(options: dict, **changes):
    """``CompositeBertConfig`` for the authors' config.json; changes: fields to set otherwise."""
    from ..models import CompositeBertConfig

    same = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
        "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "hidden_dropout_prob",
        "attention_probs_dropout_prob", "pad_token_id",
    )  # fmt: skip
    if not isinstance(options, Mapping) or "hidden_size" not in options:
        fail("config_from_options", "options", "a dict with 'hidden_size' in it, as config.json", describe(options))
    fields = {name: options[name] for name in same if name in options}
    fields["embedding_size"] = options.get("embedding_size", options["hidden_size"])
    fields["absolute_positions"] = not options.get("remove_position_embeddings", False)
    fields["attention"] = attention_options(options)
    return CompositeBertConfig(**(fields | changes))


def model_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of the authors' BertForMaskedLM under the names of ``CompositeBertForMaskedLM``."""
    result = {}
    for name, value in state.items():
        if name.endswith(_INDICES):
            continue
        stem, _, leaf = name.rpartition(".")
        path, _, module = stem.rpartition(".")
        result[f"{path}.{_SPAN[module]}.{leaf}" if module in _SPAN else name] = value
    tied = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    for name, source in tied.items():
        if source in result:
            result.setdefault(name, result[source])
    return result


def load_checkpoint(checkpoint: str | Path | dict, options: dict | None = None, **changes):
    """A ``CompositeBertForMaskedLM`` with the parameters of one of the authors' checkpoints.

    checkpoint: a directory with config.json and pytorch_model.bin, or the parameters, and then ``options`` is what
    config.json holds. changes: fields of the configuration to set otherwise. ValueError for what is neither.
    """
    from ..models import CompositeBertForMaskedLM

    name, argument = "load_checkpoint", "checkpoint"
    if not isinstance(checkpoint, Mapping):
        if not isinstance(checkpoint, str | PathLike):
            fail(name, argument, "a directory or a dict", describe(checkpoint))
        directory = Path(checkpoint)
        if options is None:
            file = directory / "config.json"
            try:
                options = json.loads(file.read_bytes())
            except ValueError as error:
                raise ValueError(f"{name}: argument '{argument}': expected JSON in {file}, got {error}") from error
        checkpoint = _files.read(name, argument, directory / "pytorch_model.bin")
    elif options is None:
        fail(name, "options", "the configuration, because checkpoint is a dict", None)
    _files.parameters(name, argument, checkpoint)
    state = model_state(checkpoint)
    model = CompositeBertForMaskedLM(config_from_options(options, **changes)).to(next(iter(state.values())).dtype)
    model.load_state_dict(state, strict=True)
    return model.eval()
