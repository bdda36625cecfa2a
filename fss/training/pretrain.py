"""Train the embedded backbone on shapes that few-shot learning never sees.

    python -m fss.training.pretrain --out fss/weights/shapes_resnet18.safetensors

A ResNet-18 of width 24 classifies images of one object each, of `PRETRAINING_CLASSES`; like
ImageNet weights it is trained at output stride 32 and used at 8. The file holds float16 tensors
with torchvision's keys, and in its metadata the command, the classes and the accuracy reached.

The shipped file: 0.531 of 1000 held-out images. Frozen, its layers 2 and 3 match novel few-shot
classes to 1-shot prototypes (mean feature of object and of background, no training) at mIoU 0.165,
random weights at 0.073: four folds of 60 episodes, 161 pixels.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import cv2
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fss.data import EvalTransform, ShapesSource
from fss.data.shapes import PRETRAINING_CLASSES
from fss.files import atomic_write
from fss.models.backbone import ResNet, build_backbone

WIDTH = 24
HELD_OUT = 1000


class Recipe(NamedTuple):
    """What is trained on; see the command's --help."""

    steps: int
    batch_size: int
    size: int
    lr: float
    seed: int


class ObjectImages(Dataset[tuple[Tensor, int]]):
    """Normalised images [3, S, S] of one object each, with its class from 0.

    Args:
        source: of one object per image.
        split: "train" or "test".
    """

    def __init__(self, source: ShapesSource, split: str) -> None:
        self.source, self.images = source, source.indices(split)
        self.transform = EvalTransform(source.image_size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, mask = self.source.load(self.images[index])
        label = int(mask.max()) - 1
        if label < 0:
            raise ValueError(f"{self.source.name(self.images[index])} shows no object")
        return self.transform(image, mask).image, label


class Classifier(nn.Module):
    """Linear classifiers on the mean of `layer4` and, to train middle layers too, of `layer3`."""

    def __init__(self, backbone: ResNet, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.middle = nn.Linear(backbone.channels[2], classes)
        self.last = nn.Linear(backbone.channels[3], classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images [B, 3, H, W] to two logits [B, C], that of `layer4` first."""
        layer3 = self.backbone.features(images)[1]
        layer4 = self.backbone.layer4(layer3)
        return self.last(layer4.mean((2, 3))), self.middle(layer3.mean((2, 3)))


def train(recipe: Recipe) -> tuple[ResNet, float]:
    """Train a backbone; return it in evaluation mode with its accuracy on held-out images."""
    torch.manual_seed(recipe.seed)
    source = ShapesSource(
        recipe.size,
        recipe.seed,
        train=recipe.steps * recipe.batch_size,
        test=HELD_OUT,
        classes=PRETRAINING_CLASSES,
        objects=(1, 1),
        radius=(0.25, 0.42),
        clutter=0,
    )
    backbone = build_backbone("resnet18", stem="plain", width=WIDTH, output_stride=32)
    model = Classifier(backbone, len(source.classes)).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, recipe.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, 10 * step / recipe.steps) * _cosine(step / recipe.steps)
    )
    loader = DataLoader(
        ObjectImages(source, "train"),
        recipe.batch_size,
        num_workers=1,
        worker_init_fn=_one_thread,
    )
    model.train()
    bar = tqdm(loader, "pretraining", mininterval=1 if sys.stderr.isatty() else 30)
    smooth = 0.0
    for images, labels in bar:
        last, middle = model(images.contiguous(memory_format=torch.channels_last))
        loss = _loss(last, labels) + 0.4 * _loss(middle, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        smooth += 0.02 * ((last.argmax(1) == labels).float().mean().item() - smooth)
        bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{smooth:.3f}", refresh=False)
    return backbone.eval(), accuracy(model, ObjectImages(source, "test"))


@torch.no_grad()
def accuracy(model: Classifier, images: ObjectImages) -> float:
    """Return the share of images that the last classifier classifies correctly."""
    model.eval()
    hits = 0
    for batch, labels in DataLoader(images, 50):
        hits += int((model(batch)[0].argmax(1) == labels).sum())
    return hits / len(images)


def build_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Build AdamW that decays matrices and kernels, not biases and batch norms."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=lr,
    )


def write_weights(path: Path, backbone: ResNet, metadata: dict[str, str]) -> None:
    """Write the backbone's tensors in float16 with torchvision's keys, atomically."""
    tensors = {
        key: value.half().contiguous() if value.is_floating_point() else value
        for key, value in backbone.state_dict().items()
    }
    with atomic_write(path) as file:
        file.write(save(tensors, metadata))


def main(arguments: list[str] | None = None) -> None:
    """Run the command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m fss.training.pretrain", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step, all different")
    parser.add_argument("--size", type=int, default=81, help="side of the images, pixels")
    parser.add_argument("--lr", type=float, default=3e-3, help="largest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its choice")
    options = parser.parse_args(arguments)
    if options.out.suffix != ".safetensors" or not options.out.parent.is_dir():
        parser.error(
            f"--out: expected a .safetensors file in an existing folder, got {options.out}"
        )
    for name in ("steps", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = Recipe(*(getattr(options, name) for name in Recipe._fields))
    backbone, reached = train(recipe)
    names = ["--" + name.replace("_", "-") for name in Recipe._fields]
    words = [word for pair in zip(names, recipe, strict=True) for word in map(str, pair)]
    write_weights(
        options.out,
        backbone,
        {
            "command": shlex.join(
                ["python", "-m", "fss.training.pretrain", "--out", options.out.name, *words]
            ),
            "architecture": f"resnet18, plain stem, width {WIDTH}",
            "accuracy": f"{reached:.3f} on {HELD_OUT} held-out images",
            "classes": json.dumps([shape.name for shape in PRETRAINING_CLASSES]),
            **{name: str(value) for name, value in recipe._asdict().items()},
        },
    )
    print(f"{options.out}: accuracy {reached:.3f} on {HELD_OUT} held-out images")


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, label_smoothing=0.1)


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)


if __name__ == "__main__":
    main()
