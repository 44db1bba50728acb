"""Every kind of picture and mask, by a rule; what is too large or leads out of its folder."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from protoseg.data import Broken, CsvPairs, Pair, ShardPairs, UnreadableFileError, load_image, load_mask, write_shards
from protoseg.data.files import read_colors, read_mask
from protoseg.data.images import MAX_PIXELS, decode, read_header, read_pixels, turned


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says how large it is, with a bit for each pixel."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = zlib.compress(bytes((width // 8 + 1) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def shard(path: Path, entries: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


SMALL = encoded(Image.new("RGB", (4, 3), "red"), "PNG")


class TestLimits:
    def test_a_small_file_of_many_pixels_is_not_decoded(self, tmp_path: Path) -> None:
        content = bomb(13_000, 13_000)
        assert len(content) < 30_000
        path = tmp_path / "large.png"
        path.write_bytes(content)
        before = psutil.Process().memory_info().rss
        for read in (load_image, read_header, lambda each: load_mask(each, 3)):
            with pytest.raises(UnreadableFileError, match=r"large\.png.* 13000 x 13000 pixels, and 134 million"):
                read(path)
        assert psutil.Process().memory_info().rss - before < 50e6

    def test_a_picture_at_the_limit_is_read(self) -> None:
        width, height = MAX_PIXELS // 4096, 4096
        assert decode(bomb(width, height), "it")[1].size == (height, width)
        with pytest.raises(UnreadableFileError, match="make it smaller"):
            decode(bomb(width, height + 1), "it")

    def test_it_is_a_broken_picture_of_a_shard(self, tmp_path: Path) -> None:
        entries = {"a.png": bomb(13_000, 13_000), "a.txt": b"a", "b.png": SMALL, "b.txt": b"b"}
        pairs = list(ShardPairs(shard(tmp_path / "x.tar", entries), report=tmp_path / "report"))
        assert [pair.key for pair in pairs] == ["b"]
        assert Broken.read(tmp_path / "report").counts == {"broken picture": 1}

    @pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
    def test_a_large_file_in_a_shard_is_passed_over(self, mode: str, tmp_path: Path) -> None:
        entries = {"a.png": bytes(2**27 + 1), "a.txt": b"a", "b.png": SMALL, "b.txt": b"b"}
        path = shard(tmp_path / "x.tar", entries, mode)
        assert mode == "w" or path.stat().st_size < 1e6
        del entries
        before = psutil.Process().memory_info().rss
        pairs = list(ShardPairs(path, report=tmp_path / "report"))
        assert psutil.Process().memory_info().rss - before < 50e6
        assert [pair.key for pair in pairs] == ["b"]
        assert "x.tar: a" in Broken.read(tmp_path / "report").names["broken picture"][0]
        with pytest.raises(UnreadableFileError, match="134217729 bytes; at most 128 MiB"):
            list(ShardPairs(path))

    def test_a_large_header_is_not_read(self, tmp_path: Path) -> None:
        path = tmp_path / "x.tar"
        with tarfile.open(path, "w:gz") as archive:
            entry = tarfile.TarInfo("long")
            entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 2**26
            archive.addfile(entry, io.BytesIO(bytes(2**26)))
        before = psutil.Process().memory_info().rss
        assert list(ShardPairs(path, report=tmp_path / "report")) == []
        assert psutil.Process().memory_info().rss - before < 50e6
        assert Broken.read(tmp_path / "report").counts == {"damaged shard": 1}


class TestNamesThatLeadOut:
    @pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "..\\x", "C:\\x"])
    def test_shards(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="must not lead out of the folder"):
            write_shards([Pair(name, torch.zeros(3, 2, 2, dtype=torch.uint8), "a")], tmp_path / "out")
        assert not list(tmp_path.rglob("*.tar"))
        entries = {f"{name}.png": SMALL, f"{name}.txt": b"a", "b.png": SMALL, "b.txt": b"b"}
        path = shard(tmp_path / "x.tar", entries)
        assert [pair.key for pair in ShardPairs(path, report=tmp_path / "report")] == ["b"]
        assert Broken.read(tmp_path / "report").counts == {"unsafe name": 2}
        with pytest.raises(UnreadableFileError, match=r"unsafe name .*leads out"):
            list(ShardPairs(path))

    @pytest.mark.parametrize("name", ["../x.png", "sub/../../x.png", "..\\x.png", "/tmp/x.png"])
    def test_a_table_of_pairs(self, name: str, tmp_path: Path) -> None:
        folder = tmp_path / "data"
        folder.mkdir()
        for path in (tmp_path / "x.png", folder / "y.png"):
            path.write_bytes(SMALL)
        (folder / "pairs.csv").write_text(f"path,caption\n{name},a\ny.png,b\n")
        with pytest.raises(ValueError, match=r"pairs\.csv, line 2: the path leads out of the CSV's folder"):
            CsvPairs(folder / "pairs.csv")
        pairs = CsvPairs(folder / "pairs.csv", report=tmp_path / "report")
        assert [pair.key for pair in pairs] == ["y"]
        assert Broken.read(tmp_path / "report").counts == {"unsafe name": 1}


def test_a_table_of_pairs_has_pictures_of_any_format(tmp_path: Path) -> None:
    names = ["a.webp", "b.TIF", "c.bmp", "d d.PNG"]
    for name in names:
        Image.new("RGB", (4, 3), "red").save(tmp_path / name)
    (tmp_path / "pairs.csv").write_text("path,caption\n" + "".join(f"{name},red\n" for name in names))
    pairs = CsvPairs(tmp_path / "pairs.csv", report=tmp_path / "report")
    assert [pair.image.shape for pair in pairs] == [(3, 3, 4)] * 4
    assert Broken.read(tmp_path / "report").counts == {}


class TestKindsOfPixels:
    def test_gray_of_16_bits_is_scaled(self, tmp_path: Path) -> None:
        values = np.array([[0, 128 * 257, 65535]], np.uint16)
        for ending in ("png", "tif"):
            Image.fromarray(values).save(tmp_path / f"a.{ending}")
            assert load_image(tmp_path / f"a.{ending}")[1].tolist() == [[0, 128, 255]]

    def test_numbers_of_32_bits(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tif"
        Image.fromarray(np.array([[0, 65535]], np.int32)).save(path)
        assert load_image(path)[0].tolist() == [[0, 255]]
        for wrong in (-1, 65536):
            Image.fromarray(np.array([[0, wrong]], np.int32)).save(path)
            with pytest.raises(UnreadableFileError, match=rf"a\.tif: pixels of mode I run from .*{wrong}.*scale it"):
                load_image(path)

    def test_floating_point_by_rule_or_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tif"
        for values, right in (([[0.0, 0.5, 1.0]], [[0, 128, 255]]), ([[0.0, 12.2, 255.0]], [[0, 12, 255]])):
            Image.fromarray(np.array(values, np.float32)).save(path)
            assert load_image(path)[2].tolist() == right
        for wrong in (-0.1, 256.0, float("nan")):
            Image.fromarray(np.array([[0.5, wrong]], np.float32)).save(path)
            with pytest.raises(UnreadableFileError, match=r"a\.tif: pixels of mode F"):
                load_image(path)

    def test_what_is_transparent_shows_white(self, tmp_path: Path) -> None:
        hidden = np.array([[[200, 10, 20, 0], [200, 10, 20, 255], [0, 0, 0, 128]]], np.uint8)
        right = [[[255, 255, 255], [200, 10, 20], [127, 127, 127]]]
        for ending in ("png", "webp", "tif"):
            options = {"lossless": True, "exact": True} if ending == "webp" else {}
            Image.fromarray(hidden).save(tmp_path / f"a.{ending}", **options)  # type: ignore[arg-type]
            assert load_image(tmp_path / f"a.{ending}").permute(1, 2, 0).tolist() == right
        palette = Image.new("P", (2, 1))
        palette.putpalette([9, 9, 9, 50, 60, 70])
        palette.putpixel((1, 0), 1)
        palette.save(tmp_path / "p.png", transparency=0)
        assert load_image(tmp_path / "p.png").permute(1, 2, 0).tolist() == [[[255] * 3, [50, 60, 70]]]
        Image.fromarray(np.array([[[0, 0], [7, 255]]], np.uint8), "LA").save(tmp_path / "la.png")
        assert load_image(tmp_path / "la.png")[0].tolist() == [[255, 7]]

    @pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
    def test_other_modes_become_rgb(self, mode: str, tmp_path: Path) -> None:
        Image.new("RGB", (5, 4), "white").convert(mode).save(tmp_path / "a.tif")
        assert load_image(tmp_path / "a.tif").min() >= 254

    @pytest.mark.parametrize(
        "name", ["A.JPG", "a.JpEg", "a.tif", "a.TIFF", "a.webp", "a.bmp", "a.gif", "a.ppm", "a.pcx", "a.tga", "a.jp2"]
    )
    def test_formats(self, name: str, tmp_path: Path) -> None:
        Image.new("RGB", (8, 6), (200, 30, 40)).save(tmp_path / name)
        assert load_image(tmp_path / name).shape == (3, 6, 8)
        assert (load_image(tmp_path / name)[0].float() - 200).abs().max() < 12

    def test_the_name_may_lie_but_postscript_is_not_opened(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("started"))
        (tmp_path / "a.jpg").write_bytes(SMALL)
        assert load_image(tmp_path / "a.jpg").shape == (3, 3, 4)
        for name in ("h.jpg", "h.eps", "h.tga"):
            (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 6\n%%EndComments\n%%EOF\n")
            with pytest.raises(UnreadableFileError, match=f"{name}: cannot be read"):
                load_image(tmp_path / name)


class TestOrientation:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_upright_as_pillow_turns_it(self, kind: str, orientation: int, tmp_path: Path) -> None:
        from PIL import ImageOps

        pixels = np.zeros((16, 32, 3), np.uint8)
        pixels[:8, :8] = 255
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / "a"
        path.write_bytes(encoded(Image.fromarray(pixels), kind, exif=exif))
        with Image.open(path) as picture:
            right = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
        found, header = read_pixels(path)
        assert np.array_equal(found, right)
        assert (header.size, header.orientation) == ((16, 32), orientation)
        assert read_header(path) == header
        assert header.upright == right.shape[:2]
        assert np.array_equal(turned(pixels, orientation) > 128, right > 128)
        if kind != "TIFF":
            assert read_pixels(path, upright=False)[0].shape == (16, 32, 3)

    def test_damaged_exif_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_bytes(
            encoded(Image.new("RGB", (8, 6)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
        )
        assert load_image(tmp_path / "a.jpg").shape == (3, 6, 8)


def test_large_pictures_can_be_given_smaller(tmp_path: Path) -> None:
    wave = np.add.outer(np.arange(600), np.arange(1000)).astype(np.float32) / 1600 * 255
    picture = Image.fromarray(wave.astype(np.uint8)).convert("RGB")
    whole = np.asarray(picture.resize((100, 60), Image.Resampling.BOX)).astype(int)
    for name in ("a.jpg", "a.png"):
        picture.save(tmp_path / name)
        pixels, header = read_pixels(tmp_path / name, max_side=100)
        assert pixels.shape == (60, 100, 3)
        assert header.size == (600, 1000)
        assert np.abs(pixels - whole).max() < 4
        assert read_pixels(tmp_path / name, max_side=1000)[0].shape == (600, 1000, 3)


class TestMasks:
    @pytest.mark.parametrize("bits", [1, 2, 4])
    def test_gray_of_few_bits_holds_indices(self, bits: int, tmp_path: Path) -> None:
        def chunk(name: bytes, content: bytes) -> bytes:
            return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

        packed = {1: 0b01000000, 2: 0b00011011, 4: 0x13}[bits]
        right = {1: [[0, 1]], 2: [[0, 1]], 4: [[1, 3]]}[bits]
        header = struct.pack(">IIBBBBB", 2, 1, bits, 0, 0, 0, 0)
        rows = zlib.compress(bytes([0, packed]))
        content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
        (tmp_path / "a.png").write_bytes(content)
        assert load_mask(tmp_path / "a.png", 3).tolist() == right

    def test_gray_of_16_bits_holds_indices(self, tmp_path: Path) -> None:
        for ending in ("png", "tif"):
            Image.fromarray(np.array([[0, 2, 255]], np.uint16)).save(tmp_path / f"a.{ending}")
            assert load_mask(tmp_path / f"a.{ending}", 2).tolist() == [[0, 2, 255]]
        Image.fromarray(np.array([[0, 257]], np.uint16)).save(tmp_path / "a.png")
        with pytest.raises(UnreadableFileError, match="index 257 stands for no class"):
            load_mask(tmp_path / "a.png", 2)

    @pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
    def test_a_lossy_file_is_no_mask_whatever_its_name(self, kind: str, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(encoded(Image.new("L", (8, 8), 1), kind))
        with pytest.raises(UnreadableFileError, match=rf"a\.png: a mask of format {kind}, which changes indices"):
            load_mask(tmp_path / "a.png", 3)

    def test_colors_of_voc_or_of_a_table(self, tmp_path: Path) -> None:
        path, table = tmp_path / "a.png", tmp_path / "colors.txt"
        Image.fromarray(np.array([[[0, 0, 0], [128, 0, 0], [0, 128, 0], [224, 224, 192]]], np.uint8)).save(path)
        assert load_mask(path, 2).tolist() == [[0, 1, 2, 255]]
        Image.fromarray(np.array([[[0, 0, 0], [250, 1, 2], [3, 4, 5], [9, 9, 9]]], np.uint8)).save(path)
        with pytest.raises(UnreadableFileError, match=r"3 colors .* such as \(3, 4, 5\).*colors\.txt"):
            load_mask(path, 2)
        texts = [
            "background 0 0 0\nred ant 250 1 2\nbee 3 4 5\nvoid 9 9 9\n",
            "name,r,g,b\nbackground,0,0,0\nbee,3,4,5\nvoid,9,9,9\nred ant,250,1,2\n",
            "# label:color_rgb:parts:actions\nbackground:0,0,0::\nred ant:250,1,2::\nbee:3,4,5::\nvoid:9,9,9::\n",
        ]
        for text in texts:
            table.write_text(text)
            colors = read_colors(table, ["red ant", "bee"])
            assert read_mask(path, 2, colors).tolist() == [[0, 1, 2, 255]]
