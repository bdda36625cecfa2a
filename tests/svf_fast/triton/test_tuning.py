"""Tables of configurations, and the search that writes them, with a timer of its own."""

import math
import threading
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources

from svf_fast.triton import check, pointwise, tune, tuning
from svf_fast.triton.check import Case

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
    """A folder of its own for the user's tables; a GPU by name."""
    monkeypatch.setenv("SVF_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "gpu", lambda: tuning.Gpu(90, "Some GPU", 132))
    tuning.forget()
    yield tmp_path
    tuning.forget()


class Fake(NamedTuple):
    size: str
    launched: list

    def key(self):
        return f"key of {self.size}"

    def candidates(self, arch):
        return [{"BLOCK": block} for block in (16, 32, 64, WRONG, TOO_LARGE)]

    def launcher(self, device):
        def launch(config):
            block = config["BLOCK"]
            self.launched.append((self.size, block))
            if block == TOO_LARGE:
                raise OutOfResources(256, 128, "shared memory")
            return torch.ones(4) * (2 if block == WRONG else 1), torch.arange(4)

        return launch


class ByArchitecture(NamedTuple):
    size: str

    def key(self):
        return f"key of {self.size}"

    def candidates(self, arch):
        return [{"BLOCK": arch}, {"BLOCK": 1}]


def _timer(launched):
    def time(launch, milliseconds):
        launch()
        return TIMES[launched[-1]]

    return time


def _empty():
    return {"kernels": {}, "microseconds": {}}


def _search(table, budget=math.inf, clock=lambda: 0.0):
    launched = []
    cases = check.cases({"fake": lambda: [Fake(size, launched) for size in ("small", "large")]})
    found = list(tune.search(cases, 90, CPU, table, budget, _timer(launched), clock))
    return found, launched


def test_an_entry_of_the_table_is_found_before_the_rule(tables):
    def find(size):
        return tuning.find("kernel", ByArchitecture(size))

    own = {"kernels": {"kernel": {"key of a": {"BLOCK": 3}}}}
    tune.write(tuning.cache_path("Some GPU"), own)
    assert [find(key)["BLOCK"] for key in "ab"] == [3, 90]
    assert find("a")["enable_fp_fusion"] is True
    tune.write(tuning.cache_path("Some GPU"), {"kernels": {}})
    assert find("a")["BLOCK"] == 3  # read once
    tuning.forget()
    assert find("a")["BLOCK"] == 90


class TwoGpus:
    """A driver with an A100 and an H100, as Triton asks for them."""

    current = 0
    asked = 0

    def get_current_device(self):
        return self.current

    def get_current_target(self):
        self.asked += 1
        return GPUTarget("cuda", (80, 90)[self.current], 32)


@pytest.fixture
def two_gpus(monkeypatch):
    gpus = TwoGpus()
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "driver", SimpleNamespace(active=gpus))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tuning.forget()
    tuning._gpu.cache_clear()
    yield gpus
    tuning.forget()
    tuning._gpu.cache_clear()


def test_each_of_two_gpus_has_its_own_configuration_and_is_asked_once(two_gpus):
    @tuning.per_gpu
    def launch(block):
        return tuning.find("kernel", ByArchitecture("a"))["BLOCK"] * block

    for _ in range(3):
        for two_gpus.current, arch in ((0, 80), (1, 90)):
            assert tuning.gpu().arch == arch
            assert tuning.find("kernel", ByArchitecture("a"))["BLOCK"] == arch
            assert launch(2) == 2 * arch
    assert two_gpus.asked == 2


def test_what_was_made_is_made_again_after_forget(two_gpus):
    made = []
    make = tuning.per_gpu(lambda value: made.append(value) or len(made))
    assert [make(5), make(5), make(6)] == [1, 1, 2]
    tuning.forget()
    assert make(5) == 3


def test_processors_are_those_of_the_gpu_itself(two_gpus, monkeypatch):
    two_gpus.current = 1
    pcie = SimpleNamespace(name="H100 PCIe", multi_processor_count=114)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: pcie)
    assert tuning.gpu() == (90, "H100 PCIe", 114)
    assert [tuning.processors(arch) for arch in (80, 90)] == [108, 114]


def test_tiles_fit_into_shared_memory():
    """In the tiles' own bytes: what Triton adds shows in `make cuda-check`."""
    for arch in (80, 86, 89, 90, 100, 120):
        for problem in pointwise.problems():
            tile = problem.tiles(arch)
            rows = tile["BLOCK_P"] + tile["BLOCK_D"]
            used = tile["num_stages"] * rows * tile["BLOCK_K"] * 2
            assert used <= tuning.shared_memory(arch), (arch, problem)


def test_the_cache_is_of_one_gpu_and_one_triton(tables):
    path = tuning.cache_path("NVIDIA H200 (80 GB)")
    assert path.parent == tables / "cache" / "triton"
    assert path.name.startswith("NVIDIA_H200_80_GB_-") and path.suffix == ".json"
    assert path != tuning.cache_path("NVIDIA H100 (80 GB)")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"other": 1}'])
def test_a_file_that_is_no_table(text, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(text)
    for read in (tuning.read_table, lambda path: tune.open_table(path, "Some GPU")):
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
    assert [case.problem.size for case, _ in found] == ["large", "small"]
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
    assert [case.problem.size for case, _ in found] == ["small"]
    assert {problem for problem, _ in launched} == {"small"}
    assert _search(table) == ([], [])


def test_the_budget_ends_the_search():
    seconds = iter(range(1000))
    table = _empty()
    found, _ = _search(table, budget=5.5, clock=lambda: next(seconds))
    assert [case.problem.size for case, _ in found] == ["large"]
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
    assert tune.collect_tensors(a) == [a]
    assert tune.collect_tensors((a, [b, None])) == [a, b]
    assert tune.collect_tensors(None) == []


def test_the_table_says_where_it_is_from(tmp_path):
    path = tmp_path / "table.json"
    tune.write(path, {"kernels": {"kernel": {"a": {"BLOCK": 1}}}, "gpu": "another"})
    table = tune.open_table(path, "Some GPU")
    assert table["gpu"] == "Some GPU" and table["kernels"] == {"kernel": {"a": {"BLOCK": 1}}}
    assert {"origin", "triton", "torch", "date", "microseconds"} <= table.keys()


def test_bits_of_a_mask_are_counted_one_by_one():
    expected = torch.randint(256, (1000,), dtype=torch.uint8)
    for bytes_with_another_bit, equal in ((8, True), (9, False)):
        actual = expected.clone()
        actual[:bytes_with_another_bit] ^= 16
        assert tune.agree([actual], [expected]) is equal


def test_the_problems_of_a_race():
    cases = list(filter(tune.is_of_a_race, check.cases(check.tunables())))
    assert {case.kernel for case in cases} == {"activation_gradients", "gram", "pointwise"}
    assert {case.problem.positions for case in cases} == {6561, 39366}
    assert not any("1024 x" in case.key or "dot" in case.key for case in cases)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_nothing_is_timed(capsys):
    assert tune.main([]) == 1
    said = capsys.readouterr()
    assert "nothing to time" in said.err and not said.out


def test_a_kernel_that_does_not_exist():
    with pytest.raises(ValueError, match="--kernels: expected names out of .*, got no_such"):
        tune.main(["--kernels", "no_such"])


def test_products_in_float32_are_searched_with_tf32_and_without():
    class Float32(NamedTuple):
        def key(self):
            return str(torch.backends.cuda.matmul.fp32_precision)

    before = torch.backends.cuda.matmul.fp32_precision
    found = check.cases({"fake": lambda: [Float32()]})
    assert [(case.key, case.tf32) for case in found] == [("ieee", False), ("tf32", True)]
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert found == [Case("fake", Float32(), False), Case("fake", Float32(), True)]
