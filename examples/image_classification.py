"""Image classification: a pretrained ResNet learns five classes that it has not seen.

Of the backbone only the singular values train, 1 in 1500 of its weights. The pictures are rendered
and the backbone comes with fss: nothing is downloaded. For a network of your own, say torchvision's
`resnet50(weights="DEFAULT")`, the lines with `svf_fast` are the same.
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import svf_fast
from fss.data import ShapesSource
from fss.data.shapes import FEW_SHOT_CLASSES
from fss.models import build_backbone, load_backbone
from fss.pretrain import ObjectImages

pictures = ShapesSource(
    65, train=320, test=200, classes=FEW_SHOT_CLASSES[:5], objects=(1, 1), radius=(0.3, 0.42)
)


def train_and_test(svf: bool) -> None:
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", width=24, output_stride=32)
    load_backbone(backbone, "shapes")
    backbone.eval().requires_grad_(False)  # batch norms keep their statistics
    if svf:
        svf_fast.convert(backbone)  # layers 2 to 4: now their singular values train
    head = nn.Linear(backbone.channels[-1], 5)
    model = nn.Sequential(backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)

    groups = [{"params": head.parameters(), "lr": 0.01}]
    if svf:
        groups.append({"params": svf_fast.svf_parameters(backbone), "lr": 0.01})
    optimizer = torch.optim.AdamW(groups)
    for _ in range(6):
        for images, labels in DataLoader(ObjectImages(pictures, "train"), 32, shuffle=True):
            loss = functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    images, labels = next(iter(DataLoader(ObjectImages(pictures, "test"), 200)))
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean()
    trained = sum(
        parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad
    )
    print(f"{trained} values of the backbone trained: {right:.3f} of 200 pictures right")
    if svf:
        svf_fast.merge(backbone)  # plain convolutions again
        with torch.no_grad():
            same = (model(images).argmax(1) == labels).float().mean()
        print(f"merged into plain convolutions: {same:.3f}")


train_and_test(svf=False)
train_and_test(svf=True)
