"""PGSeg with and without prototypes: zero-shot mIoU and what the groups are like, over seeds.

    python benchmarks/accuracy_pgseg.py --sets npr remedies       # on made scenes
    python benchmarks/accuracy_pgseg.py --sets parts --seeds 0 1 2
    python benchmarks/accuracy_pgseg.py --data ../shared/data/msrc21 --sets npr -- --size 96 --epochs 80

Runs ``protoseg train pgseg`` for every variant and seed with the same number of steps, ``--jobs`` runs at a time of
one thread each; finished runs in ``--runs`` are kept. Writes ``accuracy-pgseg-NAME-SETS.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accuracy import show, spread, table

ROOT = Path(__file__).resolve().parents[1]
NARROW = ["--npr-options", "bandwidth=0.1"]  # the class's default; that of "tiny" is 0.3
# Flags of the trainer by variant. "npr" is what the paper compares; "remedies" change how both regularizers work;
# "parts" put one part of the paper in the place of what "tiny" has.
SETS: dict[str, dict[str, list[str]]] = {
    "npr": {name: ["--npr", name] for name in ("none", "image", "text", "both")},
    "remedies": {
        "bandwidth 0.1": NARROW,
        "bandwidth 0.03": ["--npr-options", "bandwidth=0.03"],
        "three times the weights": ["--weight-image", "0.3", "--weight-text", "0.03"],
        "0.1, a tenth of the weight of images": [*NARROW, "--weight-image", "0.01"],
        "0.1, from half of the epochs on": [*NARROW, "--npr-start", "0.5"],
        "0.1, means of what groups own": [*NARROW, "--network", "npr_target=means"],
        "0.1, the same of tokens at the unit": [*NARROW, "--network", "npr_source=unit", "npr_target=means"],
        "0.1, two prototypes a group": [*NARROW, "num_prototypes=16"],
    },
    "parts": {
        "none": ["--npr", "none"],
        "patches by one convolution": ["--npr", "none", "--network", "stem=patch"],
        "group tokens in the sequence, hard Gumbel assignment": ["--npr", "none", "--network", "unit=attention"],
        "a block behind the unit": ["--npr", "none", "--network", "depths=1,1"],
        "two units, 16 and 8 groups": ["--npr", "none", "--network", "groups=16,8", "depths=1,0,0"],
        "projections with a hidden layer": ["--npr", "none", "--network", "hidden=384"],
        "no contrast of nouns": ["--npr", "none", "--weight-nouns", "0"],
    },
}
FIGURES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "mIoU": lambda m: m["maps"]["eval"]["zeroshot"]["miou"],
    "group oracle": lambda m: m["groups"]["oracle"],
    "redundancy": lambda m: m["groups"]["redundancy"],
    "compactness": lambda m: m["groups"]["compactness"],
    "groups in use": lambda m: m["groups"]["used"],
    "prototype cosine": lambda m: m["prototypes"].get("image 1 prototype cosine"),
    "accepted, image": lambda m: m["prototypes"].get("image 1 accepted"),
    "accepted, text": lambda m: m["prototypes"].get("text accepted"),
}


def train(job: tuple[Path, list[str]]) -> None:
    """Train one run in a process of its own, which draws each scene only once for all its runs."""
    import torch

    from protoseg.data import ScenePairs
    from protoseg.recipes import pgseg as recipe
    from protoseg.recipes import pgseg_data

    folder, flags = job
    torch.set_num_threads(1)

    class Held(ScenePairs):
        def __getitem__(self, index: int) -> Any:
            key = self.scenes.ids[index]
            if key not in HELD:
                HELD[key] = super().__getitem__(index)
            return HELD[key]

    setattr(pgseg_data, ScenePairs.__name__, Held)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log, contextlib.redirect_stderr(log):
        try:
            recipe.main([*flags, "--output", str(folder), "--overwrite"])  # what a broken-off run left
        except SystemExit as error:  # by which a worker would leave the pool waiting for ever
            raise RuntimeError(f"{folder}: {error}") from error


HELD: dict[str, Any] = {}  # by name, as all runs of a process have pictures of the same size


def summarize(folder: Path, wanted: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Collect every figure over the seeds."""
    summary: dict[str, Any] = {"variants": {}}
    for name in wanted:
        runs = [json.loads((path_of(folder, name, seed) / "metrics.json").read_text("utf-8")) for seed in seeds]
        summary["variants"][name] = {key: spread(read(run) for run in runs) for key, read in FIGURES.items()}
        summary["trivial"], summary["versions"] = runs[0]["trivial"]["eval"], runs[0]["versions"]
    return summary


def path_of(folder: Path, name: str, seed: int) -> Path:
    """The folder of a run."""
    return folder / f"{name}-{seed}"


def markdown(name: str, command: str, seeds: Sequence[int], summary: dict[str, Any], sets: Sequence[str]) -> str:
    """The tables as a page."""
    text = f"# PGSeg (`tiny`) on {name}\n\n`{command}`; mean ± standard deviation over seeds "
    text += f"{', '.join(map(str, seeds))}. Zero-shot mIoU on unseen pictures, no tags, threshold from other pictures. "
    text += (
        "Group oracle: mIoU when each group has its true majority class. Redundancy: mean cosine of two groups in use. "
    )
    text += "Compactness: mean cosine of a group's tokens with their mean.\n\nMasks that know nothing of the picture: "
    trivial = summary["trivial"]
    text += (
        f"background everywhere {trivial['background']:.3f}, random parts {trivial['regions']:.3f}, a true tag in a "
    )
    text += f"centered disc {trivial['disc']:.3f}.\n"
    found = summary["variants"]
    plain = found.get("none")  # what every variant is compared with, seed by seed
    for each in sets:
        rows = []
        for variant in dict.fromkeys([*(["none"] if plain else []), *SETS[each]]):
            figures, change = found[variant], "-"
            if plain and figures is not plain:
                pairs = zip(figures["mIoU"]["values"], plain["mIoU"]["values"], strict=True)
                change = show(spread(a - b for a, b in pairs))
            rows.append([variant, *(show(figures[key]) for key in FIGURES), change])
        text += f"\n## {each}\n\n" + table([each, *FIGURES, "mIoU over none, by seed"], rows)
    return text


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing and write the tables; returns the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="scenes", help="'scenes' or a VOC-layout folder")
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy-pgseg"), help="where the runs are kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="after --: flags for protoseg train pgseg")
    args = parser.parse_args(argv)
    args.flags = [flag for flag in args.flags if flag != "--"]
    name = Path(args.data).name
    shown = name if Path(args.data).is_absolute() else args.data  # a path of one machine is nobody else's
    wanted = {variant: flags for each in args.sets for variant, flags in SETS[each].items()}
    jobs = [
        (path_of(args.runs / name, variant, seed), ["--data", args.data, "--seed", str(seed), *flags, *args.flags])
        for variant, flags in wanted.items()
        for seed in args.seeds
    ]
    missing = [job for job in jobs if not (job[0] / "metrics.json").exists()]
    if missing:
        with multiprocessing.get_context("spawn").Pool(min(args.jobs, len(missing))) as pool:
            pool.map(train, missing, chunksize=1)
    summary = summarize(args.runs / name, list(wanted), args.seeds)
    flags = ["--", *args.flags] if args.flags else []
    command = " ".join(["python benchmarks/accuracy_pgseg.py --data", shown, "--sets", *args.sets, *flags])
    summary |= {"command": command, "seeds": args.seeds}
    args.output.mkdir(parents=True, exist_ok=True)
    page = "-".join(["accuracy-pgseg", name, *args.sets])
    (args.output / f"{page}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (args.output / f"{page}.md").write_text(markdown(name, command, args.seeds, summary, args.sets), encoding="utf-8")
    return summary


if __name__ == "__main__":
    main()
