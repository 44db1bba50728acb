from __future__ import annotations

import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from protoseg.data import VOC_CLASSES, Sample, UnreadableFileError, VOCFolder, save_mask, voc_palette

MSRC15 = Path(__file__).parents[2] / "shared" / "data" / "msrc15"
Make = Callable[..., Path]


def listing(samples: list[Sample]) -> list[Sample]:
    return samples


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def annotation(*names: str, difficult: int = 0) -> str:
    things = "".join(f"<object><name>{name}</name><difficult>{difficult}</difficult></object>" for name in names)
    return f"<annotation>{things}</annotation>"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three pictures of 6 x 9 with masks; classes ant, bee, cow; a has 1, b has 2 and 3, c has none."""
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass"):
        (tmp_path / folder).mkdir()
    for name, indices in (("a", [0, 1, 255]), ("b", [2, 3, 0]), ("c", [0, 0, 255])):
        pixels = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        save_mask(tmp_path / "SegmentationClass" / f"{name}.png", np.repeat([indices], 6, 0).repeat(3, 1))
    write(tmp_path / "classes.txt", "background\nant\nbee\ncow\n")
    write(tmp_path / "labels.csv", "id,labels\na,ant\nb,cow bee\nc,\n")
    write(tmp_path / "ImageSets/Segmentation/train.txt", "b\na\nc\n")
    write(tmp_path / "ImageSets/Segmentation/val.txt", "a\n")
    return tmp_path


def test_reads_ids_classes_labels_pictures_and_masks(root: Path) -> None:
    folder = VOCFolder(root, "train")
    assert folder.root == root
    assert folder.split == "train"
    assert folder.ids == ["b", "a", "c"]
    assert folder.classes == ("ant", "bee", "cow")
    assert folder.labels.tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert folder.labels.dtype == torch.float32
    sample = folder[0]
    assert sample.id == "b"
    assert sample.caption is None
    assert torch.equal(sample.labels, folder.labels[0])
    expected = np.array(Image.open(root / "JPEGImages" / "b.jpg"))
    assert np.array_equal(sample.image.numpy(), expected.transpose(2, 0, 1))
    assert sample.image.is_contiguous()
    assert sample.mask is not None
    assert sample.mask.dtype == torch.uint8
    assert sample.mask.tolist() == [[2, 2, 2, 3, 3, 3, 0, 0, 0]] * 6
    assert torch.equal(folder[-1].image, folder[2].image)
    assert len(list(folder)) == len(folder) == 3
    with pytest.raises(IndexError, match=r"index must be in -3\.\.2, got 3"):
        folder[3]


def test_a_list_of_classes_without_background_loses_none(root: Path) -> None:
    write(root / "classes.txt", "ant\nbee\ncow\n")
    folder = VOCFolder(root, "train")
    assert folder.classes == ("ant", "bee", "cow")
    assert folder.labels.tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert "no line 'background' in front, so that all 3 lines are classes" in folder.notes[0]
    for first in ("_background_", "__ignore__\n_background_", "Background"):
        write(root / "classes.txt", f"{first}\nant\nbee\ncow\n")
        assert VOCFolder(root, "train").classes == folder.classes


def test_names_and_classes_with_spaces_and_lists_with_paths(root: Path) -> None:
    (root / "JPEGImages" / "a.jpg").rename(root / "JPEGImages" / "a b (1).JPG")
    (root / "SegmentationClass" / "a.png").rename(root / "SegmentationClass" / "a b (1).png")
    write(root / "classes.txt", "background\nred ant\nbee\ncow\n")
    write(root / "labels.csv", "id,labels\na b (1),red ant bee\nb,cow\n")
    write(root / "ImageSets/Segmentation/train.txt", "a b (1)\n/JPEGImages/b.jpg /SegmentationClass/b.png\n")
    folder = VOCFolder(root, "train", masks="required")
    assert folder.ids == ["a b (1)", "b"]
    assert folder.labels.tolist() == [[1, 1, 0], [0, 0, 1]]
    assert [sample.id for sample in folder] == folder.ids


def test_a_changed_sample_does_not_change_the_labels(root: Path) -> None:
    folder = VOCFolder(root, "train")
    folder[0].labels.zero_()
    assert folder.labels[0].sum() == 2


def test_labels_need_no_picture(root: Path) -> None:
    for path in (root / "JPEGImages").iterdir():
        path.unlink()
    assert VOCFolder(root, "train").labels.sum() == 3


def test_mask_modes(root: Path) -> None:
    (root / "SegmentationClass" / "a.png").unlink()
    assert VOCFolder(root, "val")[0].mask is None
    assert VOCFolder(root, "train", masks="none")[0].mask is None
    with pytest.raises(UnreadableFileError, match=r"a\.png: no such file; add it"):
        VOCFolder(root, "val", masks="required")[0]


def test_mask_dir(root: Path) -> None:
    (root / "SegmentationClass").rename(root / "SegmentationClassAug")
    assert VOCFolder(root, "val")[0].mask is None
    assert VOCFolder(root, "val", mask_dir="SegmentationClassAug", masks="required")[0].mask is not None


def test_tags_from_masks_only_when_asked(root: Path) -> None:
    write(root / "labels.csv", "id,labels\na,cow\nb,cow\nc,cow\n")
    from_masks = VOCFolder(root, "train", tags="masks", masks="none")
    assert from_masks.labels.tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert from_masks[0].mask is None
    assert VOCFolder(root, "train").labels.tolist() == [[0, 0, 1]] * 3
    (root / "labels.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r'neither labels\.csv nor Annotations.*tags="masks" is possible'):
        VOCFolder(root, "train")
    (root / "SegmentationClass" / "c.png").unlink()
    with pytest.raises(UnreadableFileError, match=r"c\.png: no such file"):
        VOCFolder(root, "train", tags="masks")


def test_tags_from_xml_with_voc_classes_and_difficult_objects(root: Path) -> None:
    (root / "labels.csv").unlink()
    (root / "classes.txt").unlink()
    write(root / "Annotations/a.xml", annotation("person", "dog", "dog"))
    write(root / "Annotations/b.xml", annotation("tvmonitor", difficult=1))
    # Parts of persons are names inside an object: they are no classes.
    part = "<annotation><object><name>aeroplane</name><part><name>head</name></part></object></annotation>"
    write(root / "Annotations/c.xml", part)
    folder = VOCFolder(root, "train")
    assert folder.classes == VOC_CLASSES
    tags = [{folder.classes[place] for place in row.nonzero().flatten().tolist()} for row in folder.labels]
    assert tags == [{"tvmonitor"}, {"person", "dog"}, {"aeroplane"}]


def test_csv_goes_before_xml_unless_told_otherwise(root: Path) -> None:
    write(root / "Annotations/a.xml", annotation("cow"))
    assert VOCFolder(root, "val").labels.tolist() == [[1, 0, 0]]
    assert VOCFolder(root, "val", tags="xml").labels.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("ending", [".jpeg", ".png"])
def test_other_endings_and_gray_pictures(root: Path, ending: str) -> None:
    (root / "JPEGImages" / "a.jpg").unlink()
    Image.new("L", (9, 6), 7).save(root / "JPEGImages" / f"a{ending}")
    image = VOCFolder(root, "val")[0].image
    assert tuple(image.shape) == (3, 6, 9)
    assert (image == 7).all()


def test_exif_turns_picture_and_mask_alike_or_is_left_alone(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (9, 6)).save(root / "JPEGImages" / "a.jpg", exif=exif)
    sample, left = VOCFolder(root, "val")[0], VOCFolder(root, "val", upright=False)[0]
    assert sample.mask is not None
    assert left.mask is not None
    assert sample.image.shape[1:] == sample.mask.shape == (9, 6)
    assert torch.equal(sample.mask, left.mask.rot90(-1))
    # A mask that was drawn on what a viewer shows stays as it is.
    save_mask(root / "SegmentationClass" / "a.png", sample.mask)
    assert torch.equal(VOCFolder(root, "val")[0].mask, sample.mask)  # type: ignore[arg-type]


def test_windows_text_files(root: Path) -> None:
    (root / "labels.csv").write_bytes("\ufeffid,labels\r\na,ant\r\n".encode())
    (root / "classes.txt").write_bytes(b"background\r\nant\r\nbee\r\ncow\r\n")
    (root / "ImageSets/Segmentation/val.txt").write_bytes(b"a \r\n\r\n")
    assert VOCFolder(root, "val").labels.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "ImageSets/Segmentation/train.txt",
            "\n \n",
            r"train\.txt: the split is empty; write one picture name",
        ),
        ("ImageSets/Segmentation/train.txt", "a\nb\na\n", r"train\.txt: every name may occur once.*'a'$"),
        (
            "ImageSets/Segmentation/train.txt",
            "a 1\nb -1\n",
            r"line ends in a number, as 'a 1', 'b -1': is this the list",
        ),
        (
            "ImageSets/Segmentation/train.txt",
            "../a\n",
            r"expected names of pictures in JPEGImages, got '\.\./a'$",
        ),
        (
            "ImageSets/Segmentation/train.txt",
            "d\ne\nf\ng\nh\ni\n",
            r"no row for 'd', .*'h' and 1 more of the split",
        ),
        (
            "classes.txt",
            "background\n",
            r"classes\.txt: expected the background and 1 to 254 classes.*got 1 lines",
        ),
        ("classes.txt", "background\nant\nant\n", r"classes\.txt: every name may occur once.*'ant'$"),
        ("classes.txt", "ant\nbackground\n", r"classes\.txt: 'background' must be the first line"),
        ("labels.csv", "", r"labels\.csv: the table is empty; write a header such as id,labels"),
        (
            "labels.csv",
            "id,labels\na,ant\nb,cwo\nc,\n",
            r"labels\.csv, 'b': unknown class 'cwo'; did you mean 'cow'",
        ),
        ("labels.csv", "id,labels\na,zzz\n", r"no row for 'b', 'c' of the split"),
        ("labels.csv", "id,labels\na,ant\nb,\n", r"labels\.csv: no row for 'c' of the split; add it"),
        ("labels.csv", "id,labels\na,zzz\nb,\nc,\n", r"'a': unknown class 'zzz'; the classes are ant, bee, cow$"),
        (
            "labels.csv",
            "id,labels\na,ant,bee\n",
            r"line 2: 3 cells where the header has 2: \['a', 'ant', 'bee'\]",
        ),
        ("labels.csv", 'id,labels\na,"ant\n', r"labels\.csv, line 2: broken CSV"),
    ],
)
def test_faults_of_text_files_are_named_at_construction(root: Path, name: str, text: str, message: str) -> None:
    write(root / name, text)
    with pytest.raises(ValueError, match=message) as caught:
        VOCFolder(root, "train")
    assert str(root) in str(caught.value)


def test_text_in_another_encoding(root: Path) -> None:
    (root / "classes.txt").write_bytes("background\nb\u00e4r\n".encode("latin-1"))
    (root / "labels.csv").write_bytes("id,labels\na,b\u00e4r\n".encode("utf-16"))
    assert VOCFolder(root, "val").classes == ("b\u00e4r",)
    assert VOCFolder(root, "val").labels.tolist() == [[1]]
    (root / "classes.txt").write_bytes(b"\x00\x01\x02")
    with pytest.raises(ValueError, match=r"classes\.txt: not a text file of UTF-8, UTF-16 or cp1252"):
        VOCFolder(root, "val")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object>", r"a\.xml: broken XML \(.*\); write the file again"),
        (annotation("ant", "cows"), r"a\.xml: unknown class 'cows'; did you mean 'cow'"),
        ("<annotation><object/></annotation>", r"a\.xml: an object has no name"),
    ],
)
def test_faults_of_xml(root: Path, text: str, message: str) -> None:
    write(root / "Annotations/a.xml", text)
    with pytest.raises(ValueError, match=message):
        VOCFolder(root, "val", tags="xml")


def test_what_is_missing_is_named(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; give the one which holds JPEGImages"):
        VOCFolder(root / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"test\.txt: no such split; the splits there are train, val$"):
        VOCFolder(root, "test")
    with pytest.raises(FileNotFoundError, match=r"a\.xml: no such file; every picture of the split needs one"):
        VOCFolder(root, "val", tags="xml")
    (root / "labels.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"labels\.csv: no such file; give a table of tags"):
        VOCFolder(root, "val", tags="csv")
    for path in (root / "ImageSets/Segmentation").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"Segmentation holds no split at all"):
        VOCFolder(root, "val")


def test_unknown_modes(root: Path) -> None:
    with pytest.raises(ValueError, match="tags must be one of 'auto', 'csv', 'xml', 'masks', got 'pickle'"):
        VOCFolder(root, "val", tags="pickle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="masks must be one of 'optional', 'required', 'none', got 'maybe'"):
        VOCFolder(root, "val", masks="maybe")  # type: ignore[arg-type]


def test_missing_picture(root: Path) -> None:
    (root / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(UnreadableFileError, match=r"a\.jpg: no such file, nor with another ending") as caught:
        VOCFolder(root, "val")[0]
    assert str(caught.value).startswith(str(root / "JPEGImages" / "a.jpg"))


@pytest.mark.parametrize("part", [0, 0.2, 0.7])
@pytest.mark.parametrize("name", ["JPEGImages/a.jpg", "SegmentationClass/a.png"])
def test_truncated_files(root: Path, name: str, part: float) -> None:
    Image.effect_noise((9, 6), 50).convert("RGB").save(root / "JPEGImages" / "a.jpg")
    content = (root / name).read_bytes()
    (root / name).write_bytes(content[: int(part * len(content))])
    with pytest.raises(UnreadableFileError, match=rf"{name}: cannot be read \(.*\); fetch or write") as caught:
        VOCFolder(root, "val")[0]
    assert str(caught.value).startswith(str(root / name))


@pytest.mark.parametrize("name", ["JPEGImages/a.jpg", "SegmentationClass/a.png"])
def test_a_picture_starts_no_other_program(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **options: ran.append("gs"))
    (root / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 6\n%%EndComments\n%%EOF\n")
    with pytest.raises(UnreadableFileError, match=rf"{name}: cannot be read \(it is none of .*BMP, GIF, JPEG, .*\)"):
        VOCFolder(root, "val")[0]
    assert not ran


def test_a_telephone_s_jpg_with_two_pictures_is_read(root: Path) -> None:
    pictures = [Image.new("RGB", (9, 6), color) for color in ("red", "blue")]
    pictures[0].save(root / "JPEGImages" / "a.jpg", "MPO", save_all=True, append_images=pictures[1:])
    assert VOCFolder(root, "val")[0].image[0].min() > 200


def test_mask_of_another_size(root: Path) -> None:
    save_mask(root / "SegmentationClass" / "a.png", np.zeros((9, 6), np.uint8))
    with pytest.raises(UnreadableFileError, match=r"a\.png: the mask has \(H, W\) = \(9, 6\), its picture \(6, 9\)"):
        VOCFolder(root, "val")[0]


def test_mask_index_of_no_class(root: Path) -> None:
    save_mask(root / "SegmentationClass" / "a.png", np.full((6, 9), 4, np.uint8))
    with pytest.raises(UnreadableFileError, match=r"a\.png: index 4 stands for no class.*1\.\.3 are the classes"):
        VOCFolder(root, "val")[0]


@pytest.mark.parametrize("mode", ["LA", "CMYK", "F"])
def test_masks_without_class_indices_are_rejected(root: Path, mode: str) -> None:
    (root / "SegmentationClass" / "a.png").unlink()
    ending = "png" if mode == "LA" else "tif"
    Image.new(mode, (9, 6)).save(root / "SegmentationClass" / f"a.{ending}")
    with pytest.raises(UnreadableFileError, match=rf"a\.{ending}: the mask has mode {mode}, expected P .* or L "):
        VOCFolder(root, "val")[0]


def test_gray_masks_and_small_palettes_hold_indices(root: Path) -> None:
    path = root / "SegmentationClass" / "a.png"
    Image.fromarray(np.full((6, 9), 2, np.uint8)).save(path)
    first = VOCFolder(root, "val")[0].mask
    small = Image.fromarray(np.full((6, 9), 3, np.uint8))
    small.putpalette(voc_palette(4))
    small.save(path, bits=2)
    second = VOCFolder(root, "val")[0].mask
    assert first is not None
    assert second is not None
    assert (first == 2).all()
    assert (second == 3).all()


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(UnreadableFileError("a.jpg", "truncated")))
    assert isinstance(error, UnreadableFileError)
    assert str(error) == "a.jpg: truncated"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:This DataLoader will create")
def test_workers_read_the_same_and_pass_on_what_is_unreadable(root: Path) -> None:
    folder = VOCFolder(root, "train")
    loader = DataLoader(folder, num_workers=2, collate_fn=listing)
    loaded = [sample for batch in loader for sample in batch]
    assert [sample.id for sample in loaded] == folder.ids
    assert all(torch.equal(a.image, b.image) for a, b in zip(loaded, folder, strict=True))
    bad = root / "JPEGImages" / "c.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    message = rf"UnreadableFileError.*{re.escape(str(bad))}: cannot be read"
    with pytest.raises(UnreadableFileError, match=f"(?s){message}"):
        list(loader)


def test_without_pillow_the_error_says_what_to_install(root: Path) -> None:
    program = (
        "import sys; sys.modules['PIL'] = None\n"
        "from protoseg.data.folders import VOCFolder\n"
        f"VOCFolder({str(root)!r}, 'val')[0]\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert 'ImportError: reading and writing pictures needs PIL; run pip install "protoseg[recipes]"' in run.stderr


@pytest.mark.skipif(not MSRC15.is_dir(), reason=f"needs the MSRC v2 data in {MSRC15}")
def test_msrc15() -> None:
    sizes = {"train": 224, "val": 49}
    for split, size in sizes.items():
        folder = VOCFolder(MSRC15, split, masks="required")
        assert len(folder) == size
        assert len(folder.classes) == 15
        assert bool((folder.labels.sum(1) > 0).all())
        for sample in folder:
            assert sample.mask is not None
            assert sample.image.shape[1:] == sample.mask.shape
            share = torch.stack([(sample.mask == label).float().mean() for label in range(1, 16)])
            assert torch.equal(sample.labels, (share >= 0.01).float()), sample.id
