"""VPL: maps by text, centered text and vision prototypes, and what regional contrast is worth, over seeds.

    python benchmarks/accuracy_vpl.py                                        # on made scenes
    python benchmarks/accuracy_vpl.py --data ../shared/data/msrc15 --sets maps -- --size 96 --clip-size 96
    python benchmarks/accuracy_vpl.py --data ../shared/data/voc20 --clip pocket --sets prompts  # maps of kept features
    python benchmarks/accuracy_vpl.py --data ../shared/data/voc20 --clip pocket --sets contrast -- --epochs 6

Runs ``protoseg train vpl`` for every variant and seed, ``--jobs`` runs at a time of one thread each; finished runs
in ``--runs`` are kept. Writes ``accuracy-vpl-NAME.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accuracy import show, spread, table

ROOT = Path(__file__).resolve().parents[1]
MAPS = ("text", "text_centered", "vision", "vision_affinity")
NETWORK = "efficientnet-lite0"


class Variant(NamedTuple):
    """Flags of a run, and the variant whose prototypes and maps it takes over, where it differs only later."""

    flags: list[str]
    base: str | None = None


ONLY_MAPS = ["--stages", "prototypes", "seeds"]
CLEAN = "as CLIP knows them"
VARIANTS: dict[str, dict[str, Variant]] = {
    "maps": {CLEAN: Variant([]), "colors permuted": Variant(["--shift", "channels"])},
    "prompts": {
        "no background prompts": Variant(["--no-background", *ONLY_MAPS]),
        "without tags": Variant(["--no-fit-tags", *ONLY_MAPS]),
        "vision temperature as text": Variant(["--ratio", "1", *ONLY_MAPS]),
        "vision temperature four times": Variant(["--ratio", "4", *ONLY_MAPS]),
    },
}
SHIFTED = "colors permuted"
# Flags of the decoder or the seeds, and the base; each is run without regional contrast as well.
SETTINGS: dict[str, tuple[list[str], str | None]] = {
    "default": ([], CLEAN),
    "twice as wide and deep a decoder": (["--decoder-dim", "128", "--decoder-depth", "4"], CLEAN),
    "noisy seeds (text, not refined)": (["--seed-map", "text", "--refine", "none"], CLEAN),
    "100 pictures": (["--train-scenes", "100", "--epochs", "40"], None),
    "colors permuted": ([], SHIFTED),
}
# Flags of the contrast, on the default setting.
KINDS = {
    "no suppression of absent classes": ["--rsc-suppression", "0"],
    "five times the weight": ["--rsc-weight", "0.5"],
    "temperature 0.03": ["--rsc-temperature", "0.03"],
}
VARIANTS["contrast"] = {
    f"{name}, {word}": Variant([*(VARIANTS["maps"][base].flags if base else []), *flags, *off], base)
    for name, (flags, base) in SETTINGS.items()
    for word, off in (("with", []), ("without", ["--no-rsc"]))
} | {f"{name}, with": Variant(flags, CLEAN) for name, flags in KINDS.items()}


def run(job: tuple[Path, Path | None, list[str]]) -> None:
    """Train one run in a process of its own; on a base, only its last stages."""
    import torch

    from protoseg.recipes import vpl as recipe

    folder, base, flags = job
    torch.set_num_threads(1)
    if base is not None:
        shutil.copytree(base, folder, dirs_exist_ok=True)
        flags = [*flags, "--stages", *(["refine"] if "--seed-map" in flags else []), "segment"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log, contextlib.redirect_stderr(log):
        try:
            recipe.main([*flags, "--output", str(folder), "--overwrite"])  # what a broken-off run left
        except SystemExit as error:  # by which a worker would leave the pool waiting for ever
            raise RuntimeError(f"{folder}: {error}") from error
    if base is not None:  # which has them
        shutil.rmtree(folder / "seeds")


def run_all(wanted: dict[str, Variant], args: argparse.Namespace, folder: Path) -> None:
    """Run what is missing: a run of each seed first, which trains that seed's CLIP, then bases, then the others."""
    first = next(iter(wanted))
    waves = [[first], [name for name in wanted if not wanted[name].base and name != first]]
    waves.append([name for name in wanted if wanted[name].base and not same_as_base(wanted[name])])
    for wave in waves:
        jobs = []
        for name in wave:
            variant = wanted[name]
            for seed in args.seeds:
                base = path_of(folder, variant.base, seed) if variant.base else None
                flags = ["--data", args.data, "--seed", str(seed), "--cache", str(args.runs / "cache")]
                jobs.append((path_of(folder, name, seed), base, [*flags, *args.flags, *variant.flags]))
        missing = [job for job in jobs if not finished(job)]
        if missing:
            with multiprocessing.get_context("spawn").Pool(min(args.jobs, len(missing))) as pool:
                pool.map(run, missing, chunksize=1)


def same_as_base(variant: Variant) -> bool:
    """Whether a variant is its base by another name."""
    return variant.base is not None and variant.flags == VARIANTS["maps"][variant.base].flags


def finished(job: tuple[Path, Path | None, list[str]]) -> bool:
    """Whether a run has ended; a copy of its base has the base's metrics until it has."""
    folder, base, _ = job
    return (folder / "metrics.json").exists() and (base is None or not (folder / "seeds").exists())


def path_of(folder: Path, name: str, seed: int) -> Path:
    """The folder of a run."""
    return folder / f"{name}-{seed}"


def read(folder: Path, name: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The metrics of a variant's runs."""
    variant = next(each[name] for each in VARIANTS.values() if name in each)
    name = variant.base if variant.base and same_as_base(variant) else name
    return [json.loads((path_of(folder, name, seed) / "metrics.json").read_text("utf-8")) for seed in seeds]


def summarize(folder: Path, sets: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Collect the figures of each set over the seeds."""
    summary: dict[str, Any] = {}
    for each in sets:
        summary[each] = {}
        for name in VARIANTS[each]:
            runs = read(folder, name, seeds)
            entry: dict[str, Any] = {}
            for split in ("train", "eval"):
                for key in MAPS:
                    entry[f"{key} {split}"] = spread(run["maps"][split][key]["miou"] for run in runs)
                entry[f"segmentation {split}"] = spread(run["segmentation"].get(split, {}).get("miou") for run in runs)
                for other in ("text", "text_centered"):
                    maps = [run["maps"][split] for run in runs]
                    entry[f"vision over {other} {split}"] = spread(m["vision"]["miou"] - m[other]["miou"] for m in maps)
            entry["pseudo masks"] = spread(run["pseudo_masks"]["train"].get("miou") for run in runs)
            entry["seconds"] = spread(run["seconds"] for run in runs)
            summary[each][name] = entry
            summary["trivial"], summary["versions"] = runs[0]["trivial"]["eval"], runs[0]["versions"]
    return summary


def markdown(name: str, summary: dict[str, Any]) -> str:
    """The tables as a page."""
    text = f"# VPL on {name}\n\n`{summary['command']}`; mean ± standard deviation over seeds "
    text += f"{', '.join(map(str, summary['seeds']))}, each with a small CLIP of its own. Maps: Grad-CAM with tags, "
    text += "mIoU at the best threshold. Segmentation: the decoder, `eval` without tags, `train` with tags.\n\n"
    trivial = {key: f"{value:.3f}" for key, value in summary["trivial"].items()}
    text += f"Masks that know nothing of the picture (unseen pictures): background everywhere {trivial['background']}, "
    text += f"a true tag everywhere {trivial['tag']}, a true tag in a centered ellipse {trivial['disc']}.\n"
    for each in ("maps", "prompts"):
        if each not in summary:
            continue
        for split in ("eval", "train"):
            columns = [*(f"{key} {split}" for key in MAPS), f"vision over text {split}"]
            columns += [f"vision over text_centered {split}", f"segmentation {split}"]
            rows = [[key, *(show(entry[column]) for column in columns)] for key, entry in summary[each].items()]
            text += f"\n## {each}, {split}\n\n" + table([each, *columns], rows)
    if "contrast" in summary:
        rows = []
        for key in (*SETTINGS, *KINDS):
            on = summary["contrast"][f"{key}, with"]
            off = summary["contrast"][f"{key if key in SETTINGS else 'default'}, without"]
            row = [key, show(on["pseudo masks"])]
            for split in ("eval", "train"):
                pair = [each[f"segmentation {split}"] for each in (on, off)]
                gain = spread(a - b for a, b in zip(pair[0]["values"], pair[1]["values"], strict=True))
                row += [*map(show, pair), show(gain)]
            rows.append(row)
        columns = [f"{word}, {split}" for split in ("eval", "train") for word in ("with", "without", "gain")]
        text += "\n## Regional contrast\n\n" + table(["setting", "pseudo masks", *columns], rows)
    return text


def pocket(name: str, shown: str, args: argparse.Namespace) -> dict[str, Any]:
    """The tables of the pocket model."""
    import _pocket
    import torch

    from protoseg.clip import FrozenCLIP
    from protoseg.data import VOCFolder
    from protoseg.recipes.files import versions
    from protoseg.recipes.pictures import Pictures

    torch.set_num_threads(1)
    splits = {key: Pictures(VOCFolder(args.data, split)) for key, split in (("train", "train"), ("eval", "val"))}
    sets = [] if set(args.sets) == set(VARIANTS) else ["--sets", *args.sets]
    where = f"{name}-pocket"
    if args.network != NETWORK:
        where += f"-{args.network}"
        sets = ["--network", args.network, *sets]
    command = " ".join(["python benchmarks/accuracy_vpl.py --clip pocket --data", shown, *sets])
    page = args.output / f"accuracy-vpl-{where}"

    def save(summary: dict[str, Any]) -> None:
        summary["versions"] = versions("protoseg", "torch", "timm", "transformers", "numpy")
        write(page, summary, _pocket.markdown(name, summary))

    folder = args.runs / where
    summary: dict[str, Any] = {}
    if {"maps", "prompts"} & set(args.sets):
        clip = FrozenCLIP.pocket(args.network)
        summary = _pocket.run(clip, splits, command, folder, "prompts" in args.sets, save)
    if "contrast" in args.sets:
        import _decoders

        found = _decoders.run(args.data, folder / "decoders", args.seeds, args.flags)
        flags = ["--", *args.flags] if args.flags else []
        asked = ["python benchmarks/accuracy_vpl.py --clip pocket --data", shown, "--sets contrast", *flags]
        found["command"] = " ".join(asked)
        page = args.output / f"accuracy-vpl-{name}-pocket-decoder"
        write(page, found, _decoders.markdown(name, found))
        summary["decoders"] = found
    return summary


def write(page: Path, summary: dict[str, Any], text: str) -> None:
    """Write the figures and the tables."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    page.with_suffix(".md").write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing and write the tables; returns the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="scenes", help="'scenes' or a VOC-layout folder")
    parser.add_argument("--clip", choices=("small", "pocket"), default="small", help="whose maps")
    parser.add_argument("--network", default=NETWORK, help="what sees for the pocket model; its maps alone")
    parser.add_argument("--sets", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy-vpl"), help="where the runs are kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="after --: flags for protoseg train vpl")
    args = parser.parse_args(argv)
    args.flags = [flag for flag in args.flags if flag != "--"]
    name = Path(args.data).name
    shown = name if Path(args.data).is_absolute() else args.data  # a path of one machine is nobody else's
    if args.clip == "pocket":
        return pocket(name, shown, args)
    # Bases of the variants that are asked for are run as well.
    wanted = {key: each for one in args.sets for key, each in VARIANTS[one].items()}
    bases = {each.base: VARIANTS["maps"][each.base] for each in wanted.values() if each.base}
    run_all({**bases, **wanted}, args, args.runs / name)
    flags = ["--", *args.flags] if args.flags else []
    command = " ".join(["python benchmarks/accuracy_vpl.py --data", shown, "--sets", *args.sets, *flags])
    summary = {**summarize(args.runs / name, args.sets, args.seeds), "command": command, "seeds": args.seeds}
    write(args.output / f"accuracy-vpl-{name}", summary, markdown(name, summary))
    return summary


if __name__ == "__main__":
    main()
