"""A trained model as an ONNX file, which runs without torch and without fss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import svf_fast
from fss.data import MEAN, STD
from fss.files import atomic_write, check_writable
from fss.models import FewShotModel
from fss.runs.folder import RunFolder

INPUTS = ("query_image", "support_images", "support_masks")
_TOLERANCE = 1e-4
_OTHER_VOTES = 1e-4  # of the pixels


def export_onnx(
    model: FewShotModel,
    path: str | Path,
    size: int,
    shots: int = 1,
    batch_size: int = 1,
    metadata: dict[str, Any] | None = None,
) -> float:
    """Write a few-shot model as ONNX, run it there and compare; return the largest difference.

    SVF layers are merged into plain convolutions, in place. The graph has the inputs of
    `FewShotModel.features` under their names and one output:

        query_image [B, 3, size, size] and support_images [B, K, 3, size, size], float32, normalized
        support_masks [B, K, size, size], int64; 1 is foreground
        logits [B, 2, size, size], background and foreground

    What normalized means (ImageNet's mean and standard deviation, of values from 0 to 1) is in the
    file's metadata under "fss", as JSON.

    Args:
        model: float32, on the CPU; it is put into evaluation mode and frozen.
        path: the file.
        size: side of the pictures, pixels, a multiple of 8 plus 1.
        shots: supports per query (K).
        batch_size: queries at a time (B).
        metadata: what else to note in the file, plain JSON.

    Raises:
        ImportError: onnxscript or onnxruntime is not installed.
        ValueError: a size, a number of shots or a dtype that the model does not take.
        RuntimeError: a model that computes something else in onnxruntime; no file is left.
    """
    runtime = _onnxruntime()
    model = model.cpu().eval().requires_grad_(False)
    if any(True for _ in svf_fast.svf_parameters(model)):
        svf_fast.merge(model)
    for name, value in (("shots", shots), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 1 + shots, 3, size, size, generator=generator)
    masks = torch.zeros(batch_size, shots, size, size, dtype=torch.int64)
    masks[..., size // 4 : size // 2, size // 3 :] = 1
    masks *= torch.rand(masks.shape, generator=generator) > 0.1  # no rectangle, whose side may hide
    inputs = (images[:, 0].contiguous(), images[:, 1:].contiguous(), masks)

    network = _Logits(model)
    with torch.no_grad():
        expected = network(*inputs)
        exported = torch.export.export(network, inputs)
        exported = exported.run_decompositions({torch.ops.svf_fast.cosine_max.default: _cosine_max})
        program = torch.onnx.export(
            exported, input_names=list(INPUTS), output_names=["logits"], dynamo=True, verbose=False
        )
    assert program is not None
    facts = {"size": size, "shots": shots, "mean": MEAN.tolist(), "std": STD.tolist()}
    program.model.metadata_props["fss"] = json.dumps({**(metadata or {}), **facts})
    content = program.model_proto.SerializeToString()

    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = session.run(None, dict(zip(INPUTS, (x.numpy() for x in inputs), strict=True)))[0]
    errors = (torch.from_numpy(found) - expected).abs().amax(dim=1).flatten().sort().values
    # of a pixel whose supports hardly differ, another vote
    left_out = math.ceil(_OTHER_VOTES * len(errors)) if model.votes and shots > 1 else 0
    difference = float(errors[len(errors) - 1 - left_out])
    limit = _TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= limit:
        raise RuntimeError(
            f"export: expected the logits of torch to {limit:.0e} in onnxruntime, they differ by "
            f"{difference:.0e}; please report it with the versions of torch and onnxscript"
        )
    with atomic_write(Path(path)) as file:
        file.write(content)
    return difference


def export_run(
    run: str,
    out: str = "model.onnx",
    shots: int | None = None,
    checkpoint: Literal["best", "last"] = "best",
) -> str:
    """Write the network of a run as an ONNX file.

    Args:
        run: folder of a training run, or a checkpoint file in it.
        out: the file to write.
        shots: supports per query; by default as trained.
        checkpoint: of the folder, "best" or "last".

    Returns what was written, in a line.

    Raises:
        FileNotFoundError: no checkpoint there.
        ImportError, ValueError, RuntimeError: see `export_onnx`.
    """
    folder, name = RunFolder.find(run, checkpoint)
    check_writable(Path(out), "out")
    model, config = folder.network(name)
    data = config.data
    metadata = {"data": data.source, "fold": data.fold, "model": config.model.name}
    shots = shots or data.shots
    difference = export_onnx(model, out, data.size, shots, metadata=metadata)
    return (
        f"{out}: {', '.join(INPUTS)} to logits, {shots}-shot, {data.size} pixels; "
        f"onnxruntime's logits are torch's to {difference:.0e}"
    )


class _Logits(nn.Module):
    def __init__(self, model: FewShotModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, query_image: Tensor, support_images: Tensor, support_masks: Tensor) -> Tensor:
        return self.model(query_image, support_images, support_masks).logits


def _cosine_max(query: Tensor, support: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `svf_fast.cosine_max` with operators that ONNX has, through an N×M matrix."""
    masked = support * mask.unsqueeze(1)
    norms = query.norm(dim=1).unsqueeze(2) * masked.norm(dim=1).unsqueeze(1)
    values, index = ((query.transpose(1, 2) @ masked) / (norms + 1e-7)).max(dim=2)
    return values, index


def _onnxruntime() -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise ImportError(
            f"export: {error.name} is not installed; pip install 'svf-fast[onnx]' brings it"
        ) from error
    return onnxruntime
