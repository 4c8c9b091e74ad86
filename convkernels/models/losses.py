"""The losses of the models' heads, as transformers has them; computed in float32, or float64 if the logits are that."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._validate import fail


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of logits [B,T,V] over the labels [B,T] that are not -100."""
    return F.cross_entropy(_precise(logits.flatten(0, 1)), labels.flatten())


def span_loss(start: Tensor, end: Tensor, start_positions: Tensor, end_positions: Tensor) -> Tensor:
    """Mean of two cross entropies over positions: logits [B,T], places [B] or [B,1]; places outside are ignored."""
    T = start.shape[1]
    return sum(
        F.cross_entropy(_precise(logits), places.flatten().clamp(0, T), ignore_index=T)
        for logits, places in ((start, start_positions), (end, end_positions))
    ).div(2)


def classification_loss(config, logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits [B,C]; ``config.problem_type`` says which:

    "regression": mean squared error; labels [B,C], for C = 1 also [B].
    "single_label_classification": cross entropy; labels [B] or [B,1], integers.
    "multi_label_classification": binary cross entropy of each output; labels [B,C].
    None: the first for C = 1, else the second for integers and the third for floats.
    """
    (B, C), integers = logits.shape, not labels.is_floating_point()
    logits, kind = _precise(logits), config.problem_type
    if kind is None:
        kind = "regression" if C == 1 else f"{'single' if integers else 'multi'}_label_classification"
    single = kind == "single_label_classification"
    shapes = [(B, C)] if not single and C > 1 else [(B,), (B, 1)]
    if labels.shape not in shapes or (single and not integers):
        expected = " or ".join(str(list(shape)) for shape in shapes)
        numbers = "integers of shape" if single else "shape"
        fail("loss", "labels", f"{numbers} {expected}, because problem_type is {kind!r} with {C} outputs", labels)
    if single:
        return F.cross_entropy(logits, labels.flatten().long())
    loss = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
    return loss(logits, labels.view_as(logits).to(logits.dtype))
