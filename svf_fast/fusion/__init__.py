"""Finds residual blocks and conv-BN-ReLU units in a model, and fuses each in place."""

from svf_fast.fusion.blocks import SVFBasicBlock, SVFBottleneck, SVFConvBNAct

__all__ = ["SVFBasicBlock", "SVFBottleneck", "SVFConvBNAct"]
