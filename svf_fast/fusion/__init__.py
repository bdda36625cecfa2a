"""Finds residual blocks and conv-BN-ReLU units in a model, and fuses each in place."""

from svf_fast.fusion.blocks import SVFBasicBlock, SVFBottleneck, SVFConvBNAct
from svf_fast.fusion.fused import Fused

__all__ = ["Fused", "SVFBasicBlock", "SVFBottleneck", "SVFConvBNAct"]
