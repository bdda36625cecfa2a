"""What test_growth.py runs in a process of its own: training and conversion leave nothing behind.

Live tensors are counted by the garbage collector, exactly; the resident memory, which the allocator
rounds, within a few MiB after a warm-up. In a process that ran other tests, their threads and the
holes that they left in the heap would be measured too.
"""

from __future__ import annotations

import gc
import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import svf_fast
from fss.data import collate_episodes
from fss.models.backbone import build_backbone
from fss.processes import build_fabric
from fss.training.trainer import Trainer
from tests.long import LONG

MIB = 2**20


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())


def assert_steady(repeat: Callable[[], object], times: int, tolerance: int) -> None:
    """`repeat` a third of the times to warm up, then the rest without growth."""
    for _ in range(times // 3):
        repeat()
    memory, tensors = resident(), live_tensors()
    for _ in range(times - times // 3):
        repeat()
    assert live_tensors() <= tensors
    grown = resident() - memory
    print(f"{times} times: {grown / MIB:+.2f} MiB")
    assert grown < tolerance, f"{grown / MIB:.1f} MiB more after {times} times"


def test_the_measure_sees_a_leak() -> None:
    kept = []
    with pytest.raises(AssertionError):
        assert_steady(lambda: kept.append(torch.zeros(1)), 9, 100 * MIB)

    def leak() -> None:
        kept.append(mmap.mmap(-1, MIB))  # fresh pages, where malloc would reuse freed ones
        kept[-1].write(bytes(MIB))

    with pytest.raises(AssertionError, match="MiB more"):
        assert_steady(leak, 9, 3 * MIB)


@pytest.mark.parametrize("regime", ["svf", "full"])
def test_training_steps_do_not_grow_the_process(tiny, regime) -> None:
    """500 steps with SVF_LONG=1, else 120; kept are a loss and a time a step."""
    steps = 500 if LONG else 120
    config = tiny(steps=steps, regime={"name": regime}, model={"width": 4}, log_every=20)
    trainer = Trainer(config, build_fabric(config))
    parts = [[trainer.dataset[i] for i in range(2)] for _ in range(3)]
    batches = [collate_episodes(part) for part in parts]
    trainer.model.train()

    def step() -> None:
        trainer._train_step([batches[trainer.step % 3]])
        if trainer.step % 20 == 0:
            trainer._settle()

    def twenty() -> None:
        for _ in range(20):
            step()

    assert_steady(twenty, steps // 20, 8 * MIB)


def test_converting_and_merging_leaves_nothing() -> None:
    model = build_backbone("resnet18", width=8).eval()
    replaced: list[weakref.ref] = []

    def there_and_back() -> None:
        svf_fast.convert(model, progress=False)
        replaced.extend(
            weakref.ref(module)
            for module in model.modules()
            if isinstance(module, svf_fast.SVFConv2d)
        )
        model(torch.zeros(1, 3, 33, 33))
        svf_fast.merge(model)

    assert_steady(there_and_back, 50 if LONG else 15, 12 * MIB)
    gc.collect()
    assert len(replaced) > 100 and not any(module() for module in replaced)


def test_switching_adapters_leaves_nothing() -> None:
    model = svf_fast.convert(build_backbone("resnet18", width=4).eval(), progress=False)
    a = svf_fast.Adapter.of(model)
    b = svf_fast.Adapter({k: 1.1 * S for k, S in a.S.items()}, dict(a.fingerprints), {})
    x = torch.zeros(1, 3, 33, 33)

    def switch() -> None:
        for adapter in (a, svf_fast.interpolate_adapters(a, b, 0.3), b):
            adapter.apply(model)
            model(x)

    assert_steady(switch, 200 if LONG else 60, 8 * MIB)


def test_a_model_that_is_dropped_is_gone() -> None:
    model = svf_fast.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), None, progress=False)
    model(torch.zeros(1, 3, 5, 5)).sum().backward()
    svf_fast.memory_report(model, (1, 3, 5, 5))
    gone = weakref.ref(model[0]), weakref.ref(model[0].U)
    del model
    gc.collect()
    assert [found() for found in gone] == [None, None]
