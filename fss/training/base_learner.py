"""Stage 1 of BAM: a PSPNet that segments the base classes of a fold."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from fss.config import (
    DataConfig,
    ModelConfig,
    check_at_least,
    check_positive,
    check_settings,
    free,
    free_settings,
)
from fss.data import IGNORE, Source, TrainTransform, build_episodes, build_source
from fss.data import test_transform as validation_transform
from fss.data.loader import episode_loader, explain_killed_worker
from fss.data.transforms import Transform
from fss.evaluation.evaluate import episode_classes
from fss.files import atomic_write, write_json
from fss.models import PSPNet, build_backbone, load_backbone
from fss.processes import build_fabric, fixed_shapes, float32_products, lay_out
from fss.runs.checkpoint import check_types, explain_misfit, read_checkpoint, write_checkpoint
from fss.runs.folder import BaseLearnerFolder
from fss.training.loop import (
    Stopped,
    agreed,
    check_resumable,
    postponed_stop,
    restore_training,
    saved_on_failure,
    training_state,
)


@dataclass
class BaseLearnerConfig:
    """A run of `fss train-base`; the defaults are BAM's for Pascal-5i.

    Args:
        data: photos and fold. Of a photo's mask the base classes count, what is novel is
            background; `shots` and `scale` do not count.
        model: the backbone and its weights; the head's settings do not count.
        scale: range of the random scale of training photos.
        steps: optimizer steps; BAM's 100 epochs of Pascal fold 0 are about 35 000.
        batch_size: photos per step, over all processes; two at least in each, for the batch norms.
        lr: learning rate at the first step, of all parameters.
        power: the learning rate of step n is lr·(1 - n/steps)^power.
        momentum: of SGD.
        weight_decay: of all parameters.
        foreground_weight: weight of each base class in the cross-entropy, background has 1; above 1
            where objects are small and steps are few.
        validation_every: steps between two validations on base classes of the test photos; 0
            validates only at the last step.
        validation_images: test photos of one validation, 0 for all.
        save_every: steps between two writes of the last checkpoint.
        log_every: steps between two rows of the log.
        precision: as Lightning Fabric names it; "mixed" keeps the weights in float32.
        tf32: which float32 products of a GPU round to TF32, see `TrainConfig`.
        accelerator: "auto", "cpu" or "cuda".
        devices: processes, one per device: a number, or "auto".
        out: folder of the run.
        seed: of the head's weights, of dropout and of the order of the photos.
    """

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    scale: tuple[float, float] = (0.5, 2.0)
    steps: int = 35_000
    batch_size: int = 12
    lr: float = 2.5e-4
    power: float = 0.9
    momentum: float = 0.9
    weight_decay: float = 1e-4
    foreground_weight: float = 1.0
    validation_every: int = 1000
    validation_images: int = 0
    save_every: int = free(500, "resume", "finished")
    log_every: int = free(10, "resume", "finished")
    precision: Literal["32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"] = "32-true"
    tf32: Literal["none", "convolutions", "all"] = "convolutions"
    accelerator: Literal["auto", "cpu", "cuda"] = free("auto", "resume", "finished")
    devices: int | Literal["auto"] = 1
    out: str = free("runs/base", "resume", "finished")
    seed: int = 321

    def __post_init__(self) -> None:
        check_settings(self)
        self.scale = tuple(self.scale)
        lowest = {"steps": 1, "batch_size": 2, "log_every": 1, "save_every": 1}
        lowest |= {"validation_every": 0, "validation_images": 0, "seed": 0, "weight_decay": 0}
        for name, least in lowest.items():
            check_at_least(name, getattr(self, name), least)
        for name in ("lr", "foreground_weight"):
            check_positive(name, getattr(self, name))
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected 0 up to below 1, got {self.momentum}")
        if not self.out:
            raise ValueError("out: expected a folder for the run, got nothing")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BaseLearnerConfig:
        """The inverse of `plain`; a setting that is newer than the values has its default."""
        parts = {
            "data": DataConfig(**values["data"]),
            "model": ModelConfig(**values["model"]),
        }
        return cls(**{**values, **parts})


# What may differ between the two halves of a resumed run.
FREE = free_settings(BaseLearnerConfig, "resume")

_NO_CLASS = -1


class BaseImages(Dataset[dict[str, Tensor]]):
    """Photos with masks of a fold's base classes; item i depends on (seed, i) alone.

    An item is `image` float32 [3, S, S] and `mask` int64 [S, S]: 0 background and novel classes, 1
    to n the base classes in ascending order of their ids, 255 ignored.

    Args:
        source: images and masks.
        classes: ids of the base classes.
        images: which images, numbers of the source.
        transform: of each image and its mask.
        length: of the data set; it runs through the images in a fresh order each pass. None takes
            each image once, in order.
        seed: from 0.
    """

    def __init__(
        self,
        source: Source,
        classes: list[int],
        images: list[int],
        transform: Transform,
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        self.source, self.images, self.transform = source, images, transform
        self.length, self.seed = length, seed
        self.label = np.zeros(256, dtype=np.uint8)
        self.label[sorted(classes)] = np.arange(1, len(classes) + 1)
        self.label[IGNORE] = IGNORE

    def __len__(self) -> int:
        return len(self.images) if self.length is None else self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"photo: expected 0 to {len(self) - 1}, got {index}")
        image = self.images[index % len(self.images)]
        if self.length is not None:
            round_, position = divmod(index, len(self.images))
            image = self.images[self._rng(0, round_).permutation(len(self.images))[position]]
        pixels, mask = self.source.load(image)
        # any crop will do: no class of the mask is the one to keep in sight
        sample = self.transform(pixels, self.label[mask], self._rng(1, index), foreground=_NO_CLASS)
        return {"image": sample.image, "mask": sample.mask.long()}

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))


class BaseTrainer:
    """The state of a run and its loop; see `train_base`."""

    def __init__(self, config: BaseLearnerConfig, fabric: Fabric) -> None:
        self.config, self.fabric, self.folder = config, fabric, BaseLearnerFolder(config.out)
        data = dataclasses.replace(config.data, shots=1)
        source = build_source(data)
        if data.fold >= len(source.folds):
            raise ValueError(
                f"data.fold: expected 0 to {len(source.folds) - 1}, the folds of {data.source}; "
                f"got {data.fold}"
            )
        if config.batch_size < 2 * fabric.world_size:
            raise ValueError(
                f"batch_size: expected at least 2 photos for each of {fabric.world_size} "
                f"processes, whose batch norms need them; got {config.batch_size}"
            )
        self.classes = episode_classes(source, data.fold, novel=False)
        train = build_episodes(data, "train", 1, 0, source).queries
        held_out = build_episodes(data, "validation", 1, 0, source).queries
        ids = list(self.classes)
        self.photos = BaseImages(
            source,
            ids,
            train,
            TrainTransform(data.size, config.scale, data.rotate),
            config.steps * config.batch_size,
            config.seed,
        )
        self.held_out = BaseImages(
            source, ids, held_out[: config.validation_images or None], validation_transform(data)
        )

        fabric.seed_everything(config.seed, verbose=False)
        model = config.model
        backbone = build_backbone(model.backbone, model.stem, model.stride_on, model.width)
        load_backbone(backbone, model.weights)
        self.network: nn.Module = PSPNet(backbone, len(self.classes))
        if fabric.world_size > 1 and fabric.device.type == "cuda":
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        lay_out(self.network, fabric.device)
        optimizer = torch.optim.SGD(
            self.network.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.PolynomialLR(
            optimizer, config.steps, config.power
        )
        self.model, self.optimizer = fabric.setup(self.network, optimizer)
        fabric.seed_everything(config.seed + fabric.global_rank, verbose=False)
        weight = torch.full((1 + len(self.classes),), config.foreground_weight)
        weight[0] = 1.0
        self.class_weight = fabric.to_device(weight)
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.history: list[dict[str, float]] = []
        self.losses: list[Tensor] = []

    def fit(self) -> None:
        """Trains from the current step to the last."""
        config, fabric = self.config, self.fabric
        start = self.step * config.batch_size + fabric.global_rank
        share = Subset(self.photos, range(start, len(self.photos), fabric.world_size))
        loader = episode_loader(
            share, config.batch_size // fabric.world_size, config.data.workers, fabric
        )
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            desc=f"base learner fold {config.data.fold}",
            unit="step",
            disable=not fabric.is_global_zero,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )
        self.model.train()
        with (
            fixed_shapes(),
            postponed_stop() as statuses,
            bar,
            explain_killed_worker(self.folder.last_good),
        ):
            for batch in saved_on_failure(loader, self._save_alone):
                lr = self._train_step(batch)
                bar.update()
                ends = self.step == config.steps
                if self.step % config.log_every == 0 or ends:
                    bar.set_postfix(loss=f"{self._log(lr):.4f}", lr=f"{lr:.2e}", refresh=False)
                if ends or (config.validation_every and self.step % config.validation_every == 0):
                    self._validate()
                    self._save(self.folder.last)
                elif self.step % config.save_every == 0:
                    self._save(self.folder.last)
                if status := agreed(statuses, fabric, self.step % config.log_every == 0):
                    self._save(self.folder.last)
                    raise Stopped(
                        f"stopped after step {self.step} of {config.steps}, saved; the same "
                        "command with --resume goes on",
                        status,
                    )

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from the content of last.pt."""
        check_types(state, {"step": int, "best": dict | None, "history": list})
        if not 0 <= state["step"] <= self.config.steps:
            raise IndexError(f"step: expected 0 to {self.config.steps}, got {state['step']}")
        self.network.load_state_dict(state["state_dict"])
        restore_training(state, self.fabric, self.optimizer, self.scheduler)
        self.step, self.best, self.history = state["step"], state["best"], state["history"]
        self.losses = list(self.fabric.to_device(state["losses"]))

    def _train_step(self, batch: dict[str, Tensor]) -> float:
        """Returns the learning rate that the step had."""
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad()
        prediction = self.model(batch["image"])
        weight = self.class_weight.to(prediction.dtype)
        loss = functional.cross_entropy(prediction, batch["mask"], weight, ignore_index=IGNORE)
        self.fabric.backward(loss)
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        self.losses.append(loss.detach())
        return lr

    def _log(self, lr: float) -> float:
        loss = float(self.fabric.all_reduce(torch.stack(self.losses).mean(), reduce_op="mean"))
        self.losses = []
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss: expected a finite number, got {loss} until step {self.step}; lower lr, or "
                f"train in precision 32-true. {self.folder.last_good()}"
            )
        self.history.append({"step": self.step, "loss": loss, "lr": lr})
        return loss

    @torch.no_grad()
    def _validate(self) -> None:
        """Mean IoU of the base classes on the held-out photos, at the network's size."""
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

    def _save_alone(self) -> None:
        """Saves unless other processes would have to take part."""
        if self.step and self.fabric.world_size == 1:
            self._save(self.folder.last)

    def _save(self, path: Path) -> None:
        state: dict[str, Any] = {
            "state_dict": self.network.state_dict(),
            "classes": self.classes,
            "config": plain(self.config),
            "step": self.step,
            "best": self.best,
        }
        if path == self.folder.last:
            state |= {
                **training_state(self.fabric, self.optimizer, self.scheduler),
                "history": self.history,
                "losses": torch.stack(self.losses) if self.losses else torch.zeros(0),
            }
        if self.fabric.is_global_zero:
            write_checkpoint(path, state)
            table = io.StringIO(newline="")
            writer = csv.DictWriter(table, ("step", "loss", "lr", "miou"))
            writer.writeheader()
            writer.writerows(self.history)
            with atomic_write(self.folder.log) as file:
                file.write(table.getvalue().encode())
        self.fabric.barrier()


def train_base(
    config: BaseLearnerConfig, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Trains a base learner; the folder `config.out` keeps base.pt, last.pt, log.csv, result.json.

    base.pt has the highest mIoU of the base classes on the test photos, and is what BAM's
    `model.base_weights` takes.

    Args:
        config: of the run.
        resume: goes on from last.pt; on the CPU bit for bit as if never stopped.
        overwrite: replaces an earlier run in the same folder.

    Returns what result.json holds: step, mIoU and IoU per class of base.pt, and the configuration.

    Raises:
        ValueError: a folder that already has a run, a checkpoint of another run, ...
        FileNotFoundError: nothing to resume; photos or weights that are not there.
        FloatingPointError: a loss that is not finite; the last checkpoint is from before.
        OSError: a folder that cannot be written, a full disk; the last checkpoint is whole.
        Stopped: after ctrl-C or SIGTERM, once the step is finished and saved.
    """
    folder = BaseLearnerFolder(config.out)
    path = folder.last
    folder.check(resume, overwrite)
    fabric = build_fabric(config)
    state = read_checkpoint(path) if resume else None
    if state is not None:
        if not isinstance(state, dict) or "history" not in state:
            raise ValueError(f"checkpoint: expected a checkpoint of fss train-base at {path}")
        with explain_misfit(path):
            state["config"] = plain(BaseLearnerConfig.from_dict(state["config"]))
        check_resumable(state, plain(config), FREE, path, fabric)
    trainer = BaseTrainer(config, fabric)
    with float32_products(config.tf32), folder.explain_unwritable():
        if fabric.is_global_zero:
            folder.remove_leftovers()
        if state is not None:
            with explain_misfit(path):
                trainer.restore(state)
        elif fabric.is_global_zero:
            folder.clear()
        trainer.fit()
        result = {**(trainer.best or {}), "config": plain(config)}
        if fabric.is_global_zero:
            write_json(folder.result_file, result)
    fabric.barrier()
    return result


def base_table(result: dict[str, Any]) -> list[str]:
    """Lines of a table of what `train_base` returns, IoU in percent."""
    width = max(map(len, (*result["iou"], "mIoU")))
    lines = [f"base classes on test photos, step {result['step']}", f"{'':{width}}   IoU %"]
    lines += [f"{name:{width}}  {100 * iou:6.2f}" for name, iou in result["iou"].items()]
    return [*lines, f"{'mIoU':{width}}  {100 * result['miou']:6.2f}"]


def confusion(prediction: Tensor, target: Tensor, classes: int) -> Tensor:
    """Pixels [classes, classes] of each target class (row) and prediction (column), without 255."""
    kept = target != IGNORE
    pairs = target[kept] * classes + prediction[kept]
    return torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def plain(config: BaseLearnerConfig) -> dict[str, Any]:
    """The configuration as nested plain values, for JSON and checkpoints."""

    def simple(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: simple(item) for name, item in value.items()}
        return [simple(item) for item in value] if isinstance(value, (list, tuple)) else value

    return simple(dataclasses.asdict(config))
