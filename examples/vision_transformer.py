"""A vision transformer of timm: singular values of its linear layers train, and nothing else.

It begins with random weights, so that nothing is downloaded: what its singular values can do is to
learn 160 pictures by heart, others it would not know. Give `pretrained=True` for a network worth
tuning.
"""

import timm
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

import svf_fast
from fss.data import ShapesSource
from fss.data.shapes import FEW_SHOT_CLASSES
from fss.training.pretrain import ObjectImages

torch.manual_seed(0)
pictures = ShapesSource(
    65, train=160, test=1, classes=FEW_SHOT_CLASSES[:5], objects=(1, 1), radius=(0.3, 0.42)
)
model = timm.create_model(
    "vit_tiny_patch16_224", img_size=64, patch_size=16, depth=2, num_classes=5, pretrained=False
)
weights = sum(parameter.numel() for parameter in model.parameters())
model.requires_grad_(False)
# the names of modules choose: all linear layers of the blocks, or say "blocks.*.attn.qkv"
svf_fast.convert(model, layers=["blocks"])
model.head.requires_grad_(True)

trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
print(f"{sum(parameter.numel() for parameter in trained)} values train of {weights}")
optimizer = torch.optim.AdamW(trained, lr=0.01)
batches = list(DataLoader(ObjectImages(pictures, "train"), 32))
means = []
for _ in range(12):
    losses = []
    for images, labels in batches:
        loss = functional.cross_entropy(model(images[..., :64, :64]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    means.append(sum(losses) / len(losses))
print(f"loss {means[0]:.2f} in the first pass, {means[-1]:.2f} in the last")

images, labels = next(iter(DataLoader(ObjectImages(pictures, "train"), 160)))
images = images[..., :64, :64]
with torch.no_grad():
    converted = model(images)
    merged = svf_fast.merge(model)(images)  # a plain timm model again
right = (merged.argmax(1) == labels).float().mean()
print(f"{right:.2f} of the 160 pictures told apart (chance 0.20)")
print(f"merging changes the logits by at most {(merged - converted).abs().max():.0e}")
