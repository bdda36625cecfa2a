"""The race prints a speed of what is exact only, and its tables and picture come from its files."""

from __future__ import annotations

import copy
import json

import cv2
import pytest
import torch
from torch import nn

from benchmarks import render
from benchmarks.files import write_results
from benchmarks.race.__main__ import main, unfinished, variant
from benchmarks.race.contest import FEWEST_ROUNDS, Contest
from benchmarks.race.exactness import relative_error
from benchmarks.race.levels import LEVELS, Settings, defaults
from benchmarks.race.memory import by_values, saved_measured, saved_on_shapes
from benchmarks.race.peak import measure_peaks
from benchmarks.race.peers import PEERS, REGIMES, Peer, official
from tests.long import LONG

TINY = Settings(size=33, width=8, batch=1)
NAMES = ["official", "save what is needed", "full", "frozen bound", "svf_fast"]
EAGER = [name for name, peer in PEERS.items() if not peer.compiled]


@pytest.fixture(scope="module")
def groups():
    return [Contest(LEVELS["block"], "layer2", TINY, NAMES).run(rounds=3, peaks=False)]


@pytest.fixture
def results(groups, tmp_path):
    """Write the files of a race to a folder."""
    for name in ("backbone", "step"):
        level = LEVELS[name]
        path = tmp_path / f"{name}.json"
        write_results(path, name, level.title, defaults(name), groups)
    return tmp_path


def test_every_row_is_exact_and_has_all_figures(groups):
    (group,) = groups
    assert [row["peer"] for row in group["rows"]] == NAMES
    for row in group["rows"]:
        assert row["exact"] and 0 < row["error"] < 1e-5
        assert len(row["seconds"]) == 3 and min(row["seconds"]) > 0
        assert row["saved_bytes"] > 0


def test_each_stage_is_saved_and_kept(monkeypatch):
    """What a race that was stopped has measured is not measured again."""
    saved = []
    arguments = (LEVELS["block"], "layer2", TINY, ["official", "svf_fast"])

    def save(group):
        saved.append(copy.deepcopy(group["rows"]))

    Contest(*arguments).run(rounds=3, peaks=True, save=save)
    checked, timed, whole = saved
    assert all(row["exact"] and "seconds" not in row for row in checked)
    assert all(len(row["seconds"]) == 3 and "peak_bytes" not in row for row in timed)
    assert all(row["peak_bytes"] >= 0 for row in whole)

    def never(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(Contest, "_time", never)
    group = Contest(*arguments, rows=timed).run(rounds=3, peaks=True)
    assert [row["seconds"] for row in group["rows"]] == [row["seconds"] for row in timed]
    assert all(row["peak_bytes"] >= 0 for row in group["rows"])
    monkeypatch.setattr(Contest, "check", never)
    with pytest.raises(AssertionError, match="measured again"):
        Contest(*arguments, rows=checked).run(rounds=3, peaks=False)


def test_after_the_deadline_rounds_are_few_and_no_peak_is_measured():
    contest = Contest(LEVELS["block"], "layer2", TINY, ["official", "svf_fast"])
    group = contest.run(rounds=50, peaks=True, deadline=0.0)
    for row in group["rows"]:
        assert len(row["seconds"]) == FEWEST_ROUNDS and "peak_bytes" not in row


class Off(nn.Module):
    """The right output with a gradient that is off by one part in a thousand."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + 1e-3 * (x - x.detach()))


def test_a_wrong_gradient_has_no_speed(monkeypatch):
    def off(model, layers=None, cache=None):
        official(model, layers, cache)
        model[0].conv3 = nn.Sequential(Off(nn.Identity()), model[0].conv3)
        return model

    level = copy.copy(LEVELS["block"])
    monkeypatch.setattr(level, "peers", {**PEERS, "off": Peer(off, "weights")})
    group = Contest(level, "layer2", TINY, ["official", "off"]).run(rounds=2, peaks=False)
    right, wrong = group["rows"]
    assert right["exact"] and "seconds" in right
    assert not wrong["exact"] and wrong["error"] > 1e-5
    assert "seconds" not in wrong and "saved_bytes" not in wrong
    assert "no speed" in render._table(group["rows"])


def test_a_peer_that_cannot_run_says_why(monkeypatch):
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("no such kernel")

    level = copy.copy(LEVELS["block"])
    monkeypatch.setattr(level, "peers", {**PEERS, "broken": Peer(lambda *_: Broken())})
    group = Contest(level, "layer2", TINY, ["broken", "official"]).run(rounds=1, peaks=False)
    broken, right = group["rows"]
    assert "no such kernel" in broken["reason"] and "seconds" not in broken
    assert right["exact"]


def test_relative_error_by_hand():
    truth = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0]), "c": torch.tensor([1.0])}
    found = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([1.0])}
    assert relative_error(found, truth) == pytest.approx((0.1**2 / 2) ** 0.5)


def test_peaks_are_those_of_a_process_of_its_own():
    found = measure_peaks(LEVELS["block"], "official", TINY)
    assert set(found) == {"layer2", "layer3", "layer4"}
    factors = sum(
        tensor.numel() * 4
        for tensor in LEVELS["block"]
        .convert(LEVELS["block"].network(TINY, "layer2"), "official", None)
        .state_dict()
        .values()
    )
    assert found["layer2"]["resident_bytes"] == pytest.approx(factors, rel=0.05)
    assert found["layer4"]["peak_bytes"] >= 0


def test_a_peak_that_cannot_be_measured_says_why():
    found = measure_peaks(LEVELS["block"], "official", Settings(size=33, weights="nowhere"))
    assert "nowhere" in found["peak_reason"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in EAGER if not by_values(name)])
def test_counting_on_shapes_is_counting(name, dtype):
    for level_name in ("backbone", "step"):
        level = LEVELS[level_name]
        settings = Settings(size=33, width=8, batch=1, shots=2, dtype=dtype)
        (group,) = level.groups
        network = level.convert(level.network(settings, group), name, None)
        arguments = (level, network, level.inputs(settings, group), name, settings)
        assert saved_measured(*arguments) == saved_on_shapes(*arguments) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(REGIMES))
def test_each_model_is_counted_on_shapes(monkeypatch, name, dtype):
    """svf_fast too: its plans come from the values before those are left out.

    But for what the prior mask keeps of the supports, which depends on the values themselves.
    """
    monkeypatch.setattr("svf_fast.ops.cosine_max._nearest", lambda support, index: None)
    level = LEVELS["models"]
    settings = Settings(size=33, width=8, batch=1, shots=2, dtype=dtype)
    groups = ["baseline", "pfenet", "bam"]
    if dtype == "float32":  # a cast of some biases is kept once or twice, by what ran before
        groups = list(level.groups) if LONG else [*groups, "hsnet", "cyctr"]
    for group in groups:
        network = level.convert(level.network(settings, group), name, None)
        arguments = (level, network, level.inputs(settings, group), name, settings)
        found = saved_measured(*arguments)
        assert found == saved_on_shapes(*arguments)
        assert found > 0 or (group, name) == ("panet", "freeze")  # which trains nothing


def test_a_peak_of_one_group_alone():
    found = measure_peaks(LEVELS["models"], "freeze", TINY, "bam")
    assert list(found) == ["bam"] and found["bam"]["peak_bytes"] >= 0


def test_variants_have_files_of_their_own():
    level = LEVELS["step"]
    assert variant(level, defaults("step")) == "step"
    other = Settings(size=641, batch=1, shots=5, dtype="bfloat16", channels_last=True)
    assert variant(level, other) == "step-5shot-641px-bfloat16-channels_last"


def test_rendering(results, monkeypatch, capsys):
    page = results / "page.md"
    page.write_text(f"before\n{render.BEGIN}\nold\n{render.END}\nafter\n")
    arguments = ["render.py", "--results", str(results), "--page", str(page)]
    monkeypatch.setattr("sys.argv", arguments)
    for _ in range(2):  # the second time it replaces what it wrote
        assert render.main() == 0
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
        assert text.count("| **svf_fast** |") == 2
        assert "](race.png)" in text
    picture = cv2.imread(str(results / "race.png"))
    assert picture.shape[1] > 1000 and picture.std() > 10
    rows = (results / "step.md").read_text().splitlines()
    assert sum(row.startswith("| ") for row in rows) == len(NAMES) + 2


def test_a_page_without_the_lines_is_left_alone(results, monkeypatch):
    page = results / "page.md"
    page.write_text("mine\n")
    arguments = ["render.py", "--results", str(results), "--page", str(page)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit, match="expected the lines"):
        render.main()
    assert page.read_text() == "mine\n"


def test_ratio_and_spread_by_hand():
    rows = [
        {"peer": "official", "seconds": [2.0, 4.0, 3.0]},
        {"peer": "svf_fast", "seconds": [1.5, 1.0, 3.0, 2.0]},
        {"peer": "full"},
    ]
    assert render.ratio(rows[1], rows, "official") == pytest.approx(1.75 / 3)
    assert render.ratio(rows[2], rows, "official") is None
    assert render.ratio(rows[1], rows, "frozen bound") is None
    assert render.spread(rows[0]) == pytest.approx(1.0)


def test_file_is_json(results):
    content = json.loads((results / "step.json").read_text())
    assert content["machine"]["threads"] and content["date"] and content["versions"]["torch"]


def race(folder, *arguments: str) -> int:
    """Race a block as the command does, at a tiny size."""
    tiny = ["--level", "block", "--size", "33", "--width", "8", "--rounds", "1", "--no-peak"]
    return main([*tiny, "--results", str(folder), *arguments])


def test_the_command_saves_every_group_and_goes_on(tmp_path, capsys):
    peers = ("--peers", "official;svf_fast")
    assert race(tmp_path, *peers) == 0
    (path,) = tmp_path.glob("*.json")
    assert path.name == "block-33px-resnet50_8.json"
    assert render.markdown(path) in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert [group["name"] for group in content["groups"]] == list(LEVELS["block"].groups)
    assert content["settings"]["size"] == 33 and content["settings"]["batch"] == 2
    rows = [row for group in content["groups"] for row in group["rows"]]
    assert [row["peer"] for row in rows] == 3 * ["official", "svf_fast"]
    assert race(tmp_path, *peers, "--resume") == 0
    assert json.loads(path.read_text())["groups"] == content["groups"]
    assert race(tmp_path, *peers, "--suffix", "apart", "--dtype", "bfloat16") == 0
    assert (tmp_path / "block-33px-bfloat16-resnet50_8-apart.json").is_file()


def test_the_command_names_the_peers_it_knows(tmp_path, capsys):
    with pytest.raises(SystemExit):
        race(tmp_path, "--peers", "official;nobody")
    assert "expected some of official; " in capsys.readouterr().err


def test_a_race_that_lacks_something_is_unfinished():
    whole = {"exact": True, "peak_bytes": 1}
    assert not unfinished(whole, peaks=True)
    assert not unfinished({"reason": "no compiler", "skipped": True}, peaks=True)
    assert unfinished({"reason": "no such kernel"}, peaks=False)
    assert unfinished({"exact": False, "peak_bytes": 1}, peaks=False)
    assert unfinished({"exact": True}, peaks=True) and not unfinished({"exact": True}, peaks=False)
