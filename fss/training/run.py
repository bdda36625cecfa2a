"""A training run from its configuration to its measured result."""

from __future__ import annotations

import statistics
from typing import Any

from torch import nn

from fss.config import TrainConfig
from fss.data import build_episodes
from fss.evaluation.evaluate import evaluate_seeds
from fss.files import write_json
from fss.processes import determinism
from fss.report.curves import draw_own_curves
from fss.report.episodes import draw_episodes
from fss.runs.checkpoint import load_checkpoint
from fss.training.adapters import save_run_adapter
from fss.training.loop import start
from fss.training.measure import begin_peak, peak_memory
from fss.training.provenance import provenance
from fss.training.trainer import Trainer


def train(config: TrainConfig, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train, validate and test; the folder `config.out` keeps everything.

    config.yaml; last.pt and best.pt (the highest validation mIoU, see `TrainConfig.checkpoint`);
    train.csv, validation.csv and tensorboard/; at the end result.json, episodes.png, curves.png
    and test_episodes.csv, the pixels right and wrong of each test episode.
    Where S alone trains in the backbone: adapter.safetensors, its S in the tested checkpoint, and
    pretrained.safetensors, S at the first step (`svf_fast.Adapter`).

    Args:
        config: of the run.
        resume: go on from last.pt; processes that torchrun restarts do so by themselves, or begin
            anew if there is none yet. On the CPU bit for bit as if never stopped.
        overwrite: replace an earlier run in the same folder.

    Returns what result.json holds.

    Raises:
        ValueError: a folder that already has a run, a checkpoint of another run, ...
        FileNotFoundError: nothing to resume; photos or weights are missing.
        FloatingPointError: a loss that is not finite; the last checkpoint is from before.
        OSError: a folder that cannot be written, a full disk; the last checkpoint is whole.
        Stopped: after ctrl-C or SIGTERM, once the step is finished and saved; the message says how
            to go on.
    """
    with determinism(config.deterministic), start(Trainer, config, resume, overwrite) as trainer:
        if trainer.step == 0 and trainer.fabric.is_global_zero:
            save_run_adapter(trainer.folder.pretrained, trainer.network, config)
        begin_peak(trainer.fabric.device)
        trainer.fit()
        return conclude(trainer)


def conclude(trainer: Trainer) -> dict[str, Any]:
    """Test the chosen checkpoint, draw the pictures and write result.json."""
    config, fabric, folder = trainer.config, trainer.fabric, trainer.folder
    memory = peak_memory(fabric.device)
    path = folder.best if config.checkpoint == "best" else folder.last
    tested = load_checkpoint(path, config)
    trainer.network.load_state_dict(tested["model"])
    test = evaluate_seeds(
        trainer.model,
        trainer.source,
        config.data,
        fabric,
        config.test_seeds,
        config.test_episodes,
        trainer.part,
        resize=config.resize,
        feature_cache=config.feature_cache,
        graph=config.graph,
        episodes_file=folder.test_episodes,
    )
    result = {
        "test": {"checkpoint": path.name, "step": tested["step"], **test},
        "best_validation": trainer.best,
        "steps": trainer.step,
        "epoch_images": trainer.dataset.epoch,
        "step_seconds_median": statistics.median(trainer.seconds) if trainer.seconds else None,
        "stopped_early": trainer.has_converged,
        "skipped_steps": trainer.skipped,
        "unreadable": dict(trainer.unreadable.most_common()),
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
                folder.episodes,
                trainer.model,
                episodes,
                trainer.classes,
                config.pictures,
                fabric.device,
            )
        draw_own_curves(folder, result)
        save_run_adapter(folder.adapter, trainer.network, config, result["test"])
        write_json(folder.result_file, result)
    fabric.barrier()
    return result


def _parameters(network: nn.Module) -> dict[str, int]:
    """Count the trained parameters of head and backbone."""
    named = list(network.named_parameters())
    trained = [(name, p.numel()) for name, p in named if p.requires_grad]
    backbone = sum(count for name, count in trained if name.startswith("backbone."))
    return {
        "trained_head": sum(count for _, count in trained) - backbone,
        "trained_backbone": backbone,
    }
