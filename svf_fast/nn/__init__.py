from svf_fast.nn.conv2d import SVFConv2d
from svf_fast.nn.linear import SVFLinear

__all__ = ["SVFConv2d", "SVFLinear"]
