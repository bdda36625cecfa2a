"""Few-shot segmentation: find in a picture what one other picture shows, for classes never trained.

The paper's baseline on rendered pictures and the embedded backbone: nothing is downloaded. For
photos take a `DataConfig` of your own; `fss train` does the same with logs, checkpoints and tables.
"""

import torch
from torch.utils.data import DataLoader

import svf_fast
from fss.config import DataConfig, ModelConfig
from fss.data import build_episodes, build_source, collate_episodes
from fss.evaluation import episode_classes, predict
from fss.metrics import EpisodeIoU
from fss.models import build_model

torch.manual_seed(0)
data = DataConfig(source="shapes", size=65, min_area=0.03)
pictures = build_source(data)

model = build_model(
    ModelConfig(backbone="resnet18", width=24, weights="shapes", channels=32, dropout=0.0)
)
model.backbone.requires_grad_(False)
svf_fast.convert(model.backbone)  # layers 2 to 4: now their singular values train
pretrained = svf_fast.Adapter.of(model.backbone)

trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
head = [p for name, p in trained.items() if not name.startswith("backbone.")]
optimizer = torch.optim.AdamW(
    [{"params": head, "lr": 3e-3}, {"params": svf_fast.svf_parameters(model), "lr": 1e-2}]
)
episodes = build_episodes(data, "train", 30 * 8, seed=0, source=pictures)
for batch in DataLoader(episodes, 8, collate_fn=collate_episodes):
    prediction = model(batch["query_image"], batch["support_images"], batch["support_masks"])
    loss = model.loss(prediction, batch["query_mask"], class_weight=torch.tensor([1.0, 6.0]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def miou() -> float:
    """Over 40 episodes of classes that training did not show."""
    metric = EpisodeIoU(episode_classes(pictures, data.fold))
    episodes = build_episodes(data, "test", 40, seed=1, source=pictures)
    for batch in DataLoader(episodes, 10, collate_fn=collate_episodes):
        for n, prediction in enumerate(predict(model, batch)):
            metric.update(prediction, batch["query_mask_original"][n], int(batch["class_id"][n]))
    return metric.result().miou


print(f"trained: mIoU {miou():.3f} on novel classes")
svf_fast.save_adapter(model.backbone, "shapes.safetensors", {"data": "shapes", "fold": 0})

pretrained.apply(model.backbone)  # and back again, nothing is decomposed anew
print(f"with the pretrained singular values: mIoU {miou():.3f}")
svf_fast.load_adapter(model.backbone, "shapes.safetensors")
print(f"with the adapter: mIoU {miou():.3f}")
