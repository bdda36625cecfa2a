"""What `fss train` computes where networks lie in channels_last, as on a GPU, on CPU tensors."""

from __future__ import annotations

import pytest

from fss import processes
from fss.data.loader import episode_loader
from fss.processes import build_fabric
from fss.training.trainer import Trainer
from tests.svf_fast.gpu_path import defined, on_gpu

# A forward pass of layers 2 and 3, and two of layer 4: of queries, and of masked supports.
BOTTLENECKS = 4 + 6 + 2 * 3


@pytest.fixture
def as_on_gpu(monkeypatch) -> None:
    """The decision that a GPU would bring about, for the CPU."""
    monkeypatch.setattr(processes, "takes_channels_last", lambda device: True)


def calls_of_a_step(tiny) -> dict[str, int]:
    config = tiny(
        model={"backbone": "resnet50", "width": 8, "channels": 16}, precision="bf16-mixed"
    )
    trainer = Trainer(config, build_fabric(config))
    loader = episode_loader(trainer.dataset, config.batch_size, 0, trainer.fabric)
    trainer.model.train()
    with on_gpu(defined()) as calls:
        trainer._train_step([next(iter(loader))])
    return calls


def test_a_step_takes_the_fused_kernels(tiny, as_on_gpu):
    """The first and the last convolution of each bottleneck, forward and backward."""
    calls = calls_of_a_step(tiny)
    assert calls["pointwise"] >= 4 * BOTTLENECKS
    assert calls["activation_gradients"] >= 2 * BOTTLENECKS


def test_the_count_needs_channels_last(tiny):
    assert calls_of_a_step(tiny)["pointwise"] < BOTTLENECKS
