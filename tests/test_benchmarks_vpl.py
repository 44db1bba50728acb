"""The accuracy benchmark of VPL: it runs what is missing, takes over what does not differ, and compares pairs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.test_recipes_vpl import TINY

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import accuracy_vpl

pytestmark = pytest.mark.slow


def test_it_runs_what_is_missing_and_compares_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The default with and without contrast, and one kind of contrast; the whole set takes many runs.
    kind = "no suppression of absent classes"
    kept = [f"default, {word}" for word in ("with", "without")] + [f"{kind}, with"]
    contrast = {name: accuracy_vpl.VARIANTS["contrast"][name] for name in kept}
    monkeypatch.setitem(accuracy_vpl.VARIANTS, "contrast", contrast)
    monkeypatch.setattr(accuracy_vpl, "SETTINGS", {"default": accuracy_vpl.SETTINGS["default"]})
    monkeypatch.setattr(accuracy_vpl, "KINDS", {kind: accuracy_vpl.KINDS[kind]})
    command = ["--sets", "maps", "contrast", "--seeds", "0", "--jobs", "2", "--runs", str(tmp_path / "runs")]
    command += ["--output", str(tmp_path / "out"), "--", *TINY]
    summary = accuracy_vpl.main(command)
    folder = tmp_path / "runs" / "scenes"
    runs = {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/metrics.json")}
    assert set(runs) == {f"{name}-0" for name in [*accuracy_vpl.VARIANTS["maps"], *kept[1:]]}
    base, plain = (
        json.loads((folder / f"{name}-0" / "metrics.json").read_text("utf-8"))
        for name in (accuracy_vpl.CLEAN, "default, without")
    )
    assert plain["maps"] == base["maps"]
    assert plain["method"] == "without regional contrast"
    entry = summary["maps"][accuracy_vpl.CLEAN]
    gain = base["maps"]["eval"]["vision"]["miou"] - base["maps"]["eval"]["text"]["miou"]
    assert entry["vision over text eval"]["values"] == [gain]
    assert summary["contrast"]["default, with"]["segmentation eval"]["mean"] == base["segmentation"]["eval"]["miou"]
    assert summary["contrast"]["default, without"]["segmentation eval"]["mean"] == plain["segmentation"]["eval"]["miou"]
    page = (tmp_path / "out" / "accuracy-vpl-scenes.md").read_text(encoding="utf-8")
    assert "| default | " in page
    assert f"| {kind} | " in page
    accuracy_vpl.main(command)
    assert {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/metrics.json")} == runs
