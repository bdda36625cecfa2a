"""The table behind every benchmark: median, spread, ratio to reference, bytes kept, machine."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

import svf_fast


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["svf_fast"] = {key: str(value) for key, value in svf_fast.build_info().items()}


def pytest_terminal_summary(terminalreporter, config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [row for row in session.benchmarks if row.extra_info] if session else []
    if not rows:
        return
    write = terminalreporter.write_line
    commit = session.config.hook.pytest_benchmark_generate_commit_info(config=config)
    write("")
    write(
        f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit "
        f"{str(commit.get('id'))[:10]}{' with changes' if commit.get('dirty') else ''}"
    )
    width = max(len(str(row.group)) for row in rows)
    head = f"{'':<{width}}  {'variant':<10} {'median ms':>10} {'± IQR':>8} {'ratio':>6}  saved MiB"
    references = {
        row.group: row.stats.median for row in rows if row.extra_info["variant"] == "reference"
    }
    group = None
    for row in rows:
        if row.group != group:
            write(head if group is None else "")
            group = row.group
        median, spread = 1e3 * row.stats.median, 1e3 * row.stats.iqr
        write(
            f"{row.group:<{width}}  {row.extra_info['variant']:<10} {median:>10.2f} "
            f"{spread:>8.2f} {row.stats.median / references[row.group]:>6.2f} "
            f"{row.extra_info['saved_bytes'] / 2**20:>10.2f}"
        )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
