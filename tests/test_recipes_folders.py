"""The trainer on VOC-layout folders, and on faulty ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from protoseg.data import Scenes, VOCFolder, save_mask
from protoseg.recipes.pictures import Pictures
from tests.trainer import TINY, assert_maps, findings, main, masks, miou, read

MSRC15 = Path(__file__).parents[2] / "shared" / "data" / "msrc15"


CLASSES = ("disc", "bar")


def draw(root: Path, name: str, tag: int, generator: np.random.Generator, *, mask: bool = True) -> None:
    """Write a picture of 40 x 56 with one object on it."""
    pixels = generator.integers(0, 90, (40, 56, 3), dtype=np.uint8)
    truth = np.zeros((40, 56), np.uint8)
    y, x = generator.integers(4, 16), generator.integers(4, 28)
    truth[y : y + (20 if tag == 1 else 8), x : x + 20] = tag
    pixels[truth == tag, tag] = 230
    Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg")
    if mask:
        truth[0] = 255
        save_mask(root / "SegmentationClass" / f"{name}.png", truth)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "data", *, classes: tuple[str, ...] = CLASSES, masks: bool = True) -> Path:
        root, generator = tmp_path / name, np.random.default_rng(0)
        for each in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (root / each).mkdir(parents=True)
        ids = [f"p{index}" for index in range(14)]
        for index, each in enumerate(ids):
            draw(root, each, 1 + index % 2, generator, mask=masks)
        (root / "classes.txt").write_text("\n".join(("background", *classes)) + "\n")
        rows = [f"{each},{classes[index % 2]}" for index, each in enumerate(ids)]
        (root / "labels.csv").write_text("\n".join(("id,labels", *rows)) + "\n")
        (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(ids[:10]) + "\n")
        (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(ids[10:]) + "\n")
        return root

    return make


def on(root: Path, *flags: str) -> list[str]:
    settings = [*TINY, "--preset", "scenes", "--epochs", "2", "--batch", "5", "--data", str(root)]
    return [*settings, "--output", str(root.parent / "out"), *flags]


def test_masks_and_tags_come_from_where_they_are_said_to(folder: Callable[..., Path], tmp_path: Path) -> None:
    root = folder()
    (root / "labels.csv").unlink()
    (root / "SegmentationClass").rename(root / "SegmentationClassAug")
    flags = on(root, "--mask-dir", "SegmentationClassAug", "--tags", "masks", "--stages", "classify", "seeds")
    main(flags)
    assert_maps(read(tmp_path / "out")["maps"], ("background", *CLASSES))


def test_a_folder_runs_through(folder: Callable[..., Path], tmp_path: Path) -> None:
    root = folder()
    main(on(root, "--method", "none", "--threshold", "sweep", "--workers", "1"))
    metrics = read(tmp_path / "out")
    assert_maps(metrics["maps"], ("background", *CLASSES))
    found = masks(tmp_path / "out" / "pseudo_masks")
    ids = VOCFolder(root, "train").ids
    assert set(found) == set(ids)
    assert {mask.shape for mask in found.values()} == {(40, 56)}
    truth = masks(root / "SegmentationClass")
    pseudo = metrics["pseudo_masks"]["train"]
    assert pseudo["miou"] == pytest.approx(miou([found[name] for name in ids], [truth[name] for name in ids], 2))
    assert pseudo["map"] == "cam"
    assert pseudo["threshold"] == metrics["maps"]["train"]["cam"]["threshold"]


def test_evaluation_pictures_of_another_folder(folder: Callable[..., Path], tmp_path: Path) -> None:
    root, other = folder(), folder("other")
    (root / "ImageSets/Segmentation/val.txt").unlink()
    (other / "SegmentationClass" / "p12.png").unlink()  # one without a mask: left out of the score
    flags = ("--eval-data", str(other), "--stages", "classify", "seeds")
    main(on(root, *flags))
    assert_maps(read(tmp_path / "out")["maps"], ("background", *CLASSES))


def test_evaluation_pictures_of_other_classes_are_an_error(folder: Callable[..., Path]) -> None:
    root, other = folder(), folder("other", classes=("disc", "rod"))
    with pytest.raises(SystemExit, match=r"--eval-data: its classes \('disc', 'rod'\) are not .*\('disc', 'bar'\)"):
        main(on(root, "--eval-data", str(other)))


def test_without_masks_there_are_pseudo_masks_and_thresholds(folder: Callable[..., Path], tmp_path: Path) -> None:
    root = folder(masks=False)
    main(on(root))
    metrics = read(tmp_path / "out")
    for split in ("train", "eval"):
        for entry in metrics["maps"][split].values():
            assert entry["miou"] is entry["threshold"] is entry["miou_mask_free"] is None
            assert entry["per_class"] == {}
            assert 0 < entry["threshold_mask_free"] < 1
    assert metrics["pseudo_masks"]["train"]["miou"] is None
    assert metrics["pseudo_masks"]["train"]["pictures"] == {}
    assert metrics["segmentation"]["eval"]["miou"] is None
    assert len(masks(tmp_path / "out" / "pseudo_masks")) == 10
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") >= 6 * 4  # there is something to see all the same
    main(on(root, "--resume"))  # from what was null in JSON
    assert findings(read(tmp_path / "out")) == findings(metrics)


def test_a_sweep_needs_masks(folder: Callable[..., Path]) -> None:
    with pytest.raises(SystemExit, match="--threshold sweep: the training pictures have no masks; take otsu"):
        main(on(folder(masks=False), "--threshold", "sweep", "--stages", "classify", "seeds", "refine"))


def test_a_broken_picture_stops_with_its_path_or_is_left_out(folder: Callable[..., Path], tmp_path: Path) -> None:
    root = folder()
    broken = {"train": root / "JPEGImages" / "p3.jpg", "eval": root / "JPEGImages" / "p11.jpg"}
    for path in broken.values():
        path.write_bytes(path.read_bytes()[:700])
    flags = ("--stages", "classify", "seeds", "refine")
    with pytest.raises(SystemExit, match="2 faults") as stopped:
        main(on(root, *flags))
    assert all(f"{path}: cannot be read" in str(stopped.value) for path in broken.values())
    assert not (tmp_path / "out").exists()
    main(on(root, *flags, "--skip-broken"))
    metrics = read(tmp_path / "out")
    assert {split: list(each) for split, each in metrics["broken"].items()} == {"train": ["p3"], "eval": ["p11"]}
    for split, path in broken.items():
        assert str(path) in next(iter(metrics["broken"][split].values()))
    assert set(masks(tmp_path / "out" / "pseudo_masks")) == {f"p{index}" for index in range(10)} - {"p3"}


def test_a_broken_picture_in_a_reader_process_is_named(folder: Callable[..., Path]) -> None:
    root = folder()
    path = root / "JPEGImages" / "p3.jpg"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(SystemExit, match=rf"{path}: cannot be read"):
        main(on(root, "--workers", "1", "--stages", "classify"))


def test_when_every_picture_is_broken(folder: Callable[..., Path]) -> None:
    root = folder()
    for path in (root / "JPEGImages").iterdir():
        path.write_bytes(b"")
    with pytest.raises(SystemExit, match="--skip-broken: all 10 pictures are broken, the first: "):
        main(on(root, "--skip-broken"))


def test_an_empty_split_and_a_missing_folder_or_split(folder: Callable[..., Path], tmp_path: Path) -> None:
    root = folder()
    with pytest.raises(SystemExit, match=r"--data: .*nowhere: no such folder; give the one"):
        main(on(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"test.txt: no such split; the splits there are train, val"):
        main(on(root, "--train-split", "test"))
    (root / "ImageSets/Segmentation/train.txt").write_text("\n")
    with pytest.raises(SystemExit, match=r"train.txt: the split is empty"):
        main(on(root))
    assert not (tmp_path / "out").exists()


def test_what_is_held_in_memory_is_limited_in_bytes() -> None:
    scenes = Scenes(5, size=32)
    size = 32 * 32 * (3 + 1)
    held, partly = Pictures(scenes), Pictures(scenes, keep=3 * size + 1)
    assert [each.id for each in partly] == held.ids == scenes.ids
    assert held[4] is held[4]
    assert [partly[place] is partly[place] for place in range(5)] == [True, True, True, False, False]
    assert torch.equal(partly[4].image, held[4].image)


def test_without_a_val_split_and_without_classes_txt(folder: Callable[..., Path], tmp_path: Path) -> None:
    root = folder(masks=False)
    (root / "ImageSets/Segmentation/val.txt").unlink()
    (root / "classes.txt").unlink()
    main(on(root))
    metrics = read(tmp_path / "out")
    assert set(metrics["maps"]) == {"train"}
    assert metrics["segmentation"]["eval"]["miou"] is None
    assert (tmp_path / "out" / "classes.txt").read_text() == "background\nbar\ndisc\n"


def test_a_picture_without_a_class_becomes_background(folder: Callable[..., Path], tmp_path: Path) -> None:
    root = folder()
    table = root / "labels.csv"
    table.write_text(table.read_text().replace("p2,disc", "p2,"))
    main(on(root, "--stages", "classify", "seeds", "refine"))
    assert not masks(tmp_path / "out" / "pseudo_masks")["p2"].any()
    assert read(tmp_path / "out")["pseudo_masks"]["train"]["empty"] >= 1
    assert "p2" in (tmp_path / "out" / "report.html").read_text()


def test_masks_of_0_and_255_are_a_fault(folder: Callable[..., Path]) -> None:
    root = folder()
    (root / "classes.txt").write_text("background\ndisc\n")
    table = root / "labels.csv"
    table.write_text(table.read_text().replace("bar", "disc"))
    for path in (root / "SegmentationClass").iterdir():
        save_mask(path, np.where(np.array(Image.open(path)) > 0, 255, 0).astype(np.uint8))
    with pytest.raises(SystemExit, match=r"tags that never occur in a mask: 'disc' in 10 masks; .* 0 and 255, .* as 1"):
        main(on(root))


@pytest.mark.parametrize("name", ["p{}.PNG", "p{}_mask.png", "p{}.tif"])
def test_masks_are_found_by_other_names(name: str, folder: Callable[..., Path]) -> None:
    root = folder()
    for number in range(14):
        path = root / "SegmentationClass" / f"p{number}.png"
        if name.endswith("tif"):
            Image.open(path).save(path.with_name(name.format(number)))
            path.unlink()
        else:
            path.rename(path.with_name(name.format(number)))
    before = [sample.mask for sample in VOCFolder(root, "train")]
    assert all(mask is not None for mask in before)


def test_splits_that_overlap_are_a_fault(folder: Callable[..., Path]) -> None:
    root = folder()
    shutil.copy(root / "JPEGImages" / "p3.jpg", root / "JPEGImages" / "p12.jpg")
    with pytest.raises(SystemExit, match=r"train and eval: 1 pictures are in both: 'p3'; keep each in one"):
        main(on(root))
    with (root / "ImageSets/Segmentation/val.txt").open("a") as file:
        file.write("p1\n")
    with pytest.raises(SystemExit, match=r"train and eval: 2 pictures are in both: 'p1', 'p3'"):
        main(on(root))


def test_masks_to_learn_from_must_fit(folder: Callable[..., Path], tmp_path: Path) -> None:
    root = folder()
    small = tmp_path / "small"
    small.mkdir()
    for number in range(9):
        save_mask(small / f"p{number}.png", np.zeros((20, 28), np.uint8))
    flags = ("--head", "amn", "--masks", str(small), "--backbone", "small:8", "--stages", "classify")
    with pytest.raises(
        SystemExit, match=r"--masks: 10 of 10 cannot be used:\n.*\(20, 28\), its picture \(40, 56\)"
    ) as stopped:
        main(on(root, *flags))
    assert "p9.png: " in str(stopped.value)


@pytest.mark.slow
@pytest.mark.skipif(not MSRC15.is_dir(), reason=f"needs {MSRC15.name} beside the repository")
def test_real_pictures(tmp_path: Path) -> None:
    flags = ["--stages", "classify", "seeds", "--epochs", "1", "--batch", "8", "--output", str(tmp_path)]
    main([*TINY, "--data", str(MSRC15), "--preset", "scenes", *flags])
    metrics = read(tmp_path)
    assert_maps(metrics["maps"], ("background", *VOCFolder(MSRC15, "train").classes))
    assert metrics["pseudo_masks"] == {"train": {}}
    assert metrics["broken"] == {"train": {}, "eval": {}}
