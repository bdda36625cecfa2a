from __future__ import annotations

import pytest

from fss.config import DataConfig, ModelConfig, OptimizerConfig, RegimeConfig, TrainConfig


def test_defaults_are_the_papers_recipe():
    config = TrainConfig(DataConfig(root="photos"))
    assert (config.data.size, config.model.backbone, config.regime.name) == (473, "resnet50", "svf")
    assert config.regime.layers == ("layer2", "layer3", "layer4")
    assert (config.optimizer.name, config.optimizer.lr) == ("sgd", 0.015)
    assert (config.optimizer.momentum, config.optimizer.schedule) == (0.9, "cosine")
    assert (config.batch_size, config.seed, config.data.exclude_novel) == (8, 321, True)


def test_dict_round_trip(tiny):
    config = tiny(data={"scale": (0.8, 1.25)}, test_seeds=[3])
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["data"]["scale"] == [0.8, 1.25]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataConfig(), "data.root: expected the folder of the photos, got nothing"),
        (lambda: DataConfig(source="voc", root="x"), "data.source: .*shapes; got 'voc'"),
        (lambda: DataConfig(root="x", fold=-1), "data.fold: expected a number from 0 on, got -1"),
        (lambda: DataConfig(root="x", shots=0), "data.shots: .* from 1 on, got 0"),
        (
            lambda: TrainConfig(DataConfig(root="x", size=472)),
            "data.size: .*got 472, the nearest are 465 and",
        ),
        (lambda: DataConfig(root="x", size=1), "data.size: expected a number from 9 on, got 1"),
        (lambda: DataConfig(root="x", min_area=0), "data.min_area: .*above 0, got 0"),
        (lambda: DataConfig(root="x", scale=(1.1, 0.9)), r"data.scale: .*got \[1.1, 0.9\]"),
        (lambda: DataConfig(root="x", rotate=-5), "data.rotate: expected 0 to 180 degrees, got -5"),
        (lambda: ModelConfig(backbone="vgg"), "model.backbone: .*vgg16_bn, vgg16; got 'vgg'"),
        (lambda: ModelConfig(dropout=1.0), "model.dropout: expected 0 up to below 1, got 1.0"),
        (lambda: ModelConfig(weights=""), "model.weights: expected a file"),
        (lambda: RegimeConfig(name="part"), "regime.name: .*freeze, full, svf, .*got 'part'"),
        (lambda: RegimeConfig(layers=()), 'regime.layers: .*"svf", got none'),
        (
            lambda: RegimeConfig(name="freeze", layers=(), batch_norm="both"),
            'regime.layers: .*"batch_norm both", got none',
        ),
        (
            lambda: RegimeConfig(layers=("layer2", "layer2")),
            r"regime.layers: expected different .*got \['layer2', 'layer2'\]",
        ),
        (
            lambda: RegimeConfig(name="bias", kernel="3x3"),
            'regime.kernel: "bias" changes no convolution, .*got "3x3"',
        ),
        (
            lambda: RegimeConfig(name="full", factors=("S",)),
            r"""regime.factors: "full" decomposes no weight; omit factors, got \['S'\]""",
        ),
        (
            lambda: RegimeConfig(factors=()),
            r"""regime.factors: expected \['S'\] or .*\['S', 'U', 'V'\] for "svf", got \[\]""",
        ),
        (
            lambda: RegimeConfig(name="full", keep="int8"),
            r"""regime.keep: expected "exact" where other .* are \[\] in "full"; got .int8""",
        ),
        (
            lambda: RegimeConfig(factors=("S", "U"), keep="int8"),
            r"""regime.keep: expected "exact" where .* are \['S', 'U'\] in "svf"; got .int8""",
        ),
        (
            lambda: TrainConfig(
                DataConfig(root="x"),
                regime=RegimeConfig(name="full", batch_norm_statistics="batch"),
                recompute_supports=True,
            ),
            "recompute_supports: expected regime.batch_norm_statistics frozen",
        ),
        (
            lambda: RegimeConfig(name="svf_scale", factors=("S",)),
            r"""regime.factors: expected \["S'"\] or \['S', "S'"\] for "svf_scale", got""",
        ),
        (
            lambda: RegimeConfig(name="freeze", layers=(), batch_norm_statistics="batch"),
            'at least one layer for "batch_norm_statistics batch", got none',
        ),
        (
            lambda: TrainConfig(DataConfig(root="x"), validation_every="2 weeks"),
            "validation_every: expected a number of steps, or of epochs like .2 epochs.; got .2 w",
        ),
        (
            lambda: TrainConfig(DataConfig(root="x"), validation_every="0 epochs"),
            "validation_every: .*got '0 epochs'",
        ),
        (
            lambda: TrainConfig(DataConfig(root="x"), validation_every="-1 epoch"),
            "validation_every: .*got '-1 epoch'",
        ),
        (
            lambda: TrainConfig(DataConfig(root="x"), validation_every=-1),
            "validation_every: expected a number from 0 on, got -1",
        ),
        (
            lambda: RegimeConfig(name="adapter", adapter_reduction=0),
            "regime.adapter_reduction: .*from 1 on, got 0",
        ),
        (lambda: OptimizerConfig(lr=float("nan")), "optimizer.lr: .*above 0, got nan"),
        (lambda: OptimizerConfig(backbone_lr=0), "optimizer.backbone_lr: .*above 0, got 0"),
        (lambda: OptimizerConfig(schedule="steps"), "optimizer.schedule: .*constant; got 'steps'"),
        (lambda: OptimizerConfig(transformer_lr=0), "optimizer.transformer_lr: .*above 0, got 0"),
    ],
)
def test_a_bad_value_names_setting_expected_and_got(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"steps": 0}, "steps: expected a number from 1 on, got 0"),
        ({"foreground_weight": 0.0}, "foreground_weight: .*above 0, got 0.0"),
        ({"test_seeds": []}, "test_seeds: expected at least one seed, got none"),
        ({"test_seeds": [5, 5]}, r"test_seeds: expected different seeds, got \[5, 5\]"),
        ({"precision": "fp8"}, "precision: .*'fp8'"),
        ({"devices": 0}, "devices: .* from 1 on, got 0"),
        ({"out": ""}, "out: expected a folder"),
    ],
)
def test_a_bad_run_setting_is_refused(tiny, override, message):
    with pytest.raises(ValueError, match=message):
        tiny(**override)


def test_a_bare_off_in_yaml_turns_the_graph_off():
    """YAML 1.1 reads it as False."""
    data = {"source": "shapes"}
    assert TrainConfig.from_dict({"data": data, "graph": False}).graph == "off"
    with pytest.raises(ValueError, match="graph: expected"):
        TrainConfig.from_dict({"data": data, "graph": True})
