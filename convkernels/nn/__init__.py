"""Modules over the public functions; inputs are [B,T,C]."""

from .conv import DepthwiseConv1d, DynamicConv1d, GatedConv, LightweightConv1d, SeparableConv1d

__all__ = ["DepthwiseConv1d", "DynamicConv1d", "GatedConv", "LightweightConv1d", "SeparableConv1d"]
