"""The commands `fss train` and `fss eval`."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

import fss
from fss.checkpoint import load_checkpoint
from fss.config import TrainConfig
from fss.data import build_source
from fss.engine import train
from fss.evaluation import episode_classes, evaluate_seeds, table
from fss.files import write_json
from fss.models import build_model
from fss.processes import launch, torchrun_layout
from fss.regimes import apply_regime

_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)


def evaluate_run(
    run: str,
    episodes: int | None = None,
    seeds: tuple[int, ...] | None = None,
    shots: int | None = None,
    root: str | None = None,
    classes: Literal["novel", "base"] = "novel",
    checkpoint: Literal["best", "last"] = "best",
    batch_size: int | None = None,
    workers: int | None = None,
    resize: Literal["photo", "canvas"] | None = None,
    feature_cache: float | None = None,
    accelerator: Literal["auto", "cpu", "cuda"] = "auto",
) -> dict:
    """Scores a checkpoint on test episodes and writes eval.json next to it.

    Args:
        run: folder of a training run, or a checkpoint file in it.
        episodes: per seed; by default as the run was tested.
        seeds: one evaluation each; by default as the run was tested.
        shots: support photos per episode; by default as trained.
        root: folder of the photos, if they have moved.
        classes: "novel", those of the fold; "base", those that training saw.
        checkpoint: of the folder, "best" or "last".
        batch_size: episodes at a time; does not change the score.
        workers: processes that load episodes.
        resize: of predictions, see `TrainConfig`; by default as the run was tested.
        feature_cache: GiB of features kept of photos that return; does not change the score.
        accelerator: "auto", "cpu" or "cuda".

    Returns what eval.json holds.

    Raises:
        FileNotFoundError: no run, checkpoint or photos there.
        ValueError: a damaged checkpoint, or a setting that does not fit.
    """
    path = Path(run)
    if path.is_dir():
        path = path / f"{checkpoint}.pt"
    state = load_checkpoint(path)
    values = state["config"]
    trained_shots = values["data"]["shots"]
    overrides = {"shots": shots, "root": root, "workers": workers}
    values["data"] |= {name: value for name, value in overrides.items() if value is not None}
    # The checkpoint holds the backbone too: no other file is needed.
    values["model"] |= {"weights": "none", "base_weights": "none", "official": None}
    overrides = {"test_episodes": episodes, "test_seeds": seeds, "batch_size": batch_size}
    overrides |= {"resize": resize, "feature_cache": feature_cache, "devices": 1, "accumulate": 1}
    values |= {name: value for name, value in overrides.items() if value is not None}
    config = TrainConfig.from_dict(values)

    devices, nodes = torchrun_layout() or (1, 1)
    fabric = launch(accelerator, devices, nodes, config.precision)
    source = build_source(config.data)
    base = episode_classes(source, config.data.fold, novel=False)
    network = build_model(config.model, len(base), trained_shots)
    apply_regime(network, config.regime)
    network.load_state_dict(state["model"])
    result = evaluate_seeds(
        fabric.setup(network),
        source,
        config.data,
        fabric,
        config.test_seeds,
        config.test_episodes,
        config.batch_size,
        classes == "novel",
        config.resize,
        config.feature_cache,
    )
    result = {"checkpoint": path.name, "step": state["step"], **result}
    if fabric.is_global_zero:
        write_json(path.with_name("eval.json"), result)
    return result


def build_parser() -> ArgumentParser:
    """The parser of the whole command line; it raises ArgumentError."""
    parser = ArgumentParser(
        prog="fss",
        version=f"{fss.__version__} (torch {torch.__version__})",
        description="Few-shot segmentation, trained with Singular Value Fine-tuning.",
        exit_on_error=False,
    )
    debug = {"action": "store_true", "help": "show the traceback of an error (or set FSS_DEBUG=1)"}
    training = ArgumentParser(
        description="Train, validate and test a model as configured; a YAML file and options "
        "override the defaults, the last one wins.",
        usage="fss train [--config FILE.yaml] [--resume | --overwrite] [options]",
        exit_on_error=False,
    )
    training.add_argument("--config", action=ActionConfigFile, help="YAML file with settings.")
    training.add_argument("--resume", action="store_true", help="go on from last.pt in --out")
    training.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    training.add_argument("--debug", **debug)
    training.add_class_arguments(TrainConfig)
    evaluation = ArgumentParser(
        description="Score a trained model on test episodes, print a table and write eval.json.",
        usage="fss eval RUN [options]",
        exit_on_error=False,
    )
    evaluation.add_argument("--debug", **debug)
    evaluation.add_function_arguments(evaluate_run, as_positional=True)
    commands = parser.add_subcommands(required=True, dest="command")
    commands.add_subcommand("train", training, help="train, validate and test a model")
    commands.add_subcommand("eval", evaluation, help="score a trained model")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 2 after a user's error, 130 after ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments or os.environ.get("FSS_DEBUG", "") not in ("", "0")
    try:
        parser = build_parser()
        settings = parser.instantiate(parser.parse_args(arguments))
        options = vars(settings[settings.command])
        options.pop("debug")
        if settings.command == "train":
            flags = {name: options.pop(name) for name in ("resume", "overwrite")}
            options.pop("config")
            result = train(TrainConfig(**options), **flags)["test"]
        else:
            result = evaluate_run(**options)
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print("\n".join(table(result)))
    except KeyboardInterrupt as stop:
        print(f"fss: {stop or 'stopped'}", file=sys.stderr)
        return 130
    except (ArgumentError, *_USER_ERRORS) as error:
        if debug or not _expected(error):
            raise
        print(f"fss: {_message(error)} (--debug shows more)", file=sys.stderr)
        return 2
    return 0


def _expected(error: Exception) -> bool:
    """Whether an error was raised on purpose: by our packages, or by a loader process for them."""
    if isinstance(error, ArgumentError) or "DataLoader worker" in str(error):
        return True
    frames = [
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return frames[-1].partition(".")[0] in ("fss", "svf_fast") or isinstance(error, OSError)


def _message(error: Exception) -> str:
    """The text of an error; of one from a loader process, only what it raised there."""
    text = str(error).strip()
    if "DataLoader worker" in text and "Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    if isinstance(error, ArgumentError):
        text = " ".join(text.split())
    return text or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
