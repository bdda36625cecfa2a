from __future__ import annotations

import pytest

from fss.evaluation.shelf import Shelf


def misses(turns, capacity, sizes):
    """Values that are not there when a turn asks for them."""
    shelf = Shelf(capacity, turns)
    missed = 0
    for keys in turns:
        missing = [key for key in dict.fromkeys(keys) if shelf.get(key) is None]
        missed += len(missing)
        shelf.advance(1)
        for key in missing:
            shelf.put(key, key, sizes[key])
            assert shelf.nbytes <= capacity
    return missed, shelf


def test_of_equal_sizes_the_one_used_last_goes_first():
    """Belady's own rule: the best there is."""
    turns = [[key] for key in "abcdabeabcde"]
    found, _ = misses(turns, 3, dict.fromkeys("abcde", 1))
    assert found == 7


def test_a_large_value_gives_way_to_many_small_ones():
    turns = [["L"], ["a"], ["b"], ["c"], ["L"], ["a"], ["b"], ["c"]]
    assert misses(turns, 8, {"L": 6, "a": 1, "b": 1, "c": 1})[0] == 5
    assert misses(turns, 9, {"L": 6, "a": 1, "b": 1, "c": 1})[0] == 4


def test_nothing_stays_without_a_further_use():
    turns = [["a", "b"], ["b", "c"], ["c"]]
    found, shelf = misses(turns, 10, dict.fromkeys("abc", 2))
    assert found == 3 and shelf.nbytes == 0 and shelf.get("c") is None


@pytest.mark.parametrize("capacity", [0, 3])
def test_what_cannot_fit_is_not_kept(capacity):
    shelf = Shelf(capacity, [["a"], ["a"]])
    shelf.advance(1)
    shelf.put("a", "value", 4)
    shelf.put("never asked for", "value", 1)
    assert shelf.get("a") is None and shelf.nbytes == 0


def test_a_value_put_again_counts_once():
    shelf = Shelf(9, [["a"], ["a"]])
    shelf.put("a", 1, 4)
    shelf.put("a", 2, 5)
    assert shelf.get("a") == 2 and shelf.nbytes == 5
