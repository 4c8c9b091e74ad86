"""How many parameters a model has, and how many FLOPs a pass takes."""

import inspect
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedModel

# Parts of a model, each with words that occur in the names of its modules; the first part with a match counts.
PARTS = (
    ("cross-attention", ("cross_attention",)),
    ("feed-forward", ("feed_forward", "intermediate", "output")),
    ("mixer", ("mixer", "pair_attention", "attention", "relative_bias")),
    ("embedding", ("shared", "source", "embeddings", "embeddings_project", "positions")),
    ("head", ("lm_head", "cls", "dense", "classifier", "pooler", "qa_outputs")),
)

aten = torch.ops.aten
# The cross-attention's operator on the CPU; PyTorch's table has only those for GPUs.
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@dataclass(frozen=True)
class Summary:
    """Parameters (those that are trained; tied ones once) and FLOPs by part of a model; ``str`` makes a table. The
    backward pass is one part."""

    parameters: dict[str, int]
    flops: dict[str, int]
    shape: str

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    def __str__(self) -> str:
        rows = [(part, self.parameters.get(part, 0), self.flops.get(part, 0)) for part in _parts(self)]
        rows.append(("total", self.total_parameters, self.total_flops))
        lines = [f"{'part':<16} {'parameters':>14} {'FLOPs':>20}   {self.shape}"]
        return "\n".join(lines + [f"{part:<16} {count:>14,} {flops:>20,}" for part, count, flops in rows])


def _parts(result: Summary) -> list[str]:
    names = [*(part for part, _ in PARTS), "norm", "backward"]
    return [name for name in names if name in result.parameters or name in result.flops]


def _part(name: str) -> str:
    words = name.split(".")
    if any("norm" in word.lower() for word in words):
        return "norm"
    if ".attention.output." in f".{name}." or ".attention.self." in f".{name}.":
        return "mixer"
    return next((part for part, wanted in PARTS if any(word in wanted for word in words)), "head")


def summary(
    model: type[PreTrainedModel],
    config,
    *,
    batch: int = 1,
    length: int = 512,
    target_length: int | None = None,
    training: bool = False,
) -> Summary:
    """Parameters and FLOPs of ``model(config)`` for batch sequences of ``length`` tokens.

    FLOPs are those of ``torch.utils.flop_counter``, two for a multiply and an add: products of matrices, attention and
    convolutions, the operators of this package by the formulas in docs/semantics.md; element-wise work is not counted.
    target_length: of the decoder, by default ``length``. training: count the backward pass, too, as one number.

    Nothing is computed and no memory taken for weights or activations, so any size can be asked for on any machine.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = model(config).train(training)
        parameters: dict[str, int] = {}
        for name, parameter in made.named_parameters():
            if parameter.requires_grad:
                part = _part(name.rpartition(".")[0])
                parameters[part] = parameters.get(part, 0) + parameter.numel()
        ids = torch.zeros(batch, length, dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        shape = f"batch {batch}, {length} tokens"
        if "decoder_input_ids" in inspect.signature(made.forward).parameters:
            decoded = length if target_length is None else target_length
            inputs |= {"decoder_input_ids": torch.zeros(batch, decoded, dtype=torch.int64), "use_cache": False}
            shape += f", {decoded} in the decoder"
        if getattr(config, "dual_encoder", False):
            inputs |= {"pair_input_ids": ids, "pair_attention_mask": inputs["attention_mask"]}
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter, torch.set_grad_enabled(training):
            output = made(**inputs, return_dict=True)
            flops = _by_part(counter, type(made).__name__)
            if training:
                forward = counter.get_total_flops()
                next(iter(output.values())).float().sum().backward()
                flops["backward"] = counter.get_total_flops() - forward
    return Summary(parameters, flops, shape + (", training" if training else ""))


def _by_part(counter: FlopCounterMode, root: str) -> dict[str, int]:
    """The FLOPs of each module less those of the modules in it, summed by part."""
    own = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name.startswith(root)}
    flops: dict[str, int] = {}
    for name, count in own.items():
        inside = sum(other for key, other in own.items() if key.startswith(f"{name}.") and _parent(key, own) == name)
        if count != inside:
            part = _part(name.partition(".")[2])
            flops[part] = flops.get(part, 0) + count - inside
    return flops


def _parent(name: str, known: dict) -> str:
    while True:
        name = name.rpartition(".")[0]
        if name in known or not name:
            return name
