from __future__ import annotations

import itertools
import pickle
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svf_fast.budget import BudgetError, Option, choose, format_bytes, parse_bytes

# eighths add without rounding, so "equal cost" means the same here and there
option = st.builds(Option, st.integers(0, 12), st.integers(-40, 40).map(lambda n: n / 8))
units = st.lists(st.lists(option, min_size=1, max_size=4), max_size=5)


def total(options, chosen):
    picked = [unit[index] for unit, index in zip(options, chosen, strict=True)]
    return sum(o.cost for o in picked), sum(o.bytes for o in picked)


@given(units, st.integers(0, 60), st.integers(0, 20))
def test_choose_is_exact(options, budget, fixed):
    every = [
        total(options, chosen) for chosen in itertools.product(*(range(len(u)) for u in options))
    ]
    fitting = [(cost, size) for cost, size in every if fixed + size <= budget]
    if fitting:
        assert total(options, choose(options, budget, fixed)) == min(fitting)
    else:
        with pytest.raises(BudgetError) as error:
            choose(options, budget, fixed)
        assert error.value.smallest == fixed + min(size for _, size in every)
        assert error.value.budget == budget
        choose(options, error.value.smallest, fixed)


@given(units, st.integers(0, 60), st.integers(2, 4))
def test_repeated_units_are_exact_too(options, budget, times):
    options = [options[0]] * times if options else []
    every = [total(options, c) for c in itertools.product(*(range(len(u)) for u in options))]
    fitting = [(cost, size) for cost, size in every if size <= budget]
    if fitting:
        assert total(options, choose(options, budget)) == min(fitting)


def test_fifty_units_take_no_time():
    kinds = [
        [
            Option(
                2**20 * (kind + 3) * (4 - way) + 37 * way, (kind + 2.5) * (way + kind % 3) ** 1.5
            )
            for way in range(4)
        ]
        for kind in range(5)
    ]
    options = kinds * 10
    most = sum(max(o.bytes for o in unit) for unit in options)
    start = time.process_time()
    cost, size = total(options, choose(options, most // 2))
    assert time.process_time() - start < 2  # measured: 0.02
    assert size <= most // 2
    assert cost <= total(options, [2] * 50)[0]  # which fits as well


def test_the_error_says_what_would_do():
    options = [[Option(3 * 2**20, 1.0), Option(2**20, 2.0)]] * 2
    with pytest.raises(
        BudgetError, match=r"at least 3.00 MiB \(3145728 bytes\).*got 2.00 MiB"
    ) as e:
        choose(options, 2 * 2**20, fixed=2**20)
    assert e.value.smallest == 3 * 2**20
    copied = pickle.loads(pickle.dumps(e.value))
    assert (copied.smallest, str(copied)) == (e.value.smallest, str(e.value))


@pytest.mark.parametrize(
    "options, message",
    [
        ([[Option(1, 1.0)], []], "unit 1 has none"),
        ([[Option(-1, 1.0)]], "bytes >= 0"),
        ([[Option(1, float("nan"))]], "finite cost"),
        ([[Option(1, float("inf"))]], "finite cost"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        choose(options, 100)


@pytest.mark.parametrize(
    "text, size",
    [
        ("1.5GiB", 3 * 2**29),
        ("300 MB", 300_000_000),
        (" 2kib ", 2048),
        ("7B", 7),
        ("0.5 b", 0),
        (".25 MiB", 2**18),
        ("3.gb", 3_000_000_000),
        ("1KB", 1000),
        ("0.1GB", 100_000_000),
        (12345, 12345),
        (0, 0),
    ],
)
def test_parse_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "1.5", "-1 MiB", "1 GiBs", "1e3 B", "1,5 GiB", "1 2B"])
def test_text_that_is_no_size(text):
    with pytest.raises(ValueError, match="expected a number and one of GiB, .*like '1.5GiB', got"):
        parse_bytes(text)


def test_other_values_that_are_no_size():
    with pytest.raises(ValueError, match="expected 0 bytes or more, got -1"):
        parse_bytes(-1)
    for value in (1.5, None, True, b"1B"):
        with pytest.raises(TypeError, match="expected a text like '1.5GiB' or an integer"):
            parse_bytes(value)


@given(st.one_of(st.integers(0, 10**7), st.integers(0, 10**14)))
def test_a_formatted_size_is_never_too_small(count):
    assert count <= parse_bytes(format_bytes(count)) <= count + count // 100


def test_format_bytes():
    assert format_bytes(1023) == "1023 B"
    assert format_bytes(1536) == "1.50 KiB"
    assert format_bytes(2**30 + 1) == "1.01 GiB"
