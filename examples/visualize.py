"""Draws what a trained model of this package has learned as PNG files, in the manner of figures 1 to 3 of Chang et al.
2021: kernels against relative position, and for a text what each position attends to.

    python examples/visualize.py --model composite --output_dir pictures --text "The cat sat on the mat."
    python examples/visualize.py --model composite --output_dir pictures --layers 1 12 --heads 3

--model is a folder or Hub name of what pretrain_seq2seq.py, pretrain_bert.py or finetune.py has made. Of kernels there
is one file for all layers: biases of scores, lightweight filters, depthwise kernels. Of a text, which a decoder reads
too, there is one for each layer: attention, what the relative terms of BERT's scores alone attend to, dynamic filters.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from convkernels import models
from training import architectures
from training.running import main, parsed

LINES = 10  # more heads than these are a heat map, because their lines would share colours
LABELS = 75  # more rows or columns than these have numbers instead of labels, which would cover each other


@dataclass
class Arguments:
    model: str = field(metadata={"help": "folder or Hub name of a trained model"})
    output_dir: str = field(metadata={"help": "where the pictures are written"})
    text: str | None = field(default=None, metadata={"help": "a text to draw attention and dynamic filters of"})
    tokenizer: str | None = field(default=None, metadata={"help": "folder or Hub name; by default --model"})
    layers: list[int] = field(default_factory=list, metadata={"help": "numbers from 1 on; by default all"})
    heads: list[int] = field(default_factory=list, metadata={"help": "numbers from 1 on; by default all"})


class Learned(NamedTuple):
    weights: Tensor  # of kernels [H,K], of depthwise ones [C,K], of a text [H,T,S]; of a panel without [H]
    columns: list  # offsets, negative to the left, or tokens
    rows: list[str] | None = None  # tokens, in a panel also heads


def trained(name: str) -> PreTrainedModel:
    """The model with the head that it was saved with, because parts that others add have not been trained."""
    config = AutoConfig.from_pretrained(name)
    kind = (config.architectures or ["unknown"])[0]
    if not hasattr(models, kind):
        raise ValueError(f"expected a model of convkernels, got {kind} ({config.model_type})")
    model = getattr(models, kind).from_pretrained(name, dtype=torch.float32)  # NumPy has no bfloat16
    return model.eval().requires_grad_(False)


def parts(model: PreTrainedModel) -> tuple[dict[int, nn.Module], dict[str, nn.Module]]:
    """Attentions of a BERT by layer, or stacks of an encoder-decoder by name; the other one is empty."""
    base = model.base_model
    if isinstance(base, models.CompositeBertModel):
        return {i: layer.attention.self for i, layer in enumerate(base.encoder.layer, 1)}, {}
    return {}, {name: getattr(base, name) for name in ("encoder", "decoder") if hasattr(base, name)}


def filters(conv: nn.Module, logits: Tensor, rows: list[str] | None = None) -> Learned:
    left = conv.kernel_size - 1 if conv.padding == "causal" else conv.kernel_size // 2
    offsets = [conv.dilation * (tap - left) for tap in range(conv.kernel_size)]
    return Learned(logits.softmax(-1) if conv.softmax else logits, offsets, rows)


def kernels(model: PreTrainedModel) -> dict[str, dict[int, Learned]]:
    """Biases of scores, filters and depthwise kernels by layer, under the names of their pictures."""
    found, (attentions, stacks) = defaultdict(dict), parts(model)
    for i, attention in attentions.items():
        offsets = list(range(-attention.window[0], attention.window[1] + 1))
        if attention.convfixed_param is not None:
            found["bias"][i] = Learned(attention.convfixed_param[0, :, 0], offsets)
        if attention.convolution is not None:
            scales = attention.convolution_scalar.flatten().repeat_interleave(attention.head_size)
            found["depthwise-values"][i] = Learned(scales[:, None] * attention.convolution.weight[:, 0], offsets)
        for name in ("query", "key", "value"):
            weight = getattr(getattr(attention, f"{name}_conv", None), "weight", None)
            if weight is not None and weight.shape[1] == 1:  # grouped ones have no kernel per channel
                reach = weight.shape[2] // 2
                found[f"depthwise-{name}-projection"][i] = Learned(weight[:, 0], list(range(-reach, reach + 1)))
    for name, stack in stacks.items():
        for i, layer in enumerate(stack.layers if model.config.mixer == "lightweight" else (), 1):
            found[f"{name}-filters"][i] = filters(layer.mixer.conv, layer.mixer.conv.weight[:, 0])
    return dict(found)


def watched(modules: dict[int, nn.Module], call: nn.Module, *inputs):
    """The call's output with attention weights, and the inputs and output of each of the modules in it."""
    seen = {}
    for i, module in modules.items():
        module.register_forward_hook(lambda _, given, output, i=i: seen.update({i: (given, output)}))
    return call(*inputs, output_attentions=True, return_dict=True), seen


def maps(model: PreTrainedModel, tokenizer, text: str) -> dict[str, dict[int, Learned]]:
    """Attention and dynamic filters of a text by layer, under the names of their pictures."""
    found, (attentions, stacks) = defaultdict(dict), parts(model)
    ids, config, states = tokenizer(text, return_tensors="pt").input_ids, model.config, ()
    if not text.strip() or not ids.numel():
        raise ValueError(f"--text: expected a text, got {text!r}")
    if ids.max() >= config.vocab_size:
        raise ValueError(f"--tokenizer: expected that of the model, {config.vocab_size} tokens, got number {ids.max()}")
    words = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    if attentions:
        output, seen = watched(attentions, model.base_model, ids)
        found["attention"] = {i: Learned(w[0], words, words) for i, w in enumerate(output.attentions, 1)}
    for i, attention in attentions.items():
        if attention.qk and not (attention.convq_param is None and attention.convk_param is None):
            attention.qk = False  # the relative terms are what is left of the scores
            found["relative"][i] = Learned(attention.weights(*seen[i][0])[0], words, words)
            attention.qk = True
    for name, stack in stacks.items():
        source = words
        if name == "decoder" and config.decoder_start_token_id is not None:
            ids = torch.cat([ids.new_tensor([[config.decoder_start_token_id]]), ids[:, :-1]], 1)
            words = tokenizer.convert_ids_to_tokens(ids[0].tolist())
        mixers = {i: layer.mixer for i, layer in enumerate(stack.layers, 1)}
        predictors = {i: mixer.conv.weight_linear for i, mixer in mixers.items() if config.mixer == "dynamic"}
        output, seen = watched(predictors, stack, ids, None, *states)
        states, weights = (output.last_hidden_state,), iter(output.attentions or ())
        for i, mixer in mixers.items():
            if config.mixer == "dynamic":
                logits = seen[i][1][0].unflatten(-1, (mixer.conv.heads, mixer.conv.kernel_size)).transpose(0, 1)
                found[f"{name}-filters"][i] = filters(mixer.conv, logits, words)
            if config.mixer == "transformer":
                found[f"{name}-attention"][i] = Learned(next(weights)[0], words, words)
            if name == "encoder" and config.pair_attention == i:
                found["pair-attention"][i] = Learned(next(weights)[0], words, words)
        for i, each in enumerate(output.get("cross_attentions") or (), 1):
            found["cross-attention"][i] = Learned(each[0], source, words)
    return dict(found)


def pictures(found: dict[str, dict[int, Learned]], layers: list[int], heads: list[int]) -> Iterator[tuple[str, Figure]]:
    """Names and pictures of kernels and maps, of some layers and heads, or of all where none are named."""
    for name, by_layer in found.items():
        panels = {}
        for i in (i for i in by_layer if not layers or i in layers):
            weights, columns, rows = by_layer[i]
            each = {f"head {h}": one for h, one in enumerate(weights, 1) if not heads or h in heads}
            if rows and each:
                of_heads = {head: Learned(one, columns, rows) for head, one in each.items()}
                yield f"{name}-layer-{i}", draw(f"{name}, layer {i}", of_heads)
            elif name.startswith("depthwise"):
                panels[f"layer {i}"] = Learned(weights, columns)
            elif each:
                panels[f"layer {i}"] = Learned(torch.stack(list(each.values())), columns, list(each))
        if panels:
            yield name, draw(name, panels, all(one.rows and len(one.rows) <= LINES for one in panels.values()))


def draw(heading: str, panels: dict[str, Learned], lines: bool = False) -> Figure:
    """Matrices as heat maps in the same colours; lines: their rows as lines instead."""
    _, columns, rows = next(iter(panels.values()))
    across, words = min(math.isqrt(len(panels) - 1) + 1, 4), isinstance(columns[0], str)
    width = min(1.2 + 0.16 * len(columns), 12) if words else 3
    height = 2.6 if lines else min(1.2 + 0.16 * len(rows), 12) if rows else 4
    down = -(-len(panels) // across)
    figure = Figure((width * across + 1.2, height * down + 0.6), dpi=110, layout="constrained")
    values = torch.cat([one.weights.flatten() for one in panels.values()])
    top = float(values.abs().max())
    colours = dict(cmap="RdBu_r", vmin=-top, vmax=top) if values.min() < 0 else dict(cmap="Blues", vmin=0, vmax=top)
    axis = None
    for place, (title, (matrix, columns, rows)) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(down, across, place, sharey=axis if lines else None)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        at = range(len(columns)) if words else columns
        if lines:
            drawn = axis.plot(at, matrix.T.numpy(), ".-", linewidth=1)
            continue
        half = (at[-1] - at[0]) / max(len(at) - 1, 1) / 2 or 0.5
        sides = (at[0] - half, at[-1] + half, len(matrix) - 0.5, -0.5)
        image = axis.imshow(matrix.numpy(), aspect="auto", extent=sides, **colours)
        if words and len(columns) <= LABELS:
            axis.set_xticks(at, columns, rotation=90, parse_math=False)
        if rows and len(rows) <= LABELS:
            axis.set_yticks(range(len(rows)), rows, parse_math=False)
    if lines:
        figure.legend(drawn, rows, loc="outside right upper", fontsize=8, frameon=False)
    else:
        figure.colorbar(image, ax=figure.axes, fraction=0.04, aspect=40, label="weight")
    figure.suptitle(heading)
    figure.supxlabel("attends to" if words else "relative position", fontsize=9)
    figure.supylabel("weight" if lines else "" if rows else "channel", fontsize=9)
    return figure


def visualize(arguments: Arguments) -> list[Path]:
    """Write the pictures, say so of each, and return their paths."""
    model = architectures.loaded("--model", arguments.model, trained)
    found, folder, written = kernels(model), Path(arguments.output_dir), []
    if arguments.text is not None:
        tokenizer = architectures.loaded(
            "--tokenizer", arguments.tokenizer or arguments.model, AutoTokenizer.from_pretrained
        )
        if arguments.tokenizer is not None:
            architectures.check_tokens(tokenizer, arguments.tokenizer, arguments.model)
        of_text = maps(model, tokenizer, arguments.text)
        if not of_text:
            print(
                f"{arguments.model} has no attention and no dynamic filters, so its text is left out", file=sys.stderr
            )
        found |= of_text
    elif not found:
        raise ValueError(f"--text: expected a text, because {arguments.model} has no kernels to draw without one")
    layers = {i for by_layer in found.values() for i in by_layer}
    sizes = [len(one.weights) for name in found if not name.startswith("depthwise") for one in found[name].values()]
    for option, has in (("layers", layers), ("heads", range(1, 1 + max(sizes, default=0)))):
        beyond = sorted(set(getattr(arguments, option)).difference(has))
        if beyond:
            wanted = f"some of {sorted(has)}" if has else f"it unset, because {arguments.model} has none to draw"
            raise ValueError(f"--{option}: expected {wanted}, got {beyond}")
    for name, figure in pictures(found, arguments.layers, arguments.heads):
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1])
        print(f"wrote {written[-1]}")
    if not written:
        raise ValueError(f"--model {arguments.model}: there is nothing to draw")
    return written


def run() -> None:
    (arguments,) = parsed((Arguments,), {}, __doc__)
    visualize(arguments)


if __name__ == "__main__":
    main(run)
