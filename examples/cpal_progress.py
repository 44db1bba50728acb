"""The bookkeeping of ``train_cpal.py``: which stages have run, what they found, and flags that cannot work."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from common import Pictures, load_checkpoint, peak_memory_mb, versions, write_json
from cpal_stages import SIDE, Network

from protoseg.models.heads import build_cam_network
from protoseg.models.segmentation import build_segmentation_network
from protoseg.refine import load_refiner

STAGES = ("classify", "seeds", "refine", "segment")
PACKAGES = ("protoseg", "torch", "numpy", "timm", "accelerate", "segmentation-models-pytorch")
# Flags that may change between a run and its resumption.
FREE = ("output", "resume", "stages", "device", "workers", "skip_broken", "ceiling")
# Flags that no earlier stage looks at, so that these stages can be run again with others.
OWN = {"refine": ("seed_map", "threshold", "refine"), "segment": ("segmentation", "segmentation_epochs")}
FILES = {
    "classify": ("checkpoint/classify.pt",),
    "seeds": ("seeds/*.npz",),
    "refine": ("pseudo_masks/*.png",),
    "segment": ("checkpoint/segment.pt", "checkpoint/ceiling.pt", "metrics.json", "report.html"),
}
RESULTS = {"classify": (), "seeds": ("maps", "sweeps"), "refine": ("pseudo_masks",), "segment": ("segmentation",)}


class Progress:
    """What the stages have found so far, kept in ``checkpoint/progress.json``, so that a resumed run skips them.

    Without ``--resume`` the stages from the first one asked for start anew: what they left in the folder is removed.

    Args:
        args: The flags.
        accelerator: The engine; its main process writes.
        began: ``time.monotonic()`` when this process began.

    Attributes:
        found: Results by name.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, began: float) -> None:
        self.args, self.accelerator, self.began = args, accelerator, began
        self.path = args.output / "checkpoint" / "progress.json"
        self.found: dict[str, Any] = {"stages": {}}
        config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        first = min(map(STAGES.index, args.stages))
        anew = () if args.resume else STAGES[first:]
        known = self.path.exists()
        accelerator.wait_for_everyone()
        if known and (args.resume or first > 0):
            self._same(json.loads((args.output / "config.json").read_text(encoding="utf-8")), config, anew)
            self.found = json.loads(self.path.read_text(encoding="utf-8"))
        for stage in STAGES[:first]:
            if stage not in self.found["stages"]:
                raise SystemExit(f"--stages: {args.stages} need what {stage!r} leaves in {args.output}; run it first")
        for stage in anew:
            for name in RESULTS[stage]:
                self.found.pop(name, None)
            self.found["stages"].pop(stage, None)
        self.before = self.found.get("seconds", 0.0)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            # Only in a folder that is known to be a run's: files of the same names elsewhere are not ours.
            for pattern in ("checkpoint/.*", *(each for stage in anew for each in FILES[stage])) if known else ():
                for file in args.output.glob(pattern):
                    file.unlink()
            args.output.mkdir(parents=True, exist_ok=True)
            write_json(args.output / "config.json", config)
            write_json(self.path, self.found)
        accelerator.wait_for_everyone()

    def _same(self, before: Mapping[str, Any], now: Mapping[str, Any], anew: Sequence[str]) -> None:
        free = {*FREE, *(name for stage in anew for name in OWN.get(stage, ()))}
        changed = [key for key in now if key not in free and before.get(key) != now[key]]
        if changed:
            differences = ", ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in changed)
            raise SystemExit(
                f"--output: {self.args.output} holds a run with other flags: {differences}; give the same flags, take "
                "another --output, or start anew with all --stages and without --resume"
            )

    def wants(self, stage: str) -> bool:
        """Whether to run a stage now."""
        finished = self.args.resume and stage in self.found["stages"]
        if finished and stage == "segment" and self.args.ceiling:
            finished = "ceiling" in self.found["segmentation"]["eval"]
        return stage in self.args.stages and not finished

    def done(self, stage: str, results: dict[str, Any]) -> None:
        """Note a stage's results, and the seconds of this run with all that it resumed."""
        self.found["stages"][stage] = {"history": results.pop("history", [])}
        self.found["seconds"] = self.before + time.monotonic() - self.began
        self.found.update(results)
        if self.accelerator.is_main_process:
            write_json(self.path, self.found)
        self.accelerator.wait_for_everyone()

    def restore(self, net: Network) -> None:
        """Load the trained network and bank, so that every process goes on with the same."""
        state = load_checkpoint(self.args.output / "checkpoint" / "classify.pt")
        net.cam.load_state_dict(state["model"])
        net.bank.load_state_dict(state["bank"])

    def metrics(self, pictures: Pictures, test: Pictures) -> dict[str, Any]:
        """Put together ``metrics.json``."""
        return {
            "method": self.args.method,
            "seed": self.args.seed,
            "seconds": round(self.found.get("seconds", 0.0), 1),
            "peak_memory_mb": round(peak_memory_mb(self.accelerator.device), 1),
            "versions": versions(*PACKAGES),
            "maps": self.found.get("maps", {}),
            "pseudo_masks": {"train": self.found.get("pseudo_masks", {})},
            "segmentation": self.found.get("segmentation", {}),
            "broken": {"train": pictures.broken, "eval": test.broken},
        }


def check(args: argparse.Namespace) -> None:
    """Stop now, and not after hours, for what a later stage cannot use."""
    for name in ("size", "crop", "epochs", "batch", "segmentation_epochs", "train_scenes", "eval_scenes"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if args.threshold not in ("otsu", "sweep"):
        try:
            valid = 0 <= float(args.threshold) <= 1
        except ValueError:
            valid = False
        if not valid:
            raise SystemExit(f"--threshold: expected otsu, sweep or a number in 0..1, got {args.threshold!r}")
    if "refine" in args.stages:
        load_refiner(args.refine)
    if "segment" in args.stages:
        if args.crop < SIDE:
            raise SystemExit(f"--crop: the segmentation network needs at least {SIDE} pixels, got {args.crop}")
        backbone = build_cam_network(args.backbone, 1).backbone
        try:
            build_segmentation_network(args.segmentation, 2, backbone=backbone)
        except ValueError as error:
            raise SystemExit(f"--segmentation: {error}") from error
