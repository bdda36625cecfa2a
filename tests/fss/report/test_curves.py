from __future__ import annotations

import cv2
import numpy as np
import yaml

from fss.report.curves import draw_own_curves
from fss.runs.folder import RunFolder


def test_curves_of_one_run(tiny, tmp_path):
    folder = RunFolder(tmp_path)
    folder.config_file.write_text(yaml.safe_dump(tiny().to_dict()))
    test = {"step": 30, "miou": {"mean": 0.25, "std": 0.05}}
    log = folder.open_log({1: "cat"})
    for step in range(1, 60):
        log.train(
            {
                "step": step,
                "loss": 1 / step,
                "lr": 0.1,
                "backbone_lr": None,
                "step_seconds": 1.0,
                "images_per_second": 2.0,
                "peak_memory_bytes": 5,
                "skipped_steps": 0,
                "unreadable": 0,
            }
        )
    log.validation({"step": 30, "miou": 0.2, "fb_iou": 0.5, "train_miou": 0.4}, {1: 0.2})
    log.close()
    draw_own_curves(folder, {"steps": 59, "test": test})
    full = cv2.imread(str(folder.curves))
    assert full.shape[1] > full.shape[0] > 300
    folder.open_log({1: "cat"}).close()
    draw_own_curves(folder, {"steps": 0, "test": test})
    assert not np.array_equal(full, cv2.imread(str(folder.curves)))
