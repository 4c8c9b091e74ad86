"""Steps of more channels than vectors hold, with states in every layout: rows of channels, and positions of a channel
next to each other, few of them and many."""

import pytest
import torch
from test_serving import check_equal

import convkernels as ck
from convkernels.testing import compare
from convkernels.testing.inputs import StepProblem, values

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CHANNELS = 101  # whole vectors, and a rest
# Of a state with `rows` rows.
LAYOUTS = {
    "rows": lambda state: state,
    "channels": lambda state: state.mT.contiguous().mT,
    "part of channels": lambda state: torch.cat([state, state], 1).mT.contiguous().mT[:, : state.shape[1]],
    "every other": lambda state: state.repeat_interleave(2, 2)[..., ::2],
    "neither": lambda state: state.permute(2, 0, 1).contiguous().permute(1, 2, 0),
}
FINISH = {
    "plain": {},
    "silu": {"activation": 2, "bias": True, "slots": 2},
    "gates": {"activation": 2, "out_gate": True, "residual": True, "indexed": True},
    "sigmoid": {"activation": 1, "residual": True, "slots": 1},
    "out of place": {"activation": 2, "layout": "swap_last", "gate": True, "slots": 2},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("finish", FINISH)
@pytest.mark.parametrize("layout", ["contiguous", "swap_last"])
@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize(
    ("taps", "extra"), [(1, 1), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1), (4, 4), (7, 0), (9, 1)]
)
def test_many_channels(taps, extra, length, layout, finish, dtype, ops):
    options = {"dtype": dtype, "weight_dtype": dtype, "state_layout": layout, **FINISH[finish]}
    problem = StepProblem(heads=CHANNELS, head_size=1, taps=taps, extra=extra, length=length, seed=taps, **options)
    compare.conv_step(ops, problem)


@pytest.mark.parametrize("weight_dtype", DTYPES[:3])
@pytest.mark.parametrize("weight_layout", ["contiguous", "swap_last"])
def test_weights_of_many_channels(weight_layout, weight_dtype, ops):
    options = {"dtype": torch.bfloat16, "weight_dtype": weight_dtype, "weight_layout": weight_layout}
    compare.conv_step(ops, StepProblem(heads=CHANNELS, head_size=1, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("taps", [4, 6, 13])
def test_bits_do_not_depend_on_the_layout(taps, layout, dtype, backend):
    """Chunks of one position and of several give what one run gives."""
    x, weight, bias = (
        values((2, 12, CHANNELS), dtype, 1),
        values((CHANNELS, taps), dtype, 2),
        values((CHANNELS,), dtype, 3),
    )
    options = {"activation": "silu", "backend": backend}
    state = LAYOUTS[layout](torch.zeros(2, taps, CHANNELS, dtype=dtype))
    rows = []
    for chunk in x.split([1, 1, 3, 1, 5, 1], 1):
        rows.append(ck.depthwise_conv1d_step(chunk.squeeze(1), state, weight, bias, **options).view(chunk.shape))
    expected = ck.depthwise_conv1d(x, weight, bias, padding="causal", **options)
    check_equal(torch.cat(rows, 1), expected, options, backend)
    assert torch.equal(state, x[:, -taps:]) if taps < 12 else torch.equal(state[:, 1:], x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_bits_of_rows_that_are_converted(activation, dtype):
    """On CPUs a run over [B, C, T] memory gives the bits of one over rows that are read where they lie."""
    x, weight = values((2, 12, CHANNELS), dtype, 1), values((CHANNELS, 4), dtype, 2)
    options = {"padding": "causal", "activation": activation, "backend": "cpu"}
    found = ck.depthwise_conv1d(x.mT.contiguous().mT, weight, **options)
    assert torch.equal(found, ck.depthwise_conv1d(x, weight, **options))
