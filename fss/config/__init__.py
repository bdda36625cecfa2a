"""The configuration of a run: dataclasses whose defaults are the paper's SVF recipe.

The paper is Sun et al., "Singular Value Fine-tuning: Few-shot Segmentation requires Few-parameters
Fine-tuning", NeurIPS 2022 (Pascal-5i, ResNet-50). A YAML file in fss/configs holds only what
differs.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from fss.config.checks import (
    check_at_least,
    check_positive,
    check_rotation,
    check_scale,
    check_settings,
    check_side,
    check_steps,
    hints,
)
from fss.config.fields import free
from fss.config.model import COCO_BINS, METHODS, PASCAL_BINS, ModelConfig

SourceName = Literal["folder", "pascal", "coco", "fss1000", "shapes"]
Folds = Literal["fwb", "panet"]
RegimeName = Literal[
    "freeze", "full", "svf", "svf_scale", "scale_output", "scale_input", "rotated_scale",
    "rotated_svf", "adapter", "bias",
]  # fmt: skip
Checkpoint = Literal["best", "last"]
Schedule = Literal["cosine", "poly", "step", "constant"]
Resize = Literal["photo", "canvas", "network"]
Precision = Literal["32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"]
TF32 = Literal["none", "convolutions", "all"]
Accelerator = Literal["auto", "cpu", "cuda"]


def free_settings(config: type, between: str, prefix: str = "") -> set[str]:
    """Collect the dotted names of the settings that may differ.

    Args:
        config: a configuration's class.
        between: "resume", the two halves of a resumed run; "finished", a finished run and the one
            that is asked for; "mean", the runs of which a mean is reported.
        prefix: of the names.
    """
    names = set()
    for one in dataclasses.fields(config):
        part = hints(config)[one.name]
        if dataclasses.is_dataclass(part):
            names |= free_settings(part, between, f"{prefix}{one.name}.")
        elif between in one.metadata.get("free", ()):
            names.add(prefix + one.name)
    return names


@dataclass
class DataConfig:
    """Where the photos come from and how episodes are sampled from them.

    Args:
        source: "folder", a Pascal VOC layout with classes of its own; "pascal", Pascal-5i; "coco",
            COCO-20i; "fss1000", a folder per class; "shapes", the embedded rendered set.
        root: folder of the data set. "folder" expects JPEGImages/, SegmentationClass/ and
            classes.json, "pascal" and "coco" the layout of `fss data prepare`, PFENet, BAM or
            HSNet, "fss1000" a folder per class; "shapes" needs none.
        train_list: file of the training photos, given together with `val_list`. For "pascal" and
            "coco" each line is `image mask`, and a leading path that does not exist here is
            ignored, or it is a list of HSNet, or a folder of lists; by default the published
            lists. For "fss1000" the names of the base classes, one per line.
        val_list: as `train_list`, for the test photos; for "fss1000" the novel classes.
        folds: of "coco": "fwb" (novel classes k + 1, k + 5, …) or "panet" (20k + 1 to 20k + 20).
        fold: which classes are novel, from 0.
        shots: support photos per episode (K).
        size: side of the network's square input, pixels; size - 1 is a multiple of 8, unless the
            model takes any.
        min_area: smallest area of a class for a photo to be listed under it: pixels at original
            size if at least 1 (PFENet and BAM: 2·32·32 = 2048), a share of the photo if below 1.
        exclude_novel: train only on photos without any novel class (the paper's † filter).
        scale: range of the random scale of training photos (Pascal 0.9-1.1, COCO 0.8-1.25).
        rotate: largest rotation of training photos, degrees, applied to half of them.
        protocol: "pfenet" (PFENet, BAM and the paper) augments training photos, scales test photos
            by their longer side and samples K different supports; "hsnet" resizes every photo to a
            square without augmentation, asks for each class that a photo is listed under (on COCO
            it samples the class first), and samples each support independently of the others.
        shuffle_test: visit the test queries in a new random order each pass; false keeps the
            list's order, as the published BAM test, whose 1000 episodes use the first 1000 photos
            only.
        drop_small_classes: omit classes with no more than K photos in a split and warn; by default
            they are an error.
        skip_unreadable: leave out photos that cannot be used, replace an episode that has one, and
            warn; by default such a photo ends the run.
        workers: processes that load episodes; 0 loads them in the training process.
        seed: seed of the training episodes and, with "shapes", of the photos.
    """

    source: SourceName = "folder"
    root: str | None = free(None, "resume", "finished", "mean")
    train_list: str | None = None
    val_list: str | None = None
    folds: Folds = "fwb"
    fold: int = free(0, "mean")
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
    workers: int = free(2, "resume", "finished", "mean")
    seed: int = free(321, "mean")

    def __post_init__(self) -> None:
        check_settings(self, "data.")
        self.scale = tuple(self.scale)
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
        check_at_least("data.fold", self.fold, 0)
        check_at_least("data.shots", self.shots, 1)
        check_at_least("data.size", self.size, 9)
        check_positive("data.min_area", self.min_area)
        check_scale("data.scale", self.scale)
        check_rotation("data.rotate", self.rotate)
        check_at_least("data.workers", self.workers, 0)
        check_at_least("data.seed", self.seed, 0)


@dataclass
class RegimeConfig:
    """What trains in the backbone; the head always trains.

    W is the weight of a convolution in `layers`, as a matrix of Co rows and Ci·kh·kw columns, and
    U S Vᵀ its singular value decomposition. S' is exp(s') and s' starts at 0, so every regime but
    "rotated_svf" starts from the pretrained network. The paper has exp in Table 23 alone; for
    Tables 22 and 24 it says that S' starts as the identity, and exp is our reading: what differs
    is where weight decay pulls S', here to 1. W becomes:

    - "freeze": W, frozen (Table 16's baseline; with `batch_norm`, Tables 16 and 21);
    - "full": W, trained together with the bias, if any: the paper's *part fine-tune* (Tables 17
      and 18). In "all" layers and with `batch_norm` "both" every parameter of the backbone trains:
      its *fully fine-tune*, see regimes/full.yaml;
    - "svf": U S Vᵀ, the paper's method; `factors` train, by default S (Tables 19, 20);
    - "svf_scale": U S S' Vᵀ; `factors` are S' (the default, on the layers of "svf"), or S and
      S' (Table 23);
    - "scale_output": S' W, a trained factor per row, that is, output channel (Table 22);
    - "scale_input": W S', a trained factor per column, that is, weight of a filter (Table 22);
    - "rotated_scale": R S' Rᵀ W with a random rotation R (Table 24);
    - "rotated_svf": U R S Rᵀ Vᵀ, which differs from the pretrained network: S stays diagonal while
      its basis turns; `factors` are S (the default), or none, which freezes it (Table 9);
    - "adapter": W, frozen; after each of `layers` a bottleneck x + up(relu(down(x))) trains, whose
      up starts at 0 (Table 10);
    - "bias": W, frozen; the biases of convolutions and batch norms in `layers` train (Table 13,
      there of all layers). In a ResNet only batch norms have one.

    Args:
        name: one of those above.
        layers: children of the backbone that the regime applies to; "all" means every child.
        kernel: size of the convolutions it applies to: "3x3", "1x1" or "all" (Table 18).
        factors: the factors that train: any of U, S, V for "svf"; see above for other names.
        batch_norm: parameters of the batch norms in `layers` that train too: "none", "weight",
            "bias" or "both"; alone with "freeze", together with S with "svf" (Tables 16 and 21).
        batch_norm_statistics: of the batch norms in `layers`, also with "freeze". "frozen" uses the
            stored statistics: as BAM's code, and what we take for every regime of the paper, which
            does not say. "batch" uses those of the batch while training and updates the stored
            ones: as PFENet's code does in "all" layers of its frozen backbone.
        adapter_reduction: a stage's channels divided by the channels inside its adapter.
        strategy: how SVF layers compute: "auto", "reference", "fold", "chain" or "gram", all exact.
        keep: what fused blocks of SVF layers keep for the gradients of S: "exact", or "int8", a
            third of the bytes in float32, see `svf_fast.convert`.
        core: what trains beside S in U Σ Vᵀ, for "svf" with S and "svf_scale" with S': "diag",
            nothing; "band:k", the entries of Σ with |i - j| <= k; "block:b", those of the blocks of
            b along the diagonal; "lowrank:r", Σ = S + A Bᵀ. Not of the paper.
    """

    name: RegimeName = "svf"
    layers: tuple[str, ...] = ("layer2", "layer3", "layer4")
    kernel: Literal["all", "3x3", "1x1"] = "all"
    factors: tuple[str, ...] | None = None
    batch_norm: Literal["none", "weight", "bias", "both"] = "none"
    batch_norm_statistics: Literal["frozen", "batch"] = "frozen"
    adapter_reduction: int = 4
    strategy: Literal["auto", "reference", "fold", "chain", "gram"] = "auto"
    keep: Literal["exact", "int8"] = "exact"
    core: str = "diag"

    def __post_init__(self) -> None:
        check_settings(self, "regime.")
        self.layers = tuple(self.layers)
        if self.factors is not None:
            self.factors = tuple(self.factors)
        check_at_least("regime.adapter_reduction", self.adapter_reduction, 1)
        if self.reads_layers and not self.layers:
            what = self.name
            if self.name == "freeze":
                norms = self.batch_norm != "none"
                what = f"batch_norm {self.batch_norm}" if norms else "batch_norm_statistics batch"
            raise ValueError(f'regime.layers: expected at least one layer for "{what}", got none')
        if len(set(self.layers)) != len(self.layers) or ("all" in self.layers[1:]):
            raise ValueError(
                f'regime.layers: expected different layers, or "all" alone; got {list(self.layers)}'
            )
        if self.kernel != "all" and self.name in ("freeze", "adapter", "bias"):
            raise ValueError(
                f'regime.kernel: "{self.name}" changes no convolution, so none can be chosen by '
                f'its size; omit kernel, got "{self.kernel}"'
            )
        self._check_factors()
        self._check_core()
        if self.keep != "exact" and set(self.trained_factors) not in ({"S"}, {"S'"}):
            trained = list(self.trained_factors)
            raise ValueError(
                f'regime.keep: expected "exact" where other factors than S alone train, which are '
                f'{trained} in "{self.name}"; got "{self.keep}"'
            )

    def _check_core(self) -> None:
        if self.core == "diag":
            return
        if not re.fullmatch("(band|lowrank):[1-9][0-9]*|block:([2-9]|[1-9][0-9]+)", self.core):
            raise ValueError(
                "regime.core: expected diag, band:k, block:b or lowrank:r with k, r of at least 1 "
                f"and b of at least 2, got {self.core!r}"
            )
        trained = {"svf": ("S",), "svf_scale": ("S'",)}.get(self.name)
        if trained is None or self.trained_factors != trained:
            raise ValueError(
                'regime.core: expected with "svf" where S alone trains, or with "svf_scale" where '
                f'S\' does; omit core for "{self.name}" with {list(self.trained_factors)}'
            )

    def _check_factors(self) -> None:
        if self.factors is None:
            return
        sets = _FACTORS.get(self.name)
        if sets is None:
            raise ValueError(
                f'regime.factors: "{self.name}" decomposes no weight; omit factors, '
                f"got {list(self.factors)}"
            )
        if frozenset(self.factors) not in sets or len(set(self.factors)) != len(self.factors):
            listed = " or ".join(str(sorted(choice)) for choice in sets)
            raise ValueError(
                f'regime.factors: expected {listed} for "{self.name}", got {list(self.factors)}'
            )

    @property
    def trained_factors(self) -> tuple[str, ...]:
        """Return the factors that train: `factors`, or by default S (S' for "svf_scale")."""
        if self.factors is not None:
            return self.factors
        return {"svf": ("S",), "rotated_svf": ("S",), "svf_scale": ("S'",)}.get(self.name, ())

    @property
    def reads_layers(self) -> bool:
        """Whether the regime does anything to its layers: a plain "freeze" does not."""
        still = self.batch_norm == "none" and self.batch_norm_statistics == "frozen"
        return self.name != "freeze" or not still

    def signature(self) -> dict[str, Any]:
        """Return, as plain values, what determines which weights exist and which of them train."""
        values = dataclasses.asdict(self)
        del values["strategy"], values["keep"]
        values["factors"] = sorted(self.trained_factors)
        values["layers"] = list(self.layers)
        if self.name != "adapter":
            del values["adapter_reduction"]
        if self.core == "diag":
            del values["core"]
        if not self.reads_layers:
            values["layers"] = None
        return values


# What may train of a decomposed weight, by regime, in the order of the messages.
_FACTORS: dict[str, tuple[frozenset[str], ...]] = {
    "svf": tuple(map(frozenset, ("S", "U", "V", "SU", "SV", "UV", "SUV"))),
    "svf_scale": (frozenset(["S'"]), frozenset(["S", "S'"])),
    "rotated_svf": (frozenset(["S"]), frozenset()),
}


@dataclass
class OptimizerConfig:
    """The optimizer, one group for the head and one for what trains in the backbone.

    Args:
        name: "sgd" (the paper's) or "adamw".
        lr: learning rate of the head at the first step.
        momentum: momentum of SGD.
        nesterov: whether SGD's momentum is Nesterov's.
        weight_decay: weight decay of the head; coupled in SGD, decoupled in AdamW.
        lr_factor: multiplies the learning rate of every group. The published codes of PFENet and
            BAM train with 10 times the rate they state (PFENet 0.0025 on Pascal and 0.005 on COCO,
            BAM 0.005 on both): 10 does the same.
        schedule: "cosine" decays both learning rates to 0 at the last step (SVF), "poly" as
            lr·(1 - n/steps)^0.9 (PFENet, BAM), "step" divides them by 10 after each third
            (PANet), "constant" keeps them. None of the papers uses warm-up.
        backbone_lr: learning rate of the backbone's group; by default lr / 10. The paper gives one
            rate, 0.015 "when fine-tuning backbone", and its authors published no training code; a
            tenth for S is our reading, after a file of unnamed authors (BAM's code with SVF).
        backbone_weight_decay: weight decay of the backbone's group; by default `weight_decay`. Of
            this too the paper says nothing.
        transformer_lr: learning rate of AdamW for what a method calls its transformer (CyCTR,
            HDMNet), whatever trains the rest; `lr_factor` does not multiply it. null trains it with
            the rest.
        transformer_weight_decay: its weight decay, decoupled.
        transformer_bias_decay: whether its biases decay too (HDMNet); otherwise not (CyCTR).
        transformer_schedule: its schedule; by default `schedule`.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.015
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    lr_factor: float = 1.0
    schedule: Schedule = "cosine"
    backbone_lr: float | None = None
    backbone_weight_decay: float | None = None
    transformer_lr: float | None = None
    transformer_weight_decay: float = 0.01
    transformer_bias_decay: bool = False
    transformer_schedule: Schedule | None = None

    def __post_init__(self) -> None:
        check_settings(self, "optimizer.")
        check_positive("optimizer.lr", self.lr)
        check_positive("optimizer.lr_factor", self.lr_factor)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum: expected 0 up to below 1, got {self.momentum}")
        check_at_least("optimizer.weight_decay", self.weight_decay, 0)
        for name in ("backbone_lr", "transformer_lr"):
            if getattr(self, name) is not None:
                check_positive(f"optimizer.{name}", getattr(self, name))
        check_at_least("optimizer.transformer_weight_decay", self.transformer_weight_decay, 0)
        if self.backbone_weight_decay is not None:
            check_at_least("optimizer.backbone_weight_decay", self.backbone_weight_decay, 0)


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
        accumulate: parts of a step whose gradients are summed before the optimizer acts, so that
            only batch_size / accumulate episodes need memory at a time.
        foreground_weight: weight of the foreground class in the cross-entropy; above 1 if objects
            cover little of the photo.
        validation_every: steps between two validations, or a text like "2 epochs", where an epoch
            is as many whole batches as the training photos make; 0 validates only after the last
            step. Published: BAM every epoch of Pascal and half epoch of COCO with 1000 episodes,
            PFENet every second epoch of Pascal with 5000 and every epoch of COCO with 20000.
        validation_episodes: episodes of one validation.
        validation_classes: "novel", as all published numbers were selected, or "base", which keeps
            the novel classes out of every choice.
        validation_seed: seed of those episodes, the same at every validation.
        early_stop: validations in a row without a higher mIoU after which the run ends; 0 disables
            this.
        test_episodes: novel-class episodes per seed of the test at the end of the run.
        test_seeds: seeds of that test; mean and spread are reported (defaults: BAM's).
        recompute_supports: compute what leads from the supports' photos to the head again in the
            backward pass, one shot after the other, instead of keeping it: the more shots, the
            more memory is saved, for the time of their forward pass. Dropout then draws for each
            shot by itself. Steps run without a graph. Without effect in methods whose supports
            train nothing (pmm, rpmm, asgnet, cwt).
        checkpoint: the checkpoint that is tested: "best" has the highest validation mIoU, see
            `validation_classes`; "last" selects nothing.
        resize: how a prediction is resized to its photo: "photo" crops it to the part that the
            photo covers first; "canvas" does not, as the published code and so the recipes of the
            paper's tables, which is off by about 1 %; "network" keeps the network's size and scores
            on a mask of that size (HSNet).
        feature_cache: GiB of backbone features that an evaluation keeps for photos that appear
            again in later episodes; 0 recomputes them. The score depends on it by rounding at most.
        save_every: steps between two writes of the last checkpoint; 0 writes it only at
            validations and at the end of the run.
        log_every: steps between two rows of the logs.
        pictures: test episodes drawn at the end.
        precision: as Lightning Fabric names it; "mixed" keeps the weights in float32, "bf16-true"
            what the optimizer steps: S, and a float32 copy of what else trains. "16-mixed" scales
            the loss and skips steps whose gradients overflow; the log counts them.
        tf32: float32 products that a GPU may compute from factors rounded to TF32 (10 bits after
            the point), in training and `fss eval`; datasheets promise up to eight times the rate.
            "convolutions" is torch's default: the few matrix products that give W and the gradient
            of S stay exact. "none" keeps the error of float32 everywhere; "all" rounds in all.
        graph: "auto" launches the forward and backward passes of a step on a GPU as one CUDA graph
            after a few steps, which saves host time; the graph keeps the memory of a step also
            while the run validates. Steps that cannot be captured run one by one, and a line says
            why. Tests do the same if feature_cache is 0. "off" never captures. The weights are the
            same up to rounding.
        deterministic: give the same bits in every run on the same machine and number of processes;
            an operation that cannot is an error.
        sync_batch_norm: share the batch statistics of trained batch norms between all processes
            (GPUs only).
        accelerator: "auto", "cpu" or "cuda".
        devices: processes, one per device: a number, or "auto"; torchrun starts the processes
            itself, and their number is used.
        out: folder of the run.
        seed: seed of the head's initial weights and of dropout.
    """

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    regime: RegimeConfig = field(default_factory=RegimeConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 105_000
    batch_size: int = 8
    accumulate: int = 1
    foreground_weight: float = 1.0
    validation_every: int | str = 500
    validation_episodes: int = 200
    validation_classes: Literal["novel", "base"] = "novel"
    validation_seed: int = 0
    early_stop: int = 0
    test_episodes: int = free(1000, "resume")
    test_seeds: tuple[int, ...] = free((510, 365, 382, 322, 988), "resume")
    recompute_supports: bool = free(False, "resume", "finished", "mean")
    checkpoint: Checkpoint = free("best", "resume")
    resize: Resize = free("photo", "resume")
    feature_cache: float = free(2.0, "resume", "mean")
    save_every: int = free(500, "resume", "finished", "mean")
    log_every: int = free(10, "resume", "finished", "mean")
    pictures: int = free(6, "resume", "finished", "mean")
    precision: Precision = "32-true"
    tf32: TF32 = "convolutions"
    graph: Literal["auto", "off", False] = free("auto", "resume", "finished", "mean")
    deterministic: bool = False
    sync_batch_norm: bool = False
    accelerator: Accelerator = free("auto", "resume", "finished", "mean")
    devices: int | Literal["auto"] = free(1, "resume", "finished", "mean")
    out: str = free("runs/fss", "resume", "finished", "mean")
    seed: int = free(321, "mean")

    def __post_init__(self) -> None:
        if self.graph is False:  # what YAML 1.1 reads of a bare off
            self.graph = "off"
        check_settings(self)
        if not (METHODS[self.model.name].any_size or self.model.backbone.startswith("vit_")):
            check_side("data.size", self.data.size)
        scaled = METHODS[self.model.name].bins
        authors = scaled and self.model.official
        if self.model.bins is None and (not authors or self.data.source in ("pascal", "coco")):
            coco = scaled and self.data.source == "coco"
            bins = COCO_BINS if coco else PASCAL_BINS
            self.model = dataclasses.replace(self.model, bins=bins)
        self.test_seeds = tuple(self.test_seeds)
        counts = ("steps", "batch_size", "accumulate", "validation_episodes", "test_episodes")
        for name in (*counts, "log_every"):
            check_at_least(name, getattr(self, name), 1)
        check_steps("validation_every", self.validation_every)
        counts = ("validation_seed", "early_stop", "save_every", "pictures")
        for name in (*counts, "feature_cache", "seed"):
            check_at_least(name, getattr(self, name), 0)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: expected a divisor of batch_size {self.batch_size}, "
                f"got {self.accumulate}"
            )
        check_positive("foreground_weight", self.foreground_weight)
        if self.recompute_supports and self.regime.batch_norm_statistics == "batch":
            raise ValueError(
                "recompute_supports: expected regime.batch_norm_statistics frozen: batch norms "
                "would take each batch of supports into their statistics twice"
            )
        if not self.test_seeds:
            raise ValueError("test_seeds: expected at least one seed, got none")
        if len(set(self.test_seeds)) != len(self.test_seeds):
            raise ValueError(
                f"test_seeds: expected different seeds, got {list(self.test_seeds)}: a repeated "
                "seed repeats its episodes and narrows the spread"
            )
        for seed in self.test_seeds:
            check_at_least("test_seeds", seed, 0)
        if self.devices != "auto":
            check_at_least("devices", self.devices, 1)
        if not self.out:
            raise ValueError("out: expected a folder for the run, got nothing")

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as nested plain values, for JSON, YAML and checkpoints."""
        return plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Build a configuration from the values of `to_dict`."""
        kinds = hints(cls)
        parts = {name for name in values if dataclasses.is_dataclass(kinds.get(name))}
        return cls(**values | {name: kinds[name](**values[name]) for name in parts})


def plain(value: Any) -> Any:
    """Return nested values with lists for tuples, as JSON and YAML know them."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
