"""``protoseg masks`` and ``protoseg check`` on the same pictures in every shape, and on faulty ones."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import folders
from tests.trainer import masks as read_masks
from tests.trainer import read

from protoseg.data import TaggedPictures, save_mask  # isort: skip
from protoseg.data.files import read_colors, read_mask  # isort: skip
from protoseg.recipes import check, convert, masks, predict  # isort: skip

TINY = ["--device", "cpu", "--preset", "scenes", "--size", "48", "--crop", "48", "--backbone", "small:8"]
QUICK = [*TINY, "--epochs", "1", "--batch", "20", "--refine", "none"]


def opened(flags: list[str]) -> TaggedPictures:
    import argparse

    parser = argparse.ArgumentParser()
    check.add_sources(parser)
    (found,) = check.open_folder(parser.parse_args(flags)).values()
    return found


def tags_of(folder: TaggedPictures) -> dict[str, set[str]]:
    return {
        Path(name).name: {tag for tag, here in zip(folder.classes, row, strict=True) if here}
        for name, row in zip(folder.ids, folder.labels, strict=True)
    }


@pytest.mark.parametrize("shape", sorted(folders.SHAPES))
def test_every_shape_gives_the_same_tags_and_pictures(shape: str, tmp_path: Path) -> None:
    given, classes = folders.items(60)
    folder = opened(folders.SHAPES[shape](tmp_path, given, classes))
    assert tags_of(folder) == {item.name: {*item.tags} for item in given}
    assert folder.classes == classes
    by_name = {item.name: item for item in given}
    for sample in folder:
        assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), by_name[Path(sample.id).name].pixels)


def test_folders_as_classes(tmp_path: Path) -> None:
    given, _ = folders.items(60)
    given = [item for item in given if item.tags]
    folder = opened(folders.imagefolder(tmp_path, given, ()))
    assert tags_of(folder) == {item.name: {item.tags[0]} for item in given}


def test_outlines_become_masks(tmp_path: Path) -> None:
    given, classes = folders.items(10)
    folder = opened(folders.coco(tmp_path, given, classes))
    for item, sample in zip(given, folder, strict=True):
        assert sample.mask is not None
        present = [classes.index(tag) + 1 for tag in item.tags]
        assert np.array_equal(sample.mask.numpy(), np.where(np.isin(item.mask, present), item.mask, 0))


@pytest.mark.slow
def test_masks_are_the_same_whatever_the_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, classes = folders.items(60)
    found: dict[str, dict[str, Any]] = {}
    for shape in folders.SHAPES:
        root = tmp_path / shape
        root.mkdir()
        flags = folders.SHAPES[shape](root, given, classes)
        masks.main([*flags, "--output", str(root / "out"), *QUICK])
        folder = root / "out" / "pseudo_masks"
        found[shape] = {path.stem: path.read_bytes() for path in folder.rglob("*.png")}
        assert f"60 masks in {folder} (" in capsys.readouterr().out
    assert set(found["plain"]) == {item.name for item in given}
    assert any(np.any(mask) for mask in read_masks(tmp_path / "plain" / "out" / "pseudo_masks").values())
    for shape, each in found.items():
        assert each == found["plain"], shape


class TestTwelveFaults:
    KINDS = (
        *("bild 000", "bild 001", "bild 002", "bild 003", "bild 004", "nowhere", "stranger", "bild 005"),
        *("bild 006", "bild 007", "bild 008", "bild 009"),
    )

    def test_one_list_names_them_all_in_seconds(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        given, classes = folders.items(60)
        flags = folders.faulty(tmp_path, given, classes)
        began = time.monotonic()
        with pytest.raises(SystemExit) as stopped:
            check.main(flags)
        assert time.monotonic() - began < 10
        assert stopped.value.code == 1
        listed = capsys.readouterr().out.partition("12 faults:")[2].strip().splitlines()
        assert len(listed) == 12
        for name in self.KINDS:
            assert sum(f"{name}" in line for line in listed) >= 1, name
        for words in ("is truncated|image file|broken|Truncated", "none of", "12000 x 12000", "mode F", "format JPEG"):
            assert any(word in line for word in words.split("|") for line in listed), words

    def test_training_stops_before_the_first_step_or_goes_on_without_them(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given, classes = folders.items(60)
        flags = [*folders.faulty(tmp_path, given, classes), "--output", str(tmp_path / "out"), *QUICK]
        with pytest.raises(SystemExit, match="12 faults") as stopped:
            masks.main(flags)
        assert "Traceback" not in str(stopped.value)
        assert not (tmp_path / "out").exists()
        metrics = masks.main([*flags, "--skip-broken"])
        assert len(metrics["broken"]["train"]) == 9
        printed = capsys.readouterr().out
        assert "left out, train: 9" in printed
        assert "50 masks in" in printed
        assert read(tmp_path / "out")["broken"] == metrics["broken"]


def test_a_run_is_never_deleted_unasked(tmp_path: Path) -> None:
    given, classes = folders.items(20)
    flags = [*folders.plain(tmp_path, given, classes), "--output", str(tmp_path / "out"), *QUICK]
    masks.main(flags)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=r"--output: .* holds results .* or say --overwrite"):
        masks.main(flags)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    masks.main([*flags, "--resume"])
    other = masks.main([*flags, "--stages", "refine", "--overwrite", "--threshold", "0.9"])
    assert other["pseudo_masks"]["train"]["threshold"] == 0.9
    masks.main([*flags, "--overwrite"])


def test_large_pictures_are_read_smaller_and_their_masks_have_the_full_size(tmp_path: Path) -> None:
    given, classes = folders.items(20)
    flags = [*folders.plain(tmp_path, given, classes), "--output", str(tmp_path / "out"), *QUICK]
    masks.main([*flags, "--max-side", "32"])
    for name, mask in read_masks(tmp_path / "out" / "pseudo_masks").items():
        assert mask.shape == next(item.mask.shape for item in given if item.name == name)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[folders.Item], tuple[str, ...]]:
    """A finished run; not to be changed."""
    root = tmp_path_factory.mktemp("done")
    given, classes = folders.items(20)
    masks.main([*folders.plain(root, given, classes), "--output", str(root / "out"), *QUICK])
    return root, given, classes


class TestAfterwards:
    """``predict`` and ``convert`` on a finished run."""

    def test_predict_elsewhere_gives_the_masks_of_the_run(
        self, done: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        root, _, _ = done
        moved = tmp_path / "moved"
        shutil.copytree(root / "out", moved)
        for path in (moved, *moved.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o222)
        flags = [str(moved), str(root / "in"), "--output", str(tmp_path / "new"), "--device", "cpu"]
        predict.main([*flags, "--tags", str(root / "tags.csv")])
        for path in (moved, *moved.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)
        expected = read_masks(root / "out" / "pseudo_masks")
        found = read_masks(tmp_path / "new" / "masks")
        assert set(found) == set(expected)
        for name, mask in found.items():
            assert np.array_equal(mask, expected[name]), name
        assert "20 masks in" in capsys.readouterr().out

        with pytest.raises(SystemExit, match="holds 20 masks; take another, or say --resume"):
            predict.main([*flags, "--tags", str(root / "tags.csv")])
        (tmp_path / "new" / "masks" / "bild 003.png").unlink()
        predict.main([*flags, "--tags", str(root / "tags.csv"), "--resume"])
        assert "1 masks in" in (printed := capsys.readouterr().out)
        assert "19 kept" in printed
        assert np.array_equal(read_masks(tmp_path / "new" / "masks")["bild 003"], expected["bild 003"])

    def test_predict_without_tags_asks_the_network(self, done: Any, tmp_path: Path) -> None:
        root, given, classes = done
        for probability, count in (("0", len(classes)), ("1", 0)):
            output = tmp_path / probability
            flags = [str(root / "out"), str(root / "in"), "--output", str(output), "--device", "cpu"]
            predict.main([*flags, "--probability", probability])
            rows = (output / "tags-0.csv").read_text().splitlines()[1:]
            assert [len([tag for tag in row.partition(",")[2].split(";") if tag]) for row in rows] == [count] * len(
                given
            )
        assert not any(mask.any() for mask in read_masks(tmp_path / "1" / "masks").values())

    def test_what_is_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match=r"is no folder of a finished run: no .*config\.json"):
            predict.main([str(tmp_path), str(tmp_path)])
        with pytest.raises(SystemExit, match="must be the folder of a run, or of masks with a classes"):
            convert.main([str(tmp_path), "--to", "coco"])

    def test_coco_reads_back_as_the_same_masks(self, done: Any, tmp_path: Path) -> None:
        root, given, _ = done
        path = tmp_path / "coco.json"
        convert.main([str(root / "out"), "--to", "coco", "--output", str(path)])
        content = json.loads(path.read_text())
        assert [each["file_name"] for each in content["images"]] == [f"{item.name}.png" for item in given]
        expected = read_masks(root / "out" / "pseudo_masks")
        order = root / "out" / "classes.txt"
        folder = opened([str(root / "in"), "--tags", str(path), "--classes", str(order)])
        for sample in folder:
            assert sample.mask is not None
            assert np.array_equal(sample.mask.numpy(), expected[sample.id])
        for each in content["annotations"]:
            inside = expected[given[each["image_id"] - 1].name] == each["category_id"]
            left, top, width, height = each["bbox"]
            assert each["area"] == inside.sum() == inside[top : top + height, left : left + width].sum()
        with pytest.raises(SystemExit, match="exists; take another, or say --overwrite"):
            convert.main([str(root / "out"), "--to", "coco", "--output", str(path)])

    def test_labelme_reads_back_as_nearly_the_same_masks(self, tmp_path: Path) -> None:
        truth = tmp_path / "masks"
        truth.mkdir()
        ring = np.zeros((40, 60), np.uint8)
        ring[5:30, 0:50] = 2
        ring[10:20, 20:30] = 1
        save_mask(truth / "bild 000.png", ring)
        (truth / "classes.txt").write_text("background\nant\nbee\n")
        convert.main([str(truth), "--to", "labelme", "--output", str(tmp_path / "labelme")])
        Image.new("RGB", (60, 40)).save(tmp_path / "labelme" / "bild 000.jpg")
        folder = opened([str(tmp_path / "labelme"), "--classes", str(truth / "classes.txt")])
        mask = folder[0].mask
        assert mask is not None
        assert (mask.numpy() != ring).mean() < 0.08  # a border of a pixel belongs to both sides
        assert np.array_equal(mask.numpy()[12:18, 22:28], ring[12:18, 22:28])

    def test_colors_read_back(self, done: Any, tmp_path: Path) -> None:
        root, _, classes = done
        convert.main([str(root / "out"), "--to", "color", "--output", str(tmp_path / "color")])
        colors = read_colors(tmp_path / "color" / "colors.txt", classes)
        for name, mask in read_masks(root / "out" / "pseudo_masks").items():
            assert np.array_equal(read_mask(tmp_path / "color" / f"{name}.png", len(classes), colors), mask)

    def test_irn_s_files(self, done: Any, tmp_path: Path) -> None:
        root, given, classes = done
        convert.main([str(root / "out"), "--to", "irn", "--output", str(tmp_path / "irn")])
        for item in given:
            # As IRN itself loads them; the file is our own.
            content = np.load(tmp_path / "irn" / f"{item.name}.npy", allow_pickle=True).item()
            height, width = item.mask.shape
            assert [classes[key] for key in content["keys"]] == sorted(item.tags)
            assert content["cam"].shape == (len(item.tags), -(-height // 4), -(-width // 4))
            assert content["high_res"].shape == (len(item.tags), height, width)
            assert content["high_res"].dtype == np.float32
