from __future__ import annotations

import pytest

from fss.runs.folder import BaseLearnerFolder, RunFolder


def test_how_far_a_run_is(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.state == "not started"
    folder.clear()
    folder.last.touch()
    assert folder.state == "in progress"
    folder.result_file.touch()
    assert folder.state == "finished"


@pytest.mark.parametrize("kind", [RunFolder, BaseLearnerFolder])
def test_a_new_run_replaces_an_earlier_one_if_it_is_told_to(tmp_path, kind):
    folder = kind(tmp_path)
    with pytest.raises(FileNotFoundError, match="--resume: expected a checkpoint at .*last.pt"):
        folder.check(resume=True, overwrite=False)
    scores = [tmp_path / name for name in ("test-4000.json", "eval_coco_fold1.json")]
    for file in (*folder.files, *(scores if kind is RunFolder else ()), tmp_path / "notes.txt"):
        file.touch()
    with pytest.raises(ValueError, match=r"already holds a run \(last.pt, result.json"):
        folder.check(resume=False, overwrite=False)
    folder.check(resume=True, overwrite=False)
    folder.check(resume=False, overwrite=True)
    folder.clear()
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"miou": 0.5, "con', "expected JSON.*truncated"),
        ('{"miou": 0.5}', "expected an entry config"),
        ("[]", "expected an entry miou.* not written by fss train-base"),
    ],
)
def test_a_damaged_result_is_named(tmp_path, text, message):
    folder = BaseLearnerFolder(tmp_path)
    folder.result_file.write_text(text)
    with pytest.raises(ValueError, match=f"run: .*result.json: {message}"):
        folder.result()


def test_a_run_is_found_by_its_folder_or_a_checkpoint_in_it(tmp_path):
    for run, name in ((tmp_path, "last.pt"), (tmp_path / "mine.pt", "mine.pt")):
        folder, found = RunFolder.find(run, "last")
        assert (folder.path, found) == (tmp_path, name)
