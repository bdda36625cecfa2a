"""The commands of `fss`; `fss --help` lists them."""

from __future__ import annotations

import os
import re
import sys
import traceback
from typing import Any, Literal

import torch
import yaml
from jsonargparse import (
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    Namespace,
    set_parsing_settings,
)

import fss
from fss.config import TrainConfig
from fss.data.prepare import prepare, verify_data
from fss.evaluation.evaluate import table
from fss.evaluation.score import evaluate_run
from fss.files import read_yaml
from fss.paper.reproduce import reproduce_table
from fss.report import write_report
from fss.segment.app import serve
from fss.segment.export import export_run
from fss.segment.predict import predict_files
from fss.settings import config_file, config_names
from fss.training.adapters import adapter_files
from fss.training.base_learner import BaseLearnerConfig, base_table, train_base
from fss.training.loop import INTERRUPTED
from fss.training.run import train

# Settings of `fss train` that `fss reproduce` takes as options too; the others go into a file.
_REPRODUCED = {
    "data.root": "folder of the data set",
    "model.weights": "of the backbone",
    "model.base_weights": "BAM's base learners, a path with {data}, {backbone} and {fold} in it; "
    "by default they are trained first",
    "accelerator": "as for fss train",
    "devices": "as for fss train",
    "precision": "as for fss train",
}

_USAGE = {
    "train": "fss train [--config FILE_OR_NAME] [--resume | --overwrite] [options]",
    "train-base": "fss train-base [--config FILE_OR_NAME] [--resume | --overwrite] [options]",
    "eval": "fss eval RUN [options], or fss eval SETTINGS.yaml --official FILE [options]",
    "reproduce": "fss reproduce TABLE [--list] [options]",
    "report": "fss report RUN... [--out FOLDER] [--photo FILE] [--layers NAME...]",
    "app": "fss app [RUN] [options]",
    "predict": "fss predict [RUN] --support PICTURE MASK --query PICTURE|FOLDER ... --out FOLDER",
    "adapter": "fss adapter FILE..., or fss adapter A B --interpolate T --out FILE",
    "export": "fss export RUN [--out FILE.onnx] [options]",
    "data": "fss data prepare|verify pascal|coco ROOT [options]",
}
_RAISING = ("fss", "svf_fast", "jsonargparse")
_PARTS = ("data", "model", "regime", "optimizer")
_LONGEST = 4000  # characters of a message
_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)


_EXITS = (
    "Exit status: 0; 2 after an error; 130 after ctrl-C and 143 after SIGTERM, both once the step "
    "is finished and saved: --resume goes on. A second signal stops at once."
)


class SettingsFile(ActionConfigFile):
    """`--config`: a YAML file, or the name of one that comes with the package."""

    text = (
        "YAML file with settings, or the name of one that comes with fss: "
        f"{', '.join(config_names() + config_names('regimes'))}."
    )

    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        try:
            path = config_file(value)
            content = read_yaml(path)
        except (OSError, ValueError) as error:
            raise TypeError(str(error)) from error  # what jsonargparse takes for a user's error
        for name in _PARTS:
            part = content.get(name, {}) if isinstance(content, dict) else {}
            if not isinstance(part, dict):
                raise TypeError(f"{path}: {name}: expected settings by name, got {part!r:.200}")
        super().__call__(parser, namespace, str(path), option)


def build_parser() -> ArgumentParser:
    """The parser of the whole command line; it raises ArgumentError."""
    # No setting is a class: one that names a module must not import it.
    set_parsing_settings(import_path_denylist=["*"])
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
        usage=_USAGE["train"],
        epilog=_EXITS,
        exit_on_error=False,
    )
    training.add_argument("--config", action=SettingsFile, help=SettingsFile.text)
    training.add_argument("--resume", action="store_true", help="go on from last.pt in --out")
    training.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    training.add_argument("--debug", **debug)
    training.add_class_arguments(TrainConfig)
    base = ArgumentParser(
        description="Train BAM's base learner, a PSPNet that segments the base classes of a fold.",
        usage=_USAGE["train-base"],
        epilog=_EXITS,
        exit_on_error=False,
    )
    base.add_argument("--config", action=SettingsFile, help=SettingsFile.text)
    base.add_argument("--resume", action="store_true", help="go on from last.pt in --out")
    base.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    base.add_argument("--debug", **debug)
    base.add_class_arguments(BaseLearnerConfig)
    evaluation = ArgumentParser(
        description="Score a trained model on test episodes, print a table and write it.",
        usage=_USAGE["eval"],
        exit_on_error=False,
    )
    evaluation.add_argument("--debug", **debug)
    evaluation.add_function_arguments(evaluate_run, as_positional=True)
    reproduction = ArgumentParser(
        description="Make or resume the runs of a table of the paper and compare the numbers.",
        usage=_USAGE["reproduce"],
        exit_on_error=False,
    )
    reproduction.add_argument("--debug", **debug)
    reproduction.add_argument("table", nargs="?", help="T1 to T24; without one, list them all")
    reproduction.add_argument("--list", action="store_true", help="only list the runs")
    for name, kind, text in (
        ("rows", str, "names of runs or numbers of rows, as --list shows them"),
        ("folds", int, "of 0 to 3"),
        ("shots", int, "of those in the table"),
    ):
        reproduction.add_argument(f"--{name}", type=kind, nargs="+", default=[], help=text)
    reproduction.add_argument("--out", default="runs/paper", help="folder of runs and results")
    reproduction.add_argument(
        "--scale-down", action="store_true", help="small network, small photos, few steps: a try"
    )
    reproduction.add_argument("--settings", help="YAML file with settings over those of every row")
    reproduction.add_argument("--tables", help="folder of the tables' files")
    for name, text in _REPRODUCED.items():
        reproduction.add_argument(f"--{name}", help=f"{text}, in every run")
    report = ArgumentParser(
        description="Write one self-contained page about runs: results, curves, classes, episodes, "
        "what happened to the singular values, memory and time; the plots also as PNG and SVG.",
        usage=_USAGE["report"],
        exit_on_error=False,
    )
    report.add_argument("--debug", **debug)
    report.add_argument("runs", nargs="+", help="folders that fss train wrote")
    report.add_argument("--out", help="folder of the page; by default RUN/report of the first run")
    report.add_argument("--photo", help="picture for the heat maps; by default one of the test")
    report.add_argument(
        "--layers",
        nargs="+",
        default=[],
        help="convolutions for the heat maps; by default the last 3x3 and the last 1x1 of layer3",
    )
    commands = parser.add_subcommands(required=True, dest="command")
    commands.add_subcommand("train", training, help="train, validate and test a model")
    commands.add_subcommand("train-base", base, help="train BAM's base learner")
    commands.add_subcommand("eval", evaluation, help="score a trained model")
    commands.add_subcommand("reproduce", reproduction, help="make a table of the paper")
    commands.add_subcommand("report", report, help="write a page about runs")
    commands.add_subcommand("predict", _prediction(debug), help="segment your own pictures")
    commands.add_subcommand("adapter", _adapter(debug), help="show adapters or interpolate two")
    commands.add_subcommand("export", _export(debug), help="write a trained model as ONNX")
    page = ArgumentParser(
        description="Serve a page to paint an object in a picture and to find it in others.",
        usage=_USAGE["app"],
        exit_on_error=False,
    )
    page.add_argument("--debug", **debug)
    page.add_argument("run", nargs="?", help="of fss train; without one, training-free matching")
    page.add_function_arguments(serve, skip={"run"})
    commands.add_subcommand("app", page, help="the same on a local web page")
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


def _prediction(debug: dict[str, Any]) -> ArgumentParser:
    parser = ArgumentParser(
        description="Segment pictures by the example of a few others; without a run, by matching "
        "features of a pretrained backbone, by default of the small embedded one.",
        usage=_USAGE["predict"],
        exit_on_error=False,
    )
    parser.add_argument("--debug", **debug)
    parser.add_argument("run", nargs="?", help="folder of fss train, or a checkpoint in it")
    parser.add_argument(
        "--support",
        dest="supports",
        nargs=2,
        action="append",
        default=[],
        metavar=("PICTURE", "MASK"),
        help='a picture and its mask: a file, a box "x0,y0,x1,y1" or a polygon "x,y x,y x,y …", '
        "pixels from the top left; may be repeated",
    )
    parser.add_argument("--query", dest="queries", nargs="+", required=True, help="what to segment")
    parser.add_argument("--out", required=True, help="folder of the results")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    for name, kind, default, text in (
        ("adapter", str, None, "file of singular values of the backbone, as runs leave it"),
        ("threshold", float, 0.5, "probability above which a pixel belongs to the object"),
        ("batch_size", int, 8, "pictures at a time"),
        ("checkpoint", Literal["best", "last"], "best", "of the run"),
        ("device", Literal["auto", "cpu", "cuda"], "auto", "auto takes a GPU if there is one"),
        ("backbone", str, None, "without a run: its name; by default what the weights tell"),
        ("weights", str, None, "without a run: file of a pretrained backbone"),
        ("size", int, None, "without a run: longer side of the network's input, pixels"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    return parser


def _adapter(debug: dict[str, Any]) -> ArgumentParser:
    parser = ArgumentParser(
        description="Show what is in adapter files, or interpolate two.",
        usage=_USAGE["adapter"],
        exit_on_error=False,
    )
    parser.add_argument("--debug", **debug)
    parser.add_argument("files", nargs="+", help="of svf_fast.save_adapter; runs leave one")
    parser.add_argument("--interpolate", type=float, help="0 gives the first, 1 the second")
    parser.add_argument("--out", help="file for the interpolated adapter")
    return parser


def _export(debug: dict[str, Any]) -> ArgumentParser:
    parser = ArgumentParser(
        description="Write a trained model as ONNX, checked in onnxruntime.",
        usage=_USAGE["export"],
        exit_on_error=False,
    )
    parser.add_argument("--debug", **debug)
    parser.add_function_arguments(export_run, as_positional=True)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status.

    0, 1 where data are not the published ones, 2 after a user's error, 130 after ctrl-C, 143 after
    SIGTERM; these two let a training run finish and save its step, the second signal ends it at
    once.
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
            text = "\n".join(table(train(TrainConfig(**options), **flags)["test"]))
        elif settings.command == "train-base":
            flags = {name: options.pop(name) for name in ("resume", "overwrite")}
            options.pop("config")
            text = "\n".join(base_table(train_base(BaseLearnerConfig(**options), **flags)))
        elif settings.command == "eval":
            text = "\n".join(table(evaluate_run(**options)))
        elif settings.command == "report":
            text = str(write_report(**options))
        elif settings.command == "predict":
            text = predict_files(**options)
        elif settings.command == "adapter":
            text = adapter_files(**options)
        elif settings.command == "export":
            text = export_run(**options)
        elif settings.command == "app":
            serve(**options)
            return 0
        else:
            text = reproduce_table(**_given(options))
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(text)
    except KeyboardInterrupt as stop:
        print(f"fss: {stop or 'stopped'}", file=sys.stderr)
        return getattr(stop, "status", INTERRUPTED)
    except (ArgumentError, *_USER_ERRORS) as error:
        if debug or not _expected(error):
            raise
        print(f"fss: {_message(error)} (--debug shows more)", file=sys.stderr)
        return 2
    return 0


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options of `fss reproduce` without the settings that were not given, read as YAML is."""
    given: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Namespace):
            part = {key: one for key, one in vars(value).items() if one is not None}
            given |= {name: part} if part else {}
        elif name not in _REPRODUCED:
            given[name] = value
        elif value is not None:
            given[name] = yaml.safe_load(value)
    return given


def _expected(error: Exception) -> bool:
    """Whether an error was raised on purpose: by our packages, or by a loader process for them."""
    if isinstance(error, ArgumentError) or "DataLoader worker" in str(error):
        return True
    frames = [
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return frames[-1].partition(".")[0] in _RAISING or isinstance(error, OSError)


def _message(error: Exception) -> str:
    """The text of an error; of one from a loader process, only what it raised there."""
    text = str(error).strip()
    if "DataLoader worker" in text and "Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    if isinstance(error, ArgumentError):
        text = " ".join(text.split())
        missing = re.search(r"arguments are required: ([a-z-]+)", text)
        if missing and missing[1] in _USAGE:  # the parser names what no user types
            text = f"something is missing; expected: {_USAGE[missing[1]]}"
    if len(text) > _LONGEST:  # a file may hold anything, and some errors quote it
        text = f"{text[: _LONGEST - 203]} … {text[-200:]}"
    return text or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
