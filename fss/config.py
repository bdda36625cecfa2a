"""The configuration of a run: dataclasses whose defaults are the paper's SVF recipe.

The paper is Sun et al., "Singular Value Fine-tuning: Few-shot Segmentation requires Few-parameters
Fine-tuning", NeurIPS 2022 (Pascal-5i, ResNet-50). A YAML file in `configs/` holds only what is
different.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class DataConfig:
    """Where the photos come from and how episodes are made of them.

    Args:
        source: "folder" reads a Pascal VOC layout with its own classes, "pascal" Pascal-5i, "coco"
            COCO-20i, "fss1000" folders of classes, "shapes" renders the embedded procedural set.
        root: the folder of the data set: with "folder" JPEGImages/, SegmentationClass/ and
            classes.json, with "pascal" and "coco" as `fss data prepare`, PFENet, BAM or HSNet
            lay it out, with "fss1000" a folder per class; not with "shapes".
        train_list: file with `image mask` per line for "pascal" and "coco", together with
            `val_list`; a path prefix is left off. By default the published lists. For "fss1000"
            the base classes, a name per line.
        val_list: as `train_list`, of the test photos; for "fss1000" the novel classes.
        folds: of "coco": "fwb" (novel classes k + 1, k + 5, …) or "panet" (20k + 1 to 20k + 20).
        fold: which classes are novel, from 0.
        shots: support photos per episode (K).
        size: side of the network's square input, pixels; size - 1 is a multiple of 8.
        min_area: a class counts for a photo from this area on: pixels at original size when at
            least 1 (PFENet and BAM: 2·32·32 = 2048), a share of the photo when below 1.
        exclude_novel: train only on photos without any novel class (the paper's † filter).
        scale: range of the random scale of training photos (Pascal 0.9-1.1, COCO 0.8-1.25).
        rotate: largest rotation of training photos, degrees, applied to half of them.
        protocol: "pfenet" (PFENet, BAM and the paper): augmented training photos, test photos
            scaled to the longer side, K different supports; "hsnet": every photo resized to a
            square without augmentation, each support drawn independently of the others.
        shuffle_test: test queries in a fresh order each pass; false takes the list's order, as the
            published BAM test does, whose 1000 episodes ask for the first 1000 photos only.
        drop_small_classes: leave out the classes that have no more than K photos in a split, with
            a warning; by default they are an error.
        skip_unreadable: replace an episode with a photo that cannot be read, with a warning that
            names and counts; by default such a photo ends the run.
        workers: processes that load episodes; 0 loads in the training process.
        seed: seed of the training episodes and, with "shapes", of the photos.
    """

    source: Literal["folder", "pascal", "coco", "fss1000", "shapes"] = "folder"
    root: str | None = None
    train_list: str | None = None
    val_list: str | None = None
    folds: Literal["fwb", "panet"] = "fwb"
    fold: int = 0
    shots: int = 1
    size: int = 473
    min_area: float = 2048
    exclude_novel: bool = True
    scale: tuple[float, float] = (0.9, 1.1)
    rotate: float = 10.0
    protocol: Literal["pfenet", "hsnet"] = "pfenet"
    shuffle_test: bool = True
    drop_small_classes: bool = False
    skip_unreadable: bool = False
    workers: int = 2
    seed: int = 321

    def __post_init__(self) -> None:
        self.scale = tuple(self.scale)
        _choice("data.source", self.source, ("folder", "pascal", "coco", "fss1000", "shapes"))
        _choice("data.protocol", self.protocol, ("pfenet", "hsnet"))
        _choice("data.folds", self.folds, ("fwb", "panet"))
        if (self.train_list is None) != (self.val_list is None):
            raise ValueError("data.train_list, data.val_list: expected both or none, got one")
        if self.train_list and self.source not in ("pascal", "coco", "fss1000"):
            raise ValueError(
                'data.train_list: only "pascal", "coco" and "fss1000" take lists, not '
                f'"{self.source}"'
            )
        if self.source == "fss1000" and not self.train_list:
            raise ValueError(
                'data.train_list: "fss1000" needs the names of its base classes here and of its '
                "novel classes in data.val_list, got nothing"
            )
        if self.source != "shapes" and not self.root:
            raise ValueError(
                "data.root: expected the folder of the photos, got nothing; give --data.root, or "
                "--data.source shapes for the embedded photos"
            )
        _at_least("data.fold", self.fold, 0)
        _at_least("data.shots", self.shots, 1)
        if self.size < 9 or (self.size - 1) % 8:
            lower = max(9, (self.size - 1) // 8 * 8 + 1)
            raise ValueError(
                "data.size: expected a multiple of 8 plus 1 pixels, so that maps at output stride "
                f"8 align with the image; got {self.size}, the nearest are {lower} and {lower + 8}"
            )
        _positive("data.min_area", self.min_area)
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(
                f"data.scale: expected two factors, smallest first, above 0; got {list(self.scale)}"
            )
        if not 0 <= self.rotate <= 180:
            raise ValueError(f"data.rotate: expected 0 to 180 degrees, got {self.rotate}")
        _at_least("data.workers", self.workers, 0)
        _at_least("data.seed", self.seed, 0)


@dataclass
class ModelConfig:
    """The network.

    Args:
        name: "baseline", the paper's: PFENet with an ASPP in place of its FEM, main loss only.
        backbone: the feature extractor.
        stem: "plain", one 7×7 convolution (torchvision), or "deep", three 3×3 ones (semseg).
        stride_on: the bottleneck convolution with the stride: "conv2" (torchvision), "conv1"
            (Caffe, Keras).
        width: channels of the backbone's stem; 64 in every published ResNet.
        weights: of the backbone: a file, "torchvision" (downloaded by name), "shapes" (embedded,
            fits resnet18 of width 24) or "none".
        channels: of the head.
        dropout: probability that the head drops a channel while training.
    """

    name: Literal["baseline"] = "baseline"
    backbone: Literal["resnet18", "resnet50", "resnet101"] = "resnet50"
    stem: Literal["plain", "deep"] = "plain"
    stride_on: Literal["conv1", "conv2"] = "conv2"
    width: int = 64
    weights: str = "torchvision"
    channels: int = 256
    dropout: float = 0.5

    def __post_init__(self) -> None:
        _choice("model.name", self.name, ("baseline",))
        _choice("model.backbone", self.backbone, ("resnet18", "resnet50", "resnet101"))
        _choice("model.stem", self.stem, ("plain", "deep"))
        _choice("model.stride_on", self.stride_on, ("conv1", "conv2"))
        _at_least("model.width", self.width, 1)
        _at_least("model.channels", self.channels, 1)
        if not self.weights:
            raise ValueError('model.weights: expected a file, "torchvision", "shapes" or "none"')
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout: expected 0 up to below 1, got {self.dropout}")


@dataclass
class RegimeConfig:
    """What trains in the backbone; the head always does, the batch norms never do.

    Args:
        name: "freeze", nothing; "svf", the singular values of `layers`; "full", the convolution
            weights of `layers` (the paper's Table 17).
        layers: the backbone's children that "svf" and "full" act upon.
        strategy: how SVF layers compute: "auto", "reference", "fold", "chain" or "gram", all exact.
    """

    name: Literal["freeze", "svf", "full"] = "svf"
    layers: tuple[str, ...] = ("layer2", "layer3", "layer4")
    strategy: Literal["auto", "reference", "fold", "chain", "gram"] = "auto"

    def __post_init__(self) -> None:
        self.layers = tuple(self.layers)
        _choice("regime.name", self.name, ("freeze", "svf", "full"))
        _choice("regime.strategy", self.strategy, ("auto", "reference", "fold", "chain", "gram"))
        if self.name != "freeze" and not self.layers:
            raise ValueError(
                f'regime.layers: expected at least one layer for "{self.name}", got none'
            )


@dataclass
class OptimizerConfig:
    """The optimizer, one group for the head and one for what trains in the backbone.

    Args:
        name: "sgd" (the paper's) or "adamw".
        lr: learning rate of the head at the first step.
        momentum: of SGD.
        weight_decay: of the head; coupled in SGD, decoupled in AdamW.
        schedule: "cosine" decays both learning rates to 0 at the last step, "constant" keeps them
            (the published SVF code states a cosine, yet rebuilds its scheduler every step).
        backbone_lr: learning rate of the backbone's group; by default lr / 10, as published for S.
        backbone_weight_decay: of the backbone's group; by default `weight_decay`, as published.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.015
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    backbone_lr: float | None = None
    backbone_weight_decay: float | None = None

    def __post_init__(self) -> None:
        _choice("optimizer.name", self.name, ("sgd", "adamw"))
        _choice("optimizer.schedule", self.schedule, ("cosine", "constant"))
        _positive("optimizer.lr", self.lr)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum: expected 0 up to below 1, got {self.momentum}")
        _at_least("optimizer.weight_decay", self.weight_decay, 0)
        if self.backbone_lr is not None:
            _positive("optimizer.backbone_lr", self.backbone_lr)
        if self.backbone_weight_decay is not None:
            _at_least("optimizer.backbone_weight_decay", self.backbone_weight_decay, 0)


@dataclass
class TrainConfig:
    """A run: `fss train` makes one from a YAML file and the command line.

    Args:
        data: photos and episodes.
        model: the network.
        regime: what trains in the backbone.
        optimizer: how it trains.
        steps: optimizer steps; the paper's 200 epochs of Pascal fold 0 are about 105 000.
        batch_size: episodes per step, over all processes.
        foreground_weight: weight of the foreground class in the cross-entropy; above 1 where
            objects cover little of the photo.
        validation_every: steps between two validations; 0 validates only at the last step.
        validation_episodes: novel-class episodes of one validation.
        validation_seed: seed of those episodes, the same at every validation.
        test_episodes: novel-class episodes per seed of the evaluation that ends the run.
        test_seeds: one evaluation per seed; mean and spread are reported (defaults: BAM's).
        checkpoint: which one the run ends with testing: "best" has the highest validation mIoU,
            which selects on novel classes as all published numbers do; "last" selects nothing.
        save_every: steps between two writes of the last checkpoint; 0 writes it only at
            validations and when the run ends.
        log_every: steps between two rows of the logs.
        pictures: episodes drawn at the end.
        precision: as Lightning Fabric names it; "mixed" keeps the weights in float32.
        accelerator: "auto", "cpu" or "cuda".
        devices: processes, one per device: a number, or "auto".
        out: folder of the run.
        seed: seed of the head's weights and of dropout.
    """

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    regime: RegimeConfig = field(default_factory=RegimeConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 105_000
    batch_size: int = 8
    foreground_weight: float = 1.0
    validation_every: int = 500
    validation_episodes: int = 200
    validation_seed: int = 0
    test_episodes: int = 1000
    test_seeds: tuple[int, ...] = (510, 365, 382, 322, 988)
    checkpoint: Literal["best", "last"] = "best"
    save_every: int = 500
    log_every: int = 10
    pictures: int = 6
    precision: Literal["32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"] = "32-true"
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int | Literal["auto"] = 1
    out: str = "runs/fss"
    seed: int = 321

    def __post_init__(self) -> None:
        self.test_seeds = tuple(self.test_seeds)
        for name in ("steps", "batch_size", "validation_episodes", "test_episodes", "log_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("validation_every", "save_every", "pictures", "validation_seed", "seed"):
            _at_least(name, getattr(self, name), 0)
        _positive("foreground_weight", self.foreground_weight)
        if not self.test_seeds:
            raise ValueError("test_seeds: expected at least one seed, got none")
        if len(set(self.test_seeds)) != len(self.test_seeds):
            raise ValueError(
                f"test_seeds: expected different seeds, got {list(self.test_seeds)}: a repeated "
                "seed repeats its episodes and narrows the spread"
            )
        for seed in self.test_seeds:
            _at_least("test_seeds", seed, 0)
        _choice("checkpoint", self.checkpoint, ("best", "last"))
        _choice(
            "precision",
            self.precision,
            ("32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"),
        )
        _choice("accelerator", self.accelerator, ("auto", "cpu", "cuda"))
        if self.devices != "auto":
            _at_least("devices", self.devices, 1)
        if not self.out:
            raise ValueError("out: expected a folder for the run, got nothing")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as nested plain values, for JSON, YAML and checkpoints."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`."""
        parts = {
            "data": DataConfig,
            "model": ModelConfig,
            "regime": RegimeConfig,
            "optimizer": OptimizerConfig,
        }
        return cls(
            **{
                name: parts[name](**value) if name in parts else value
                for name, value in values.items()
            }
        )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {value!r}")


def _at_least(name: str, value: float, lowest: int) -> None:
    if not (value >= lowest and math.isfinite(value)):
        raise ValueError(f"{name}: expected a number from {lowest} on, got {value}")


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected a number above 0, got {value}")
