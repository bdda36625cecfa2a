"""A training run from its configuration to its measured result."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

from torch import nn

from fss.adapter import save_run_adapter
from fss.checkpoint import load_checkpoint
from fss.config import TrainConfig
from fss.data import build_episodes
from fss.evaluation import evaluate_seeds
from fss.files import write_json
from fss.measure import peak_memory
from fss.plots import draw_curves, draw_episodes
from fss.processes import build_fabric, determinism, is_restart
from fss.provenance import provenance
from fss.trainer import Trainer, check_resumable


def train(config: TrainConfig, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Trains, validates and tests; the folder `config.out` keeps everything.

    config.yaml; last.pt and best.pt (the highest validation mIoU, see `TrainConfig.checkpoint`);
    train.csv, validation.csv and tensorboard/; at the end result.json, episodes.png, curves.png.
    Where S alone trains in the backbone: adapter.safetensors, its S in the tested checkpoint, and
    pretrained.safetensors, S at the first step (`svf_fast.Adapter`).

    Args:
        config: of the run.
        resume: goes on from last.pt; when torchrun restarts its processes they do so by themselves,
            or begin anew where there is none yet. On the CPU bit for bit as if never stopped.
        overwrite: replaces an earlier run in the same folder.

    Returns what result.json holds.

    Raises:
        ValueError: a folder that already has a run, a checkpoint of another run, ...
        FileNotFoundError: nothing to resume; photos or weights that are not there.
        FloatingPointError: a loss that is not finite; the last checkpoint is from before.
        KeyboardInterrupt: after ctrl-C, once the step is finished and saved; the message says how
            to go on.
    """
    folder = Path(config.out)
    path = folder / "last.pt"
    if is_restart():
        resume = path.is_file()
        overwrite = not resume
    if resume and not path.is_file():
        raise FileNotFoundError(
            f"--resume: expected a checkpoint at {path}, found none; leave out --resume to begin "
            "anew"
        )
    state = load_checkpoint(path, config) if resume else None
    if not resume and not overwrite:
        _refuse_overwriting(folder)
    fabric = build_fabric(config, config.accumulate)
    if state is not None:
        check_resumable(state, config, fabric)
    with determinism(config.deterministic):
        trainer = Trainer(config, fabric)
        if state is not None:
            trainer.restore(state)
        elif fabric.is_global_zero:
            _clear(folder)
            save_run_adapter(folder / "pretrained.safetensors", trainer.network, config)
        trainer.fit()
        return conclude(trainer)


def conclude(trainer: Trainer) -> dict[str, Any]:
    """Tests the chosen checkpoint, draws the pictures and writes result.json."""
    config, fabric, folder = trainer.config, trainer.fabric, trainer.folder
    memory = peak_memory(fabric.device)
    path = folder / f"{config.checkpoint}.pt"
    tested = load_checkpoint(path, config)
    trainer.network.load_state_dict(tested["model"])
    test = evaluate_seeds(
        trainer.model,
        trainer.source,
        config.data,
        fabric,
        config.test_seeds,
        config.test_episodes,
        max(1, config.batch_size // fabric.world_size // config.accumulate),
        resize=config.resize,
        feature_cache=config.feature_cache,
    )
    result = {
        "test": {"checkpoint": path.name, "step": tested["step"], **test},
        "best_validation": trainer.best,
        "steps": trainer.step,
        "step_seconds_median": statistics.median(trainer.seconds) if trainer.seconds else None,
        "stopped_early": trainer.has_converged,
        "skipped_steps": trainer.skipped,
        "saved_bytes_per_step": trainer.saved_bytes,
        "peak_memory_bytes": memory,
        "parameters": _parameters(trainer.network),
        **provenance(fabric.device),
        "config": config.to_dict(),
    }
    if fabric.is_global_zero:
        if config.pictures:
            episodes = build_episodes(
                config.data, "test", config.test_episodes, config.test_seeds[0], trainer.source
            )
            draw_episodes(
                folder / "episodes.png",
                trainer.model,
                episodes,
                trainer.classes,
                config.pictures,
                fabric.device,
            )
        draw_curves(folder / "curves.png", folder)
        save_run_adapter(folder / "adapter.safetensors", trainer.network, config, result["test"])
        write_json(folder / "result.json", result)
    fabric.barrier()
    return result


def _refuse_overwriting(folder: Path) -> None:
    runs = [name for name in ("last.pt", "result.json", "train.csv") if (folder / name).exists()]
    if runs:
        raise ValueError(
            f"out: {folder} already holds a run ({', '.join(runs)}); go on with --resume, replace "
            "it with --overwrite, or give another --out"
        )


def _clear(folder: Path) -> None:
    """Makes the folder of a new run, without what an earlier one left there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("last.pt", "best.pt", "result.json", "eval.json", "episodes.png", "curves.png"):
        (folder / name).unlink(missing_ok=True)
    for name in ("adapter.safetensors", "pretrained.safetensors"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def _parameters(network: nn.Module) -> dict[str, int]:
    named = list(network.named_parameters())
    trained = [(name, p.numel()) for name, p in named if p.requires_grad]
    backbone = sum(count for name, count in trained if name.startswith("backbone."))
    return {
        "trained_head": sum(count for _, count in trained) - backbone,
        "trained_backbone": backbone,
    }
