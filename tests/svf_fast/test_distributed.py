"""A converted and fused network under DistributedDataParallel, on two CPU processes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import distributed, nn
from torch.nn.functional import relu
from torch.nn.parallel import DistributedDataParallel

import svf_fast

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo"
)


class Block(nn.Module):
    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.project = nn.Sequential(
            nn.Conv2d(channels, out, 1, stride=2, bias=False), nn.BatchNorm2d(out)
        )

    def forward(self, x):
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(y + self.project(x))


def network() -> nn.Module:
    """A block and a unit, both fused, and a head that trains whole."""
    torch.manual_seed(0)
    unit = nn.Sequential(nn.Conv2d(12, 7, 3), nn.BatchNorm2d(7), nn.ReLU())
    model = nn.Sequential(
        Block(5, 12), unit, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 3)
    )
    model[:2].eval().requires_grad_(False)
    svf_fast.convert(model, ("0", "1"), progress=False)
    assert model[0].unfused_reason() == model[1].unfused_reason() == ""
    return model


def image(index: int) -> torch.Tensor:
    return torch.randn(2, 5, 13, 15, generator=torch.Generator().manual_seed(index))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.requires_grad]


def _train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    try:
        model = DistributedDataParallel(network())
        model(image(rank)).square().sum().backward()
        once = [grad.clone() for grad in gradients(model)]
        model.zero_grad()
        with model.no_sync():
            model(image(rank)).square().sum().backward()
        model(image(2 + rank)).square().sum().backward()
        torch.save((once, gradients(model)), f"{folder}/{rank}.pt")
        distributed.barrier()  # no connection is closed while the other one still listens
    finally:
        distributed.destroy_process_group()


def test_gradients_are_the_mean_over_processes_with_and_without_accumulation(tmp_path):
    command = [sys.executable, __file__]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for images, found in (((0, 1), 0), ((0, 1, 2, 3), 1)):
        model = network()
        for index in images:
            (model(image(index)).square().sum() / 2).backward()
        expected = gradients(model)
        assert len(expected) == 4 + 2 and all(grad.any() for grad in expected)
        for rank in range(2):
            for mine, mean in zip(results[rank][found], expected, strict=True):
                torch.testing.assert_close(mine, mean, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    _train(int(sys.argv[1]), sys.argv[2])
