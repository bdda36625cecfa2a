"""The network of a run as it was tested, and what one of its steps keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import svf_fast
from fss.models import FewShotModel, build_model
from fss.models.regimes import apply_regime
from fss.runs.folder import Run

_WEIGHTS = {"64-true": torch.float64, "bf16-true": torch.bfloat16}
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def build_network(run: Run, state: Mapping[str, Any]) -> FewShotModel:
    """The network that a checkpoint fits, with random weights; it needs no other file.

    Args:
        run: with the configuration.
        state: the model's part of the checkpoint, for the number of BAM's base classes.
    """
    bam = run.config.model.name == "bam"
    config = replace(
        run.config.model, weights="none", official=None, base_weights="none" if bam else None
    )
    base = len(state["base_learner.classifier.4.bias"]) - 1 if bam else 0
    names = {number: str(number) for number in range(base)}
    network = build_model(config, names, run.config.data.shots)
    apply_regime(network, run.config.regime)
    return network


def step_memory(run: Run, network: FewShotModel) -> Any:
    """What one process keeps of a training step for its backward pass, predicted from shapes.

    Without the loss; the networks with a loss for training alone count as in evaluation.
    """
    config = run.config
    devices = config.devices if isinstance(config.devices, int) else 1
    batch = max(1, config.batch_size // config.accumulate // devices)
    shape = (batch * (1 + config.data.shots), 3, config.data.size, config.data.size)
    step = _Step(network.to(_WEIGHTS.get(config.precision, torch.float32)), config.data.shots)
    step.train(config.model.name != "bam")
    try:
        return svf_fast.memory_report(step, shape, _AUTOCAST.get(config.precision))
    finally:
        network.float().eval()


class _Step(nn.Module):
    """A network that takes the photos of a step as one tensor."""

    def __init__(self, network: FewShotModel, shots: int) -> None:
        super().__init__()
        self.network = network
        self.shots = shots

    def forward(self, photos: Tensor) -> Tensor:
        """[B·(1 + shots), 3, H, W], the B queries first, to logits [B, 2, H, W]."""
        batch = len(photos) // (1 + self.shots)
        inputs = {
            "query_image": photos[:batch],
            "support_images": photos[batch:].unflatten(0, (batch, self.shots)),
            "support_masks": torch.ones(
                (batch, self.shots, *photos.shape[-2:]), dtype=torch.int64, device=photos.device
            ),
            "base_class": None,
        }
        return self.network(*(inputs[name] for name in self.network.inputs)).logits
