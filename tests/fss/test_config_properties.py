"""Configurations of all kinds of values: one that says what was meant, or a typed error."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import typing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fss.config import DataConfig, ModelConfig, OptimizerConfig, RegimeConfig, TrainConfig
from tests.long import LONG

PARTS = {
    "data": DataConfig,
    "model": ModelConfig,
    "regime": RegimeConfig,
    "optimizer": OptimizerConfig,
    "": TrainConfig,
}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 700),
    st.floats(),
    st.floats(0, 10),
    st.text(max_size=5),
    st.sampled_from(["none", "auto", "layer4", "all", "S", "bam", "full", "freeze", "32-true"]),
    st.lists(st.one_of(st.integers(0, 5), st.floats(0, 3), st.sampled_from(["S", "U", "layer3"]))),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def declared(kind: type) -> st.SearchStrategy:
    """One of the fields of a dataclass with a value: of its own choices, or any."""
    hints = typing.get_type_hints(kind)

    def of(name: str) -> st.SearchStrategy:
        choices = [c for c in typing.get_args(hints[name]) if isinstance(c, str)]
        value = st.one_of(st.sampled_from(choices), VALUES) if choices else VALUES
        return st.tuples(st.just(name), value)

    names = [field.name for field in dataclasses.fields(kind) if field.name not in PARTS]
    return st.sampled_from([*names, "unknown"]).flatmap(
        lambda name: of(name) if name in hints else st.tuples(st.just(name), VALUES)
    )


CHANGES = st.lists(
    st.sampled_from(sorted(PARTS)).flatmap(
        lambda part: st.tuples(st.just(part), declared(PARTS[part]))
    ),
    max_size=4,
)


@settings(
    max_examples=4000 if LONG else 300,
    deadline=None,
    derandomize=not LONG,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(changes=CHANGES)
def test_a_configuration_says_what_was_meant_or_is_refused(changes) -> None:
    values: dict = {"data": {"source": "shapes"}, "model": {}, "regime": {}, "optimizer": {}}
    for part, (name, value) in changes:
        (values[part] if part else values)[name] = value
    try:
        config = TrainConfig.from_dict(copy.deepcopy(values))
    except (TypeError, ValueError):
        return
    found = config.to_dict()
    assert TrainConfig.from_dict(copy.deepcopy(found)).to_dict() == found
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for part, kind in PARTS.items():
        hints = typing.get_type_hints(kind)
        for name, value in (found[part] if part else found).items():
            if hints[name] is int:
                assert type(value) is int and value >= 0
            elif hints[name] is float:
                assert math.isfinite(value)
    for part, (name, value) in changes:
        given_last = [v for p, (n, v) in changes if (p, n) == (part, name)][-1]
        if given_last is value:
            assert (found[part] if part else found)[name] == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 2.5}, r"steps: expected an integer, got 2\.5"),
        ({"steps": True}, "steps: expected an integer, got True"),
        ({"optimizer": {"lr": "fast"}}, r"optimizer\.lr: expected a number, got 'fast'"),
        (
            {"regime": {"layers": "layer4"}},
            r"layers: expected a list of texts, got 'layer4'",
        ),
        ({"deterministic": 1}, "deterministic: expected true or false, got 1"),
        ({"model": {"weights": 7}}, r"model\.weights: expected a text, got 7"),
    ],
)
def test_another_type_is_named(values, message) -> None:
    with pytest.raises(TypeError, match=message):
        TrainConfig.from_dict({"data": {"source": "shapes"}, **values})
