"""The commands `fss train`, `fss eval` and `fss data`."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser
from lightning_fabric import Fabric

import fss
from fss.checkpoint import load_checkpoint
from fss.config import TrainConfig
from fss.data import build_source
from fss.data.prepare import prepare, verify_data
from fss.engine import train
from fss.evaluation import evaluate_seeds, table
from fss.files import write_json
from fss.models import build_model
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
    overrides = {"shots": shots, "root": root, "workers": workers}
    values["data"] |= {name: value for name, value in overrides.items() if value is not None}
    # The checkpoint holds the backbone too: no other file is needed.
    values["model"]["weights"] = "none"
    overrides = {"test_episodes": episodes, "test_seeds": seeds, "batch_size": batch_size}
    values |= {name: value for name, value in overrides.items() if value is not None}
    config = TrainConfig.from_dict(values)

    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("accelerator: expected a GPU for cuda, found none; set accelerator to cpu")
    fabric = Fabric(accelerator=accelerator, devices=1, precision=config.precision)
    source = build_source(config.data)
    network = build_model(config.model)
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
    )
    result = {"checkpoint": path.name, "step": state["step"], **result}
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
    data = ArgumentParser(description="Make or verify a data set.", exit_on_error=False)
    data.add_argument("--debug", **debug)
    commands.add_subcommand("data", data, help="make or verify a data set")
    actions = data.add_subcommands(required=True, dest="action")
    for name, function, text in (
        ("prepare", prepare, "download and convert Pascal-5i or COCO-20i; go on if cut"),
        ("verify", verify_data, "compare a data set with the published numbers"),
    ):
        command = ArgumentParser(description=f"{text.capitalize()}.", exit_on_error=False)
        command.add_argument("--debug", **debug)
        command.add_function_arguments(function, as_positional=True)
        actions.add_subcommand(name, command, help=text)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status.

    0, 1 where data are not the published ones, 2 after a user's error, 130 after ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments or os.environ.get("FSS_DEBUG", "") not in ("", "0")
    try:
        parser = build_parser()
        settings = parser.instantiate(parser.parse_args(arguments))
        options = vars(settings[settings.command])
        options.pop("debug")
        if settings.command == "data":
            action = options["action"]
            options = vars(options[action])
            options.pop("debug")
            lines, passed = (prepare if action == "prepare" else verify_data)(**options)
            print("\n".join(lines))
            return 0 if passed else 1
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
