"""Tables of configurations, and the search that writes them, with a timer of its own."""

import json
import math
import threading

import pytest
import torch
from triton.runtime.errors import OutOfResources

from svf_fast.triton import check, tune, tuning
from svf_fast.triton.check import Case
from svf_fast.triton.tuning import Tunable

CPU = torch.device("cpu")
# of a problem: what a launch with a block of that size takes, in microseconds
TIMES = {
    ("small", 16): 9.0,
    ("small", 32): 7.0,
    ("small", 64): 5.0,
    ("large", 16): 900.0,
    ("large", 32): 950.0,
    ("large", 64): 990.0,
}
WRONG, TOO_LARGE = 128, 256


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Folders of their own for the shipped tables and those of the user; a GPU by name."""
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("SVF_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "architecture", lambda: 90)
    monkeypatch.setattr(tuning, "_name", lambda: "Some GPU")
    tuning.forget()
    yield tmp_path
    tuning.forget()


def _fake(launched):
    def launcher(problem, device):
        def launch(config):
            block = config["BLOCK"]
            launched.append((problem, block))
            if block == TOO_LARGE:
                raise OutOfResources(256, 128, "shared memory")
            return torch.ones(4) * (2 if block == WRONG else 1), torch.arange(4)

        return launch

    return Tunable(
        "fake",
        lambda problem: f"key of {problem}",
        lambda problem, arch: [{"BLOCK": block} for block in (16, 32, 64, WRONG, TOO_LARGE)],
        launcher,
        lambda: ["small", "large"],
    )


def _timer(launched):
    def time(launch, milliseconds):
        launch()
        return TIMES[launched[-1]]

    return time


def _empty():
    return {"kernels": {}, "microseconds": {}}


def _search(table, budget=math.inf, clock=lambda: 0.0):
    launched = []
    cases = check.cases([_fake(launched)])
    found = list(tune.search(cases, 90, CPU, table, budget, _timer(launched), clock))
    return found, launched


def test_an_own_entry_is_found_before_a_shipped_one_before_the_rule(tables):
    def find(key):
        return tuning.find("kernel", key, lambda arch: {"BLOCK": arch})

    shipped = {"kernels": {"kernel": {"a": {"BLOCK": 1}, "b": {"BLOCK": 2}}}}
    own = {"kernels": {"kernel": {"a": {"BLOCK": 3}}}}
    tune.write(tuning.SHIPPED / "sm_90.json", shipped)
    tune.write(tuning.cache_path("Some GPU"), own)
    assert [find(key)["BLOCK"] for key in "abc"] == [3, 2, 90]
    assert find("a")["enable_fp_fusion"] is True
    tune.write(tuning.cache_path("Some GPU"), {"kernels": {}})
    assert find("a")["BLOCK"] == 3  # read once
    tuning.forget()
    assert find("a")["BLOCK"] == 1


def test_the_cache_is_of_one_gpu_and_one_triton(tables):
    path = tuning.cache_path("NVIDIA H200 (80 GB)")
    assert path.parent == tables / "cache" / "triton"
    assert path.name.startswith("NVIDIA_H200_80_GB_-") and path.suffix == ".json"
    assert path != tuning.cache_path("NVIDIA H100 (80 GB)")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"other": 1}'])
def test_a_file_that_is_no_table(text, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(text)
    for read in (tuning.read_table, lambda path: tune.begin(path, "Some GPU")):
        with pytest.raises(ValueError, match=r"table.json: expected a table .*triton.tune"):
            read(path)


def test_positions_share_a_bucket():
    assert [tuning.bucket(n) for n in (1, 1024, 1025, 6561)] == [1024, 1024, 2048, 8192]


def test_a_reader_never_finds_half_a_table(tmp_path):
    path = tmp_path / "folder" / "table.json"
    table = {"kernels": {"kernel": {str(i): {"BLOCK": i} for i in range(500)}}}
    tune.write(path, table)
    writer = threading.Thread(target=lambda: [tune.write(path, table) for _ in range(20)])
    writer.start()
    while writer.is_alive():
        assert len(tuning.read_table(path)["kernel"]) == 500
    writer.join()
    with pytest.raises(TypeError):
        tune.write(path, {"kernels": object()})
    assert tuning.read_table(path) == table["kernels"]
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]


def test_the_fastest_right_configuration_is_kept_and_the_longest_problem_comes_first():
    table = _empty()
    found, launched = _search(table)
    assert [case.problem for case, _ in found] == ["large", "small"]
    assert table["kernels"] == {
        "fake": {"key of large": {"BLOCK": 16}, "key of small": {"BLOCK": 64}}
    }
    assert table["microseconds"]["fake"] == {"key of large": 900.0, "key of small": 5.0}
    outcome = found[1][1]
    assert (outcome.by_rule, outcome.timed, outcome.differing, outcome.failed) == (9.0, 3, 1, 1)
    assert launched.count(("large", WRONG)) == launched.count(("large", TOO_LARGE)) == 1


def test_what_the_table_has_is_not_timed_again():
    table = _empty()
    _search(table)
    del table["kernels"]["fake"]["key of small"]
    found, launched = _search(table)
    assert [case.problem for case, _ in found] == ["small"]
    assert {problem for problem, _ in launched} == {"small"}
    assert _search(table) == ([], [])


def test_the_budget_ends_the_search():
    seconds = iter(range(1000))
    table = _empty()
    found, _ = _search(table, budget=5.5, clock=lambda: next(seconds))
    assert [case.problem for case, _ in found] == ["large"]
    assert found[0][1].timed < 3
    assert list(table["kernels"]["fake"]) == ["key of large"]


@pytest.mark.parametrize(
    "actual, equal",
    [
        (torch.ones(1000), True),
        (torch.ones(1000) * (1 + 1e-6), True),
        (torch.ones(1000) * 1.001, False),
        (torch.full((1000,), torch.nan), False),
        (torch.ones(999), False),
        (torch.ones(1000).double(), False),
    ],
)
def test_results_agree_up_to_rounding(actual, equal):
    assert tune.agree([actual], [torch.ones(1000)]) is equal
    assert not tune.agree([actual, actual], [torch.ones(1000)])


def test_few_bits_and_indices_may_differ():
    expected = torch.arange(3000)
    for count, equal in ((0, True), (3, True), (4, False)):
        actual = expected.clone()
        actual[:count] += 1
        assert tune.agree([actual], [expected]) is equal


def test_tensors_of_a_result():
    a, b = torch.ones(1), torch.ones(2)
    assert tune.tensors(a) == [a]
    assert tune.tensors((a, [b, None])) == [a, b]
    assert tune.tensors(None) == []


def test_the_table_says_where_it_is_from(tmp_path):
    path = tmp_path / "table.json"
    tune.write(path, {"kernels": {"kernel": {"a": {"BLOCK": 1}}}, "gpu": "another"})
    table = tune.begin(path, "Some GPU")
    assert table["gpu"] == "Some GPU" and table["kernels"] == {"kernel": {"a": {"BLOCK": 1}}}
    assert {"origin", "triton", "torch", "date", "microseconds"} <= table.keys()


@pytest.mark.parametrize("arch", check.ARCHITECTURES)
def test_shipped_tables_follow_the_rules_or_were_timed(arch):
    table = json.loads((tuning.SHIPPED / f"sm_{arch}.json").read_text())
    derived = tune.derive(check.cases(check.tunables()), arch)
    if table["origin"] == derived["origin"]:
        for kernel, configs in table["kernels"].items():
            assert configs == derived["kernels"][kernel], "python -m svf_fast.triton.tune --derive"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_nothing_is_timed(capsys):
    assert tune.main([]) == 1
    said = capsys.readouterr()
    assert "nothing to time" in said.err and not said.out


def test_a_kernel_that_does_not_exist():
    with pytest.raises(ValueError, match="--kernels: expected names out of .*, got no_such"):
        tune.main(["--kernels", "no_such"])


def test_products_in_float32_are_searched_with_tf32_and_without():
    float32 = Tunable(
        "fake",
        lambda problem: str(torch.backends.cuda.matmul.fp32_precision),
        lambda problem, arch: [{"BLOCK": 16}],
        lambda problem, device: lambda config: None,
        lambda: [1],
    )
    before = torch.backends.cuda.matmul.fp32_precision
    found = check.cases([float32])
    assert [(case.key, case.tf32) for case in found] == [("ieee", False), ("tf32", True)]
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert found == [Case(float32, 1, False), Case(float32, 1, True)]
