"""Few-shot training: the loss of a batch of episodes, its log, validation and checkpoints."""

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
from typing import TYPE_CHECKING, Any

import torch
import yaml
from tqdm import tqdm

from fss.captured import captured
from fss.config import TrainConfig
from fss.config.checks import count_steps
from fss.data import build_episodes
from fss.evaluation.evaluate import episode_classes, evaluate
from fss.evaluation.metrics import EpisodeIoU, episode_counts
from fss.files import atomic_write
from fss.models import build_model
from fss.models.regimes import apply_regime
from fss.processes import synchronize_batch_norms
from fss.runs.checkpoint import check_types, load_checkpoint, save_checkpoint
from fss.runs.folder import RunFolder
from fss.runs.log import RunLog
from fss.training.loop import Loop, gather
from fss.training.measure import StepTimer, peak_memory, saved_bytes
from fss.training.optimizer import build_optimizer, build_scheduler

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Plain entries of last.pt, beside those of `Loop`.
_PROGRESS: dict[str, type | UnionType] = {"stale": int, "skipped": int, "losses": list}
_PROGRESS |= {"saved_bytes": int | None, "unreadable": dict}


class Trainer(Loop):
    """Few-shot training of a network on episodes of the base classes.

    With several processes, or a step in several parts, the episodes of a step are shared evenly and
    gradients averaged: up to rounding what one process would compute at once, apart from dropout
    and, with a foreground weight or ignored pixels, the weights of the shares' mean losses.

    Args:
        config: of the run.
        fabric: launched, see `build_fabric`.
    """

    FOLDER = RunFolder
    read = staticmethod(load_checkpoint)

    def __init__(self, config: TrainConfig, fabric: Fabric) -> None:
        super().__init__(config, fabric)
        self.classes = episode_classes(self.source, config.data.fold)
        self.base_classes = episode_classes(self.source, config.data.fold, novel=False)
        self.dataset = build_episodes(
            config.data, "train", config.steps * config.batch_size, config.data.seed, self.source
        )
        self.validation_every = count_steps(
            config.validation_every, self.dataset.epoch, config.batch_size
        )
        novel = config.validation_classes == "novel"
        self.validated = self.classes if novel else self.base_classes
        self.validation_episodes = build_episodes(
            config.data,
            "test" if novel else "validation",
            config.validation_episodes,
            config.validation_seed,
            self.source,
        )

        network = build_model(config.model, self.base_classes, config.data.shots)
        apply_regime(network, config.regime)
        network.recompute_supports = config.recompute_supports
        if config.sync_batch_norm:
            network = synchronize_batch_norms(network, config.regime, fabric)
        optimizer = build_optimizer(network, config.optimizer)
        scheduler = build_scheduler(optimizer, config.optimizer, config.steps)
        self._set_up(network, optimizer, scheduler)
        self.class_weight = fabric.to_device(torch.tensor([1.0, config.foreground_weight]))
        inputs = (*network.inputs, *network.targets, "query_mask", "class_id")
        again = config.recompute_supports and network.supports_train
        graph = "off" if again else config.graph
        self._run_parts = captured(
            self._backward_parts, network, inputs, fabric, graph, self._print
        )

        self.title = f"{config.regime.name} fold {config.data.fold}"
        self.continuation = f"continue with: fss train --config {self.folder.config_file} --resume"
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

    def _loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the loss of a batch of episodes; count its pixels for the training mIoU."""
        prediction = self.model(*(batch[name] for name in self.network.inputs))
        targets = (batch[name] for name in self.network.targets)
        counts = episode_counts(prediction.logits.detach().argmax(1), batch["query_mask"])
        self._counts.index_add_(0, self._places[batch["class_id"]], counts)
        return self.network.loss(prediction, *targets, class_weight=self.class_weight)

    def _backward(self, part: dict[str, Any], last: bool) -> torch.Tensor:
        """Add the gradients of a part of a step; only the last waits for other processes."""
        with self.fabric.no_backward_sync(self.model, enabled=not last):
            if self.saved_bytes is None:
                with saved_bytes(self.network) as saved:
                    loss = self._loss(part)
                self.saved_bytes = saved.total
            else:
                loss = self._loss(part)
            self.fabric.backward(loss / self.config.accumulate)
        return loss.detach()

    def _backward_parts(self, parts: list[dict[str, Any]]) -> torch.Tensor:
        """Add the gradients of the parts of a step; return the loss of each."""
        return torch.stack([self._backward(part, part is parts[-1]) for part in parts])

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

    def _step_optimizer(self) -> None:
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        scale = scaler.get_scale() if scaler else 0.0
        self.optimizer.step()
        # a scaler halves its scale exactly when it has left a step out
        self.skipped += int(scaler is not None and scaler.get_scale() < scale)

    def fit(self) -> None:
        """Train from the current step to the last; see `Loop.fit`."""
        with self._open_log():
            super().fit()
        self._run_parts = self._backward_parts  # the test needs a graph's memory
        self.optimizer.zero_grad()
        self.unreadable = self._all_unreadable()
        if self.unreadable:
            self._print(self._unreadable_line())

    @contextmanager
    def _open_log(self) -> Iterator[None]:
        """Keep the configuration and open the log, in the first process only."""
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

    def _settle(self) -> None:
        """Take the losses and times of the steps since the last call; waits for the device."""
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

    def _log_steps(self, first: int, since: float) -> dict[str, str]:
        """Log the steps after `first`, begun at time `since`; return what the bar shows."""
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

    def _validate(self) -> None:
        """Score the validated classes, keep the best checkpoint and say so."""
        self._settle()
        score = evaluate(
            self.model,
            self.validation_episodes,
            list(self.validated),
            self.fabric,
            self.part,
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
        self._print(
            f"step {self.step}: validation mIoU {100 * score.miou:.2f} %, "
            f"FB-IoU {100 * score.fb_iou:.2f} %{unsampled}; training mIoU {100 * train_miou:.2f} %"
        )
        if self.has_converged:
            self._print(
                f"stopped early after step {self.step}: {self.stale} validations without more than "
                f"{100 * self.best['miou']:.2f} % mIoU, of step {self.best['step']}"
            )

    def _train_miou(self) -> float:
        """Return the mIoU of the training episodes since the last validation."""
        metric = EpisodeIoU(list(self.base_classes))
        metric.counts = self._all_counts()
        self._counts.zero_()
        return metric.result().sampled_miou

    def _all_counts(self) -> torch.Tensor:
        return self.fabric.all_reduce(self._counts.clone(), reduce_op="sum").cpu()

    @property
    def has_converged(self) -> bool:
        """Whether the last validations ended the run early, see `TrainConfig.early_stop`."""
        return 0 < self.config.early_stop <= self.stale

    def _state(self) -> dict[str, Any]:
        """Return the weights and counters of a checkpoint.

        Raises:
            FloatingPointError: a loss or weight that is not finite.
        """
        self._settle()
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad and not bool(parameter.isfinite().all()):
                raise FloatingPointError(
                    f"{name}: expected finite numbers, got others at step {self.step}; lower "
                    "optimizer.lr, or train in precision 32-true. " + self.folder.last_good()
                )
        return {
            "stale": self.stale,
            "skipped": self.skipped,
            "model": self.network.state_dict(),
            "base_classes": self.base_classes,
        }

    def _progress(self) -> dict[str, Any]:
        return {
            "unreadable": dict(self._all_unreadable()),
            "saved_bytes": self.saved_bytes,
            "seconds": torch.tensor(self.seconds),
            "losses": self.losses,
            "counts": self._all_counts(),
        }

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        save_checkpoint(path, self.config, state)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the content of last.pt, see `start`."""
        check_types(state, _PROGRESS)
        self.network.load_state_dict(state["model"])
        super().restore(state)
        if self.best is not None:
            self.best = {name: self.best[name] + 0 for name in ("miou", "fb_iou", "step")}
        self.stale, self.skipped = state["stale"], state["skipped"]
        self.saved_bytes = state["saved_bytes"]
        self.seconds = state["seconds"].tolist()
        self.losses = state["losses"]
        if self.fabric.is_global_zero:  # sums over the processes
            self.unreadable = Counter(state["unreadable"])
            self._counts.copy_(state["counts"])

    def _print(self, line: str) -> None:
        if self.fabric.is_global_zero:
            tqdm.write(line, file=sys.stderr)

    def _all_unreadable(self) -> Counter[str]:
        """Count how often photos were asked for that no process could read, by error."""
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
