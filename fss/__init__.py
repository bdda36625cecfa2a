"""Few-shot segmentation: training and evaluation with Singular Value Fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fss.segment.segmenter import FewShotSegmenter

__version__ = "0.1.0"
__all__ = ["FewShotSegmenter"]


def __getattr__(name: str) -> Any:
    # torch is imported when the segmenter is first asked for
    if name == "FewShotSegmenter":
        from fss.segment.segmenter import FewShotSegmenter

        return FewShotSegmenter
    raise AttributeError(f"module 'fss' has no attribute {name!r}")
