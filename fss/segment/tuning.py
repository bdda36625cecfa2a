"""Tuning of a segmenter's network on nothing but its supports."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import svf_fast
from fss.config import RegimeConfig
from fss.config.checks import check_positive, check_settings, check_side
from fss.models import FewShotModel, Matching, leaves_adapter
from fss.segment.backbones import Backbones, remembering
from fss.segment.views import Round, SupportViews

LAYERS = ("layer3", "layer4")
"""What is tuned in unless a `RegimeConfig` says otherwise."""

TUNABLE: dict[str, tuple[RegimeConfig, float]] = {
    "svf": (RegimeConfig("svf", LAYERS, strategy="chain"), 0.02),
    "svf_scale": (RegimeConfig("svf_scale", LAYERS, strategy="chain"), 0.007),
    "full": (RegimeConfig("full", LAYERS), 1e-5),
    "layer4": (RegimeConfig("full", ("layer4",)), 1e-4),
    "batch_norm": (RegimeConfig("freeze", LAYERS, batch_norm="both"), 0.004),
    "bias": (RegimeConfig("bias", LAYERS), 0.004),
    "scale_output": (RegimeConfig("scale_output", LAYERS), 0.02),
    "scale_input": (RegimeConfig("scale_input", LAYERS), 0.02),
    "rotated_scale": (RegimeConfig("rotated_scale", LAYERS), 0.02),
    "adapter": (RegimeConfig("adapter", LAYERS), 1e-3),
}
"""What can be tuned, by name: the regime, and the learning rate of Adam. That of S is relative: the
change of S in a step over the mean |S| of its layer, see `svf_fast.svf_parameter_groups`. The first
six are within half a point of mIoU of the best of three, with five supports of training photos
(benchmarks/results/supports.json; "full" of layers 2 to 4 there); the others were not searched.
"chain" is faster than "auto" on views as small as these, where W costs more to compose than to
convolve with (benchmarks/LOG.md)."""

LARGEST = 225
"""Side of the views, pixels, unless another is asked for."""
SHARE = 0.6
"""How far the values that are kept lie from the untuned to the trained ones, unless it is said.
What is fitted to few supports carries over better so (benchmarks/LOG.md)."""
_EVERY = 5
"""Steps between two measures; fewer where there are few steps."""
_UNEXPLAINED = 0.1
"""A held-out IoU below which supports do not explain each other."""


@dataclass(frozen=True)
class Measure:
    """What was measured after some steps.

    iou: mean IoU of the object over held-out views, at the segmenter's threshold.
    loss: mean loss of these.
    train_loss: mean loss of the steps since the last measure; None before the first.
    """

    step: int
    iou: float
    loss: float
    train_loss: float | None

    def better_than(self, other: Measure) -> bool:
        """Return whether the IoU is higher, or the same at a lower loss."""
        if not math.isfinite(self.loss):
            return False
        return (self.iou, -self.loss) > (other.iou, -other.loss)


@dataclass(frozen=True)
class Tuning:
    """The record of a tuning; as text, a line.

    what: its name, or the regime's.
    shots: number of supports.
    before, after: mean IoU of the object over views that are not trained on, at the segmenter's
        threshold, before the first step and with the values that are kept.
    best_step: after which step these were; 0 if nothing was better than untuned, which is kept.
    steps: done.
    seconds: of all of it, decomposing included.
    stopped: why no further step was taken.
    history: every measure.
    adapter: the singular values, where these alone were tuned: to save, and to go back to.
    unlabeled: how many pictures without a mask helped, and of how many; those without a place that
        is background for sure do not.
    """

    what: str
    shots: int
    before: float
    after: float
    best_step: int
    steps: int
    seconds: float
    stopped: str
    history: tuple[Measure, ...]
    adapter: svf_fast.Adapter | None = field(default=None, repr=False)
    unlabeled: tuple[int, int] = (0, 0)

    @property
    def advice(self) -> str:
        """Tell what the measure says about the supports; "" where there is nothing to say."""
        if self.after >= _UNEXPLAINED:
            return ""
        if self.shots == 1:
            return (
                "other views of the support are not recognized by it: is its mask right, and the "
                "object large enough?"
            )
        return (
            "the supports do not explain each other: do all of them show the same kind of object, "
            "and are their masks right?"
        )

    def __str__(self) -> str:
        kept = f"step {self.best_step} is kept" if self.best_step else "the untuned values are kept"
        supports = "1 support" if self.shots == 1 else f"{self.shots} supports"
        used, given = self.unlabeled
        if given:
            of = str(used) if used == given else f"{used} of {given}"
            supports += f" and {of} picture{'s' if given > 1 else ''} without a mask"
        text = (
            f"tuned {self.what} on {supports}: held-out IoU {self.before:.3f} -> {self.after:.3f}, "
            f"{kept} ({self.steps} steps, {self.seconds:.1f} s; {self.stopped})"
        )
        return f"{text}; {self.advice}" if self.advice else text


@dataclass(frozen=True)
class TuningSettings:
    """What `FewShotSegmenter.tune` is asked for, checked; see there."""

    steps: int = 20
    lr: float | None = None
    what: str | RegimeConfig = "svf"
    size: int | None = None
    seed: int = 0
    patience: int = 4
    share: float = SHARE

    def __post_init__(self) -> None:
        check_settings(self)
        if self.steps < 1:
            raise ValueError(
                f"steps: expected at least 1, got {self.steps}; to segment untuned, do not tune"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected an integer from 0 to 2^63 - 1, got {self.seed}")
        if self.patience < 1:
            raise ValueError(f"patience: expected at least 1 measure, got {self.patience}")
        if self.lr is not None:
            check_positive("lr", self.lr)
        if self.size is not None:
            check_side("size", self.size)
        if not 0 < self.share <= 1:
            raise ValueError(f"share: expected more than 0, at most 1, got {self.share}")
        _check_regime(self.regime)

    @property
    def regime(self) -> RegimeConfig:
        """Return what trains."""
        if isinstance(self.what, RegimeConfig):
            return self.what
        if self.what not in TUNABLE:
            raise ValueError(
                f"what: expected one of {', '.join(TUNABLE)}, or a RegimeConfig; got {self.what!r}"
            )
        return TUNABLE[self.what][0]

    @property
    def name(self) -> str:
        """Return the short name of what trains."""
        return self.regime.name if isinstance(self.what, RegimeConfig) else self.what

    @property
    def leaves_adapter(self) -> bool:
        """Whether singular values alone train, so that an adapter holds them."""
        return leaves_adapter(self.regime)

    def groups(self, backbone: nn.Module) -> list[dict[str, Any]]:
        """Return the groups of Adam for what trains in a backbone, with their rates."""
        trained = [p for p in backbone.parameters() if p.requires_grad]
        values = {id(p) for p in svf_fast.svf_parameters(backbone)}
        groups = []
        if any(id(p) in values for p in trained):
            layers = {
                name: layer
                for name, layer in backbone.named_modules()
                if isinstance(layer, svf_fast.SVFConv2d)
            }
            # as in the layers: a run has one or the other, whatever is asked for
            scaled = any(x.trains == "log_scale" for x in layers.values())
            default = TUNABLE["svf_scale" if scaled else "svf"][1]
            rate = default if self.lr is None else self.lr
            for name, layer in layers.items():
                if layer.trains == "S" and not layer.S.any():
                    raise ValueError(
                        f"what: expected singular values to start from, but those of {name} are "
                        "all 0; go back by adapter(None), or take another adapter or run"
                    )
            groups = svf_fast.svf_parameter_groups(backbone, rate)
            groups = [g for g in groups if any(p.requires_grad for p in g["params"])]
        others = [p for p in trained if id(p) not in values]
        if others:
            groups.append({"params": others, "lr": self._rate if self.lr is None else self.lr})
        return groups

    @property
    def _rate(self) -> float:
        """The default rate of parameters that are not those of SVF layers."""
        regime = self.regime
        if self.name in TUNABLE and regime.name not in ("svf", "svf_scale"):
            return TUNABLE[self.name][1]
        # beside S, or alone
        factors = not {"S", "S'"}.issuperset(regime.trained_factors)
        return TUNABLE["full" if factors else "batch_norm"][1]


def _check_regime(regime: RegimeConfig) -> None:
    if not regime.reads_layers or (regime.name == "freeze" and regime.batch_norm == "none"):
        raise ValueError(
            'what: expected a regime that trains something in the backbone, got "freeze" alone; '
            f"one of {', '.join(TUNABLE)} does"
        )
    if regime.name == "rotated_svf":
        raise ValueError(
            'what: "rotated_svf" starts from another network than the pretrained one, which a few '
            "supports cannot make up for; rotated_scale starts from the pretrained one"
        )
    if regime.batch_norm_statistics == "batch":
        raise ValueError(
            'what: expected batch_norm_statistics "frozen", got "batch": statistics of a few views '
            "are not those of pictures"
        )


def soft_iou_loss(margins: Tensor, masks: Tensor) -> Tensor:
    """Average 1 - IoU of masks as probabilities, sigmoid(margins), with the true ones.

    Source: Rahman and Wang, "Optimizing Intersection-Over-Union in Deep Neural Networks for Image
    Segmentation", 2016, equations 3 to 5.

    Args:
        margins: logits of the object, [E, H, W].
        masks: integers [E, H, W]; 1 is the object, 255 is left out.
    """
    found = margins.sigmoid() * (masks != 255)
    truth = (masks == 1).to(found)
    both = (found * truth).sum((1, 2))
    either = (found + truth - found * truth).sum((1, 2))
    return (1 - both / either.clamp(min=1)).mean()


def tune(
    backbones: Backbones,
    views: SupportViews,
    settings: TuningSettings,
    threshold: float,
    shots: int,
    card: dict[str, Any],
    progress: bool,
    begin: float,
    on_measure: Callable[[Measure], None] | None = None,
    unlabeled: tuple[int, int] = (0, 0),
) -> Tuning:
    """Tune the backbone of a model on views of supports, and leave the best values in it.

    The model stays in evaluation mode. What was there before is put back by the caller where this
    raises, see `Backbones.unless_it_fails`.

    Args:
        backbones: of the model.
        views: of the supports.
        settings: what to do.
        threshold: of the probability.
        shots: number of supports.
        card: what to note in the adapter besides.
        progress: show a bar.
        begin: when it began, of `time.monotonic`.
        on_measure: called with every measure, while the model has the values that it is of.
        unlabeled: of the record.
    """
    model = backbones.model
    device = backbones.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(settings.seed))  # of what a regime adds
        backbones.train(settings.regime, progress)
        groups = settings.groups(model.backbone)
        loop = _Loop(model, views, groups, threshold, settings, on_measure)
        with remembering(model.backbone):
            stopped = loop.run(progress)
        best, history = loop.best, tuple(loop.history)
        card = {
            **card,
            "tuned": settings.name,
            "shots": shots,
            "steps": best.step,
            "share": float(settings.share),
            "metric": {"IoU before": history[0].iou, "IoU after": best.iou},
        }
        adapter = backbones.keep(settings.regime, best.step > 0, card)
    return Tuning(
        settings.name,
        shots,
        history[0].iou,
        best.iou,
        best.step,
        loop.done,
        time.monotonic() - begin,
        stopped,
        history,
        adapter,
        unlabeled,
    )


class _Loop:
    """Steps with a measure now and then, of values between the untuned and the trained ones.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models", 2022 (weight-space
    ensembles).

    Attributes:
        history: all measures; best: the best of them.
        done: steps.
    """

    def __init__(
        self,
        model: FewShotModel | Matching,
        views: SupportViews,
        groups: list[dict[str, Any]],
        threshold: float,
        settings: TuningSettings,
        on_measure: Callable[[Measure], None] | None,
    ) -> None:
        self.model, self.views, self.settings = model, views, settings
        self._on_measure = on_measure
        self.optimizer = torch.optim.Adam(groups)
        self.parameters: list[Tensor] = [p for group in groups for p in group["params"]]
        self._untuned = self._values()
        self.margin = math.log(threshold / (1 - threshold))
        self.held_out = views.held_out()
        self.history: list[Measure] = []
        self.done = 0

    def run(self, progress: bool) -> str:
        """Take the steps, leave the best values in the parameters, and return why it stopped."""
        every = min(_EVERY, max(1, self.settings.steps // 4))
        losses: list[float] = []
        self._look(losses)
        stopped = "all steps are done"
        bar = tqdm(
            total=self.settings.steps, desc="tune", unit="step", disable=not progress, leave=False
        )
        try:
            with bar:
                while self.done < self.settings.steps:
                    loss = self._step()
                    if not math.isfinite(loss):
                        stopped = (
                            f"the loss of step {self.done + 1} was {loss}, a lower lr may help"
                        )
                        break
                    losses.append(loss)
                    self.done += 1
                    if self.done % every == 0 or self.done == self.settings.steps:
                        self._look(losses)
                        losses = []
                    bar.set_postfix(loss=f"{loss:.3f}", iou=f"{self.history[-1].iou:.3f}")
                    bar.update()
                    if self._is_exhausted(every):
                        stopped = f"not better since step {self.best.step}"
                        break
        except KeyboardInterrupt:
            stopped = f"stopped by ctrl-C after {self.done} steps"
        self._set(self._kept)
        for parameter in self.parameters:
            parameter.grad = None
        return stopped

    def _is_exhausted(self, every: int) -> bool:
        waited = self.done - self.best.step
        return self.done < self.settings.steps and waited >= self.settings.patience * every

    def _step(self) -> float:
        """Take a step and return its loss, or none if that is not finite."""
        self.optimizer.zero_grad()
        with torch.enable_grad():
            loss = soft_iou_loss(*self._margins(self.views.sample()))
        value = float(loss.detach())
        if math.isfinite(value):
            loss.backward()
            self.optimizer.step()
        return value

    def _look(self, losses: Sequence[float]) -> None:
        """Measure the values at the share, keep them if they are the best so far, and tell."""
        trained = self._values()
        pairs = zip(self._untuned, trained, strict=True)
        self._set([a.lerp(b, self.settings.share) for a, b in pairs])
        try:
            measure = self._measure(losses)
            if not self.history or measure.better_than(self.best):
                self.best, self._kept = measure, self._values()
            self.history.append(measure)
            if self._on_measure is not None:
                self._on_measure(measure)
        finally:
            self._set(trained)

    def _values(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def _measure(self, losses: Sequence[float]) -> Measure:
        margins, truth = self._margins(self.held_out)
        mask = margins > 0
        both = (mask & (truth == 1)).sum((1, 2))
        either = ((mask | (truth == 1)) & (truth != 255)).sum((1, 2))
        train_loss = sum(losses) / len(losses) if losses else None
        loss = float(soft_iou_loss(margins, truth))
        return Measure(self.done, float((both / either).mean()), loss, train_loss)

    def _margins(self, views: Round) -> tuple[Tensor, Tensor]:
        """Compute how far the queries' logits are above the threshold [E, S, S]; also the masks."""
        images, masks, episodes = views
        queries = [query for query, _ in episodes]
        if isinstance(self.model, Matching):
            logits = self.model.compare(images, masks, episodes)
        else:
            supports = torch.tensor([supports for _, supports in episodes], device=images.device)
            logits = self.model(images[queries], images[supports], masks[supports]).logits
        return logits[:, 1] - logits[:, 0] - self.margin, masks[queries]
