"""Makes a small copy of Pascal-5i to carry to a machine without a network: PACK/data/pascal.

    python -m benchmarks.gpu.pack ../shared --out runs/pack           # --weights: ResNet-50's too
    SVF_SHARED=runs/pack python -m benchmarks.gpu …

Photos of 257 px as WebP, masks by the nearest pixel, the lists, and ``pascal.yaml`` with the
settings that `fss train` needs. What does not fit is thinned out evenly, of both lists alike.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from fss.data.pascal import IMAGES, LISTS, MASKS

MIB = 2**20
SIDE = 257  # px, the longer side: room for crops of 225
MIN_AREA, AT = 2048, 500  # px of an object that counts, in photos whose longer side is this
WEIGHTS = "weights/resnet50_imagenet.safetensors"
CONFIG = "pascal.yaml"


class Packed(NamedTuple):
    """A photo and its mask, encoded."""

    name: str
    photo: bytes
    mask: bytes

    @property
    def line(self) -> str:
        """Of the list."""
        return f"{IMAGES}/{self.name}.webp {MASKS}/{self.name}.png\n"

    @property
    def bytes(self) -> int:
        return len(self.photo) + len(self.mask) + len(self.line)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path, help="folder with data/pascal")
    parser.add_argument("--out", type=Path, required=True, help="folder of the copy, a new one")
    parser.add_argument("--mib", type=float, default=50, help="at most, all together")
    parser.add_argument("--side", type=int, default=SIDE, help="longer side of a photo, px")
    parser.add_argument("--quality", type=int, default=60, help="of WebP, 0 to 100")
    parser.add_argument("--weights", action="store_true", help=f"with {WEIGHTS}")
    options = parser.parse_args(arguments)
    source, target = options.shared / "data/pascal", options.out / "data/pascal"
    if not (source / LISTS / "train.txt").is_file():
        parser.error(f"shared: expected {source / LISTS}/train.txt, found none")
    if options.out.exists():
        parser.error(f"out: expected a new folder, {options.out} is there; remove it")
    room = options.mib * MIB
    if options.weights:
        room -= (options.shared / WEIGHTS).stat().st_size
    packed = {
        split: _packed(_pairs(source, split), options.side, options.quality)
        for split in ("train", "val")
    }
    total = sum(one.bytes for every in packed.values() for one in every)
    area = MIN_AREA * (options.side / AT) ** 2
    config = f"# {MIN_AREA} px at {AT} px are {area:.0f} at {options.side} px.\n"
    config += f"data: {{source: pascal, min_area: {area:.0f}}}\n"
    share = min(1.0, (room - len(config)) / total)
    if share <= 0:
        parser.error(f"mib: expected more than {options.mib - room / MIB:.0f}, got {options.mib}")
    for folder in (IMAGES, MASKS, LISTS):
        (target / folder).mkdir(parents=True)
    written = 0
    for split, every in packed.items():
        kept = _thinned(every, share)
        for one in kept:
            (target / IMAGES / f"{one.name}.webp").write_bytes(one.photo)
            (target / MASKS / f"{one.name}.png").write_bytes(one.mask)
        (target / LISTS / f"{split}.txt").write_text("".join(one.line for one in kept))
        written += sum(one.bytes for one in kept)
        print(f"{split}: {len(kept)} of {len(every)} photos")
    (target / CONFIG).write_text(config)
    if options.weights:
        (options.out / WEIGHTS).parent.mkdir()
        shutil.copyfile(options.shared / WEIGHTS, options.out / WEIGHTS)
        written += (options.out / WEIGHTS).stat().st_size
    print(f"{options.out}: {written / MIB:.1f} MiB")
    return 0


def _pairs(source: Path, split: str) -> list[tuple[Path, Path]]:
    lines = (source / LISTS / f"{split}.txt").read_text().splitlines()
    return [(source / image, source / mask) for image, mask in map(str.split, lines)]


def _packed(pairs: list[tuple[Path, Path]], side: int, quality: int) -> list[Packed]:
    with ProcessPoolExecutor() as pool:
        sides, qualities = [side] * len(pairs), [quality] * len(pairs)
        return list(pool.map(_encoded, pairs, sides, qualities, chunksize=32))


def _encoded(pair: tuple[Path, Path], side: int, quality: int) -> Packed:
    photo, mask = (Image.open(path) for path in pair)
    factor = min(1.0, side / max(photo.size))
    size = (max(1, round(factor * photo.width)), max(1, round(factor * photo.height)))
    files = io.BytesIO(), io.BytesIO()
    photo.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(
        files[0], "WEBP", quality=quality
    )
    mask.resize(size, Image.Resampling.NEAREST).save(files[1], "PNG", optimize=True)
    return Packed(pair[0].stem, *(file.getvalue() for file in files))


def _thinned(packed: list[Packed], share: float) -> list[Packed]:
    """Choose a share of the photos, evenly from first to last."""
    count = int(share * len(packed))
    return [packed[index * len(packed) // count] for index in range(count)]


if __name__ == "__main__":
    sys.exit(main())
