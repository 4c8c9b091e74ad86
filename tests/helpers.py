"""What tests of several files share."""

import re
import warnings
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import convkernels as ck

ROOT = Path(__file__).resolve().parent.parent
CALLS = {"depthwise": ck.depthwise_conv1d, "lightweight": ck.lightweight_conv1d, "dynamic": ck.dynamic_conv1d}


def close(actual, expected, rtol=1e-12, atol=1e-12):
    """Tensors, or sequences of them, equal to the rounding of float64."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def unusual(make):
    """make(), without torch's warnings of prototypes and deprecated features."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def nested(layout):
    rows = [torch.randn(7, 12), torch.randn(3, 12)]
    return unusual(lambda: torch.nested.nested_tensor(rows, layout=layout))


def quantized():
    return unusual(lambda: torch.quantize_per_tensor(torch.randn(2, 7, 12), 0.1, 0, torch.qint8))


def flops_of(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def run_page(page):
    """The Python of a page, from top to bottom, is one program; returns of how many blocks."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": "page"})
    return len(blocks)
