"""Launches of Triton's kernels, which a recorded pass repeats without asking Triton's compiler."""

from __future__ import annotations

import functools
from typing import Any

from svf_fast.ops.program import Recorder


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch ``kernel[grid](*arguments, **constants)``.

    arguments: tensors, integers and None, by position; constants: what the kernel is compiled for,
    and Triton's options. Each launch looks up what was compiled for arguments of these kinds, which
    takes several times as long as launching it; a program has that at hand.
    """
    compiled = kernel[grid](*arguments, **constants)
    recorder = Recorder.listening()
    if recorder is None:
        return
    if compiled is None:  # by the interpreter
        recorder.launched(functools.partial(kernel[grid], **constants), arguments)
        return
    names = kernel.arg_names[len(arguments) :]
    known = compiled[(*grid, 1, 1)[:3]]
    recorder.launched(known, (*arguments, *(constants[name] for name in names)))
