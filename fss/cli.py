"""The commands of `fss`; `fss --help` lists them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import docstring_parser
from jsonargparse import (
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    Namespace,
    set_parsing_settings,
)

import fss
from fss.config import RegimeConfig, TrainConfig, plain
from fss.config.checks import misfit
from fss.files import read_yaml
from fss.settings import config_file, config_names, flat_settings

_RAISING = ("fss", "svf_fast", "jsonargparse")
_PARTS = ("data", "model", "regime", "optimizer")
_LONGEST = 4000  # characters of a message
_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
_INTERRUPTED = 130
_EXITS = (
    "Exit status: 0; 2 after an error; 130 after ctrl-C and 143 after SIGTERM, both once the step "
    "is finished and saved: --resume goes on. A second signal stops at once."
)
# What the parser says of a value that does not fit its type.
_MISFIT = re.compile(
    r'Parser key "([\w.]+)"(?: element \d+)?: .*(?:Got value|Given value): (.*)', re.DOTALL
)


class Command(NamedTuple):
    """A command; its arguments are the parameters of its function, described in the docstring.

    Args:
        function: MODULE:NAME, imported when the command is chosen; "" for a group of commands.
        help: what it does, in a few words.
        usage: how it is typed.
        show: the text to print of what the function returns.
        spelled: how an argument is spelled where it is not NAME without a default, --NAME with one.
        metavars: what the help shows as the value of an argument.
        settings: further options, settings of `fss train` with their help.
    """

    function: str
    help: str
    usage: str
    show: Callable[[Any], str] = str
    spelled: Mapping[str, Sequence[str]] = {}
    metavars: Mapping[str, tuple[str, ...]] = {}
    settings: Mapping[str, str] = {}

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)


def _train_text(result: dict[str, Any]) -> str:
    return _eval_text(result["test"])


def _base_text(result: dict[str, Any]) -> str:
    from fss.training.base_learner import base_table

    return "\n".join(base_table(result))


def _eval_text(result: dict[str, Any]) -> str:
    from fss.evaluation.evaluate import table

    return "\n".join(table(result))


def _data_text(result: Any) -> str:
    return "\n".join(result.lines)


COMMANDS = {
    "train": Command(
        "fss.training.run:train",
        "train, validate and test a model",
        "fss train [--config FILE_OR_NAME] [--resume | --overwrite] [options]",
        _train_text,
    ),
    "train-base": Command(
        "fss.training.base_learner:train_base",
        "train BAM's base learner",
        "fss train-base [--config FILE_OR_NAME] [--resume | --overwrite] [options]",
        _base_text,
    ),
    "eval": Command(
        "fss.evaluation.score:evaluate_run",
        "score a trained model, or matching without training",
        "fss eval RUN [options], fss eval SETTINGS.yaml --official FILE [options], or "
        "fss eval --weights FILE --source NAME [options]",
        _eval_text,
        spelled={"run": ["run"]},
    ),
    "reproduce": Command(
        "fss.paper.reproduce:reproduce_table",
        "make a table or draw a figure of the paper",
        "fss reproduce TABLE|FIGURE [--list] [options]",
        spelled={"table": ["table"], "scale_down": ["--scale-down", "--scale_down"]},
        settings={
            "data.root": "folder of the data set, in every run",
            "model.weights": "of the backbone, in every run",
            "model.base_weights": "BAM's base learners, a path with {data}, {backbone} and {fold} "
            "in it; by default they are trained first",
            "accelerator": "as for fss train, in every run",
            "devices": "as for fss train, in every run",
            "precision": "as for fss train, in every run",
        },
    ),
    "compare": Command(
        "fss.paper.methods:compare_methods",
        "train methods on the same photos and compare them",
        "fss compare METHOD... [--config FILE_OR_NAME] [--regimes NAME...] [options]",
        settings={
            "data.root": "folder of the data set",
            "data.source": "kind of the data set",
            "data.fold": "which classes are novel",
            "data.shots": "supports per episode (K)",
            "data.size": "side of the network's input, pixels",
            "data.workers": "processes that load episodes",
            "model.backbone": "of all methods",
            "model.weights": "of the backbone",
            "model.base_weights": "of methods with a base learner; by default it is trained first",
            "optimizer.lr": "learning rate of the head",
            "optimizer.backbone_lr": "learning rate of what trains in the backbone",
            "optimizer.backbone_weight_decay": "weight decay of what trains in the backbone",
            "steps": "of each run",
            "batch_size": "episodes per step",
            "test_episodes": "per seed",
            "accelerator": "as for fss train",
            "devices": "as for fss train",
            "precision": "as for fss train",
        },
    ),
    "report": Command(
        "fss.report.page:write_report",
        "write a page about runs",
        "fss report RUN... [--out FOLDER] [--photo FILE] [--layers NAME...]",
    ),
    "predict": Command(
        "fss.segment.predict:predict_files",
        "segment your own pictures",
        "fss predict [RUN] --support PICTURE MASK --query PICTURE|FOLDER ... --out FOLDER",
        spelled={
            "run": ["run"],
            "supports": ["--support"],
            "queries": ["--query"],
            "out": ["--out"],
        },
        metavars={"supports": ("PICTURE", "MASK")},
    ),
    "adapter": Command(
        "fss.training.adapters:adapter_files",
        "show adapters or interpolate two",
        "fss adapter FILE..., or fss adapter A B --interpolate T --out FILE",
    ),
    "export": Command(
        "fss.segment.export:export_run",
        "write a trained model as ONNX",
        "fss export RUN [--out FILE.onnx] [options]",
    ),
    "app": Command(
        "fss.segment.app:serve",
        "segment pictures on a local web page",
        "fss app [RUN] [options]",
        spelled={"run": ["run"]},
    ),
    "data": Command(
        "",
        "make, verify or import a data set",
        "fss data prepare|verify pascal|coco ROOT [options], or fss data import IMAGES MASKS OUT",
    ),
    "data prepare": Command(
        "fss.data.prepare.datasets:prepare",
        "download and convert Pascal-5i or COCO-20i",
        "fss data prepare pascal|coco ROOT [options]",
        _data_text,
    ),
    "data verify": Command(
        "fss.data.prepare.datasets:verify_data",
        "compare a data set with the published numbers",
        "fss data verify pascal|coco ROOT [options]",
        _data_text,
    ),
    "data import": Command(
        "fss.data.imports.folder:import_folder",
        "write your own photos and masks as a data set",
        "fss data import IMAGES MASKS OUT [--classes NAME...] [--values ids|colors|binary]",
        _data_text,
    ),
}


class SettingsFile(ActionConfigFile):
    """`--config`: a YAML file, or the name of one that comes with the package.

    A regime is one thing: a file that names one takes the place of an earlier file's, whose layers
    and batch norms would otherwise go on in it.
    """

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
        regime = _regime(content)
        if "name" in regime:
            for earlier in namespace.get(self.dest) or []:
                for setting, value in _regime(read_yaml(Path(earlier))).items():
                    given = plain(namespace.get(f"regime.{setting}"))
                    if setting not in regime and given == value:  # else the command line's
                        namespace[f"regime.{setting}"] = getattr(RegimeConfig, setting)
        super().__call__(parser, namespace, str(path), option)


def _regime(content: Any) -> dict[str, Any]:
    """Return what a file says of the regime, nested or by dotted names."""
    flat = flat_settings(content) if isinstance(content, dict) else {}
    prefix = "regime."
    return {n.removeprefix(prefix): value for n, value in flat.items() if n.startswith(prefix)}


def build_parser(arguments: Sequence[str] | None = None) -> ArgumentParser:
    """Build the parser of the command line; it raises ArgumentError.

    Given `arguments`, only the commands among them have their options: the others are not imported.
    """
    # No setting is a class: one that names a module must not import it.
    set_parsing_settings(import_path_denylist=["*"])
    parser = ArgumentParser(
        prog="fss",
        version=f"{fss.__version__} (torch {version('torch')})",
        description="Few-shot segmentation, trained with Singular Value Fine-tuning.",
        exit_on_error=False,
    )
    groups = {"": parser.add_subcommands(required=True, dest="command")}
    for name, command in COMMANDS.items():
        one = ArgumentParser(usage=command.usage, exit_on_error=False)
        one.add_argument(
            "--debug",
            action="store_true",
            help="show the traceback of an error (or set FSS_DEBUG=1)",
        )
        group, _, last = name.rpartition(" ")
        groups[group].add_subcommand(last, one, help=command.help)
        if not command.function:
            one.description = f"{command.help.capitalize()}."
            groups[name] = one.add_subcommands(required=True, dest="action")
        elif arguments is None or set(name.split()) <= set(arguments):
            _add_arguments(one, command)
    return parser


def _add_arguments(parser: ArgumentParser, command: Command) -> None:
    """Add a command's arguments, as the signature and the docstring of its function have them."""
    function = command.load()
    text = docstring_parser.parse(inspect.getdoc(function) or "")
    paragraphs = (text.short_description, text.long_description)
    parser.description = "\n\n".join(each for each in paragraphs if each)
    documented = {each.arg_name: each.description for each in text.params}
    hints = _parameters(function)
    for name, hint in hints.items():
        default = inspect.signature(function).parameters[name].default
        if dataclasses.is_dataclass(hint):
            names = ", ".join(config_names() + config_names("regimes"))
            about = f"YAML file with settings, or the name of one that comes with fss: {names}."
            parser.add_argument("--config", action=SettingsFile, help=about)
            parser.add_class_arguments(hint)
            parser.epilog = _EXITS
            continue
        required = default is inspect.Parameter.empty
        flags = command.spelled.get(name, [name if required else f"--{name}"])
        options: dict[str, Any] = _kind(hint) | {"help": documented[name]}
        if not required:
            options["default"] = [*default] if isinstance(default, tuple) else default
        if flags[0].startswith("-"):
            options |= {"dest": name, "required": required and "action" not in options}
        elif not required:
            options["nargs"] = "?"
        if name in command.metavars:
            options["metavar"] = command.metavars[name]
        parser.add_argument(*flags, **options)
    for name, about in command.settings.items():
        parser.add_argument(f"--{name}", type=_setting(name) | None, help=about)


def _kind(hint: Any) -> dict[str, Any]:
    """Return how values of a type are typed: a sequence as several words, a bool as a switch."""
    if hint is bool:
        return {"action": "store_true"}
    if typing.get_origin(hint) is not Sequence:
        return {"type": hint}
    (item,) = typing.get_args(hint)
    if typing.get_origin(item) is tuple:
        return {"action": "append", "nargs": len(typing.get_args(item)), "default": []}
    return {"nargs": "+", "type": item}


def _parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of a function's parameters, without **keywords, by name."""
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    return {each.name: hints[each.name] for each in parameters if each.kind != each.VAR_KEYWORD}


def _setting(name: str, config: type = TrainConfig) -> Any:
    """Return the type of a setting by its dotted name."""
    part, _, rest = name.partition(".")
    hint = typing.get_type_hints(config)[part]
    return _setting(rest, hint) if rest else hint


def _run(command: Command, options: Namespace) -> Any:
    """Call a command's function with its options."""
    function = command.load()
    arguments: dict[str, Any] = {}
    for name, hint in _parameters(function).items():
        if dataclasses.is_dataclass(hint):
            arguments[name] = hint(**{f.name: options[f.name] for f in dataclasses.fields(hint)})
        else:
            arguments[name] = options[name]
    given = Namespace()
    for name in command.settings:
        if options[name] is not None:
            given[name] = options[name]
    return function(**arguments, **given.as_dict())


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit status.

    0, 1 where data are not the published ones, 2 after a user's error, 130 after ctrl-C, 143 after
    SIGTERM; these two let a training run finish and save its step, the second signal ends it at
    once.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack ± and …
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments or os.environ.get("FSS_DEBUG", "") not in ("", "0")
    command = None
    try:
        _check_ranks()
        parser = build_parser(arguments)
        settings = parser.parse_args(arguments)
        name, options = settings.command, parser.instantiate(settings)[settings.command]
        if not COMMANDS[name].function:
            name, options = f"{name} {options.action}", options[options.action]
        command = COMMANDS[name]
        result = _run(command, options)
        if result is not None and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(command.show(result))
        return 0 if getattr(result, "passed", True) else 1
    except KeyboardInterrupt as stop:
        print(f"fss: {str(stop) or 'stopped'}", file=sys.stderr)
        return getattr(stop, "status", _INTERRUPTED)
    except (ArgumentError, *_USER_ERRORS) as error:
        if debug or not _expected(error):
            raise
        print(f"fss: {_message(error, arguments)} (--debug shows more)", file=sys.stderr)
        return 2


def _check_ranks() -> None:
    """Check the variables that lightning_fabric reads as numbers when it is imported."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        value = os.environ.get(name, "0")
        if not value:
            del os.environ[name]  # as if it were not there
        elif not value.isdecimal():
            raise ValueError(
                f"{name}: expected a number in the environment, got {value!r}; unset it"
            )


def _expected(error: Exception) -> bool:
    """Tell whether our packages, or a loader process for them, raised an error on purpose."""
    if isinstance(error, ArgumentError) or "DataLoader worker" in str(error):
        return True
    frames = [
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return frames[-1].partition(".")[0] in _RAISING or isinstance(error, OSError)


def _message(error: Exception, arguments: Sequence[str] = ()) -> str:
    """Return the text of an error; of one from a loader process, only what it raised there."""
    text = str(error).strip()
    if "DataLoader worker" in text and "Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    if isinstance(error, ArgumentError):
        text = _in_our_words(" ".join(text.split()), arguments)
    if len(text) > _LONGEST:  # a file may hold anything, and some errors quote it
        text = f"{text[: _LONGEST - 203]} … {text[-200:]}"
    return text or type(error).__name__


def _in_our_words(text: str, arguments: Sequence[str]) -> str:
    """Return an error of the parser with what was expected and what came, as it is typed."""
    missing = re.search(r"arguments are required: ([a-z-]+)", text)
    if missing and missing[1] in COMMANDS:  # the parser names what no user types
        return f"something is missing; expected: {COMMANDS[missing[1]].usage}"
    words = [each for each in arguments if any(each in name.split() for name in COMMANDS)]
    names = (" ".join(words[:2]), *words[:1])
    command = next((COMMANDS[name] for name in names if name in COMMANDS), None)
    unfit = _MISFIT.match(text)
    if not unfit or command is None or not command.function:
        return text
    hints = _parameters(command.load())
    config = hints.pop("config", TrainConfig)
    try:
        return misfit(unfit[1], hints.get(unfit[1]) or _setting(unfit[1], config), repr(unfit[2]))
    except KeyError:
        return text


if __name__ == "__main__":
    sys.exit(main())
