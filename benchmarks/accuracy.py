"""Accuracy of CPAL against its plain baseline: means and spreads over seeds, each part's share, the cost of no masks.

    python benchmarks/accuracy.py --data scenes
    python benchmarks/accuracy.py --data ../shared/data/msrc15 --ceiling
    python benchmarks/accuracy.py --head mct                            # the bank in another paper's network

Runs ``protoseg train cpal`` with ``--method none`` and ``--method cpal`` for every seed; finished runs in
``--runs`` are kept, broken-off ones resumed. Then leaves out one part of the bank at a time, on the networks that
``cpal`` trained. Other heads than the plain CAM leave nothing out; both methods of AMN's learn from the same masks.
Writes ``accuracy-NAME.json`` and ``accuracy-NAME.md`` into ``--output``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from protoseg import ContextPrototypeBank
from protoseg.metrics import RegionContrast, ThresholdSweep
from protoseg.recipes.cpal_heads import build
from protoseg.recipes.cpal_options import parse
from protoseg.recipes.cpal_stages import infer
from protoseg.recipes.files import keywords, load_checkpoint
from protoseg.recipes.pictures import open_pictures
from protoseg.recipes.pseudo_masks import enlarge

ROOT = Path(__file__).resolve().parents[1]

MAPS = ("cam", "instance", "pacam")
# What is left out or changed, and what stands in its place, as arguments of ContextPrototypeBank.
PAPER = "the paper's words (ContextPrototypeBank.paper)"
MANY: dict[str, Any] = {"num_contexts": 10, "temperature": 0.3}
PARTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "score: standardized features (diagonal)": {"score": "diagonal"},
    "score: the whole covariance (whitened)": {"score": "whitened"},
    "score: features less their mean (dot)": {"score": "dot"},
    "score: cosine, which drops the features' length": {"score": "cosine"},
    "centering": {"center": False},
    "repeated estimate: instances where the CAM is": {"locate": "cam"},
    "background contexts: one background prototype an image": {"background": "image"},
    "background: none, the plain 1 - max": {"background": "one_minus_max"},
    "3 contexts a class": {"num_contexts": 3, "temperature": 0.3},
    "10 contexts a class": MANY,
    "10 contexts, all weigh the same": {**MANY, "temperature": 1e6},
    "10 contexts, the best 3 by positiveness": {**MANY, "top_k": 3},
    "10 contexts, positiveness by cosine": {**MANY, "metric": "cosine"},
    "10 contexts, positiveness by L1": {**MANY, "metric": "l1"},
    "10 contexts, positiveness by L2": {**MANY, "metric": "l2"},
    "10 contexts, no shift": {**MANY, "shift": False},
    "bank of 10 a class": {"capacity": 10},
    "bank of 30 a class": {"capacity": 30},
    "bank of 100 a class": {"capacity": 100},
    "0.1.0: cosine, 3 contexts, where the CAM is": {
        "score": "cosine", "num_contexts": 3, "locate": "cam", "temperature": 0.3,
    },
    PAPER: {},
}  # fmt: skip


def spread(values: Iterable[float | None]) -> dict[str, Any]:
    """Mean, sample standard deviation and the values themselves."""
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "sd": None, "values": []}
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return {"mean": statistics.fmean(known), "sd": deviation, "values": known}


def run(folder: Path, method: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one run, or read it where it is finished already."""
    if not (folder / "metrics.json").exists():
        command = [sys.executable, "-m", "protoseg", "train", "cpal", "--data", args.data, "--method", method]
        command += ["--head", args.head, "--seed", str(seed), "--output", str(folder), "--device", args.device]
        command += args.flags
        if method == "cpal":
            command += ["--fork", str(folder.with_name(f"none-{seed}"))]
        command += ["--ceiling"] * (args.ceiling and method == "cpal")
        if (folder / "checkpoint").exists():
            command.append("--resume")
        subprocess.run(command, check=True)
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return metrics


class Seen(NamedTuple):
    """Pictures of one size as a trained network sees them."""

    features: Tensor  # [B, D, h, w]
    cam: Tensor  # [B, C, h, w], raw
    labels: Tensor  # [B, C]
    masks: list[Tensor | None]  # [H, W]


def look(folder: Path, split: str, size: int = 16) -> list[Seen]:
    """Run the network of a trained run once over the pictures of a split; shuffled batches of pictures of one size."""
    config = parse(["--config", str(folder / "config.json")])
    accelerator = Accelerator(cpu=config.device == "cpu")
    data, name = (
        (config.data, config.train_split) if split == "train" else (config.eval_data or config.data, config.eval_split)
    )
    pictures = open_pictures(data, name, config)
    cam = build(config, len(pictures.classes)).to(accelerator.device).eval()
    cam.load_state_dict(load_checkpoint(folder / "checkpoint" / "classify.pt")["model"])

    by_size: dict[torch.Size, list[Any]] = {}
    for sample in tqdm(pictures, f"look at {split}", leave=False):
        features, scores = infer(cam, sample, config, accelerator)
        labels = sample.labels[None].to(scores)
        by_size.setdefault(features.shape, []).append((features, scores, labels, sample.mask))
    batches = []
    for group in by_size.values():
        for first in range(0, len(group), size):
            together = group[first : first + size]
            features, scores, labels = (torch.cat([each[k] for each in together]) for k in (0, 1, 2))
            batches.append(Seen(features, scores, labels, [each[3] for each in together]))
    random.Random(0).shuffle(batches)
    return batches


@torch.no_grad()
def ablate(folder: Path) -> dict[str, Any]:
    """Score ``pacam`` on a trained run with one part of the bank left out at a time, with masks and without."""
    splits = {split: look(folder, split) for split in ("train", "eval")}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classes, dim = splits["train"][0].labels.shape[1], splits["train"][0].features.shape[1]
    found: dict[str, Any] = {}
    for part, options in PARTS.items():
        if part == PAPER:
            bank = ContextPrototypeBank.paper(classes, dim)
        else:
            bank = ContextPrototypeBank(classes, dim, **{**keywords("--bank", config["bank"]), **options})
        bank.to(splits["train"][0].features.device).eval()
        with warnings.catch_warnings():
            # That a map is worse than the CAM is what the table shows.
            warnings.filterwarnings("ignore", "ContextPrototypeBank.fill: the bank's map")
            bank.fill([batch[:3] for batch in splits["train"]])

        found[part] = {}
        for split, batches in splits.items():
            sweep, contrast = ThresholdSweep(classes), RegionContrast(classes)
            for features, cam, labels, masks in batches:
                maps = bank(features, cam, labels).pacam[:, 1:]
                for index, mask in enumerate(masks):
                    contrast.update(features[index], maps[index], labels[index])
                    if mask is not None:
                        sweep.update(enlarge(maps[index], mask).cpu(), labels[index].cpu(), mask)
            found[part][split] = {"miou": sweep.result().best.miou, "contrast": contrast.result().best[0]}
    return found


def summarize(runs: dict[str, list[dict[str, Any]]], parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Collect every figure over the seeds."""
    summary: dict[str, Any] = {"maps": {}, "per_class": {}, "parts": {}}
    for method, metrics in runs.items():
        for split in ("train", "eval"):
            for name in MAPS:
                entries = [each["maps"][split][name] for each in metrics]
                key = f"{method}/{split}/{name}"
                fields = ("miou", "threshold", "miou_mask_free", "threshold_mask_free", "contrast")
                summary["maps"][key] = {field: spread(entry.get(field) for entry in entries) for field in fields}
                classes = entries[0]["per_class"]
                summary["per_class"][key] = {c: spread(entry["per_class"].get(c) for entry in entries) for c in classes}
        summary[method] = {
            "pseudo_masks": spread(each["pseudo_masks"]["train"].get("miou") for each in metrics),
            "segmentation": spread(each["segmentation"].get("eval", {}).get("miou") for each in metrics),
            "ceiling": spread(each["segmentation"].get("eval", {}).get("ceiling") for each in metrics),
            "all_background": spread(each["segmentation"].get("eval", {}).get("all_background") for each in metrics),
            "seconds": spread(each["seconds"] for each in metrics),
            "peak_memory_mb": spread(each["peak_memory_mb"] for each in metrics),
        }
    for part in PARTS if parts else ():
        summary["parts"][part] = {
            split: {key: spread(each[part][split][key] for each in parts) for key in ("miou", "contrast")}
            for split in ("train", "eval")
        }
    if parts:
        summary["rank_correlation"] = rank_correlation(parts)
    return summary


def rank_correlation(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Spearman's, over the parts, of each seed: of contrast with mIoU on eval, and of mIoU on train with that."""

    def ranked(one: tuple[str, str], other: tuple[str, str]) -> dict[str, Any]:
        found = []
        for each in parts:
            x, y = ([float(each[part][split][key]) for part in PARTS] for split, key in (one, other))
            found.append(float(spearmanr(x, y).statistic))
        return spread(found)

    return {
        "contrast": ranked(("eval", "contrast"), ("eval", "miou")),
        "miou_train": ranked(("train", "miou"), ("eval", "miou")),
    }


def show(value: dict[str, Any]) -> str:
    """Mean and spread as text; of one value, the value."""
    if value["mean"] is None:
        return "-"
    if len(value["values"]) == 1:
        return f"{value['mean']:.3f}"
    return f"{value['mean']:.3f} ± {value['sd']:.3f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def markdown(name: str, command: str, seeds: Sequence[int], summary: dict[str, Any]) -> str:
    """The tables as a page."""
    maps, methods, splits = summary["maps"], ("none", "cpal"), ("train", "eval")
    columns = [(split, key) for split in splits for key in MAPS]

    def mean(method: str, split: str, key: str, field: str = "miou") -> float:
        return float(maps[f"{method}/{split}/{key}"][field]["mean"])

    def gain(one: tuple[str, str], other: tuple[str, str], split: str) -> str:
        a, b = (maps[f"{method}/{split}/{key}"]["miou"]["values"] for method, key in (one, other))
        found = spread(x - y for x, y in zip(a, b, strict=True))
        return f"{found['mean']:+.3f} ± {found['sd']:.3f}"

    text = (
        f"# Accuracy on {name}\n\n`{command}`; mean ± standard deviation over seeds {', '.join(map(str, seeds))}. mIoU "
    )
    text += "over background and classes, tags given, threshold by sweep on the pictures shown.\n\n"
    rows = [[method, *(show(maps[f"{method}/{split}/{key}"]["miou"]) for split, key in columns)] for method in methods]
    text += table(["method", *(f"{key}, {split}" for split, key in columns)], rows)

    pairs = [("cpal", "pacam", "none", "cam"), ("cpal", "pacam", "none", "instance")]
    pairs += [("none", "pacam", "none", "cam"), ("cpal", "cam", "none", "cam")]
    rows = [
        [f"`{map_a}` of {a} over `{map_b}` of {b}", *(gain((a, map_a), (b, map_b), split) for split in splits)]
        for a, map_a, b, map_b in pairs
    ]
    text += "\n## Gains\n\nOf each seed.\n\n" + table(["", *splits], rows)

    if summary["parts"]:
        without_loss = {split: maps[f"none/{split}/pacam"] for split in splits}
        parts = {**summary["parts"], "self-supervised loss (trained without it)": without_loss}
        rows = []
        for part, scores in parts.items():
            means = [scores[split]["miou"]["mean"] - parts["nothing"][split]["miou"]["mean"] for split in splits]
            shown = [show(scores[split]["miou"]) for split in splits]
            contrast = show(scores["eval"]["contrast"]) if part in summary["parts"] else "-"  # other features
            rows.append([part, *shown, *(f"{mean:+.3f}" for mean in means), contrast])
        text += (
            "\n## `pacam` of cpal with one part left out\n\nOn the networks that cpal trained with every part; only "
        )
        text += "the last row is trained anew.\n\n"
        text += table(["left out", *splits, "change, train", "change, eval", "contrast, eval"], rows)
        rank = summary["rank_correlation"]
        text += (
            "\nSettings without masks: over these banks, all of the same features, the rank correlation (Spearman's, "
            f"of each seed) of contrast with mIoU on eval is {show(rank['contrast'])}. That of mIoU on train with mIoU "
            f"on eval is {show(rank['miou_train'])}.\n"
        )

    rows = []
    for method in methods:
        for split, key in columns:
            entry = maps[f"{method}/{split}/{key}"]
            change = mean(method, split, key, "miou_mask_free") - mean(method, split, key)
            rows.append([method, split, key, show(entry["miou"]), show(entry["miou_mask_free"]), f"{change:+.3f}"])
    text += "\n## Threshold without masks (Otsu) against the sweep\n\n"
    text += table(["method", "pictures", "map", "sweep", "without masks", "change"], rows)

    fields = ("pseudo_masks", "segmentation", "ceiling", "all_background", "seconds", "peak_memory_mb")
    text += (
        "\n## After the maps\n\nPseudo masks on train; the segmentation network on eval without tags; the same network "
        "trained on the true masks (ceiling); everything background (floor). Seconds of cpal count from where it takes "
        "up the run of none.\n\n"
    )
    text += table(["method", *fields], [[m, *(show(summary[m][field]) for field in fields)] for m in methods])

    text += "\n## Per class\n\n"
    head = [f"{method}: {key}, {split}" for method in methods for split, key in columns]
    rows = []
    for name in summary["per_class"]["none/train/cam"]:
        cells = [summary["per_class"][f"{m}/{split}/{key}"][name] for m in methods for split, key in columns]
        rows.append([name, *map(show, cells)])
    return text + table(["class", *head], rows)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing and write the tables; returns the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="scenes", help="'scenes' or a VOC-layout folder")
    parser.add_argument("--name", help="of the runs and results (default: that of the data, and the head)")
    parser.add_argument("--head", choices=("cam", "amn", "mct"), default="cam")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ceiling", action="store_true", help="also train the segmentation network on the true masks")
    parser.add_argument("--no-parts", action="store_true", help="do not leave out parts")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"), help="where the runs are kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="after --: flags for protoseg train cpal")
    args = parser.parse_args(argv)
    args.flags = [flag for flag in args.flags if flag != "--"]
    name = Path(args.data).name
    shown = name if Path(args.data).is_absolute() else args.data  # a path of one machine is nobody else's
    if args.head != "cam":
        name, args.no_parts = f"{name}-{args.head}", True
    name = args.name or name
    runs: dict[str, list[dict[str, Any]]] = {"none": [], "cpal": []}
    for seed in args.seeds:
        for method, metrics in runs.items():
            metrics.append(run(args.runs / name / f"{method}-{seed}", method, seed, args))
    folders = [args.runs / name / f"cpal-{seed}" for seed in args.seeds]
    parts = [] if args.no_parts else [ablate(folder) for folder in folders]
    summary = summarize(runs, parts)
    head = [] if args.head == "cam" else ["--head", args.head]
    given = ["--name", args.name] if args.name else []
    given += head + ["--ceiling"] * args.ceiling
    flags = [*given, "--", *args.flags] if args.flags else given
    command = " ".join(["python benchmarks/accuracy.py --data", shown, *flags])
    summary |= {"command": command, "seeds": args.seeds, "versions": runs["cpal"][0]["versions"]}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"accuracy-{name}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (args.output / f"accuracy-{name}.md").write_text(markdown(name, command, args.seeds, summary), encoding="utf-8")
    return summary


if __name__ == "__main__":
    main()
