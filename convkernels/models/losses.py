"""The losses of the models' heads, as transformers has them; computed in float32, or float64 if the logits are that."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._validate import fail, tensor
from .configs import PROBLEMS


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of logits [B,T,V] over the labels [B,T] that are not -100."""
    return F.cross_entropy(_precise(logits.flatten(0, 1)), labels.flatten().long())


def span_loss(start: Tensor, end: Tensor, start_positions: Tensor, end_positions: Tensor) -> Tensor:
    """Mean of two cross entropies over positions: logits [B,T], indices [B] or [B,1]; those outside of 0 to T - 1 are
    ignored. transformers documents this for its own heads, which clamp negative indices to 0 instead.
    """
    losses = []
    for logits, index in ((start, start_positions), (end, end_positions)):
        index = index.flatten().long()
        outside = (index < 0) | (index >= logits.shape[1])
        losses.append(F.cross_entropy(_precise(logits), index.masked_fill(outside, -100)))
    return sum(losses) / 2


def _problem(config, labels: Tensor) -> str:
    """The configuration's problem_type, by default the one that the labels' dtype suggests."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    return f"{'multi' if labels.is_floating_point() else 'single'}_label_classification"


def check_classes(call: str, config, B: int, labels) -> None:
    """Check that labels, if they are given, have a shape and dtype of ``classification_loss`` for B rows."""
    if labels is None:
        return
    tensor(call, "labels", labels)
    kind, C = _problem(config, labels), config.num_labels
    if kind not in PROBLEMS:
        fail(call, "config.problem_type", f"None or one of {PROBLEMS}", repr(kind))
    single = kind == "single_label_classification"
    shapes = [(B, C)] if not single and C > 1 else [(B,), (B, 1)]
    if labels.shape not in shapes or labels.is_complex() or (single and labels.is_floating_point()):
        expected = " or ".join(str(list(shape)) for shape in shapes)
        numbers = "integers of shape" if single else "shape"
        fail(call, "labels", f"{numbers} {expected}, because problem_type is {kind!r} with {C} outputs", labels)


def classification_loss(config, logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits [B,C], C being ``config.num_labels``; ``config.problem_type`` says which:

    "regression": mean squared error; labels [B,C], for C = 1 also [B].
    "single_label_classification": cross entropy; labels [B] or [B,1], integers.
    "multi_label_classification": binary cross entropy of each output; labels [B,C].
    None: the first for C = 1, else the second for integers and the third for floats.
    """
    logits, kind = _precise(logits), _problem(config, labels)
    if kind == "single_label_classification":
        return F.cross_entropy(logits, labels.flatten().long())
    loss = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
    return loss(logits, labels.view_as(logits).to(logits.dtype))
