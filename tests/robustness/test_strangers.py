"""Files of strangers: a pickle, a YAML tag or a list never runs their code."""

from __future__ import annotations

import ast
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import svf_fast
from fss.cli import main
from fss.config import TrainConfig
from fss.models import build_model
from fss.models.backbone import build_backbone
from fss.models.official import load_base_learner, load_official
from fss.models.state_dict import read_state_dict, read_torch
from fss.models.weights import load_backbone
from fss.runs.checkpoint import load_checkpoint
from fss.training.run import train

ROOT = Path(__file__).resolve().parents[2]


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trace(tmp_path) -> Path:
    """The file that evil code would make."""
    return tmp_path / "executed"


def evil_file(path: Path, trace: Path, kind: str) -> Path:
    content = {"state_dict": {"conv1.weight": torch.ones(2), "evil": Evil(trace)}, "format": 1}
    if kind == "zip":
        torch.save(content, path)
    elif kind == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    return path


def bam():
    config = TrainConfig.from_dict(
        {
            "data": {"source": "shapes"},
            "model": {"name": "bam", "backbone": "resnet18", "width": 4, "weights": "none"}
            | {"base_weights": "none", "channels": 8},
        }
    )
    return build_model(config.model, {1: "a", 2: "b"}, 1)


def resume(path: Path) -> None:
    values = {"data": {"source": "shapes", "size": 33}, "out": str(path.parent)}
    train(TrainConfig.from_dict(values), resume=True)


LOADERS = {
    "checkpoint": load_checkpoint,
    "backbone": lambda path: load_backbone(build_backbone("resnet18", width=4), str(path)),
    "state": lambda path: read_state_dict(path, "model.official"),
    "torch": read_torch,
    "official": lambda path: load_official(bam(), str(path)),
    "base learner": lambda path: load_base_learner(bam(), str(path)),
    "resume": resume,
}


def test_the_pickle_is_evil(tmp_path, trace) -> None:
    torch.load(evil_file(tmp_path / "last.pt", trace, "zip"), weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("loader", LOADERS)
def test_no_pickle_of_a_stranger_is_executed(tmp_path, trace, loader, kind) -> None:
    with pytest.raises(ValueError, match="last.pt"):
        LOADERS[loader](evil_file(tmp_path / "last.pt", trace, kind))
    assert not trace.exists()


@pytest.mark.parametrize("command", ["eval", "train", "train-base"])
def test_nor_by_a_command(tmp_path, trace, command, capsys) -> None:
    evil_file(tmp_path / "last.pt", trace, "zip")
    evil_file(tmp_path / "best.pt", trace, "zip")
    arguments = {
        "eval": [str(tmp_path)],
        "train": ["--data.source", "shapes", "--out", str(tmp_path), "--resume"],
        "train-base": ["--data.source", "shapes", "--out", str(tmp_path), "--resume"],
    }[command]
    assert main([command, *arguments]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert not trace.exists()


def test_adapters_and_decompositions_are_no_pickles(tmp_path, trace) -> None:
    path = evil_file(tmp_path / "x.safetensors", trace, "pickle")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4))
    with pytest.raises(ValueError, match="x.safetensors"):
        load_backbone(build_backbone("resnet18", width=4), str(path))
    svf_fast.convert(model, None, cache=tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    evil_file(kept, trace, "pickle")
    svf_fast.convert(torch.nn.Sequential(svf_fast.merge(model)[0]), None, cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="x.safetensors"):
        svf_fast.load_adapter(svf_fast.convert(model, None), path)
    assert not trace.exists()


def test_a_matlab_file_of_python_objects(tmp_path, trace) -> None:
    pytest.importorskip("scipy.io")
    from fss.data.prepare.annotations import read_sbd

    for content in (pickle.dumps(Evil(trace)), npy(Evil(trace))):
        with pytest.raises(ValueError, match="m.mat: expected GTcls"):
            read_sbd(content, "m.mat")
    assert not trace.exists()


def npy(value: object) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([value], dtype=object), allow_pickle=True)
    return stream.getvalue()


@pytest.mark.parametrize(
    "line",
    [
        "steps: !!python/object/apply:pathlib.Path.touch [{}]",
        "out: !!python/object/new:pathlib.PosixPath [{}]",
        "data: {{class_path: pathlib.Path.touch, init_args: {{self: {}}}}}",
        "model: {{class_path: subprocess.Popen, init_args: {{args: [touch, {}]}}}}",
        "out: ${{oc.env:HOME}}/{}\nsteps: none",
    ],
)
def test_yaml_is_plain(tmp_path, trace, line, capsys) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("data: {source: shapes}\n" * ("data" not in line) + line.format(trace) + "\n")
    assert main(["train", "--config", str(path)]) == 2
    assert main(["reproduce", "T1", "--settings", str(path), "--list"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2
    assert not trace.exists()


def test_no_program_decodes_a_picture(tmp_path, monkeypatch) -> None:
    """Pillow has Ghostscript draw PostScript, whatever the name of the file ends with."""
    from PIL import EpsImagePlugin, Image

    from fss.data.images import read_picture
    from fss.data.masks import open_classes, open_object, read_object

    def run(*arguments: object, **options: object) -> None:
        raise AssertionError("a program was to run")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (9, 9)).save(path, "EPS")
    with pytest.raises(AssertionError):
        Image.open(path).load()
    for read in (read_picture, open_classes, open_object, read_object):
        with pytest.raises(ValueError, match="photo.jpg"):
            read(path)


# Calls that run what a file says, and what makes them harmless.
FORBIDDEN = {"pickle.load", "pickle.loads", "dill.load", "joblib.load", "yaml.load", "eval", "exec"}
FORBIDDEN |= {"yaml.unsafe_load", "yaml.full_load", "os.system", "marshal.loads", "np.load"}


# Code that is made of nothing of a stranger's: `test_programs_are_made_of_names_and_numbers`.
OWN_CODE = {"svf_fast/ops/program.py": ["exec"]}


def dangerous(source: str) -> list[str]:
    """Calls in a source that would run a stranger's code, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {word.arg: word.value for word in node.keywords}
        if name == "torch.load":
            only = keywords.get("weights_only")
            if isinstance(only, ast.Constant) and only.value is True:
                continue
        elif name not in FORBIDDEN:
            continue
        found.append(f"line {node.lineno}: {name}")
    return found


def test_dangerous_calls_are_seen() -> None:
    assert dangerous("torch.load(p, weights_only=True)\nyaml.safe_load(t)") == []
    source = "torch.load(p)\ntorch.load(p, weights_only=no)\npickle.loads(b)\nx = eval('1')"
    assert [line.partition(": ")[2] for line in dangerous(source)] == [
        "torch.load",
        "torch.load",
        "pickle.loads",
        "eval",
    ]


def test_no_source_calls_what_runs_a_file() -> None:
    sources = [path for name in ("fss", "svf_fast") for path in (ROOT / name).rglob("*.py")]
    assert len(sources) > 50
    found = {
        str(path.relative_to(ROOT)): [call.partition(": ")[2] for call in calls]
        for path in sources
        if (calls := dangerous(path.read_text()))
    }
    assert found == OWN_CODE
