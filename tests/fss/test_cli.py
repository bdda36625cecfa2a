from __future__ import annotations

import functools
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fss.cli
from fss.cli import main
from fss.training import run


@pytest.fixture
def config_file(tiny, tmp_path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny().to_dict()))
    return str(path)


def test_train_then_eval(config_file, tmp_path, capsys):
    out = tmp_path / "there"
    assert (
        main(["train", "--config", config_file, "--out", str(out), "--optimizer.lr", "1e-3"]) == 0
    )
    printed = capsys.readouterr()
    assert "mIoU" in printed.out and "star" in printed.out
    assert "step 3: validation mIoU" in printed.err
    result = json.loads((out / "result.json").read_text())
    assert result["config"]["optimizer"]["lr"] == 0.001
    assert result["steps"] == 3

    assert main(["eval", str(out)]) == 0
    evaluated = json.loads((out / "eval.json").read_text())
    assert evaluated == result["test"]
    assert capsys.readouterr().out == printed.out


def test_eval_options(config_file, tmp_path, capsys):
    assert main(["train", "--config", config_file, "--steps", "1"]) == 0
    options = ["--episodes", "4", "--seeds", "[7,8,9]", "--shots", "2", "--checkpoint", "last"]
    assert main(["eval", str(tmp_path / "run"), *options, "--classes", "base"]) == 0
    evaluated = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert evaluated["seeds"] == [7, 8, 9] and evaluated["episodes_per_seed"] == 4
    assert evaluated["shots"] == 2 and evaluated["checkpoint"] == "last.pt"
    assert evaluated["classes_are"] == "base" and len(evaluated["iou"]) == 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.sorce", "shapes"], "--data.sorce"),
        (["--steps", "many"], "steps: expected an integer, got 'many'"),
        (["--graph", "maybe"], "graph: expected one of auto, off; got 'maybe'"),
        (["--devices", "all"], "devices: expected an integer or auto, got 'all'"),
        (["--data.source", "voc"], "coco, fss1000, shapes; got 'voc'"),
        (["--data.scale", "[0.9]"], "data.scale: expected 2 numbers, got '[0.9]'"),
        (["--data.size", "96"], "data.size: expected a multiple of 8 plus 1"),
        (["--data.fold", "9"], "data.fold: expected 0 to 3"),
        (["--model.weights", "nowhere.pth"], "nowhere.pth"),
        (["--data.source", "folder", "--data.root", "nowhere"], "nowhere"),
        (["--data.min_area", "0.9"], "min_area"),
        (["--resume"], "--resume: expected a checkpoint"),
    ],
)
def test_a_users_error_is_one_line_and_status_2(config_file, capsys, arguments, message):
    assert main(["train", "--config", config_file, *arguments]) == 2
    printed = capsys.readouterr().err
    line = printed.strip().splitlines()[-1]
    assert line.startswith("fss: ") and message in line
    assert "Traceback" not in printed


def test_an_unknown_key_in_a_file_is_refused(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text("data:\n  source: shapes\n  colour: red\n")
    assert main(["train", "--config", str(path)]) == 2
    assert "colour" in capsys.readouterr().err


def test_no_command_and_no_config(capsys):
    assert main([]) == 2
    assert main(["train", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_matching_needs_no_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--source", "shapes", "--min_area", "0.01", "--size", "33", "--episodes", "3"]
    options += ["--seeds", "[7]", "--accelerator", "cpu", "--workers", "0"]
    assert main(["eval", "--weights", "shapes", *options]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("matching with shapes, nothing trained, 33 px\nfold 0, novel classes")
    assert not list(tmp_path.iterdir())
    assert main(["eval"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fss: run: expected the folder of a run, or --weights of")
    assert "fss eval RUN [options], or fss eval --weights FILE" in said


def test_eval_of_what_is_not_there(tmp_path, capsys):
    assert main(["eval", str(tmp_path)]) == 2
    assert "checkpoint: expected a file at" in capsys.readouterr().err


def test_an_error_in_a_loader_process_is_one_line_too(config_file, capsys, monkeypatch):
    def broken(self, index):
        raise ValueError("photo 17 is truncated: fetch it again")

    monkeypatch.setattr("fss.data.EpisodeDataset.__getitem__", broken)
    assert main(["train", "--config", config_file, "--data.workers", "1"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fss: photo 17 is truncated: fetch it again")


@pytest.mark.parametrize("switch", ["--debug", "FSS_DEBUG"])
def test_debug_shows_the_traceback(config_file, monkeypatch, switch):
    if switch == "FSS_DEBUG":
        monkeypatch.setenv(switch, "1")
    options = [switch] if switch == "--debug" else []
    with pytest.raises(ValueError, match="data.fold"):
        main(["train", "--config", config_file, "--data.fold", "9", *options])


def test_a_bug_is_not_dressed_as_a_users_error(config_file, monkeypatch):
    @functools.wraps(run.train)
    def broken(*arguments, **options):
        return int("a bug deep inside")

    monkeypatch.setattr(run, "train", broken)
    monkeypatch.setattr(fss.cli, "_expected", lambda error: False)
    with pytest.raises(ValueError, match="a bug deep inside"):
        main(["train", "--config", config_file])


def test_interrupt_says_how_to_go_on(config_file, monkeypatch, capsys):
    @functools.wraps(run.train)
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt("stopped after step 1; continue with: fss train --resume")

    monkeypatch.setattr(run, "train", interrupted)
    assert main(["train", "--config", config_file]) == 130
    assert "continue with: fss train --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("predict", "fss predict [RUN] --support PICTURE MASK --query PICTURE|FOLDER ... --out"),
        ("export", "fss export RUN [--out FILE.onnx]"),
        ("data prepare", "fss data prepare|verify pascal|coco ROOT"),
    ],
)
def test_what_is_missing_is_told_as_it_is_typed(capsys, command, usage):
    assert main(command.split()) == 2
    assert capsys.readouterr().err.startswith(f"fss: something is missing; expected: {usage}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "run", "--classes", "all"], "classes: expected one of novel, base; got 'all'"),
        (["eval", "run", "--seeds", "many"], "seeds: expected a list of integers or null, got"),
        (
            ["reproduce", "T1", "--devices", "many"],
            "devices: expected an integer or auto, got 'many'",
        ),
        (["reproduce", "T1", "--folds", "0", "x"], "folds: expected an integer, got 'x'"),
        (["data", "verify", "ade", "root"], "name: expected one of pascal, coco; got 'ade'"),
        # a word among the values is not the command
        (["adapter", "--interpolate", "x", "--out", "o", "export"], "interpolate: expected a num"),
    ],
)
def test_an_option_says_what_it_expects(capsys, arguments, message):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"fss: {message}")


def test_the_list_of_commands_imports_none_of_them():
    program = (
        "import sys\nfrom fss.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "segment your own pictures" in done.stdout and done.stdout.endswith("False\n")


@pytest.mark.parametrize("command", ["train", "eval", "predict", "reproduce"])
def test_help_does_not_wait_for_what_trains(command):
    """Lightning brings Dynamo, which takes as long as all of torch."""
    program = (
        "import sys\nfrom fss.cli import main\n"
        "try:\n    main([sys.argv[1], '--help'])\n"
        "except SystemExit:\n    print({'lightning_fabric', 'torch._dynamo'} & {*sys.modules})"
    )
    words = [sys.executable, "-c", program, command]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nset()\n")


def test_version_and_help(capsys):
    for arguments, text in (
        (["--version"], fss.__version__),
        (["train", "--help"], "--optimizer.backbone_lr"),
        (["eval", "--help"], "--episodes"),
        (["reproduce", "--help"], "--scale-down, --scale_down"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert text in capsys.readouterr().out


IN_TURN = """
import sys
from fss.cli import main
for arguments in (["train", "--help"], ["reproduce"], ["train", "--step"]):
    sys.stdout.reconfigure(errors="strict")  # as it was before the first
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    print("ended with", status)
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_without_utf_8(encoding):
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    statuses = re.findall(rb"ended with (\S+)", done.stdout)
    assert done.returncode == 0 and statuses == [b"0", b"0", b"2"], done.stderr
    assert b"Traceback" not in done.stderr and b"codec" not in done.stderr


def test_a_finished_run_ends_well_in_a_terminal_without_utf_8(config_file, monkeypatch):
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
    assert main(["train", "--config", config_file, "--test_seeds", "[1,2]"]) == 0
    sys.stdout.flush()
    assert "?" in screen.getvalue().decode("ascii")  # in the place of ±


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_variables_of_a_launcher_that_are_no_numbers(config_file, capsys, monkeypatch, name):
    monkeypatch.setenv(name, "first")
    assert main(["train", "--config", config_file]) == 2
    assert f"{name}: expected a number in the environment, got 'first'" in capsys.readouterr().err
    environment = os.environ | {name: ""}
    listed = [sys.executable, "-m", "fss.cli", "reproduce", "T4", "--list"]
    assert subprocess.run(listed, env=environment, capture_output=True).returncode == 0


def test_run_folder_is_where_out_says(config_file, tmp_path):
    assert main(["train", "--config", config_file, "--steps", "1"]) == 0
    assert (tmp_path / "run" / "result.json").is_file()
    assert Path(config_file).is_file()
