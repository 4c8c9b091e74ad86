"""Modules over the public functions; inputs are [B,T,C]."""

from .attention import CompositeAttention, SpanDynamicConv
from .blocks import ConformerConv, GatedConv, SeparableConv1d
from .conv import DepthwiseConv1d, DynamicConv1d, LightweightConv1d
from .relative import RelativeAttention

__all__ = [
    "CompositeAttention",
    "ConformerConv",
    "DepthwiseConv1d",
    "DynamicConv1d",
    "GatedConv",
    "LightweightConv1d",
    "RelativeAttention",
    "SeparableConv1d",
    "SpanDynamicConv",
]
