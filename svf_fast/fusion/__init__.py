"""Finds what runs as one in a model, and fuses each in place.

Residual blocks, conv-BN-ReLU units, transformer blocks.
"""

from svf_fast.fusion.blocks import SVFBasicBlock, SVFBottleneck, SVFConvBNAct
from svf_fast.fusion.fused import Fused
from svf_fast.fusion.transformer import SVFTransformerBlock

__all__ = ["Fused", "SVFBasicBlock", "SVFBottleneck", "SVFConvBNAct", "SVFTransformerBlock"]
