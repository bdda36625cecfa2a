"""Segmentation of a user's own pictures by the example of a few others."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import svf_fast
from fss.colors import ORANGE
from fss.config import RegimeConfig, TrainConfig
from fss.config.checks import check_side
from fss.data import EvalTransform, Sample, test_transform
from fss.data.masks import MaskValue
from fss.evaluation.evaluate import enlarge, input_names
from fss.models import FewShotModel, Matching, build_matching, matching_size
from fss.processes import lay_out
from fss.runs.folder import RunFolder
from fss.segment.backbones import Backbones
from fss.segment.pictures import MaskLike, Picture, find_object, overlay, read_picture
from fss.segment.tuning import LARGEST, SHARE, Measure, Tuning, TuningSettings, tune
from fss.segment.views import (
    SCENES,
    Example,
    Scene,
    SupportViews,
    check_supports,
    plain_view,
    shrunk,
    surely_background,
)

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The result for a picture, at the size of the upright picture.

    picture: RGB uint8 [H, W, 3].
    probability: of the object, float32 [H, W], 0 to 1. A network's confidence: not calibrated.
    mask: bool [H, W], where the probability is above the segmenter's threshold.
    """

    picture: NDArray[np.uint8]
    probability: NDArray[np.float32]
    mask: NDArray[np.bool_]

    def overlay(self, color: str = ORANGE, opacity: float = 0.5) -> Image.Image:
        """Draw the mask over the picture in a color, "#RRGGBB", with a line around it."""
        return overlay(self.picture, self.mask, color, opacity)


class FewShotSegmenter:
    """Segments pictures by the example of a few supports: pictures with a mask of the object.

        segmenter = FewShotSegmenter.load("runs/svf")
        segmenter.support([image], [mask])
        result = segmenter(query)            # result.mask, result.probability, result.overlay()

    `load` takes a trained run. Without one, as here, nothing is trained: each pixel is compared
    with object and background of the supports, see `Matching`. By default with features of the
    embedded backbone, which is small and was trained on rendered shapes: enough to try it, poor on
    photos. For photos give weights trained on photos, or train a run.

    Pictures and masks: see `read_picture` and `read_mask`. Any size and shape; each is scaled so
    that its longer side fits the network's input, and results come back at the picture's own size.

    Args:
        backbone: its name; by default the one that the file of weights is of.
        weights: file of a pretrained backbone (see `load_backbone`), "shapes" (embedded) or
            "torchvision" (downloaded; the default if only `backbone` is given).
        stride_on: of a ResNet's bottlenecks, "conv1" or "conv2" (torchvision); by default what the
            weights' file says, else conv2.
        size: longer side of the network's input, pixels, a multiple of 8 plus 1; by default 513,
            and 161 for the embedded backbone, which sees its shapes best at that size.
        adapter: file of `svf_fast.save_adapter` on this backbone, see `adapter`.
        threshold: probability above which a pixel belongs to the object.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".

    Attributes:
        model: the network, in evaluation mode, its weights frozen.
        config: of the run that was loaded; None without a run.
        conventions: how the mask of each support was read, such as "class id 15, 255 ignored".

    Raises:
        FileNotFoundError, ValueError, ImportError, ConnectionError: weights that are missing, not
            readable or do not fit, see `load_backbone`; an argument out of range.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        backbone: str | None = None,
        weights: str | os.PathLike[str] | None = None,
        stride_on: str | None = None,
        size: int | None = None,
        adapter: str | os.PathLike[str] | None = None,
        threshold: float = 0.5,
        device: Device = "auto",
    ) -> None:
        if weights is None:
            weights = "shapes" if backbone is None else "torchvision"
        if size is None:
            size = matching_size(str(weights))
        check_side("size", size)
        model = build_matching(str(weights), backbone, stride_on)
        self._prepare(model, None, EvalTransform(size), adapter, threshold, device)

    @classmethod
    @torch.inference_mode(False)
    def load(
        cls,
        run: str | os.PathLike[str],
        checkpoint: Literal["best", "last"] = "best",
        adapter: str | os.PathLike[str] | None = None,
        threshold: float = 0.5,
        device: Device = "auto",
    ) -> FewShotSegmenter:
        """Load the segmenter of a trained run, at the size it was trained for; see the class.

        Args:
            run: folder of `fss train`, or a checkpoint in it. No other file is needed.
            checkpoint: of the folder, "best" or "last".

        Raises:
            FileNotFoundError: no checkpoint there.
            ValueError: a damaged checkpoint.
        """
        folder, name = RunFolder.find(run, checkpoint)
        model, config = folder.network(name)
        segmenter = cls.__new__(cls)
        segmenter._prepare(model, config, test_transform(config.data), adapter, threshold, device)
        return segmenter

    def _prepare(
        self,
        model: FewShotModel | Matching,
        config: TrainConfig | None,
        transform: Any,
        adapter: str | os.PathLike[str] | None,
        threshold: float,
        device: Device,
    ) -> None:
        self.device = _device(device)
        model = model.to(self.device).eval().requires_grad_(False)
        self.model = lay_out(model, self.device)
        self.config = config
        self.threshold = threshold
        self._transform = transform
        self.conventions: list[str] = []
        # "network" is for scores alone: a picture is segmented at its own size
        self._resize = "photo"
        if config is not None and config.resize != "network":
            self._resize = config.resize
        self._backbones = Backbones(self.model, self.device)
        self._is_tuning = False
        self._pictures: list[Example] = []
        self._examples: tuple[Tensor, Tensor] | None = None
        self._supports: Any = None  # what the model keeps of the examples
        if adapter is not None:
            self.adapter(adapter)

    @property
    def threshold(self) -> float:
        """Return the probability above which a pixel belongs to the object."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        if not 0 < value < 1:
            raise ValueError(f"threshold: expected a probability between 0 and 1, got {value}")
        self._threshold = value

    @torch.inference_mode(False)
    def adapter(self, adapter: str | os.PathLike[str] | svf_fast.Adapter | Tuning | None) -> None:
        """Set the backbone's singular values, without decomposing it anew; supports stay.

        A backbone without SVF layers, as in a run of another regime, is decomposed the first time.
        What `tune` did is undone; its adapter brings it back.

        Args:
            adapter: a file of `svf_fast.save_adapter`, as runs leave it, one that was loaded, or
                the record of a tuning of singular values; None for the values that the segmenter
                came with.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no adapter, or one of another backbone; a tuning of something else.
        """
        self._refuse_while_tuning("adapter")
        if isinstance(adapter, Tuning):
            if adapter.adapter is None:
                raise ValueError(
                    f"adapter: expected a tuning of singular values, got one of {adapter.what}, "
                    "whose values are nowhere kept but in the segmenter; tune again"
                )
            adapter = adapter.adapter
        if adapter is not None and not isinstance(adapter, svf_fast.Adapter):
            adapter = svf_fast.Adapter.load(adapter)
        if adapter is not None and adapter.also:
            raise ValueError(
                f"{adapter}: expected singular values alone, got also {', '.join(adapter.also)}, "
                "which a segmenter could not take back"
            )
        self._backbones.set(adapter)
        self._supports = None

    def _refuse_while_tuning(self, name: str) -> None:
        if self._is_tuning:
            raise RuntimeError(
                f"{name}(): was called while the segmenter is being tuned, by on_measure or in "
                "another thread; on_measure can call support() and segment, for anything else wait "
                "until tune() has returned"
            )

    def support(
        self,
        images: Picture | Sequence[Picture],
        masks: MaskLike | Sequence[MaskLike],
        mask_value: MaskValue | None = None,
    ) -> FewShotSegmenter:
        """Take K supports, replacing earlier ones; return the segmenter.

        Args:
            images: K pictures in a list, or one.
            masks: as many masks in a list, or one if one picture is given.
            mask_value: which value of the masks is the object, where they have several: a class id,
                a gray or a color (128, 0, 0).

        Raises:
            TypeError, ValueError, FileNotFoundError: see `read_picture` and `read_mask`; another
                number of masks than of pictures, or none.
        """
        if not isinstance(images, (list, tuple)):
            images, masks = [images], [masks]  # type: ignore[list-item, assignment]
        if not isinstance(masks, (list, tuple)) or len(images) != len(masks) or not images:
            got = len(masks) if isinstance(masks, (list, tuple)) else type(masks).__name__
            raise ValueError(
                f"masks: expected a list of a mask for each of the {len(images)} images, at least "
                f"one, got {got}"
            )
        pictures: list[Example] = []
        samples, conventions = [], []
        for number, (image, mask) in enumerate(zip(images, masks, strict=True), start=1):
            where = f" {number}" if len(images) > 1 else ""
            pixels = read_picture(image, f"support image{where}")
            height, width = pixels.shape[:2]
            found = find_object(mask, (height, width), f"support mask{where}", mask_value)
            conventions.append(found.convention)
            pictures.append((pixels, found.labels))
            samples.append(plain_view(*pictures[-1], self._transform))
        if isinstance(self.model, Matching) and not any((mask == 0).any() for _, mask in pictures):
            raise ValueError(
                "support mask: expected some background to tell the object from, got masks that "
                "cover all of their images, ignored pixels aside; a trained run can do without"
            )
        image, mask = (torch.stack(parts).to(self.device) for parts in zip(*samples, strict=True))
        supports = self.model.encode_supports(image, mask)
        self._examples, self._supports = (image, mask), supports
        self._pictures, self.conventions = pictures, conventions
        return self

    @torch.inference_mode(False)
    def tune(
        self,
        steps: int = 20,
        lr: float | None = None,
        what: str | RegimeConfig = "svf",
        size: int | None = None,
        seed: int = 0,
        progress: bool = True,
        patience: int = 4,
        on_measure: Callable[[Measure], None] | None = None,
        unlabeled: Picture | Sequence[Picture] = (),
        share: float = SHARE,
    ) -> Tuning:
        """Tune the backbone on the present supports; from then on the segmenter is the tuned one.

        Crops of the supports are each other's queries, at the size at which the segmenter sees
        pictures: of several supports those of one by the example of all others. Pictures without a
        mask can help, such as those that will be segmented: what looks least like the object in
        them is background to paste the supports' objects into. The head of a run stays as trained,
        and so do batch norms unless they are what is tuned. Views that are never trained on are
        measured before the first step and every few: the best values are kept (of the highest IoU,
        and of these the lowest loss), the untuned ones if none are better, and it stops once it
        does not get better. Ctrl-C stops too, and keeps the best; before the first step it is
        raised. Whatever is raised leaves the segmenter as it was.

        It starts from the network as it came, or from the adapter that was set last; tuning twice
        starts again from there. `adapter(None)` goes back; where singular values were tuned,
        `adapter(tuning)` to what they became, both without decomposing. Of a run, singular values
        train where it has them, from their present values. What else is tuned is a copy of the
        backbone.

        BAM weighs a fixed number of supports: where episodes would have one less, views of one are
        among them twice.

        Args:
            steps: at most.
            lr: learning rate of Adam; by default one for each `what`, see `TUNABLE`. For singular
                values it is relative to the mean of a layer's.
            what: "svf", "svf_scale", "full", "layer4", "batch_norm", "bias", "scale_output",
                "scale_input", "rotated_scale" or "adapter", each in layers 3 and 4; or a
                `RegimeConfig`.
            size: side of the views, pixels, a multiple of 8 plus 1: crops of the supports as large
                as the network sees them; by default that of whole pictures, at most 225. Time
                grows with its square.
            seed: of views and episodes; the same one gives the same values on the same machine.
            progress: show a bar.
            patience: measures without a better one after which it stops; there is one every five
                steps, more often where there are fewer than 20.
            on_measure: called with every measure; the segmenter then segments with its values, but
                cannot be tuned, nor take an adapter.
            unlabeled: pictures without a mask, with the object in them or not; of more than 16,
                16 are drawn. They are segmented before the first step.
            share: how far the values that are measured and kept lie from the untuned (0) to the
                trained ones (1): less is safer for pictures that are unlike the supports.

        Raises:
            ValueError: no support was given yet; a support without background; an argument out of
                range; layers without what is to be tuned.
            TypeError: an argument of another type.
        """
        begin = time.monotonic()
        self._refuse_while_tuning("tune")
        self._is_tuning = True
        try:
            settings = TuningSettings(steps, lr, what, size, seed, patience, share)
            if on_measure is not None and not callable(on_measure):
                raise TypeError(f"on_measure: expected a function, got {on_measure!r}")
            with self._backbones.unless_it_fails():
                return self._tune(settings, unlabeled, on_measure, progress, begin)
        finally:
            self._is_tuning, self._supports = False, None

    def _tune(
        self,
        settings: TuningSettings,
        unlabeled: Picture | Sequence[Picture],
        on_measure: Callable[[Measure], None] | None,
        progress: bool,
        begin: float,
    ) -> Tuning:
        if not self._pictures:
            raise ValueError("supports: expected at least one, call support(images, masks) first")
        most = self._transform.size
        size = min(most, LARGEST) if settings.size is None else int(settings.size)
        if size > most:
            raise ValueError(
                f"size: expected at most {most}, at which the network sees pictures, got {size}"
            )
        shots = getattr(self.model, "shots", None)  # BAM's weights are for so many
        count = len(self._pictures)
        if shots is not None and count not in (1, shots):
            raise ValueError(
                f"supports: expected {' or '.join(sorted({'1', str(shots)}))}, which this model "
                f"can weigh, got {count}"
            )
        check_supports(self._pictures)
        scenes, given = self._scenes(unlabeled, settings.seed)
        self._supports = None
        views = SupportViews(
            self._pictures,
            self._transform,
            size,
            shots,
            isinstance(self.model, Matching),
            settings.seed,
            self.device,
            scenes,
        )
        card = {"size": size, "model": type(self.model).__name__.lower()}

        def look(measure: Measure) -> None:
            self._supports = None  # as these values see them
            if on_measure is not None:
                on_measure(measure)

        return tune(
            self._backbones,
            views,
            settings,
            self.threshold,
            count,
            card,
            progress,
            begin,
            look,
            (len(scenes), given),
        )

    def _scenes(self, pictures: Picture | Sequence[Picture], seed: int) -> tuple[list[Scene], int]:
        """Segment pictures as the untuned network does; keep those with background for sure.

        Returns these, and how many were given.
        """
        if not isinstance(pictures, (list, tuple)):
            pictures = [pictures]  # type: ignore[list-item]
        drawn = np.random.default_rng([seed, 2]).permutation(len(pictures))[:SCENES]
        read = [read_picture(pictures[n], f"unlabeled picture {n + 1}") for n in drawn]
        largest = 2 * self._transform.size  # what views need
        read = [shrunk(x, np.ones(x.shape[:2], bool), largest)[0] for x in read]
        self._backbones.put_back()
        self._supports = None
        found = self(read) if read else []
        scenes = [Scene(f.picture, surely_background(f.probability, f.mask)) for f in found]
        return [scene for scene in scenes if scene.background.any()], len(pictures)

    @overload
    def __call__(self, images: Picture, batch_size: int = 8) -> Segmentation: ...

    @overload
    def __call__(
        self, images: list[Any] | tuple[Any, ...], batch_size: int = 8
    ) -> list[Segmentation]: ...

    def __call__(self, images: Any, batch_size: int = 8) -> Segmentation | list[Segmentation]:
        """Segment a picture, or each of a list.

        Args:
            images: a picture or a list of them, each of any size.
            batch_size: pictures at a time; the result does not depend on it but for rounding.

        Raises:
            ValueError: no support was given yet; and see `read_picture`.
        """
        if self._examples is None:
            raise ValueError("supports: expected at least one, call support(images, masks) first")
        if not isinstance(images, (list, tuple)):
            return self([images], 1)[0]
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        results: list[Segmentation] = []
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            numbered = enumerate(part, start=start + 1)
            pictures = [read_picture(image, f"image {number}") for number, image in numbered]
            results += self._segment(pictures)
        return results

    def _segment(self, pictures: list[NDArray[np.uint8]]) -> list[Segmentation]:
        if self._supports is None:
            assert self._examples is not None
            self._supports = self.model.encode_supports(*self._examples)
        blank = [np.zeros(picture.shape[:2], np.uint8) for picture in pictures]
        samples = [self._transform(*pair) for pair in zip(pictures, blank, strict=True)]
        queries = torch.stack([sample.image for sample in samples]).to(self.device)
        padding = torch.stack([sample.padding for sample in samples]).to(self.device)
        given = {"query_padding": padding}
        others = (given.get(name) for name in input_names(self.model)[3:])
        logits = self.model.segment(queries, self._supports, *others)
        results = []
        for picture, sample, one in zip(pictures, samples, logits, strict=True):
            background, foreground = self._enlarge(one, sample, picture)
            margin = (foreground - background).float()  # under autocast it is less
            limit = math.log(self.threshold / (1 - self.threshold))
            # of the margin: a probability rounds
            mask = (margin > limit).cpu().numpy()
            results.append(Segmentation(picture, margin.sigmoid().cpu().numpy(), mask))
        return results

    def _enlarge(self, logits: Tensor, sample: Sample, picture: NDArray[np.uint8]) -> Tensor:
        """Resize logits [2, S, S] of a picture to its own size, [2, H, W]."""
        assert sample.size is not None
        height, width = sample.size
        if isinstance(self.model, Matching) and max(picture.shape[:2]) > max(height, width):
            part = sample.image[:, :height, :width].to(logits)
            whole = torch.tensor(picture, device=logits.device)  # it may be read-only
            return self.model.sharpen(logits[:, :height, :width], part, whole)
        return enlarge(logits, sample.size, picture.shape[:2], self._resize)


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a GPU for cuda, torch finds none; use auto or cpu")
    return torch.device(name)
