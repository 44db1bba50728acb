"""What is said of a data set before anything is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from protoseg.data import PictureFolder, VOCFolder, save_mask, survey
from protoseg.data.surveys import DECODED
from tests.folders import table


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for number in range(6):
        pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"p{number}.jpg")
    table(tmp_path / "tags.csv", [("id", "labels"), *((f"p{number}", "cat" if number else "") for number in range(6))])
    return tmp_path


def told(root: Path, **options: object) -> str:
    folder = PictureFolder(root / "in", root / "tags.csv", **options)  # type: ignore[arg-type]
    return str(survey({"mine": folder}))


def test_what_there_is(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(root / "in" / "p1.jpg").save(root / "in" / "p1.jpg", exif=exif)
    Image.new("L", (99, 50)).save(root / "in" / "p2.jpg")
    text = told(root, max_side=64)
    assert "mine: 6 pictures, 1 classes: cat 5" in text
    assert "1 pictures without a class, of background only: 'p0'" in text
    assert "sizes from 16 x 12 to 99 x 50" in text
    assert "5 JPEG RGB, 1 JPEG L" in text
    assert "1 pictures that EXIF says to turn, made upright, masks alike" in text
    assert "1 pictures are read with their longer side reduced to 64 pixels" in text
    assert "masks to score against of 0 of 6 pictures" in text
    assert text.endswith("no faults")
    assert "1 pictures that EXIF says to turn, left as they are" in told(root, upright=False)


def test_pictures_that_are_there_twice(root: Path) -> None:
    shutil.copy(root / "in" / "p1.jpg", root / "in" / "p4.jpg")
    shutil.copy(root / "in" / "p0.jpg", root / "in" / "p3.jpg")
    text = told(root)
    assert "2 pictures are there more than once: 'p0 = p3', 'p1 = p4'" in text
    assert "1 of them with other tags each time: 'p0 = p3'" in text


def test_pictures_of_one_size_that_differ_in_a_pixel_are_not_the_same(root: Path) -> None:
    for number in range(6):
        (root / "in" / f"p{number}.jpg").unlink()
        pixels = np.zeros((200, 200, 3), np.uint8)
        pixels[0, 0] = number  # in front of what is looked at first
        Image.fromarray(pixels).save(root / "in" / f"p{number}.bmp")
    assert "more than once" not in told(root)


def test_masks(root: Path) -> None:
    (root / "true").mkdir()
    for number in (0, 1, 2):
        mask = np.zeros((12, 16), np.uint8)
        mask[:5] = number < 2
        save_mask(root / "true" / f"p{number}.png", mask)
    text = told(root, masks=root / "true")
    assert "masks to score against of 3 of 6 pictures" in text
    assert "a tag is not in the mask of 1 pictures: 'p2'" in text
    assert "a class of the mask is no tag of 1 pictures: 'p0'" in text
    assert text.endswith("no faults")


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_of_many_pictures_headers_and_ends_are_read(kind: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert DECODED > 1000
    monkeypatch.setattr("protoseg.data.surveys.DECODED", 3)
    monkeypatch.setattr("protoseg.data.surveys.decode", lambda *_, **__: pytest.fail("decoded"))
    if kind == "png":
        for number in range(6):
            path = root / "in" / f"p{number}.jpg"
            Image.open(path).save(path.with_suffix(".png"))
            path.unlink()
    assert told(root).endswith("no faults")
    path = root / "in" / f"p4.{kind}"
    path.write_bytes(path.read_bytes()[:-100])
    assert f"p4.{kind}: it is truncated" in told(root)
    path.write_bytes(b"GIF89a")
    assert f"p4.{kind}: " in told(root)


def test_of_voc_s_layout(root: Path) -> None:
    (root / "in").rename(root / "JPEGImages")
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("p0\np1.jpg\nJPEGImages/p9.jpg\n")
    table(root / "labels.csv", [("ID", "Labels"), ("p0", ""), ("p1", "traffic light"), ("p9", "cat;dog")])
    folder = VOCFolder(root, "train")
    assert folder.classes == ("cat", "dog", "traffic light")
    assert folder.ids == ["p0", "p1", "p9"]
    found = survey({"train": folder})
    assert [fault.where for fault in found.faults] == ["train, p9"]
    assert f"{root / 'JPEGImages' / 'p9.jpg'}: no such file, nor with another ending" in found.faults[0].problem
    assert list(found.broken["train"]) == ["p9"]
