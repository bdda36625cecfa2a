"""Few-shot segmentation: find in pictures what one other picture shows, without any training.

The pictures are rendered and the backbone comes with fss: nothing is downloaded. For photos give
`FewShotSegmenter` a backbone trained on photos (`weights=`), or `FewShotSegmenter.load` a run of
`fss train`; the lines below stay the same.
"""

import numpy as np

import fss
import svf_fast
from fss.data import ShapesSource

pictures = ShapesSource(97, train=1, test=200, objects=(1, 2))
(class_id, name), *_ = pictures.class_names.items()
shown = [pictures.load(i) for i in pictures.indices("test")]
shown = [(image, mask == class_id) for image, mask in shown if (mask == class_id).mean() > 0.05]
(support, support_mask), *queries = shown[:9]

segmenter = fss.FewShotSegmenter(size=97)
segmenter.support([support], [support_mask])
results = segmenter([image for image, _ in queries])
results[0].overlay().save("overlay.png")


def iou(results: list) -> float:
    """Return the score of all queries together."""
    pairs = [(result.mask, mask) for result, (_, mask) in zip(results, queries, strict=True)]
    both = sum(np.sum(found & mask) for found, mask in pairs)
    return both / sum(np.sum(found | mask) for found, mask in pairs)


chance = np.mean([mask for _, mask in queries])  # IoU of calling everything the object
print(f"{name}: IoU {iou(results):.3f} of {len(queries)} pictures, all of them object {chance:.3f}")

# Singular values of another training take their turn in the same backbone: here made by hand.
backbone = segmenter.model.backbone
svf_fast.convert(backbone)
adapter = svf_fast.Adapter.of(backbone, {"data": "none", "made": "every singular value by 0.8"})
softer = {layer: 0.8 * S for layer, S in adapter.S.items()}
svf_fast.Adapter(softer, adapter.fingerprints, adapter.card).save("softer.safetensors")
segmenter.adapter("softer.safetensors")
print(f"with softer.safetensors: IoU {iou(segmenter([image for image, _ in queries])):.3f}")
segmenter.adapter(None)
print(f"without: IoU {iou(segmenter([image for image, _ in queries])):.3f}")
