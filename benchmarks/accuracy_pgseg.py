"""PGSeg with and without prototypes: zero-shot mIoU and what the groups are like, over seeds.

    python benchmarks/accuracy_pgseg.py --sets npr remedies       # on made scenes
    python benchmarks/accuracy_pgseg.py --sets parts --seeds 0 1 2
    python benchmarks/accuracy_pgseg.py --data ../shared/data/msrc21 --sets npr -- --size 96 --epochs 80
    python benchmarks/accuracy_pgseg.py --data ../shared/data/voc20 --sets npr --judge ../shared/data/msrc15 \
        -- --preset lite0

Runs ``protoseg train pgseg`` for every variant and seed with the same number of steps, ``--jobs`` runs at a time of
one thread each; finished runs in ``--runs`` are kept. ``--judge`` scores each network on other pictures, too. Writes
``accuracy-pgseg-NAME-SETS.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accuracy import show, spread, table

SEEDS = [0, 1, 2, 3]
ROOT = Path(__file__).resolve().parents[1]
NARROW = ["--npr-options", "bandwidth=0.1"]  # the class's default, and that of "lite0"
WIDE = ["--npr-options", "bandwidth=0.3"]  # that of "tiny"
# Flags of the trainer by variant. "npr" is what the paper compares; "remedies" change how both regularizers work;
# "bandwidth" and "kernel" are what the paper leaves open; "parts" put one part of the paper in the place of what "tiny"
# has.
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
    "bandwidth": {
        "image, bandwidth 0.3": ["--npr", "image", *WIDE],
        "text, bandwidth 0.3": ["--npr", "text", *WIDE],
        "both, bandwidth 0.3": ["--npr", "both", *WIDE],
        "image, bandwidth 0.03": ["--npr", "image", "--npr-options", "bandwidth=0.03"],
    },
    "kernel": {
        "image, gaussian kernel": ["--npr", "image", "--npr-options", "kernel=gaussian"],
        "image, cosine kernel": ["--npr", "image", "--npr-options", "kernel=cosine"],
        "image, 4 prototypes": ["--npr", "image", "--npr-options", "num_prototypes=4"],
        "image, 16 prototypes": ["--npr", "image", "--npr-options", "num_prototypes=16"],
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


def train(job: tuple[Path, list[str], str | None]) -> None:
    """Train one run in a process of its own, and judge it on other pictures, where there are some."""
    import _held
    import torch

    from protoseg.recipes import pgseg as recipe

    folder, flags, other = job
    torch.set_num_threads(1)
    _held.hold(frozen="lite0" in flags and "frozen=false" not in flags)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log, contextlib.redirect_stderr(log):
        try:
            if not (folder / "metrics.json").exists():
                recipe.main([*flags, "--output", str(folder), "--overwrite"])  # what a broken-off run left
            if other is not None:
                judged = judged_in(folder, other)
                shutil.copytree(folder, judged, dirs_exist_ok=True)
                recipe.main([*flags, "--eval-data", other, "--stages", "score", "--output", str(judged)])
                shutil.rmtree(judged / "checkpoint")  # which is that of the run
        except SystemExit as error:  # by which a worker would leave the pool waiting for ever
            raise RuntimeError(f"{folder}: {error}") from error


def judged_in(folder: Path, other: str) -> Path:
    """Where the scores of a run on other pictures are."""
    return folder.with_name(f"{folder.name} on {Path(other).name}")


def finished(job: tuple[Path, list[str], str | None]) -> bool:
    """Whether a run has ended; a copy to judge has the run's metrics until it has been."""
    folder, _, other = job
    if other is None:
        return (folder / "metrics.json").exists()
    judged = judged_in(folder, other)
    return (judged / "metrics.json").exists() and not (judged / "checkpoint").exists()


def summarize(folder: Path, wanted: Sequence[str], seeds: Sequence[int], other: str | None = None) -> dict[str, Any]:
    """Collect every figure over the seeds, on the runs' own pictures or on others."""
    summary: dict[str, Any] = {"variants": {}}
    for name in wanted:
        folders = [path_of(folder, name, seed) for seed in seeds]
        if other is not None:
            folders = [judged_in(each, other) for each in folders]
        runs = [json.loads((each / "metrics.json").read_text("utf-8")) for each in folders]
        summary["variants"][name] = {key: spread(read(run) for run in runs) for key, read in FIGURES.items()}
        summary["trivial"], summary["versions"] = runs[0]["trivial"]["eval"], runs[0]["versions"]
    return summary


def path_of(folder: Path, name: str, seed: int) -> Path:
    """The folder of a run."""
    return folder / f"{name}-{seed}"


def markdown(
    name: str, preset: str, command: str, seeds: Sequence[int], summary: dict[str, Any], sets: dict[str, list[str]]
) -> str:
    """The tables as a page."""
    text = f"# PGSeg (`{preset}`) on {name}\n\n`{command}`; mean ± standard deviation over seeds "
    text += f"{', '.join(map(str, seeds))}. Zero-shot mIoU on unseen pictures, no tags, threshold from other pictures. "
    text += (
        "Group oracle: mIoU when each group has its true majority class. Redundancy: mean cosine of two groups in use. "
    )
    text += "Compactness: mean cosine of a group's tokens with their mean.\n\n"
    text += _trivial(summary["trivial"]) + _tables(summary["variants"], sets)
    for other, judged in summary.get("judged", {}).items():
        text += f"\n# The same networks on {other}, whose pictures and classes they have never seen\n\n"
        text += _trivial(judged["trivial"]) + _tables(judged["variants"], sets)
    return text


def _trivial(scores: dict[str, float]) -> str:
    text = f"Masks that know nothing of the picture: background everywhere {scores['background']:.3f}, random parts "
    return text + f"{scores['regions']:.3f}, a true tag in a centered disc {scores['disc']:.3f}.\n"


def _tables(found: dict[str, dict[str, Any]], sets: dict[str, list[str]]) -> str:
    """A table for each set; every variant is compared with none, seed by seed."""
    text, plain = "", found.get("none")
    for each, variants in sets.items():
        rows = []
        for variant in dict.fromkeys([*(["none"] if plain else []), *variants]):
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
    parser.add_argument("--only", nargs="+", help="variants of these sets; all where none is named")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--judge", help="a VOC-layout folder of other pictures, to score each network on")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy-pgseg"), help="where the runs are kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="after --: flags for protoseg train pgseg")
    args = parser.parse_args(argv)
    args.flags = [flag for flag in args.flags if flag != "--"]
    name = Path(args.data).name
    preset = args.flags[args.flags.index("--preset") + 1] if "--preset" in args.flags else "tiny"
    where = name if preset == "tiny" else f"{name}-{preset}"
    sets = {each: [variant for variant in SETS[each] if variant in (args.only or SETS[each])] for each in args.sets}
    wanted = {variant: SETS[each][variant] for each, variants in sets.items() for variant in variants}
    jobs = [
        (
            path_of(args.runs / where, variant, seed),
            ["--data", args.data, "--seed", str(seed), *flags, *args.flags],
            args.judge,
        )
        for variant, flags in wanted.items()
        for seed in args.seeds
    ]
    missing = [job for job in jobs if not finished(job)]
    if missing:
        with multiprocessing.get_context("spawn").Pool(min(args.jobs, len(missing))) as pool:
            pool.map(train, missing, chunksize=1)
    summary = summarize(args.runs / where, list(wanted), args.seeds)
    judge = []
    if args.judge:
        summary["judged"] = {Path(args.judge).name: summarize(args.runs / where, list(wanted), args.seeds, args.judge)}
        judge = ["--judge", shown(args.judge)]
    flags = ["--", *args.flags] if args.flags else []
    seeds = [] if args.seeds == SEEDS else ["--seeds", *map(str, args.seeds)]
    only = ["--only", *args.only] if args.only else []
    asked = ["--data", shown(args.data), "--sets", *args.sets, *only, *seeds, *judge, *flags]
    command = " ".join(["python benchmarks/accuracy_pgseg.py", *asked])
    summary |= {"command": command, "seeds": args.seeds}
    args.output.mkdir(parents=True, exist_ok=True)
    page = "-".join(["accuracy-pgseg", where, *args.sets])
    (args.output / f"{page}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    text = markdown(name, preset, command, args.seeds, summary, sets)
    (args.output / f"{page}.md").write_text(text, encoding="utf-8")
    return summary


def shown(data: str) -> str:
    """Data as a command names it; a path of one machine is nobody else's."""
    return Path(data).name if Path(data).is_absolute() else data


if __name__ == "__main__":
    main()
