"""Stage 1 of BAM: a PSPNet that segments the base classes of a fold."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Subset

from fss.config import TF32, Accelerator, DataConfig, ModelConfig, Precision, plain
from fss.config.checks import (
    check_at_least,
    check_positive,
    check_settings,
    check_side,
    check_steps,
    count_steps,
)
from fss.config.fields import free
from fss.data import IGNORE, TrainTransform
from fss.data import test_transform as validation_transform
from fss.data.base_images import BaseImages, base_images
from fss.data.loader import episode_loader
from fss.evaluation.evaluate import episode_classes
from fss.files import atomic_write, write_json
from fss.models import PSPNet, build_backbone, load_backbone
from fss.runs.checkpoint import check_types, read_checkpoint, write_checkpoint
from fss.runs.folder import BaseLearnerFolder
from fss.training.loop import Loop, start

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass
class BaseLearnerData(DataConfig):
    """The photos of a base learner: all training photos of the lists, whatever they show.

    Novel classes are background in their masks. `shots`, `min_area` and `scale` are ignored, and
    the settings that differ from those of `DataConfig` have BAM's values.

    Args:
        size: side of the square crop, pixels.
        exclude_novel: train only on photos without any novel class, which BAM does not.
    """

    size: int = 417
    exclude_novel: bool = False


@dataclass
class BaseLearnerConfig:
    """A run of `fss train-base`; the defaults are those of BAM's published code for Pascal-5i.

    Args:
        data: photos and fold, see `BaseLearnerData`.
        model: the backbone and its weights; the head's settings are ignored.
        scale: range of the random scale of training photos.
        steps: optimizer steps; BAM's 100 epochs of Pascal's 5953 photos are 49 600.
        batch_size: photos per step, over all processes; two at least in each, for the batch norms.
        lr: learning rate of the backbone at the first step.
        head_lr_factor: multiplies it for pyramid pooling and classifier. BAM has 10 on Pascal; on
            COCO it multiplies all rates by 10, which is lr 0.0025 and a factor of 1.
        power: the learning rate of step n is lr·(1 - n/steps)^power.
        momentum: of SGD.
        weight_decay: of all parameters.
        foreground_weight: weight of each base class in the cross-entropy, background has 1; above 1
            where objects are small and steps are few.
        validation_every: steps, or a text like "2 epochs", between two validations on base classes
            of the test photos; 0 validates only at the last step.
        validation_images: test photos of one validation, 0 for all, as BAM.
        save_every: steps between two writes of the last checkpoint.
        log_every: steps between two rows of the log.
        precision: as Lightning Fabric names it; "mixed" keeps the weights in float32.
        tf32: which float32 products of a GPU round to TF32, see `TrainConfig`.
        accelerator: "auto", "cpu" or "cuda".
        devices: processes, one per device: a number, or "auto".
        out: folder of the run.
        seed: of the head's weights, of dropout and of the order of the photos.
    """

    data: BaseLearnerData
    model: ModelConfig = field(default_factory=ModelConfig)
    scale: tuple[float, float] = (0.5, 2.0)
    steps: int = 49_600
    batch_size: int = 12
    lr: float = 2.5e-4
    head_lr_factor: float = 10.0
    power: float = 0.9
    momentum: float = 0.9
    weight_decay: float = 1e-4
    foreground_weight: float = 1.0
    validation_every: int | str = "1 epoch"
    validation_images: int = 0
    save_every: int = free(500, "resume", "finished")
    log_every: int = free(10, "resume", "finished")
    precision: Precision = "32-true"
    tf32: TF32 = "convolutions"
    accelerator: Accelerator = free("auto", "resume", "finished")
    devices: int | Literal["auto"] = 1
    out: str = free("runs/base", "resume", "finished")
    seed: int = 321

    accumulate: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if type(self.data) is DataConfig:
            self.data = BaseLearnerData(**vars(self.data))
        check_settings(self)
        check_side("data.size", self.data.size)
        self.scale = tuple(self.scale)
        lowest = {"steps": 1, "batch_size": 2, "log_every": 1, "save_every": 1}
        lowest |= {"validation_images": 0, "seed": 0, "weight_decay": 0}
        for name, least in lowest.items():
            check_at_least(name, getattr(self, name), least)
        check_steps("validation_every", self.validation_every)
        for name in ("lr", "head_lr_factor", "foreground_weight"):
            check_positive(name, getattr(self, name))
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected 0 up to below 1, got {self.momentum}")
        if not self.out:
            raise ValueError("out: expected a folder for the run, got nothing")

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as nested plain values, for JSON and checkpoints."""
        return plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BaseLearnerConfig:
        """Invert `to_dict`; a setting that is newer than the values has its default."""
        data, model = BaseLearnerData(**values["data"]), ModelConfig(**values["model"])
        return cls(**values | {"data": data, "model": model})


class BaseTrainer(Loop):
    """Training of a base learner on photos; see `train_base`."""

    FOLDER = BaseLearnerFolder

    def __init__(self, config: BaseLearnerConfig, fabric: Fabric) -> None:
        super().__init__(config, fabric)
        if config.batch_size < 2 * fabric.world_size:
            raise ValueError(
                f"batch_size: expected at least 2 photos for each of {fabric.world_size} "
                f"processes, whose batch norms need them; got {config.batch_size}"
            )
        self.classes = episode_classes(self.source, config.data.fold, novel=False)
        data = config.data
        train = base_images(self.source, data.fold, data.exclude_novel)
        held_out = self.source.indices("test")
        self.validation_every = count_steps(config.validation_every, len(train), config.batch_size)
        ids = list(self.classes)
        self.dataset = BaseImages(
            self.source,
            ids,
            train,
            TrainTransform(data.size, config.scale, data.rotate),
            config.steps * config.batch_size,
            config.seed,
        )
        self.held_out = BaseImages(
            self.source,
            ids,
            held_out[: config.validation_images or None],
            validation_transform(data),
        )

        model = config.model
        backbone = build_backbone(model.backbone, model.stem, model.stride_on, model.width)
        load_backbone(backbone, model.weights)
        network: nn.Module = PSPNet(backbone, len(self.classes))
        if fabric.world_size > 1 and fabric.device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        optimizer = torch.optim.SGD(parameter_groups(network, config), momentum=config.momentum)
        scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, config.steps, config.power)
        self._set_up(network, optimizer, scheduler)
        weight = torch.full((1 + len(self.classes),), config.foreground_weight)
        weight[0] = 1.0
        self.class_weight = fabric.to_device(weight)

        self.title = f"base learner fold {data.fold}"
        self.continuation = "the same command with --resume goes on"
        self.history: list[dict[str, float]] = []
        self.losses: list[Tensor] = []
        self._learning_rate = config.lr

    def _train_step(self, parts: list[dict[str, Any]]) -> None:
        (batch,) = parts
        self._learning_rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad()
        prediction = self.model(batch["image"])
        weight = self.class_weight.to(prediction.dtype)
        loss = functional.cross_entropy(prediction, batch["mask"], weight, ignore_index=IGNORE)
        self.fabric.backward(loss)
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        self.losses.append(loss.detach())

    def _log_steps(self, first: int, since: float) -> dict[str, str]:
        """Add the mean loss since the last row to the history; return what the bar shows."""
        loss = float(self.fabric.all_reduce(torch.stack(self.losses).mean(), reduce_op="mean"))
        self.losses = []
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss: expected a finite number, got {loss} until step {self.step}; lower lr, or "
                f"train in precision 32-true. {self.folder.last_good()}"
            )
        self.history.append({"step": self.step, "loss": loss, "lr": self._learning_rate})
        return {"loss": f"{loss:.4f}", "lr": f"{self._learning_rate:.2e}"}

    @torch.no_grad()
    def _validate(self) -> None:
        """Score the held-out photos by the mean IoU of the base classes, at the network's size."""
        fabric, classes = self.fabric, len(self.classes) + 1
        share = Subset(
            self.held_out, range(fabric.global_rank, len(self.held_out), fabric.world_size)
        )
        counts = torch.zeros(classes, classes, dtype=torch.int64)
        self.model.eval()
        loader = episode_loader(share, self.config.batch_size, self.config.data.workers, fabric)
        for batch in loader:
            counts += confusion(self.model(batch["image"]).argmax(1), batch["mask"], classes).cpu()
        self.model.train()
        counts = fabric.all_reduce(counts.to(fabric.device), reduce_op="sum").cpu()
        hit = counts.diag()
        iou = (hit / (counts.sum(0) + counts.sum(1) - hit).clamp(min=1))[1:]
        miou = float(iou.mean())
        self.history.append({"step": self.step, "miou": miou})
        if self.best is None or miou > self.best["miou"]:
            named = dict(zip(self.classes.values(), iou.tolist(), strict=True))
            self.best = {"step": self.step, "miou": miou, "iou": named}
            self._save(self.folder.base)

    def _state(self) -> dict[str, Any]:
        return {
            "state_dict": self.network.state_dict(),
            "classes": self.classes,
            "config": self.config.to_dict(),
        }

    def _progress(self) -> dict[str, Any]:
        losses = torch.stack(self.losses) if self.losses else torch.zeros(0)
        return {"history": self.history, "losses": losses}

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        """Write a checkpoint and, with it, the log."""
        write_checkpoint(path, state)
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, ("step", "loss", "lr", "miou"))
        writer.writeheader()
        writer.writerows(self.history)
        with atomic_write(self.folder.log) as file:
            file.write(table.getvalue().encode())

    @staticmethod
    def read(path: Path, config: BaseLearnerConfig) -> dict[str, Any]:
        """Read last.pt; raise ValueError if it is of another command."""
        state = read_checkpoint(path)
        if not isinstance(state, dict) or "history" not in state:
            raise ValueError(f"checkpoint: expected a checkpoint of fss train-base at {path}")
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the content of last.pt, see `start`."""
        check_types(state, {"history": list})
        self.network.load_state_dict(state["state_dict"])
        if len(state["optimizer"]["param_groups"]) != len(self.optimizer.param_groups):
            raise ValueError(
                f"checkpoint: {self.folder.last} is of a base learner with one learning rate for "
                "all parameters, as earlier versions trained it; it cannot go on with two. Finish "
                "it there, or begin anew with --overwrite"
            )
        super().restore(state)
        self.history = state["history"]
        self.losses = list(self.fabric.to_device(state["losses"]))


def parameter_groups(network: nn.Module, config: BaseLearnerConfig) -> list[dict[str, Any]]:
    """Return the optimizer's groups: backbone and head, each with its rate."""
    parts = {"backbone": config.lr, "base_learner": config.lr * config.head_lr_factor}
    return [
        {
            "name": name,
            "params": list(network.get_submodule(name).parameters()),
            "lr": lr,
            "weight_decay": config.weight_decay,
        }
        for name, lr in parts.items()
    ]


def train_base(
    config: BaseLearnerConfig, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Train a base learner; the folder `config.out` keeps base.pt, last.pt, log.csv, result.json.

    base.pt has the highest mIoU of the base classes on the test photos, and is what BAM's
    `model.base_weights` takes.

    Args:
        config: of the run.
        resume: go on from last.pt; processes that torchrun restarts do so by themselves. On the CPU
            bit for bit as if never stopped.
        overwrite: replace an earlier run in the same folder.

    Returns what result.json holds: step, mIoU and IoU per class of base.pt, and the configuration.

    Raises:
        ValueError: a folder that already has a run, a checkpoint of another run, ...
        FileNotFoundError: nothing to resume; photos or weights are missing.
        FloatingPointError: a loss that is not finite; the last checkpoint is from before.
        OSError: a folder that cannot be written, a full disk; the last checkpoint is whole.
        Stopped: after ctrl-C or SIGTERM, once the step is finished and saved.
    """
    with start(BaseTrainer, config, resume, overwrite) as trainer:
        trainer.fit()
        result = {**(trainer.best or {}), "config": config.to_dict()}
        if trainer.fabric.is_global_zero:
            write_json(trainer.folder.result_file, result)
        trainer.fabric.barrier()
        return result


def base_table(result: dict[str, Any]) -> list[str]:
    """Format what `train_base` returns as lines of a table, IoU in percent."""
    width = max(map(len, (*result["iou"], "mIoU")))
    lines = [f"base classes on test photos, step {result['step']}", f"{'':{width}}   IoU %"]
    lines += [f"{name:{width}}  {100 * iou:6.2f}" for name, iou in result["iou"].items()]
    return [*lines, f"{'mIoU':{width}}  {100 * result['miou']:6.2f}"]


def confusion(prediction: Tensor, target: Tensor, classes: int) -> Tensor:
    """Count pixels [classes, classes] by target (row) and prediction (column), ignoring 255."""
    kept = target != IGNORE
    pairs = target[kept] * classes + prediction[kept]
    return torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
