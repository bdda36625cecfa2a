"""A packed Pascal-5i trains: fewer and smaller photos, the same classes and folds."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from benchmarks.gpu import pack
from fss.cli import main as fss
from fss.data import PascalSource


@pytest.fixture
def small(tmp_path):
    """Write twelve photos of 500 px with one class each, in the layout of Pascal-5i."""
    root = tmp_path / "shared" / "data" / "pascal"
    for name in (pack.IMAGES, pack.MASKS, pack.LISTS):
        (root / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, numbers in (("train", range(8)), ("val", range(8, 12))):
        lines = []
        for number in numbers:
            photo = rng.integers(0, 256, (375, 500, 3), dtype=np.uint8)
            mask = np.zeros((375, 500), np.uint8)
            mask[50:300, 100:400] = 1 + 5 * (number % 2)  # a class of fold 0, one of fold 1
            mask[0] = 255
            Image.fromarray(photo).save(root / pack.IMAGES / f"2007_{number:06}.jpg")
            Image.fromarray(mask).save(root / pack.MASKS / f"2007_{number:06}.png")
            lines.append(f"{pack.IMAGES}/2007_{number:06}.jpg {pack.MASKS}/2007_{number:06}.png\n")
        (root / pack.LISTS / f"{split}.txt").write_text("".join(lines))
    return tmp_path / "shared"


def files(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_all_that_fits(small, tmp_path):
    assert pack.main([str(small), "--out", str(tmp_path / "pack")]) == 0
    source = PascalSource(tmp_path / "pack/data/pascal")
    assert len(source) == 12 and len(source.indices("train")) == 8
    photo, mask = source.load(0)
    assert photo.shape == (193, 257, 3) and set(np.unique(mask)) == {0, 1, 255}
    share = 250 * 300 / (375 * 500)
    assert source.class_areas(0)[1] / mask.size == pytest.approx(share, rel=0.02)


def test_what_does_not_fit_is_thinned_evenly(small, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    pack.main([str(small), "--out", str(whole)])
    mib = files(whole) / pack.MIB / 2
    pack.main([str(small), "--out", str(half), "--mib", f"{mib:.4f}"])
    assert files(half) <= mib * pack.MIB * 1.02
    source = PascalSource(half / "data/pascal")
    assert len(source.indices("train")) == pytest.approx(4, abs=1)
    assert len(source.indices("test")) == pytest.approx(2, abs=1)
    first, *_, last = (source.name(index) for index in source.indices("train"))
    assert first == "2007_000000" and last >= "2007_000005"


def test_its_settings_are_those_of_a_run(small, tmp_path):
    pack.main([str(small), "--out", str(tmp_path / "pack")])
    root = tmp_path / "pack/data/pascal"
    assert "min_area: 541" in (root / pack.CONFIG).read_text()
    words = f"train --config {root / pack.CONFIG} --data.root {root} --data.fold 0 --data.size 65"
    words += " --data.workers 0 --data.drop_small_classes true --model.backbone resnet18"
    words += " --model.width 8 --model.weights none --steps 1 --batch_size 1 --pictures 0"
    words += f" --validation_episodes 1 --test_episodes 1 --test_seeds [1] --out {tmp_path / 'run'}"
    assert fss(words.split()) == 0


def test_errors_name_the_argument(small, tmp_path, capsys):
    for words in ([tmp_path, "--out", tmp_path / "a"], [small, "--out", small]):
        with pytest.raises(SystemExit):
            pack.main(list(map(str, words)))
    with pytest.raises(SystemExit):
        pack.main([str(small), "--out", str(tmp_path / "b"), "--mib", "0.00001"])
    told = capsys.readouterr().err
    assert "shared: expected" in told and "out: expected" in told and "mib: expected" in told


def test_real_photos_fit_into_fifty_mib(shared):
    """Of a sample, the whole takes a minute: all 3316 at the size of these."""
    root = shared / "data/pascal"
    if not root.is_dir():
        pytest.skip(f"no real photos here: {root} is not there")
    pairs = pack._pairs(root, "train")
    packed = pack._packed(pairs[:: len(pairs) // 24], pack.SIDE, 60)
    assert 3316 * sum(one.bytes for one in packed) / len(packed) < 50 * pack.MIB
