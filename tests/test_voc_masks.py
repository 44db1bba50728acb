from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from protoseg.data import save_mask, voc_palette


def test_palette_is_that_of_voc() -> None:
    palette = voc_palette()
    assert len(palette) == 768
    assert palette[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    assert palette[15 * 3 : 16 * 3] == [192, 128, 128]  # person
    assert palette[20 * 3 : 21 * 3] == [0, 64, 128]  # tvmonitor
    assert palette[255 * 3 :] == [224, 224, 192]  # void
    assert voc_palette(2) == palette[:6]
    for n in (0, 257):
        with pytest.raises(ValueError, match=rf"n must be in 1\.\.256, got {n}"):
            voc_palette(n)


@pytest.mark.parametrize("kind", ["tensor", "array", "list", "int64"])
def test_saved_masks_come_back(tmp_path: Path, kind: str) -> None:
    values = np.arange(256, dtype=np.uint8).reshape(8, 32)
    given = {
        "tensor": torch.from_numpy(values),
        "array": values,
        "list": values.tolist(),
        "int64": torch.from_numpy(values).long(),
    }
    path = tmp_path / "mask.png"
    path.write_text("older")
    save_mask(path, given[kind])  # type: ignore[arg-type]
    with Image.open(path) as picture:
        assert picture.mode == "P"
        assert picture.getpalette() == voc_palette()
        assert np.array_equal(np.array(picture), values)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_older_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mask.png"
    save_mask(path, [[1]])
    before = path.read_bytes()

    def fail(self: Image.Image, target: Path, **options: str) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_mask(path, [[2]])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saving_what_is_no_mask(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    with pytest.raises(ValueError, match=r"path must end in \.png .*mask\.jpg"):
        save_mask(tmp_path / "mask.jpg", [[1]])
    with pytest.raises(ValueError, match=r"mask must be \(H, W\) of whole numbers, got \(1, 1, 1\) of int64"):
        save_mask(path, torch.zeros(1, 1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got \(2, 2\) of float32"):
        save_mask(path, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"mask must lie in 0\.\.255, got values from -1 to 256"):
        save_mask(path, [[-1, 256]])
    with pytest.raises(FileNotFoundError, match="no such folder; create it"):
        save_mask(tmp_path / "nowhere" / "mask.png", [[1]])
    assert not list(tmp_path.iterdir())
