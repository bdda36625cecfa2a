"""Singular Value Fine-tuning of pretrained networks at the memory and cost of a frozen backbone."""

from svf_fast._library import __version__, build_info
from svf_fast.adapter import Adapter, interpolate_adapters, load_adapter, save_adapter
from svf_fast.capture import composed, follow
from svf_fast.convert import convert, merge, svf_parameter_groups, svf_parameters
from svf_fast.fusion import Fused, SVFBasicBlock, SVFBottleneck, SVFConvBNAct, SVFTransformerBlock
from svf_fast.layers import SVFConv2d, SVFLinear
from svf_fast.ops.cosine_max import cosine_max
from svf_fast.ops.relu import relu
from svf_fast.report import memory_report
from svf_fast.svd import Factors, compose, decompose

__all__ = [
    "Adapter",
    "Factors",
    "Fused",
    "SVFBasicBlock",
    "SVFBottleneck",
    "SVFConv2d",
    "SVFConvBNAct",
    "SVFLinear",
    "SVFTransformerBlock",
    "__version__",
    "build_info",
    "compose",
    "composed",
    "convert",
    "cosine_max",
    "decompose",
    "follow",
    "interpolate_adapters",
    "load_adapter",
    "memory_report",
    "merge",
    "relu",
    "save_adapter",
    "svf_parameter_groups",
    "svf_parameters",
]
