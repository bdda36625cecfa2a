from __future__ import annotations

import subprocess

import pytest
import torch

from fss.training import provenance as module
from fss.training.provenance import provenance


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the package that this process seems to run from."""
    (tmp_path / "fss").mkdir()
    monkeypatch.setattr(module, "__file__", str(tmp_path / "fss" / "training" / "provenance.py"))
    monkeypatch.delenv("SVF_COMMIT", raising=False)
    return tmp_path


def commit() -> str | None:
    return provenance(torch.device("cpu"))["commit"]


def test_a_copy_without_git_has_the_commit_of_the_environment(copy, monkeypatch):
    assert commit() is None
    monkeypatch.setenv("SVF_COMMIT", "")
    assert commit() is None
    monkeypatch.setenv("SVF_COMMIT", "270a625-dirty")
    assert commit() == "270a625-dirty"


def test_a_checkout_speaks_for_itself(copy, monkeypatch):
    monkeypatch.setenv("SVF_COMMIT", "270a625")
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", str(copy), *arguments], check=True)
    found = commit()
    assert found and found != "270a625" and len(found) >= 7
    (copy / "new").write_text("")
    subprocess.run(["git", "-C", str(copy), "add", "new"], check=True)
    assert commit() == f"{found}-dirty"
