from svf_fast.nn.block import SVFBasicBlock, SVFBottleneck, SVFConvBNAct
from svf_fast.nn.conv2d import SVFConv2d
from svf_fast.nn.linear import SVFLinear

__all__ = ["SVFBasicBlock", "SVFBottleneck", "SVFConv2d", "SVFConvBNAct", "SVFLinear"]
