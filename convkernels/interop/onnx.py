"""Models with this package's operators as ONNX graphs: convolutions as ``CausalConvWithState`` (opset 27) or ``Conv``
where these say the same, and everything else by its definition in plain operators."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import _dtypes, _spec, _validate
from ..ops.attention import reference as attention_reference
from ..ops.attention.schema import Attention
from ..ops.conv import reference
from ..ops.conv.schema import TapConv

_STATEFUL_OPSET = 27
# Where the graph has CausalConvWithState until its opset is one that knows it: converters do not.
_DOMAIN = "convkernels"


def export(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: Sequence[Any] = (),
    file: str | Path | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    opset_version: int | None = None,
    **options: Any,
):
    """Write a model to an ONNX file, this package's convolutions and attention included.

    model: a module, for inference, or a program of ``torch.export``.
    args, kwargs, dynamic_shapes: inputs of a module, and which of their sizes may differ, as ``torch.export.export``
        takes them.
    file: where to write; None: nowhere.
    opset_version: as in ``torch.onnx.export``; None: what that takes. From 27 on, causal convolutions with shared
        filters and dilation 1 are ``CausalConvWithState``; others with shared filters are ``Conv`` in any version.
        Those of float64, which runtimes lack, are neither.
    options: of ``torch.onnx.export``, such as ``input_names`` and ``external_data``.

    Everything is computed in float32 (float64 for float64) and rounded once, as in the package; NaN and infinities in
    values that only a masked query or key meets may spread in attention, where the package selects. Returns the
    ``torch.onnx.ONNXProgram``. Needs ``onnx`` and ``onnxscript``. ValueError for dropout that is active, for steps,
    which change their state in place (give the state as ``initial_state`` and take ``return_state``), and for
    gradients.
    Source: ONNX operators ``CausalConvWithState`` (27) and ``Conv``.
    """
    if not isinstance(model, torch.nn.Module | torch.export.ExportedProgram):
        expected = "a torch.nn.Module or torch.export.ExportedProgram"
        _validate.fail("export", "model", expected, _validate.describe(model), TypeError)
    program = model
    if isinstance(model, torch.nn.Module):
        program = torch.export.export(model, tuple(args), kwargs, dynamic_shapes=dynamic_shapes)
    _refuse(program)
    program = program.run_decompositions(decompositions(opset_version))
    found = torch.onnx.export(program, opset_version=opset_version, dynamo=True, **options)
    for graph in (found.model.graph, *(function.graph for function in found.model.functions.values())):
        for node in graph:
            if node.domain == _DOMAIN:
                node.domain = ""
    found.model.opset_imports.pop(_DOMAIN, None)
    if file is not None:
        found.save(file)
    return found


def decompositions(opset_version: int | None = None) -> dict[torch._ops.OpOverload, Callable]:
    """For ``ExportedProgram.run_decompositions``: this package's operators in those that ``torch.onnx`` knows.
    ``CausalConvWithState`` has the domain ``convkernels`` there."""
    stateful = opset_version is not None and opset_version >= _STATEFUL_OPSET
    table = {torch.ops.aten.searchsorted.Tensor: _searchsorted}
    for kind, function in ((TapConv, partial(_convolution, stateful=stateful)), (Attention, _attention)):
        for overload in _spec.overloads(kind.__name__):
            table[overload] = partial(_of_record, kind, function)
    return table


def _of_record(kind: type, function: Callable, *args, **named):
    record = kind(*args, **named)
    if record.dropout > 0:
        _validate.fail("export", "model", "one for inference (model.eval())", f"dropout of {record.dropout}")
    return function(record)


def _refuse(program: torch.export.ExportedProgram) -> None:
    refused = {
        overload: name
        for name in _spec.OPERATORS.keys() - {TapConv.__name__, Attention.__name__}
        for overload in _spec.overloads(name)
    }
    for node in program.graph.nodes:
        if node.target in refused:
            expected = "convolutions and attention (of sequences: initial_state and return_state instead of steps)"
            _validate.fail("export", "model", expected, f"{refused[node.target]}")


def _searchsorted(boundaries: Tensor, values: Tensor, *, right: bool = False, **others) -> Tensor:
    """As the definitions use it, for packed sequences."""
    if others or not right or boundaries.dim() != 1:
        return NotImplemented
    return (boundaries <= values[..., None]).sum(-1)


def _convolution(args: TapConv, *, stateful: bool) -> Tensor:
    x, dtype = args.x, _dtypes.accumulate_dtype(args.x.dtype)
    span, channels = args.dilation * (args.weight.shape[-1] - 1), x.shape[2]
    shared = args.weight.dim() == 2 and args.cu_seqlens is None and not (args.softmax and args.renormalize)
    if not shared or dtype == torch.float64:  # which onnxruntime's Conv does not take
        return reference.convolved(args).to(x.dtype)
    gate = None if args.gate is None else args.gate.to(dtype)
    z = reference.gated_input(x.to(dtype), gate, args.mask, args.gate_activation)
    w = reference.tap_weights(args.weight.to(dtype), None, args)[0, 0]
    filters = reference.per_channel(w.T, channels).T[:, None]
    bias = None if args.bias is None else args.bias.to(dtype)
    rows, state = z.transpose(1, 2), None
    if args.initial_state is not None:
        state = args.initial_state.to(dtype).transpose(1, 2)
    if stateful and args.dilation == 1 and args.left == span > 0:
        given = (rows, filters, bias, state)
        y, _ = torch.onnx.ops.symbolic_multi_out(
            f"{_DOMAIN}::CausalConvWithState", given[: 4 if state is not None else 3 if bias is not None else 2],
            dtypes=(dtype, dtype), shapes=(rows.shape, (x.shape[0], channels, span)), version=1,
        )  # fmt: skip
    else:
        rows = F.pad(rows, (args.left, span - args.left)) if state is None else torch.cat([state, rows], 2)
        y = F.conv1d(rows, filters, bias, dilation=args.dilation, groups=channels)
    return reference.finished(y.transpose(1, 2), args).to(x.dtype)


def _attention(args: Attention) -> tuple[Tensor, Tensor]:
    out, lse = attention_reference.attend(args)
    return out.to(args.q.dtype), lse
