"""Search what the paper leaves open: learning rates, weight decay of S, and which layers.

One setting after the other, each kept at the value whose run scores best on base classes; the novel
classes are scored once by each run and choose nothing. A finished run is kept and an interrupted
one resumes. Writes NAME.json and NAME.md with every run that was made:

    python -m benchmarks.few_shot.search --config fss/configs/clothing.yaml \
        --results benchmarks/results/search
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import yaml

from benchmarks import files
from benchmarks.few_shot.training import held_out, make_run


class Stage(NamedTuple):
    """A setting of a regime and the values tried; None is as the stage before left it."""

    regime: str
    key: str
    values: tuple[str | None, ...]


LR, BACKBONE_LR = "optimizer.lr", "optimizer.backbone_lr"
DECAY, LAYERS = "optimizer.backbone_weight_decay", "regime.layers"
STAGES = (
    Stage("freeze", LR, ("0.0005", "0.00025", "0.001")),
    Stage("full", BACKBONE_LR, ("0.00005", "0.00001", "0.0002")),
    Stage("svf", BACKBONE_LR, ("0.002", "0.0005", "0.008", "0.03")),
    Stage("svf", DECAY, (None, "0.1", "1")),
    Stage("svf", LAYERS, (None, "[layer4]", "[layer3, layer4]")),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file of `fss train`")
    parser.add_argument("--out", default="runs/search", help="folder of the runs")
    parser.add_argument("--results", help="path of the results without its ending")
    parser.add_argument("--regimes", nargs="+", default=["freeze", "full", "svf"])
    parser.add_argument("--fold", type=int, default=0)
    options, extra = parser.parse_known_args()
    root = yaml.safe_load(Path(options.config).read_text())["data"]["root"]
    view = held_out(root, options.fold, Path(options.out) / "photos")
    extra += [f"--data.root={view}", f"--data.fold={options.fold}"]
    trials: dict[str, dict] = {}
    chosen: dict[str, dict[str, str]] = {}
    for stage in STAGES:
        if stage.regime not in ("freeze", *options.regimes):
            continue
        # the head's rate is freezing's; what a regime fixed before stays
        settings = chosen.get("freeze", {}) | chosen.get(stage.regime, {})
        tried = [settings | ({stage.key: v} if v is not None else {}) for v in stage.values]
        names = [_name(stage.regime, trial) for trial in tried]
        for name, trial in zip(names, tried, strict=True):
            trials[name] = _trial(options, extra, stage.regime, trial, name)
        best = max(range(len(names)), key=lambda n: trials[names[n]]["base_miou"])
        chosen[stage.regime] = tried[best]
    command = files.command()
    table = _table(trials, chosen, command)
    if options.results:
        base = Path(options.results)
        base.parent.mkdir(parents=True, exist_ok=True)
        summary = {"command": command, "chosen": chosen, "trials": trials}
        base.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")
        base.with_suffix(".md").write_text(table)
    print(table)
    return 0


def _name(regime: str, settings: dict[str, str]) -> str:
    parts = [
        key.rpartition(".")[2] + "=" + value.translate(str.maketrans({" ": "", "[": "", "]": ""}))
        for key, value in settings.items()
    ]
    return "-".join([regime, *parts])


def _trial(
    options: argparse.Namespace, extra: list[str], regime: str, settings: dict[str, str], name: str
) -> dict:
    settings = {"regime.name": regime, "validation_classes": "base", **settings}
    result = make_run(options.config, Path(options.out) / name, settings, extra)
    return {
        "regime": regime,
        "settings": settings,
        "base_miou": result["best_validation"]["miou"],
        "base_fb_iou": result["best_validation"]["fb_iou"],
        "novel_miou": result["test"]["miou"],
        "novel_fb_iou": result["test"]["fb_iou"],
        **{key: result[key] for key in ("config", "machine", "versions", "commit")},
    }


def _table(trials: dict[str, dict], chosen: dict[str, dict[str, str]], command: str) -> str:
    lines = [
        "| regime | settings | mIoU, base | FB-IoU, base | mIoU, novel | FB-IoU, novel |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for trial in trials.values():
        own = {k: v for k, v in trial["settings"].items() if k in (LR, BACKBONE_LR, DECAY, LAYERS)}
        best = own == chosen[trial["regime"]]
        text = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in own.items())
        scores = [trial["base_miou"], trial["base_fb_iou"]]
        scores += [trial["novel_miou"]["mean"], trial["novel_fb_iou"]["mean"]]
        shown = " | ".join(f"{100 * score:.2f}" for score in scores)
        lines.append(f"| {trial['regime']} | {'**' + text + '**' if best else text} | {shown} |")
    first = next(iter(trials.values()))
    config = first["config"]
    lines += [
        "",
        "In bold what the base classes chose; the novel classes chose nothing. "
        f"{config['model']['backbone']}, {config['model']['name']}, fold {config['data']['fold']}, "
        f"{config['data']['size']} px, batch {config['batch_size']}, {config['steps']} steps; one "
        f"training seed; {config['validation_episodes']} episodes of base classes on photos "
        f"outside the training list, {config['test_episodes']} of novel classes.",
        f"{first['machine']['cpu']}, torch {first['versions']['torch']}, commit {first['commit']}.",
        "",
        f"    {command}",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
