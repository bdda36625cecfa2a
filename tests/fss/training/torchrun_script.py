"""A run under torchrun: what `fss train --config FILE` does, noting its episodes, killed if asked.

Arguments: the configuration, and the step in which the last process kills itself in its first life.
Every process writes the numbers of its training episodes to episodes-RANK.txt, one a line with the
step and whether torchrun has restarted.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from fss.cli import main
from fss.training.trainer import Trainer

rank, restarts = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
last_rank = int(os.environ["WORLD_SIZE"]) - 1
killed_at = int(sys.argv[2]) if len(sys.argv) > 2 else 0
train_step = Trainer._train_step


def noted(self: Trainer, parts: list) -> None:
    if restarts == 0 and rank == last_rank and self.step + 1 == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
    train_step(self, parts)
    with (Path(sys.argv[1]).parent / f"episodes-{rank}.txt").open("a") as file:
        for part in parts:
            file.writelines(f"{i} {self.step} {restarts}\n" for i in part["index"].tolist())


Trainer._train_step = noted
sys.exit(main(["train", "--config", sys.argv[1]]))
