"""Every recipe of docs/plug-in.md runs on a network with the layer names and shapes of the code base it is for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protoseg import ContextPrototypeBank
from tests.page import SECTIONS, surroundings
from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "plug-in.md"


def recipes() -> list[tuple[str, int, str]]:
    """Section, line and code of each block."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    headings = [(number, line.lstrip("# ")) for number, line in enumerate(lines, 1) if re.match("###? ", line)]
    return [([name for at, name in headings if at < line][-1], line, code) for line, code in blocks(PAGE)]


RECIPES = recipes()


def run(line: int, code: str, namespace: dict[str, Any]) -> None:
    exec(compile("\n" * (line - 1) + code, str(PAGE), "exec"), namespace)


@pytest.mark.filterwarnings("ignore:.*the bank is empty")
@pytest.mark.parametrize(("section", "line", "code"), RECIPES, ids=[f"{name}, {line}" for name, line, _ in RECIPES])
def test_recipe(section: str, line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A thousand instances of 4096 channels for each of 21 rows take 344 MB, several times.
    monkeypatch.setitem(ContextPrototypeBank.__init__.__kwdefaults__, "capacity", 50)  # type: ignore[misc]
    names = surroundings(section, tmp_path)
    # A section's blocks build on each other.
    earlier = [(before, other) for name, before, other in RECIPES if name == section and before < line]
    for before, other in earlier:
        run(before, other, names)
        if "loss" in names:
            names.pop("loss").backward()
    run(line, code, names)

    if section == "Lightning":
        module = names["WithBank"]()
        assert any(name.startswith("bank.") for name in module.state_dict())
        module.on_fit_start()
        names |= {"bank": module.bank, "loss": module.training_step((names["img"], names["label"]), 0)}
    if "loss" in names and section != "Add the loss":
        loss: Tensor = names["loss"]
        loss.backward()
        assert loss.isfinite()
    if "tap.loss(" in code or "tap.store(" in code:
        assert names["bank"].stored[:3].sum() > 0
        assert names["bank"].stored[3:-1].sum() == 0
    if section == "In short":
        assert names["pacam"].shape[:2] == (4, 21)
    if section == "Find the names":
        assert next((each.features, each.cam) for each in candidates_of(names)) == ("layer4", "fc")
    if section == "From a checkpoint to maps":
        files = sorted(tmp_path.glob("*.npy"))
        assert [file.stem for file in files] == ["0", "1", "2", "3"]
        read = np.load(files[2], allow_pickle=True).item()
        assert read["keys"].tolist() == [2]
        assert read["high_res"].shape == (1, 64, 64)
        assert read["high_res"].max() > 0
    if section == "At test time, in `make_cam.py`":
        assert [tuple(each.shape) for each in names["outputs"]] == [(20, 8, 8), (20, 4, 4)]
        assert names["outputs"][0][0].max() > 0
    if section == "CLIP-ES":
        assert names["fg_text_features"].shape == (20, 512)
        assert names["fg_text_features"].dtype == torch.float16
    if section == "Histopathology" and "tap.loss" in code:
        assert names["bank"].memory.background_contexts == 0
    if section == "open_clip":
        assert names["maps"].shape[:2] == (4, 21)
    if section == "WeCLIP" and "loss" in names:
        assert names["project"].weight.grad.abs().sum() > 0


def candidates_of(names: dict[str, Any]) -> Any:
    return names["candidates"](names["model"], names["img"])


def test_no_recipe_takes_more_than_twelve_lines() -> None:
    for section, _, code in RECIPES:
        ours = [line for line in code.splitlines() if re.search(r"\S", line) and not line.lstrip().startswith("#")]
        assert len(ours) <= 12, section


def test_every_section_with_code_is_known_and_the_other_way_round() -> None:
    assert {section for section, _, _ in RECIPES} == set(SECTIONS)


def test_every_family_of_the_table_has_a_section() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("## Families") : text.index("### AMN")]
    hosts = re.findall(r"^\|[^|]*\|([^|]*)\|", table, re.MULTILINE)[2:]
    for name in ", ".join(hosts).replace("(wseg)", "").split(","):
        assert text.count(name.strip()) > 1, name
