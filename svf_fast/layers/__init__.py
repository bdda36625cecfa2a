"""Layers of which only the singular values S train."""

from svf_fast.layers.conv2d import SVFConv2d
from svf_fast.layers.linear import SVFLinear

__all__ = ["SVFConv2d", "SVFLinear"]
