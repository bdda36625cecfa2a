"""The training loop and its state."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any

import torch
import yaml
from lightning_fabric import Fabric
from torch.utils.data import Subset
from tqdm import tqdm

from fss.captured import captured
from fss.config import TrainConfig, free_settings
from fss.data import build_episodes, build_source
from fss.data.loader import episode_loader, explain_killed_worker
from fss.evaluation.evaluate import episode_classes, evaluate
from fss.evaluation.metrics import EpisodeIoU, episode_counts
from fss.files import atomic_write
from fss.models import build_model
from fss.models.regimes import apply_regime, build_optimizer, build_scheduler
from fss.processes import fixed_shapes, lay_out, synchronise_batch_norms
from fss.runs.checkpoint import check_types, save_checkpoint
from fss.runs.folder import RunFolder
from fss.runs.log import RunLog
from fss.training.loop import (
    Stopped,
    agreed,
    gather,
    postponed_stop,
    restore_training,
    saved_on_failure,
    training_state,
)
from fss.training.measure import StepTimer, peak_memory, saved_bytes

# What may differ between the two halves of a resumed run: it does not change what is trained.
FREE = free_settings(TrainConfig, "resume")

# Of what last.pt holds, the plain values.
_PROGRESS: dict[str, type | UnionType] = {"step": int, "stale": int, "skipped": int, "losses": list}
_PROGRESS |= {"best": dict | None, "saved_bytes": int | None, "unreadable": dict}


class Trainer:
    """The state of a run and its loop.

    With several processes, or a step in several parts, the episodes of a step are shared evenly and
    gradients averaged: up to rounding what one process would compute at once, apart from dropout
    and, with a foreground weight or ignored pixels, the weights of the shares' mean losses.

    Args:
        config: of the run.
        fabric: launched, see `build_fabric`.
    """

    def __init__(self, config: TrainConfig, fabric: Fabric) -> None:
        self.config = config
        self.fabric = fabric
        self.folder = RunFolder(config.out)
        self.source = build_source(config.data)
        folds = len(self.source.folds)
        if config.data.fold >= folds:
            raise ValueError(
                f"data.fold: expected 0 to {folds - 1}, the folds of {config.data.source}; "
                f"got {config.data.fold}"
            )
        self.classes = episode_classes(self.source, config.data.fold)
        self.train_episodes = build_episodes(
            config.data, "train", config.steps * config.batch_size, config.data.seed, self.source
        )
        novel = config.validation_classes == "novel"
        self.validated = (
            self.classes if novel else episode_classes(self.source, config.data.fold, False)
        )
        self.validation_episodes = build_episodes(
            config.data,
            "test" if novel else "validation",
            config.validation_episodes,
            config.validation_seed,
            self.source,
        )

        fabric.seed_everything(config.seed, verbose=False)
        self.base_classes = episode_classes(self.source, config.data.fold, novel=False)
        self.network = build_model(config.model, self.base_classes, config.data.shots)
        apply_regime(self.network, config.regime)
        if config.sync_batch_norm:
            self.network = synchronise_batch_norms(self.network, config.regime, fabric)
        lay_out(self.network, fabric.device)
        optimizer = build_optimizer(self.network, config.optimizer)
        self.scheduler = build_scheduler(optimizer, config.optimizer, config.steps)
        self.model, self.optimizer = fabric.setup(self.network, optimizer)
        fabric.seed_everything(config.seed + fabric.global_rank, verbose=False)
        self.class_weight = fabric.to_device(torch.tensor([1.0, config.foreground_weight]))

        self.step = 0
        self.best: dict[str, float] | None = None
        self.stale = 0
        self.skipped = 0
        self.unreadable: Counter[str] = Counter()
        self.saved_bytes: int | None = None
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.log: RunLog | None = None
        self._pending: list[tuple[int, float, torch.Tensor]] = []
        self._timer = StepTimer(fabric.device)
        places = torch.zeros(max(self.base_classes) + 1, dtype=torch.int64)
        places[list(self.base_classes)] = torch.arange(len(self.base_classes))
        self._places = fabric.to_device(places)
        self._counts = fabric.to_device(torch.zeros(len(self.base_classes), 5, dtype=torch.int64))
        inputs = (*self.network.inputs, *self.network.targets, "query_mask", "class_id")
        self._run_parts = captured(
            self._backward_parts, self.network, inputs, fabric, config.graph, self._tell
        )

    def fit(self) -> None:
        """Trains from the current step to the last."""
        config, fabric = self.config, self.fabric
        start = self.step * config.batch_size + fabric.global_rank
        episodes = Subset(
            self.train_episodes, range(start, len(self.train_episodes), fabric.world_size)
        )
        part = config.batch_size // fabric.world_size // config.accumulate
        loader = episode_loader(episodes, part, config.data.workers, fabric)
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            desc=f"{config.regime.name} fold {config.data.fold}",
            unit="step",
            disable=not fabric.is_global_zero,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )
        self.model.train()
        window = self.step, time.perf_counter()
        with (
            fixed_shapes(),
            self._open_log(),
            postponed_stop() as statuses,
            bar,
            explain_killed_worker(self.folder.last_good),
        ):
            batches = saved_on_failure(loader, self._save_alone)
            while self.step < config.steps and not self.has_converged:
                parts = [next(batches) for _ in range(config.accumulate)]
                self._train_step(parts)
                bar.update()
                ends = self.step == config.steps
                if self._due(config.log_every) or ends:
                    bar.set_postfix(self._log_training(*window), refresh=False)
                    window = self.step, time.perf_counter()
                if self._due(config.validation_every) or ends:
                    self._tell(self._validate())
                    self._save(self.folder.last)
                    window = self.step, time.perf_counter()
                    if self.has_converged:
                        self._tell(self._stop_line())
                elif self._due(config.save_every):
                    self._save(self.folder.last)
                if status := agreed(statuses, fabric, self._due(config.log_every)):
                    self._save(self.folder.last)
                    raise Stopped(
                        f"stopped after step {self.step} of {config.steps}, saved; continue with: "
                        f"fss train --config {self.folder.config_file} --resume",
                        status,
                    )
        self._run_parts = self._backward_parts  # the test needs a graph's memory
        self.optimizer.zero_grad()
        self.unreadable = self._all_unreadable()
        if self.unreadable:
            self._tell(self._unreadable_line())

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from the content of last.pt, see `check_resumable`."""
        check_types(state, _PROGRESS)
        if not 0 <= state["step"] <= self.config.steps:
            raise IndexError(f"step: expected 0 to {self.config.steps}, got {state['step']}")
        if (best := state["best"]) is not None:
            self.best = {name: best[name] + 0 for name in ("miou", "fb_iou", "step")}
        self.network.load_state_dict(state["model"])
        restore_training(state, self.fabric, self.optimizer, self.scheduler)
        self.step, self.stale, self.skipped = state["step"], state["stale"], state["skipped"]
        self.saved_bytes = state["saved_bytes"]
        self.seconds = state["seconds"].tolist()
        self.losses = state["losses"]
        if self.fabric.is_global_zero:  # sums over the processes
            self.unreadable = Counter(state["unreadable"])
            self._counts.copy_(state["counts"])

    @contextmanager
    def _open_log(self) -> Iterator[None]:
        """Keeps the configuration and opens the log, in the first process only."""
        if not self.fabric.is_global_zero:
            yield
            return
        text = yaml.safe_dump(self.config.to_dict(), sort_keys=False, allow_unicode=True)
        with atomic_write(self.folder.config_file) as file:
            file.write(text.encode())
        self.log = self.folder.open_log(self.validated, self.step)
        try:
            yield
        finally:
            self.log.close()

    def _save_alone(self) -> None:
        """Saves unless other processes would have to take part."""
        if self.step and self.fabric.world_size == 1:
            self._save(self.folder.last)

    def _train_step(self, parts: list[dict[str, Any]]) -> None:
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self._timer.start()
        self.optimizer.zero_grad()
        losses = self._run_parts(parts)
        self._step_optimizer()
        self._timer.stop()
        self.scheduler.step()
        self.step += 1
        for part in parts:
            for errors in part.get("unreadable", ()):
                self.unreadable.update(errors)
        self._pending.append((self.step, learning_rate, losses.mean()))

    def _backward_parts(self, parts: list[dict[str, Any]]) -> torch.Tensor:
        """Adds the gradients of the parts of a step; returns the loss of each."""
        return torch.stack([self._backward(part, part is parts[-1]) for part in parts])

    def _backward(self, part: dict[str, Any], last: bool) -> torch.Tensor:
        """Adds the gradients of a part of a step; only the last waits for other processes."""
        with self.fabric.no_backward_sync(self.model, enabled=not last):
            if self.saved_bytes is None:
                with saved_bytes(self.network) as saved:
                    loss = self._loss(part)
                self.saved_bytes = saved.total
            else:
                loss = self._loss(part)
            self.fabric.backward(loss / self.config.accumulate)
        return loss.detach()

    def _step_optimizer(self) -> None:
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        scale = scaler.get_scale() if scaler else 0.0
        self.optimizer.step()
        # a scaler halves its scale exactly when it has left a step out
        self.skipped += int(scaler is not None and scaler.get_scale() < scale)

    def _loss(self, batch: dict[str, Any]) -> torch.Tensor:
        prediction = self.model(*(batch[name] for name in self.network.inputs))
        targets = (batch[name] for name in self.network.targets)
        counts = episode_counts(prediction.logits.detach().argmax(1), batch["query_mask"])
        self._counts.index_add_(0, self._places[batch["class_id"]], counts)
        return self.network.loss(prediction, *targets, class_weight=self.class_weight)

    def _settle(self) -> None:
        """Takes the losses and times of the steps since the last call; waits for the device."""
        if not self._pending:
            return
        losses = self.fabric.all_reduce(
            torch.stack([loss for _, _, loss in self._pending]), reduce_op="mean"
        ).tolist()
        for (step, learning_rate, _), loss in zip(self._pending, losses, strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"loss: expected a finite number, got {loss} at step {step} with learning rate "
                    f"{learning_rate:.3g}; lower optimizer.lr, or train in precision 32-true. "
                    + self.folder.last_good()
                )
        self.losses += losses
        self.seconds += self._timer.take()
        self._pending = []

    def _log_training(self, first: int, since: float) -> dict[str, str]:
        """Adds a row on the steps after `first`, begun at time `since`, to the log.

        Returns what the progress bar shows.
        """
        self._settle()
        episodes = (self.step - first) * self.config.batch_size
        images_per_second = episodes * (1 + self.config.data.shots) / (time.perf_counter() - since)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        row = {
            "step": self.step,
            "loss": statistics.fmean(self.losses),
            "lr": rates[0],
            "backbone_lr": rates[1] if len(rates) > 1 else None,
            "step_seconds": statistics.median(self.seconds[-len(self.losses) :]),
            "images_per_second": images_per_second,
            "peak_memory_bytes": peak_memory(self.fabric.device),
            "skipped_steps": self.skipped,
            "unreadable": self._all_unreadable().total(),
        }
        self.losses = []
        if self.log is not None:
            self.log.train(row)
        return {
            "loss": f"{row['loss']:.4f}",
            "lr": f"{rates[0]:.2e}",
            "images/s": f"{images_per_second:.1f}",
            "memory": f"{row['peak_memory_bytes'] / 2**30:.2f} GiB",
        }

    def _validate(self) -> str:
        """Scores the validated classes, keeps the best checkpoint; returns the outcome."""
        self._settle()
        score = evaluate(
            self.model,
            self.validation_episodes,
            list(self.validated),
            self.fabric,
            max(1, self.config.batch_size // self.fabric.world_size // self.config.accumulate),
            self.config.data.workers,
            self.config.resize,
            self.config.feature_cache,
            self.config.graph,
        )
        train_miou = self._train_miou()
        if self.log is not None:
            scores = {"miou": score.miou, "fb_iou": score.fb_iou, "train_miou": train_miou}
            self.log.validation({"step": self.step, **scores}, score.iou)
        if self.best is None or score.miou > self.best["miou"]:
            self.best = {"miou": score.miou, "fb_iou": score.fb_iou, "step": self.step}
            self.stale = 0
            self._save(self.folder.best)
        else:
            self.stale += 1
        unsampled = f", {len(score.unsampled)} classes unsampled" if score.unsampled else ""
        return (
            f"step {self.step}: validation mIoU {100 * score.miou:.2f} %, "
            f"FB-IoU {100 * score.fb_iou:.2f} %{unsampled}; training mIoU {100 * train_miou:.2f} %"
        )

    def _train_miou(self) -> float:
        """Of the training episodes since the last validation, as they were when trained on."""
        metric = EpisodeIoU(list(self.base_classes))
        metric.counts = self._all_counts()
        self._counts.zero_()
        return metric.result().sampled_miou

    def _all_counts(self) -> torch.Tensor:
        return self.fabric.all_reduce(self._counts.clone(), reduce_op="sum").cpu()

    def _save(self, path: Path) -> None:
        self._settle()
        for parameter_name, parameter in self.network.named_parameters():
            if parameter.requires_grad and not bool(parameter.isfinite().all()):
                raise FloatingPointError(
                    f"{parameter_name}: expected finite numbers, got others at step {self.step}; "
                    f"lower optimizer.lr, or train in precision 32-true. {self.folder.last_good()}"
                )
        state: dict[str, Any] = {
            "step": self.step,
            "best": self.best,
            "stale": self.stale,
            "skipped": self.skipped,
            "model": self.network.state_dict(),
            "base_classes": self.base_classes,
        }
        if path == self.folder.last:
            state |= {
                **training_state(self.fabric, self.optimizer, self.scheduler),
                "unreadable": dict(self._all_unreadable()),
                "saved_bytes": self.saved_bytes,
                "seconds": torch.tensor(self.seconds),
                "losses": self.losses,
                "counts": self._all_counts(),
            }
        if self.fabric.is_global_zero:
            save_checkpoint(path, self.config, state)
        self.fabric.barrier()

    def _tell(self, line: str) -> None:
        if self.fabric.is_global_zero:
            tqdm.write(line, file=sys.stderr)

    @property
    def has_converged(self) -> bool:
        """Whether the last validations ended the run early, see `TrainConfig.early_stop`."""
        return 0 < self.config.early_stop <= self.stale

    def _stop_line(self) -> str:
        best = self.best or {}
        return (
            f"stopped early after step {self.step}: {self.stale} validations without more than "
            f"{100 * best['miou']:.2f} % mIoU, of step {best['step']}"
        )

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _all_unreadable(self) -> Counter[str]:
        """Photos that no process could read, by error, and how often each was asked for."""
        if not self.config.data.skip_unreadable:
            return self.unreadable
        return sum(gather(self.fabric, self.unreadable), Counter())

    def _unreadable_line(self) -> str:
        named = [f"{error} ({times} times)" for error, times in self.unreadable.most_common(5)]
        more = len(self.unreadable) - len(named)
        return (
            f"{self.unreadable.total()} training episodes gave way to others because of "
            f"{len(self.unreadable)} unreadable photos: {'; '.join(named)}"
            + (f"; and {more} more, see result.json" if more else "")
        )
