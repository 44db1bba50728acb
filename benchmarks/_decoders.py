"""VPL's decoder on features of the pocket model, with regional contrast and without."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _held
from accuracy import show, spread, table

from protoseg.recipes import vpl

VARIANTS: dict[str, list[str]] = {"without": ["--no-rsc"], "with": []}
SCORES: dict[str, Callable[[dict[str, Any]], float]] = {
    "unseen, without tags": lambda found: found["eval"]["miou"],
    "unseen, with tags": lambda found: found["eval"]["miou_tagged"],
    "train, with tags": lambda found: found["train"]["miou"],
}


def run(data: str, folder: Path, seeds: Sequence[int], flags: Sequence[str]) -> dict[str, Any]:
    """Train what is missing, after the stages before it, in which nothing is random; returns the scores."""
    _hold()
    base = ["--data", data, "--clip", "pocket"]
    first = folder / "base"
    if not (first / "metrics.json").exists():
        _main([*base, "--stages", "prototypes", "seeds", "refine", "--output", str(first), "--overwrite"])

    found: dict[str, list[dict[str, Any]]] = {}
    for name, own in VARIANTS.items():
        for seed in seeds:
            output = folder / f"{name}-{seed}"
            if not (output / "done").exists():
                shutil.rmtree(output, ignore_errors=True)
                shutil.copytree(first, output)
                _take_seed(output, seed)
                _main([*base, *flags, *own, "--stages", "segment", "--seed", str(seed), "--output", str(output)])
                (output / "done").touch()
            found.setdefault(name, []).append(json.loads((output / "metrics.json").read_text(encoding="utf-8")))

    runs = found["with"]
    summary: dict[str, Any] = {"seeds": list(seeds), "versions": runs[0]["versions"]}
    summary["maps"] = {
        split: {name: each["miou"] for name, each in maps.items()} for split, maps in runs[0]["maps"].items()
    }
    summary["pseudo masks"] = runs[0]["pseudo_masks"]["train"]["miou"]
    summary["decoders"] = {
        name: {key: spread(score(each["segmentation"]) for each in metrics) for key, score in SCORES.items()}
        for name, metrics in found.items()
    }
    summary["all background"] = runs[0]["segmentation"]["eval"]["all_background"]
    return summary


def _hold() -> None:
    """Have the trainer ask the frozen model once for each crop, of which a picture has few."""
    clip = _held.HeldCLIP.pocket()
    for name, held in (("open_clip_model", lambda *_: clip), ("Crops", _held.FewCrops)):
        setattr(vpl, name, held)


def _take_seed(folder: Path, seed: int) -> None:
    """Have stages in which nothing is random count as those of a seed."""
    config = folder / "config.json"
    options = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**options, "seed": seed}), encoding="utf-8")


def _main(flags: Sequence[str]) -> None:
    output = Path(flags[flags.index("--output") + 1])
    output.mkdir(parents=True, exist_ok=True)
    with (output / "log.txt").open("w") as log, contextlib.redirect_stderr(log):
        vpl.main(flags)


def markdown(name: str, summary: dict[str, Any]) -> str:
    """The tables as a page."""
    text = f"# VPL's decoder on {name}, with the pocket model\n\n`{summary['command']}`; mean ± standard deviation "
    text += f"over seeds {', '.join(map(str, summary['seeds']))}. mIoU with background. The decoder sees features in "
    text += "half precision of four crops per picture. A mask of background alone scores "
    text += f"{summary['all background']:.3f} on the unseen pictures. "
    text += f"It learns from masks that score {summary['pseudo masks']:.3f}.\n\n## Maps, with tags, best threshold\n\n"
    splits = summary["maps"]
    rows = [[key, *(f"{splits[split][key]:.3f}" for split in ("train", "eval"))] for key in splits["train"]]
    text += table(["map", "train", "unseen"], rows) + "\n## Decoder\n\n"

    plain = summary["decoders"]["without"]
    rows = []
    for key, scores in summary["decoders"].items():
        gain = "-"
        if key != "without":
            pairs = zip(*(each["unseen, without tags"]["values"] for each in (scores, plain)), strict=True)
            gain = show(spread(a - b for a, b in pairs))
        rows.append([key, *(show(scores[each]) for each in SCORES), gain])
    return text + table(["regional contrast", *SCORES, "gain, unseen, without tags"], rows)
