"""The phases of `make gpu`, in the order of their worth: what each runs, how long, and on what."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.archive import write_whole
from benchmarks.gpu.processes import ROOT

MARGIN = 8.0  # seconds between the time given to a phase and its limit
REST = 3600  # seconds: as many as there are
OF_FSS = ("jsonargparse", "lightning_fabric", "tensorboardX", "cv2", "jinja2", "yaml")
FOUR = "official;recomposed, BN folded;frozen bound;svf_fast"
IMAGENET = "weights/resnet50_imagenet.safetensors"
PASCAL = "data/pascal"
# Of three runs at once on an H100, predicted: what they need beside their steps, and for a step.
REGIME_OVERHEAD, REGIME_STEP = 35.0, 0.08


class Options(NamedTuple):
    """What all phases are given.

    out, weights, photos: as the commands get them, relative to the repository where that is
        shorter; "none" where there are none.
    """

    out: Path
    dry: bool
    weights: str
    photos: str = "none"

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def stride_on(self) -> str:
        """Return where the found ImageNet weights have the stride; random weights: the default."""
        return "conv2" if self.weights == "none" else "conv1"

    @property
    def svd_cache(self) -> Path:
        return self.out / "cache" / "svd"


class Phase(NamedTuple):
    """A process of its own.

    seconds: at most. least: with less left it does not start. command: what it runs, given the
    seconds it may take. needs: modules beside those of all phases. repeats: it runs in each call,
    done or not.
    """

    name: str
    seconds: int
    least: int
    command: Callable[[Options, int], list[str]]
    needs: tuple[str, ...] = ()
    repeats: bool = False


def module(name: str, *arguments: str | float | Path) -> list[str]:
    """Return the command that runs a module of `benchmarks`."""
    return [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]


def build(options: Options, _: int) -> list[str]:
    if options.dry:
        return [sys.executable, "-c", "import svf_fast; print(svf_fast.build_info())"]
    return [sys.executable, "setup.py", "build_ext", "--inplace"]


def facts(options: Options, _: int) -> list[str]:
    return module("gpu.facts", "--device", options.device, "--results", options.out)


def tests(part: str) -> Callable[[Options, int], list[str]]:
    """Return the command for one part of the tests that need a GPU: see tests.py."""

    def command(options: Options, seconds: int) -> list[str]:
        words = module("gpu.tests", "--seconds", seconds - 3, "--out", options.out)
        words += ["--part", part]
        if options.dry:  # the kernels' tests run on the CPU with all others
            chosen = {"first": "test_gpu_sync.py", "rest": "test_gpu_graph.py"}[part]
            words += ["--files", f"tests/gpu/{chosen}"]
        return words

    return command


def tune(options: Options, seconds: int) -> list[str]:
    command = [sys.executable, "-m", "svf_fast.triton.tune"]
    if options.dry:
        return [*command, "--help"]
    return [*command, "--like", "race", "--budget-seconds", f"{seconds - MARGIN:.0f}"]


def race(level: str, *arguments: str, folder: str = ".") -> Callable[[Options, int], list[str]]:
    """Return the command for a level of the race; results go to a folder in `out`."""

    def command(options: Options, seconds: int) -> list[str]:
        words = module("race", "--level", level, "--dtype", "bfloat16", "--resume")
        words += ["--device", options.device, "--results", str(options.out / folder)]
        words += ["--seconds", f"{max(seconds - 2 * MARGIN, 1):.0f}"]
        if level != "prior":
            words += ["--channels-last", "--weights", options.weights]
            words += ["--stride-on", options.stride_on, "--svd-cache", str(options.svd_cache)]
        words += arguments
        if options.dry:  # what comes later counts
            words += ["--size", "33", "--width", "8", "--rounds", "1"]
            words += ["--batch", "1", "--weights", "none", "--no-peak"]
            words += ["--peers", "official;svf_fast"]
        return words

    return command


def compiled(name: str) -> Callable[[Options, int], list[str]]:
    """Race one peer with torch.compile, which takes a minute or more to compile, against ours."""
    names = f"official;svf_fast;torch.compile of {name}"
    return race("backbone", *SIX, "--suffix", f"compiled_{name}", "--peers", names)


def measured(name: str, *tiny: str) -> Callable[[Options, int], list[str]]:
    """Return the command of a module that runs steps of layers 2-4 outside the race."""

    def command(options: Options, _: int) -> list[str]:
        words = module(name, "--device", options.device, "--results", options.out)
        words += ["--weights", options.weights, "--stride-on", options.stride_on]
        words += ["--svd-cache", str(options.svd_cache)]
        if options.dry:
            words += ["--size", "33", "--width", "8", "--batches", "1", *tiny]
        return words

    return command


def train(options: Options, seconds: int) -> list[str]:
    words = module("gpu.train", "--device", options.device, "--results", options.out)
    words += ["--weights", options.weights, "--stride-on", options.stride_on]
    # a row takes some ten seconds: one in progress should end
    words += ["--photos", options.photos, "--seconds", f"{max(seconds - 25, 1)}"]
    if options.dry:
        words += ["--backbone", "resnet18", "--width", "8", "--cases", "65x1", "--batch", "1"]
        words += ["--steps", "2", "--workers", "0", "--regimes", "svf", "freeze"]
    return words


def regimes(options: Options, seconds: int) -> list[str]:
    """Train freeze, svf and full at once, as many steps as the time of the first call allows."""
    folder = options.out / "regimes"
    planned = ROOT / folder / "plan.json"
    seconds = max(seconds - 35, 1)  # to stop, save and draw in
    if not planned.is_file():
        planned.parent.mkdir(parents=True, exist_ok=True)
        of_fold = (seconds / 2 - REGIME_OVERHEAD) / REGIME_STEP
        plan = {"steps": max(200, min(2000, int(of_fold) // 100 * 100))}
        write_whole(planned, json.dumps(plan))
    steps = 2 if options.dry else json.loads(planned.read_text())["steps"]
    words = module("few_shot.regimes", "--folds", 0, "--at-once", 3, "--seconds", seconds)
    words += ["--out", str(options.out / "runs"), "--results", str(folder / "regimes")]
    if options.dry:
        words += ["--config", "demo", "--regimes", "freeze", "svf", "--data.size=65"]
        words += ["--test_episodes=2", "--test_seeds=[1]", "--validation_episodes=2"]
        words += ["--data.workers=0", "--batch_size=1", "--accelerator=cpu"]
        return [*words, f"--steps={steps}", "--log_every=1", "--pictures=0"]
    words += photos_of_regimes(options)
    words += [f"--model.weights={options.weights}", f"--model.stride_on={options.stride_on}"]
    words += ["--data.size=225", "--data.workers=5", "--batch_size=8", f"--steps={steps}"]
    # what learns in so few steps: AdamW, S at the rate that moves it as much as weights at theirs
    words += ["--optimizer.name=adamw", "--optimizer.lr=0.0005", "--foreground_weight=2"]
    words += ["--only", "svf", "optimizer.backbone_lr=0.002"]
    words += ["--only", "full", "optimizer.backbone_lr=0.00005"]
    words += [f"--validation_every={max(steps // 2, 50)}", "--validation_episodes=100"]
    words += ["--test_episodes=500", "--test_seeds=[510, 365]", "--checkpoint=last"]
    words += ["--save_every=100", "--precision=bf16-mixed", "--accelerator=cuda"]
    return [*words, "--pictures=3"]


def photos_of_regimes(options: Options) -> list[str]:
    """Choose folds 0 and 2 of Pascal-5i if found, packed or at 400 px, else embedded photos."""
    if options.photos == "none":
        return ["--config", "pascal_svf", "--data.source=shapes", "--data.min_area=0.02"]
    packed = ROOT / options.photos / "pascal.yaml"
    words = ["--config", str(packed) if packed.is_file() else "pascal_svf", "--folds", "0", "2"]
    words += [f"--data.root={options.photos}", "--data.drop_small_classes=true"]
    return words if packed.is_file() else [*words, "--data.min_area=1311"]


def elementwise(options: Options, _: int) -> list[str]:
    return module("gpu.elementwise", "--device", options.device, "--results", options.out)


def roofline(options: Options, _: int) -> list[str]:
    return module("gpu.roofline", "--results", options.out, "--stride-on", options.stride_on)


def render(options: Options, _: int) -> list[str]:
    folders = [folder for folder in (options.out, options.out / ONE) if (ROOT / folder).is_dir()]
    return module("render", "--results", *folders)


ONE = "one_image"
SIX = ("--size", "641", "--batch", "6")  # as many images as a 5-shot episode
EPISODE = ("--size", "641", "--batch", "1", "--shots", "5", "--peers", FOUR)
AT_ONE = ("--size", "641", "--batch", "1", "--peers", FOUR)

PHASES = (
    Phase("build", 110, 20, build, repeats=True),
    Phase("facts", 30, 10, facts),
    Phase("tests-first", 60, 30, tests("first")),
    Phase("race", 150, 60, race("backbone", *SIX, "--peers", FOUR)),
    Phase("profile", 70, 30, measured("gpu.profile", "--steps", "1")),
    Phase("one-image", 80, 40, race("backbone", *AT_ONE, folder=ONE)),
    Phase("replay", 60, 30, measured("gpu.replay", "--rounds", "1")),
    Phase("train", 170, 50, train, needs=OF_FSS),
    Phase("step", 75, 40, race("step", *EPISODE)),
    Phase("prior", 30, 15, race("prior")),
    Phase("elementwise", 20, 10, elementwise),
    Phase("roofline", 12, 8, roofline),
    Phase("tests-rest", 120, 40, tests("rest")),
    Phase("regimes", REST, 90, regimes, needs=OF_FSS),
    Phase("tune", 60, 30, tune),
    Phase("compiled-official", 90, 60, compiled("official")),
    Phase("compiled-recomposed", 90, 60, compiled("recomposed")),
    Phase("render", 15, 5, render, repeats=True),
)
