"""The Triton twins of the CUDA ops in the place of the CPU's kernels, as a pytest plugin.

With `-p tests.svf_fast.triton_twins` the tests of the ops run on them, in Triton's
interpreter where no GPU is.
"""

from __future__ import annotations

from importlib import import_module

import torch

TWINS = {
    "affine_act": ("affine_act", "affine_act_", "affine_act_backward", "affine_act_backward_"),
    "channel_dot": ("channel_dot", "channel_dot_scale_"),
    "guard": ("guards_hold",),
    "quantize": ("quantize", "dequantize", "quantized_backward", "quantized_backward_"),
}
_library = torch.library.Library("svf_fast", "IMPL")


def pytest_configure() -> None:
    import svf_fast  # noqa: F401 (its kernels first: the last registered are called)

    for module, names in TWINS.items():
        found = import_module(f"svf_fast.triton.{module}")
        for name in names:
            _library.impl(name, getattr(found, name), "CPU", allow_override=True)
