"""Runs of the trainer on tiny pictures, and what is compared between them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

pytest.importorskip("accelerate", reason="the extra recipes is not installed")
pytest.importorskip("segmentation_models_pytorch", reason="the extra recipes is not installed")

from protoseg.recipes import cpal, pseudo_masks
from protoseg.recipes.files import load_checkpoint

__all__ = [
    "COMMAND",
    "MAPS",
    "SCENES",
    "SETTINGS",
    "TINY",
    "assert_equal",
    "assert_maps",
    "checkpoint",
    "cpal",
    "findings",
    "main",
    "masks",
    "miou",
    "pseudo_masks",
    "read",
    "run",
]

COMMAND = [sys.executable, "-m", "protoseg", "train", "cpal"]
MAPS = {"cam", "instance", "pacam"}
TINY = ["--device", "cpu", "--size", "48", "--crop", "48", "--backbone", "small:8", "--segmentation-epochs", "1"]
SCENES = [*TINY, "--train-scenes", "24", "--eval-scenes", "6", "--epochs", "2", "--batch", "8"]
# Of a trainer in a process of its own.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "error,ignore:ContextPrototypeBank.fill",
    "PYTHONHASHSEED": "7",
    "TQDM_DISABLE": "1",
}


def main(flags: Sequence[str]) -> dict[str, Any]:
    """Run the trainer in this process, on one thread as in SETTINGS: sums in another order are other sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return cpal.main(flags)
    finally:
        torch.set_num_threads(threads)


def run(output: Path, *flags: str) -> dict[str, Any]:
    """Run the trainer on scenes and return what it wrote to ``metrics.json``."""
    main([*SCENES, "--output", str(output), *flags])
    return read(output)


def read(output: Path, name: str = "metrics.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / name).read_text(encoding="utf-8"))
    return found


def findings(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What equal runs have in common."""
    return {key: value for key, value in metrics.items() if key not in ("seconds", "peak_memory_mb")}


def checkpoint(output: Path, name: str = "classify") -> dict[str, Any]:
    return load_checkpoint(output / "checkpoint" / f"{name}.pt")


def assert_equal(a: Any, b: Any) -> None:
    """The same structure and bitwise the same tensors and numbers."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b or (a != a and b != b)  # NaN is NaN


def masks(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {path.stem: np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def miou(predicted: list[np.ndarray[Any, Any]], truth: list[np.ndarray[Any, Any]], classes: int) -> float:
    """VOC's mean IoU by scikit-learn's confusion matrix."""
    flat, true = np.concatenate([m.ravel() for m in predicted]), np.concatenate([m.ravel() for m in truth])
    matrix = confusion_matrix(true[true != 255], flat[true != 255], labels=range(classes + 1))
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    return float(np.mean(matrix.diagonal()[union > 0] / union[union > 0]))


def assert_maps(maps: Any, names: tuple[str, ...]) -> None:
    assert set(maps) == {"train", "eval"}
    for split in maps.values():
        assert set(split) == MAPS
        for entry in split.values():
            assert set(entry) == {"miou", "threshold", "per_class", "miou_mask_free", "threshold_mask_free", "contrast"}
            assert 0 < entry["contrast"] < 1
            assert 0 <= entry["miou_mask_free"] <= entry["miou"] <= 1
            assert 0 <= entry["threshold"] <= 1
            assert 0 <= entry["threshold_mask_free"] <= 1
            assert tuple(entry["per_class"]) == names
            known = [value for value in entry["per_class"].values() if value is not None]
            assert entry["miou"] == pytest.approx(sum(known) / len(known))
