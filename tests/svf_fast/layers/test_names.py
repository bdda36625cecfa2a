from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from svf_fast.layers.names import Place, places, plain_names, within


def net() -> nn.Module:
    layers = {"stem": nn.Conv2d(3, 4, 1), "module": nn.Sequential(nn.Conv2d(4, 4, 1))}
    return nn.Sequential(OrderedDict(layers))


PLAIN = {"", "stem", "module", "module.0"}  # a child called module is none in a wrapper here


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        torch.compile,
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        checkpoint_wrapper,
        lambda model: torch.compile(nn.DataParallel(torch.compile(model))),
    ],
    ids=["none", "compile", "DataParallel", "AveragedModel", "checkpoint", "nested"],
)
def test_wrappers_have_no_part_in_names(wrap) -> None:
    assert set(plain_names(wrap(net())).values()) == PLAIN


def test_wrappers_within_a_model_neither() -> None:
    model = net()
    model.stem = torch.compile(model.stem)
    model.module[0] = checkpoint_wrapper(nn.DataParallel(model.module[0]))
    names = plain_names(model)
    assert set(names.values()) == PLAIN
    assert names["module.0._checkpoint_wrapped_module.module"] == "module.0"


@pytest.mark.parametrize(
    ("names", "there", "exact", "expected"),
    [
        (["a.0", "a.1"], ["a.1", "a.0"], True, [Place("", "")]),
        (["a.0", "a.1"], ["net.a.0", "net.a.1"], True, [Place("", "net.")]),
        (["net.a.0", "net.b"], ["a.0", "b"], True, [Place("net.", "")]),
        (["x.a.0", "x.b.0"], ["y.z.a.0", "y.z.b.0"], True, [Place("x.", "y.z.")]),
        (["a.0"], ["a.0", "a.1"], True, []),
        (["a.0"], ["a.0", "a.1"], False, [Place("", "")]),
        (["a.0"], ["b.a.0", "c.a.0", "d"], False, [Place("", "b."), Place("", "c.")]),
        (["a.0", "b.0"], ["a.0"], False, []),
        (["aa.0"], ["a.0", "b.aa.0"], False, [Place("", "b.")]),
        (["layer3.0"], ["layer4.0"], True, [Place("layer3.", "layer4.")]),
        (["0"], ["a.0"], True, [Place("", "a.")]),
    ],
)
def test_places_of_a_model_in_another(names, there, exact, expected) -> None:
    found = list(places(names, there, exact))
    assert found[: len(expected)] == expected
    assert expected or not found


def test_within() -> None:
    inside = within(("layer*.0", "head"))
    assert [inside(x) for x in ("layer2.0.conv", "layer2.1", "head.weight", "header")] == [
        *(True, False, True, False)
    ]
    assert within(None)("anything")
