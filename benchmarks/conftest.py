"""Options of bench_svf.py, and what its JSON says of the machine."""

from __future__ import annotations

import torch

import svf_fast


def pytest_addoption(parser) -> None:
    group = parser.getgroup("svf_fast")
    group.addoption("--size", type=int, help="side of the image in px, 8n + 1")
    group.addoption("--dtype", default="float32", help="float32, or bfloat16 by autocast")
    group.addoption("--device", default="cpu", help="cpu or cuda")


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["svf_fast"] = {key: str(value) for key, value in svf_fast.build_info().items()}
