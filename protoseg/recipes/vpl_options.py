"""What can be set in the recipe ``vpl``, and its presets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from protoseg.clip import Pooling
from protoseg.data import Scenes
from protoseg.recipes.options import MaskOptions, read

__all__ = ["PRESETS", "STAGES", "VPLOptions", "parse"]

Stage = Literal["prototypes", "seeds", "refine", "segment"]
STAGES: tuple[Stage, ...] = ("prototypes", "seeds", "refine", "segment")


@dataclasses.dataclass(kw_only=True)
class VPLOptions(MaskOptions):
    """Options of ``protoseg train vpl``."""

    output: Path = Path("runs/vpl")
    """folder of the run"""
    stages: list[Stage] = dataclasses.field(default_factory=lambda: list(STAGES))  # type: ignore[assignment]
    """stages to run"""
    eval_scenes: int = 300
    """made scenes to evaluate on"""
    shift: Literal["none", "channels"] = "none"
    """channels: permute the colors"""

    clip: str | None = None
    """CLIP: open_clip's name, such as ViT-B-16, or pocket; the small one where not given"""
    pretrained: str | None = None
    """CLIP: open_clip's tag, such as openai, or the path of a checkpoint"""
    clip_precision: str = "fp32"
    """CLIP: fp32, fp16 or bf16"""
    cache: Path = Path("runs/cache")
    """small CLIP: folder where it is kept"""
    clip_data: list[str] = dataclasses.field(default_factory=lambda: ["scenes"])
    """small CLIP: what it reads: scenes, folders"""
    clip_scenes: int = 8000
    """small CLIP: made scenes that it reads"""
    clip_steps: int = 600
    """small CLIP: steps of its training"""
    clip_size: int = 64
    """small CLIP: side of its training pictures in pixels"""
    size: int
    """shorter side of the pictures in pixels"""
    pooling: Pooling = "patches"
    """what stands for a whole picture"""

    prompts: Literal["single", "ensemble"] = "single"
    """prompts: one template or all"""
    templates: list[str]
    """prompts: sentences with {} for the name; CLIP-ES's where none is given"""
    synonyms: Path | None = None
    """prompts: JSON file {"class": ["another name", ...]}"""
    background: bool = True
    """prompts: of what else pictures show"""
    background_names: list[str]
    """prompts: what else pictures show; CLIP-ES's list where none is given"""

    ratio: float = 2.0
    """prototypes: vision temperature over text temperature"""
    balance: int = 0
    """prototypes: rounds of Sinkhorn"""
    fit_tags: bool = True
    """prototypes: learn them with the tags"""
    scales: list[float]
    """maps: of --size; maps are means over them, on the grid of the first"""
    attentions: int = 8
    """maps: blocks whose attention makes the affinity"""
    box_threshold: float = 0.4
    """maps: of the boxes that the affinity spreads from"""
    seed_map: Literal["text", "text_centered", "vision", "vision_affinity"] = "vision"
    """map of the pseudo masks"""

    rsc: bool = True
    """decoder: regional semantic contrast"""
    rsc_weight: float = 0.1
    """decoder: of that contrast"""
    rsc_temperature: float = 0.1
    """decoder: of that contrast"""
    rsc_suppression: float = 1.0
    """decoder: of what absent classes' masks look like"""
    affinity_weight: float = 0.1
    """decoder: of the affinity loss"""
    layers: list[int]
    """decoder: blocks whose features it sees"""
    decoder_dim: int
    """decoder: channels"""
    decoder_depth: int
    """decoder: blocks"""

    def other_names(self) -> dict[str, list[str]]:
        """What the file of synonyms says."""
        if self.synonyms is None:
            return {}
        names: dict[str, list[str]] = json.loads(self.synonyms.read_text(encoding="utf-8"))
        return names


# Chosen on made scenes with the small CLIP; "clip" has CLIP-ES's and WeCLIP's values where they state one. Nothing of
# it has been run on VOC or COCO.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "size": 64, "crop": 64, "smallest_crop": 0.5, "epochs": 8, "batch": 16, "lr": 2e-3, "layers": [1, 2],
        "decoder_dim": 64, "decoder_depth": 2, "templates": ["a photo of a {}"], "scales": [1.0],
    },
    "clip": {
        "size": 512, "crop": 320, "smallest_crop": 0.3, "epochs": 10, "batch": 4, "lr": 2e-3,
        "layers": [-4, -3, -2, -1], "decoder_dim": 256, "decoder_depth": 3, "templates": [], "scales": [1.0],
    },
    # What an ImageNet classifier of stride 16 and pictures of 320 pixels ask for; scales and map by VOC (docs/vpl.md).
    "pocket": {
        "size": 288, "crop": 256, "smallest_crop": 0.3, "epochs": 8, "batch": 8, "lr": 1e-3, "layers": [3, 4, 5],
        "decoder_dim": 128, "decoder_depth": 2, "templates": [], "scales": [1.25, 0.85], "seed_map": "vision_affinity",
    },
}  # fmt: skip


def parse(argv: Sequence[str] | None, description: str | None = None) -> VPLOptions:
    """Read the options over the defaults of the preset: that of the small CLIP, or that of a real one."""
    args = read(
        VPLOptions,
        argv,
        prog="protoseg train vpl",
        description=description,
        choosers=("data", "clip"),
        preset=_defaults,
    )
    args.eval_data = args.eval_data or args.data
    return args


def _defaults(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What data and model ask for."""
    presets = {None: "small", "pocket": "pocket"}
    values = dict(PRESETS[presets.get(chosen["clip"], "clip")])
    values["background_names"] = []
    if chosen["data"] in (None, "scenes"):
        scenes = Scenes(1)
        values["background_names"] = [scenes.home(label + 1) for label in range(len(scenes.classes))]
    return values
