"""Image classification: a pretrained ResNet learns five classes that it has not seen.

First a linear classifier on the frozen backbone, then with the backbone's singular values, and no
other weight of it. The pictures are rendered and the backbone comes with fss: nothing is
downloaded. For a network of your own, say torchvision's `resnet50(weights="DEFAULT")`, the lines
with `svf_fast` are the same. On pictures as near to its pretraining as these, S lets the small
backbone fit the training pictures better and leaves the test about where it was.
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import svf_fast
from fss.data import ShapesSource
from fss.data.shapes import FEW_SHOT_CLASSES
from fss.models import build_backbone, load_backbone
from fss.training.pretrain import ObjectImages

pictures = ShapesSource(
    65,
    train=400,
    test=200,
    classes=FEW_SHOT_CLASSES[:5],
    objects=(1, 1),
    radius=(0.3, 0.42),
    clutter=0,
)
images, labels = next(iter(DataLoader(ObjectImages(pictures, "train"), 400)))
test_images, test_labels = next(iter(DataLoader(ObjectImages(pictures, "test"), 200)))

for svf in (False, True):
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", width=24, output_stride=32)
    load_backbone(backbone, "shapes")
    backbone.eval().requires_grad_(False)  # batch norms keep their statistics
    if svf:
        svf_fast.convert(backbone)  # layers 2 to 4: now their singular values train
    head = nn.Linear(backbone.channels[-1], 5)
    model = nn.Sequential(backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)

    values = list(svf_fast.svf_parameters(backbone))
    optimizer = torch.optim.AdamW(
        [{"params": head.parameters(), "lr": 0.01}, {"params": values, "lr": 0.02}], weight_decay=0
    )
    for _ in range(10):
        for batch in torch.randperm(400).split(40):
            loss = functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    if svf:
        svf_fast.merge(backbone)  # plain convolutions again
    with torch.no_grad():
        right = (model(test_images).argmax(1) == test_labels).float().mean()
    count = sum(len(S) for S in values)
    print(f"{count} values of the backbone trained: loss {loss:.2f}, {right:.3f} of 200 pictures")
