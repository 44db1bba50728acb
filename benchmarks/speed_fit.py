"""Time, result and memory of VisionPrototypeLearner.fit, beside the published schedule, on made pictures, in one run.

    python benchmarks/speed_fit.py [--quick] [--published FOLDER] [--parts race recovery memory] [--threads N]
        [--output FOLDER]

``--published`` is a copy of the repository idstcv/InMaP, whose optimization is run as it is; without it fit runs alone.
Writes ``speed-fit.json`` and ``speed-fit.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _measure import environment, table

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("race", "recovery", "memory")
# glibc would hand every large table back to the system and fetch it again page by page, at each step.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**36)}
GB = 10**9


@dataclass(frozen=True)
class Sizes:
    """What is measured: pictures, classes and tags a picture of VOC and COCO, and what the pictures are made of."""

    sets: tuple[tuple[int, int, float], ...] = ((10_582, 20, 1.5), (82_000, 80, 2.9))
    dim: int = 512
    gap: float = 3.0
    error: float = 1.0
    noise: float = 1.0
    temperatures: tuple[float, float] = (0.01, 0.04)
    steps: tuple[int, ...] = (200, 2000)
    noises: tuple[float, ...] = (0.5, 1.0, 2.0)
    grid: tuple[tuple[float, float], ...] = (
        (0.01, 0.02), (0.01, 0.03), (0.01, 0.04), (0.02, 0.06), (0.02, 0.08), (0.02, 0.1),
    )  # fmt: skip
    many: int = 1_000_000
    # Classes, tags a picture, half precision, with tags, rounds of balancing.
    memory: tuple[tuple[int, float, bool, bool, int], ...] = (
        (20, 1.5, True, False, 0), (20, 1.5, True, True, 0), (20, 1.5, False, True, 0), (80, 2.9, True, True, 20),
    )  # fmt: skip
    iterations: int = 10


QUICK = Sizes(
    ((150, 4, 1.5),), 32, steps=(5, 20), noises=(0.5,), grid=((0.02, 0.08),), many=2000,
    memory=((4, 1.5, True, True, 2),), iterations=2,
)  # fmt: skip


def measured(tasks: Sequence[dict[str, Any]], environ: Mapping[str, str]) -> list[dict[str, Any]]:
    """Run ``_fit.py`` in a process of its own; returns the tasks and what it found."""
    command = [sys.executable, str(Path(__file__).with_name("_fit.py")), json.dumps(tasks)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environ})
    kept = [{name: value for name, value in task.items() if name != "published"} for task in tasks]  # a folder of ours
    return [{**task, **found} for task, found in zip(kept, json.loads(ran.stdout), strict=True)]


def measure(parts: Sequence[str], sizes: Sizes, threads: int, published: Path | None) -> dict[str, Any]:
    """All measurements of the chosen parts."""
    common = {name: getattr(sizes, name) for name in ("dim", "gap", "error", "noise", "temperatures")}
    common["threads"] = threads
    race = [
        {
            **common, "what": "race", "n": n, "classes": classes, "tags": tags, "with_tags": with_tags,
            "published": published and str(published.resolve()), "steps": sizes.steps,
        }
        for n, classes, tags in sizes.sets
        for with_tags in (True, False)
    ]  # fmt: skip
    n, classes, tags = sizes.sets[0]
    recovery = [
        {
            **common, "what": "recovery", "n": n, "classes": classes, "tags": tags, "with_tags": with_tags,
            "noise": noise, "temperatures": pair,
        }
        for noise in sizes.noises
        for pair in sizes.grid
        for with_tags in (True, False)
    ]  # fmt: skip
    memory = [
        {
            **common, "what": "memory", "n": sizes.many, "classes": classes, "tags": tags, "with_tags": with_tags,
            "half": half, "balance": balance, "iterations": sizes.iterations,
        }
        for classes, tags, half, with_tags, balance in sizes.memory
    ]  # fmt: skip
    found = measured([task for task in (*race, *recovery) if task["what"] in parts], KEEP_MEMORY)
    if "memory" in parts:  # the peak of one is not another's
        found += [one for task in memory for one in measured([task], {})]
    return {part: [one for one in found if one["what"] == part] for part in PARTS if part in parts}


def named(one: Mapping[str, Any]) -> str:
    """Pictures, classes and whether there are tags."""
    return f"n={one['n']:,}, C={one['classes']}, {'with' if one['with_tags'] else 'without'} tags"


def goals(results: Mapping[str, Any], sizes: Sizes) -> list[dict[str, Any]]:
    """The goals, what was measured and whether it is enough."""
    found = []
    for one in results.get("race", []):
        for published in one["published"][-1:]:
            times = published["times"] or 0.0
            what = f"times as fast as {published['steps']} published steps, {named(one)}"
            found.append({"what": what, "goal": "at least 20", "measured": times, "met": times >= 20})
    for one in results.get("recovery", []):
        cosine = one["fit"]["cosine"]["raw"]
        if one["noise"] == sizes.noise and one["temperatures"] in (sizes.temperatures, sizes.grid[-1]):
            what = f"cosine to the planted, noise {one['noise']:g}, temperatures {named_pair(one)}, {named(one)}"
            found.append({"what": what, "goal": "at least 0.99", "measured": cosine, "met": cosine >= 0.99})
    if "memory" in results:
        most = max(one["peak_bytes"] for one in results["memory"]) / GB
        what = f"peak above the features in GB, {results['memory'][0]['n']:,} pictures, worst case"
        found.append({"what": what, "goal": "at most 1", "measured": most, "met": most <= 1})
    return found


def named_pair(one: Mapping[str, Any]) -> str:
    """Both temperatures."""
    return " and ".join(f"{value:g}" for value in one["temperatures"])


def race_tables(races: Sequence[Mapping[str, Any]]) -> str:
    """The races, and what came out of them."""
    lines, quality = [], []
    for one in races:
        for published in one["published"]:
            fit = published["reached"]
            ours = ["-"] * 5 if fit is None else [
                f"{fit['seconds']:.3g} s", str(fit["iterations"]), f"{fit['kl']:.6f}", f"{published['times']:.3g}",
                f"{published['cpu_times']:.3g}",
            ]  # fmt: skip
            lines.append(
                [named(one), f"{published['steps']}", f"{published['seconds']:.4g} s", f"{published['kl']:.6f}", *ours]
            )
        whole = one["whole"]
        rows = [("texts", one["text"]), *((f"{each['steps']} published steps", each) for each in one["published"])]
        for name, each in (*rows, (f"fit to the end, {whole['iterations']} steps, {whole['seconds']:.3g} s", whole)):
            cosine = each["cosine"]
            quality.append(
                [named(one), name, f"{each['kl']:.6f}", *(f"{cosine[k]:.4f}" for k in ("raw", "centered", "least"))]
            )
    return (
        table(["", "published steps", "time", "KL", "fit: time", "steps", "KL", "times as fast", "by CPU time"], lines)
        + "\n\n"
        + table(["", "prototypes", "KL", "cosine", "centered", "least centered"], quality)
    )


def recovery_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a setting."""
    lines = []
    for one in rows:
        pairs = [f"{one[k]['raw']:.3f}, {one[k]['centered']:.3f}" for k in ("text", "least_squares")]
        cosine, kl = one["fit"]["cosine"], one["fit"]["kl"]
        lines.append(
            [
                f"{one['noise']:g}", named_pair(one), "yes" if one["with_tags"] else "no", *pairs,
                f"{cosine['raw']:.4f}, {cosine['centered']:.4f}", f"{one['planted_kl']:.4f}", f"{kl:.4f}",
            ]
        )  # fmt: skip
    header = ["noise", "temperatures", "tags", "texts", "least squares of pictures and tags", "fit"]
    return table([*header, "KL of the planted", "KL of fit"], lines)


def memory_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a case."""
    lines = [
        [
            named(one), "16 bit" if one["half"] else "32 bit", str(one["balance"]), f"{one['data_bytes'] / GB:.2f} GB",
            f"{one['peak_bytes'] / GB:.3f} GB", f"{one['seconds']:.3g} s", str(one["evaluations"]),
        ]
        for one in rows
    ]  # fmt: skip
    return table(["", "features", "rounds of balancing", "features and tags", "peak above", "time", "passes"], lines)


def markdown(results: Mapping[str, Any]) -> str:
    """All results as one page."""
    env, sizes = results["environment"], results["sizes"]
    versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items())
    met = [[g["what"], g["goal"], f"{g['measured']:.4g}", "yes" if g["met"] else "**no**"] for g in results["goals"]]
    text = f"""# Vision prototypes: time, result and memory of the fit

Written by `{results["command"]}` in {results["seconds"]:.0f} s.
{versions}.
{env["system"]}, {env["cpu_count"]} CPUs, {env["torch_threads"]} threads, load {env["load_before"]} before the run;
device CPU, {env["dtype"]}. Wall-clock, one run.

Made pictures: D={sizes["dim"]}, one seed. The planted prototypes are random directions less their mean, of length 1. A
picture is, up to its length, the direction of the sum of its classes' prototypes, a mean of all pictures of length
{sizes["gap"]:g} and noise of length {sizes["noise"]:g} unless stated; a text is its prototype, a mean of all texts of
length {sizes["gap"]:g} and an error of length {sizes["error"]:g}. So the cosines of a picture with the texts of its own
and of another class differ by 0.09 at noise 1 and one tag, about what CLIP has, and CLIP's temperatures fit.

Cosines are of found and planted prototypes, means over the classes; centered: less the mean of all prototypes.

{table(["what", "goal", "measured", "met"], met)}
"""
    if "race" in results:
        text += f"""
## Time to the KL of the published schedule

The optimization of idstcv/InMaP on the CPU (full batch, rate 10, halved when the gradient grows), and fits with more
and more steps until one has reached its KL: each is a fresh fit, timed from construction to result, with checks and
target; the published time is that of its loop alone, given the target, without making shares above 0.6 certain, so that
it minimizes the same KL. A KL is reached when it is at most a millionth above. Temperatures {named_pair(sizes)}. For
both, memory is kept between calls (`{" ".join(f"{name}={value}" for name, value in KEEP_MEMORY.items())}`).

{race_tables(results["race"])}
"""
    if "recovery" in results:
        text += f"""
## Planted prototypes

Cosine, and centered cosine. The least squares know the tags in every case. The KL of the planted prototypes beside that
of the fit says whether the objective itself prefers others.

{recovery_table(results["recovery"])}
"""
    if "memory" in results:
        text += f"""
## Memory

Peak of a fit of at most {sizes["iterations"]} steps above what the process held with features and tags, with glibc's
own settings.

{memory_table(results["memory"])}
"""
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs: the numbers say nothing")
    parser.add_argument("--published", type=Path, help="a copy of the repository idstcv/InMaP")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    begin, sizes = time.perf_counter(), QUICK if args.quick else Sizes()
    torch.set_num_threads(args.threads)
    command = "python benchmarks/speed_fit.py" + " --quick" * args.quick
    command += " --published FOLDER" * (args.published is not None)
    command += "" if set(args.parts) == set(PARTS) else f" --parts {' '.join(args.parts)}"
    results: dict[str, Any] = {"environment": environment(torch.device("cpu")), "command": command}
    results |= {"quick": args.quick, "sizes": asdict(sizes)}
    results |= measure(args.parts, sizes, args.threads, args.published)
    results["goals"] = goals(results, sizes)
    results["seconds"] = round(time.perf_counter() - begin, 1)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "speed-fit.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (args.output / "speed-fit.md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
