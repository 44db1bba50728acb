"""Every recipe of docs/plug-in.md runs on a network with the layer names and shapes of the code base it is for."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import stand_ins
from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "plug-in.md"


def recipes() -> list[tuple[str, int, str]]:
    """Section, line and code of each block."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    headings = [(number, line[3:]) for number, line in enumerate(lines, 1) if line.startswith("## ")]
    return [([name for at, name in headings if at < line][-1], line, code) for line, code in blocks(PAGE)]


RECIPES = recipes()


def run(line: int, code: str, namespace: dict[str, Any]) -> None:
    exec(compile("\n" * (line - 1) + code, str(PAGE), "exec"), namespace)


@pytest.mark.parametrize(("section", "line", "code"), RECIPES, ids=[f"{name}, {line}" for name, line, _ in RECIPES])
def test_recipe(section: str, line: int, code: str) -> None:
    names = stand_ins.recipe(section)
    for other, before, earlier in RECIPES:  # a section's blocks build on each other
        if other == section and before < line:
            run(before, earlier, names)
    run(line, code, names)
    if section == "Lightning":
        module = names["WithBank"]()
        module.on_fit_start()
        names |= {"bank": module.bank, "loss": module.training_step((names["img"], names["label"]), 0)}
        module.on_fit_end()
        assert not module.tap._recorder.attached
    if "loss" in names:
        loss: Tensor = names["loss"]
        loss.backward()
        assert loss.isfinite()
    if "attach(" in code:
        assert names["bank"].stored[:3].sum() > 0
        assert names["bank"].stored[3:20].sum() == 0
    if section == "In short":
        assert names["pacam"].shape[:2] == (4, 21)
    if section == "CLIP-ES":
        assert names["fg_text_features"].shape == (20, 512)
        assert names["fg_text_features"].dtype == torch.float16


def test_no_recipe_takes_more_than_ten_lines() -> None:
    for section, _, code in RECIPES:
        ours = [line for line in code.splitlines() if re.search(r"\S", line) and not line.lstrip().startswith("#")]
        assert len(ours) <= 10, section


def test_every_code_base_has_a_recipe() -> None:
    wanted = {"AMN", "MCTformer", "SIPE", "CLIP-ES", "WeCLIP", "In short", "A vision transformer of timm", "Lightning"}
    assert wanted <= {section for section, _, _ in RECIPES}
