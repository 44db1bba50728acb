"""Time and memory of ContextPrototypeBank and of its clustering, beside what they are compared with, in one run.

    python benchmarks/speed.py [--quick] [--threads N] [--batch N] [--device cpu|cuda] [--output FOLDER]

Writes ``speed.json`` and ``speed.md``. Compared things run in turn (A B A B) and a ratio is the median of the ratios of
neighbors, so that a machine that slows down slows both. Spread is given as quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _growth import measure_growth
from _measure import (
    NEVER,
    Call,
    environment,
    full_bank,
    pictures,
    ratios,
    row,
    spread,
    table,
    timed,
    training_step,
)
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from protoseg import ContextPrototypeBank
from protoseg.functional import kmeans

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    model: str = "resnet50"
    batch: int = 16
    side: int = 512
    classes: int = 20
    capacity: int = 1000
    oracle_batch: int = 4
    points: tuple[int, int, int] = (20, 1000, 256)
    clusters: tuple[int, ...] = (3, 10)
    rounds: int = 10
    draws: int = 5
    seeds: int = 3
    growth: tuple[tuple[int, int], ...] = (*((20, 10**n) for n in (2, 3, 4, 5)), (80, 100), (1000, 100))
    growth_shape: tuple[int, int, int] = (4, 256, 32)
    repeats: int = 7
    seconds: float = 150.0


QUICK = Sizes("resnet18", 2, 64, 4, 16, 2, (2, 40, 8), (3,), 10, 2, 2, ((4, 16),), (2, 16, 8), 2, 1.0)


def measure_step(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """The bank's share of a training step, and how near it is to its matrix products."""
    import timm

    network: Any = timm.create_model(sizes.model, pretrained=False, num_classes=0, output_stride=16).to(device)
    dim = int(network.num_features)
    head = nn.Conv2d(dim, sizes.classes, 1, bias=False).to(device)
    optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()])
    images = torch.randn(sizes.batch, 3, sizes.side, sizes.side, device=device)
    inputs = pictures(sizes.batch, dim, sizes.side // 16, sizes.classes, device)

    def network_step() -> None:
        optimizer.zero_grad()
        logits = head(network.forward_features(images)).mean((-2, -1))
        torch.autograd.backward(nn.functional.multilabel_soft_margin_loss(logits, inputs[2]))
        optimizer.step()

    bank = full_bank(sizes.classes, dim, sizes.capacity, device)
    both = full_bank(sizes.classes, dim, sizes.capacity, device, detach="none")
    step, every = training_step(bank, inputs), ContextPrototypeBank(1, 1).refresh_every

    def cycle() -> None:
        bank.refresh_every = every
        bank.memory.step.zero_()
        for _ in range(every):
            step()
        bank.refresh_every = NEVER

    features = inputs[0].detach().flatten(2)
    directions = torch.randn(sizes.batch, sizes.classes + 1, dim, device=device)
    masks = torch.rand(sizes.batch, sizes.classes + 1, features.shape[-1], device=device)

    def products() -> None:
        torch.bmm(directions, features)
        torch.bmm(masks, features.transpose(1, 2))

    def products_both_ways() -> None:
        products()
        for _ in range(2):
            torch.bmm(directions.transpose(1, 2), masks)

    calls: dict[str, Call] = {"network": network_step, "cycle": cycle, "step": step, "refresh": bank.refresh}
    calls |= {"products": products, "both": training_step(both, inputs), "products both ways": products_both_ways}
    times = timed(calls, device, sizes.repeats, sizes.seconds)
    mean = [value / every for value in times["cycle"]]
    share = row("mean of a cycle / network's step", [100 * r for r in ratios(mean, times["network"])], "%")
    return {
        "sizes": {"batch": sizes.batch, "side": sizes.side, "features": list(inputs[0].shape)}
        | {"classes": sizes.classes, "capacity": sizes.capacity, "refresh_every": every},
        "share": share["median"],
        "rows": [
            row(f"{sizes.model}: forward, backward, AdamW", times["network"]),
            row(f"bank: mean of a cycle of {every} steps, one of them with refresh", mean),
            row("bank: step without refresh", times["step"]),
            row("bank: refresh", times["refresh"]),
            row("limit: the two products with the features", times["products"]),
            row('bank, detach="none": step without refresh', times["both"]),
            row("limit: the same and the two of the backward pass", times["products both ways"]),
            share,
            row("step without refresh / limit", ratios(times["step"], times["products"]), "x"),
            row('the same, detach="none"', ratios(times["both"], times["products both ways"]), "x"),
        ],
    }


def measure_oracle(sizes: Sizes, dim: int, device: torch.device) -> dict[str, Any]:
    """The bank against the loops that its tests compare it with, from the same state and on the same batch.

    By cosine: the loops keep every pixel that they have seen for its covariance.
    """
    sys.path.insert(0, str(ROOT))
    from tests.oracles import LoopBank

    bank = full_bank(sizes.classes, dim, sizes.capacity, device, score="cosine")
    options = {name: p.default for name, p in inspect.signature(ContextPrototypeBank).parameters.items()}
    options |= {"num_classes": sizes.classes, "dim": dim, "capacity": sizes.capacity, "refresh_every": NEVER}
    options |= {"score": "cosine", "top_k": options["num_contexts"]}
    inputs = pictures(sizes.oracle_batch, dim, sizes.side // 16, sizes.classes, device)
    # The loops make their tensors on the default device.
    with contextlib.nullcontext() if device.type == "cpu" else device:
        loops = LoopBank(**{name: options[name] for name in inspect.signature(LoopBank).parameters if name in options})
        loops.rings = [list(ring) for ring in bank.memory.instances.clone()]
        loops.written = [sizes.capacity for _ in loops.rings]
        loops.contexts = [
            {i: contexts[i] for i in valid.nonzero().flatten().tolist()}
            for contexts, valid in zip(bank.memory.contexts.clone(), bank.memory.context_valid, strict=True)
        ]
        loops.shift, loops.midpoint, loops.step = list(bank.memory.shift.clone()), bank.memory.midpoint.clone(), 1
        ours, theirs = bank(*inputs), loops(*inputs)
        difference = (ours.pacam - theirs.pacam).detach().abs().max().item()
        calls = {"bank": training_step(bank, inputs), "loops": training_step(loops, inputs)}
        times = timed(calls, device, sizes.repeats, sizes.seconds / 5)
    speedup = row("loops / bank", ratios(times["loops"], times["bank"]), "x")
    return {
        "sizes": {"features": list(inputs[0].shape), "classes": sizes.classes, "capacity": sizes.capacity},
        "speedup": speedup["median"],
        "largest_difference": difference,
        "rows": [row("bank: step", times["bank"]), row("loops: step", times["loops"]), speedup],
    }


def draw_points(kind: str, shape: tuple[int, int, int], clusters: int, generator: torch.Generator) -> Tensor:
    """Planted blobs, unit noise, or rectified noise of falling spectrum around a class mean, as in a real bank."""
    classes, count, dim = shape
    noise = torch.randn(shape, generator=generator)
    if kind == "noise":
        return noise
    if kind == "blobs":
        centers = torch.randn(classes, clusters, dim, generator=generator)
        member = torch.randint(clusters, (classes, count, 1), generator=generator)
        return centers.gather(1, member.expand_as(noise)) + 0.7 * noise
    axes, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator))
    spectrum = torch.arange(1, dim + 1).rsqrt()
    return torch.relu(0.3 * torch.randn(classes, 1, dim, generator=generator) + (noise * spectrum) @ axes)


def measure_kmeans(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """All classes at once against scikit-learn on one class after the other, in at most as many rounds."""
    cases = [_cluster(kind, k, sizes, device) for kind in ("blobs", "noise", "bank") for k in sizes.clusters]
    return {
        "sizes": {"points": list(sizes.points), "rounds": sizes.rounds, "draws": sizes.draws, "seeds": sizes.seeds},
        "speedup": min(case["speedup"] for case in cases),
        "speedup_one_thread": min(case["speedup_one_thread"] for case in cases),
        "inertia": max(case["inertia"] for case in cases),
        "rows": [one for case in cases for one in case["rows"]],
    }


def _cluster(kind: str, clusters: int, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(clusters)
    times: dict[str, list[float]] = {"ours": [], "theirs": [], "theirs alone": [], "products": []}
    inertia: list[float] = []
    rounds: list[int] = []
    for _ in range(sizes.draws):
        points = draw_points(kind, sizes.points, clusters, generator).to(device)
        arrays = [one.cpu().numpy() for one in points]
        centers = torch.randn(len(points), clusters, points.shape[-1], device=device)
        members = torch.rand(len(points), clusters, points.shape[1], device=device)
        fits: list[list[KMeans]] = []

        def ours(points: Tensor = points) -> None:
            kmeans(points, num_clusters=clusters, iterations=sizes.rounds)

        def theirs(arrays: list[Any] = arrays, fits: list[list[KMeans]] = fits) -> None:
            options = {"n_init": 1, "max_iter": sizes.rounds, "tol": 0.0, "algorithm": "lloyd"}
            fits.append([KMeans(clusters, random_state=len(fits), **options).fit(one) for one in arrays])

        def alone(theirs: Call = theirs) -> None:
            with threadpool_limits(1):
                theirs()

        def products(points: Tensor = points, centers: Tensor = centers, members: Tensor = members) -> None:
            for _ in range(sizes.rounds):
                torch.bmm(centers, points.transpose(1, 2))
                torch.bmm(members, points)

        calls: dict[str, Call] = {"ours": ours, "theirs": theirs, "theirs alone": alone, "products": products}
        for name, values in timed(calls, device, sizes.seeds).items():
            times[name] += values
        rounds += [model.n_iter_ for fit in fits for model in fit]
        reached = [_inertia(points, [torch.from_numpy(model.cluster_centers_) for model in fit]) for fit in fits]
        found = kmeans(points, num_clusters=clusters, iterations=sizes.rounds)
        mine = _inertia(points, [m[v] for m, v in zip(found.centers, found.valid, strict=True)])
        inertia.append(mine / statistics.mean(reached))
    name = f"{kind}, K={clusters}"
    speedup = row(f"{name}: scikit-learn / protoseg", ratios(times["theirs"], times["ours"]), "x")
    alone_too = row(f"{name}: scikit-learn on one thread / protoseg", ratios(times["theirs alone"], times["ours"]), "x")
    quality = row(f"{name}: inertia, protoseg / mean of scikit-learn's seeds", inertia, "")
    return {
        "speedup": speedup["median"],
        "inertia": quality["median"],
        "rows": [
            row(f"{name}: protoseg", times["ours"]),
            row(f"{name}: scikit-learn, {statistics.mean(rounds):.1f} rounds", times["theirs"]),
            row(f"{name}: scikit-learn on one thread", times["theirs alone"]),
            row(f"{name}: only the two products of each of {sizes.rounds} rounds", times["products"]),
            speedup,
            alone_too,
            quality,
        ],
        "speedup_one_thread": alone_too["median"],
    }


def _inertia(points: Tensor, centers: Sequence[Tensor]) -> float:
    """The same sum of squared distances for both, in float64."""
    pairs = zip(points.cpu().double(), centers, strict=True)
    return sum(torch.cdist(x, m.cpu().double()).square().amin(1).sum().item() for x, m in pairs)


def goals(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The goals, what was measured and whether it is enough."""
    measured = (
        ("the bank's share of a training step, in %", "at most", 10.0, results["step"]["share"]),
        ("bank, times as fast as plain loops", "at least", 10.0, results["oracle"]["speedup"]),
        ("clustering, times as fast as scikit-learn, worst case", "at least", 5.0, results["kmeans"]["speedup"]),
        (
            "the same, scikit-learn on one thread",
            "at least",
            5.0,
            results["kmeans"]["speedup_one_thread"],
        ),
        ("its inertia / mean of scikit-learn's seeds, worst case", "at most", 1.001, results["kmeans"]["inertia"]),
    )
    return [
        {"what": what, "goal": f"{side} {limit:g}", "measured": got}
        | {"met": got <= limit if side == "at most" else got >= limit}
        for what, side, limit, got in measured
    ]


def markdown(results: Mapping[str, Any]) -> str:
    """All results as one page."""
    env, step, oracle, clustering = (results[key] for key in ("environment", "step", "oracle", "kmeans"))
    versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items())
    met = [[g["what"], g["goal"], f"{g['measured']:.4g}", "yes" if g["met"] else "**no**"] for g in results["goals"]]
    grown = []
    for one in results["growth"]:
        numbers = [f"failed, code {one['failed']}"] if "failed" in one else []
        if not numbers:
            numbers = [f"{one[key] / 2**20:.1f} MiB" for key in ("state_bytes", "peak_bytes")]
            numbers += spread(one["step"]) + spread(one["refresh"])
        grown.append([str(one["classes"]), str(one["capacity"]), *numbers, *[""] * (8 - len(numbers))])

    def rows(section: Mapping[str, Any]) -> str:
        lines = [[one["what"], *spread(one)] for one in section["rows"]]
        return table(["what", "median", "quartiles", "repeats"], lines)

    few = "" if step["sizes"]["batch"] >= 16 else " (fewer than 16 to save time or memory)"
    header = ["C", "capacity", "state", "peak", "step", "quartiles", "repeats", "refresh", "quartiles", "repeats"]
    return f"""# Speed and memory

Written by `python benchmarks/speed.py{" --quick" if results["quick"] else ""}` in {results["seconds"]:.0f} s.
{versions}.
{env["system"]}, {env["cpu_count"]} CPUs, {env["torch_threads"]} threads, load {env["load_before"]} before the run;
device {env["device"]}, {env["dtype"]}, TF32 {"on" if env["tf32"] else "off"}. Wall-clock medians after a warm-up.
Compared calls run in turn; a ratio is the median of the ratios of neighbors.

{table(["what", "goal", "measured", "met"], met)}

## Bank and training step

Both with {step["sizes"]["batch"]} pictures of {step["sizes"]["side"]} px{few}, features {step["sizes"]["features"]},
{step["sizes"]["classes"]} classes, full rings of {step["sizes"]["capacity"]}, two labels a picture. A bank step is
forward, backward and update. By default the bank's loss sends no gradient into the features; with `detach="none"` it
does.

{rows(step)}

## Bank and plain loops

`LoopBank` of `tests/oracles.py`: forward, backward and update from the same state, without the clustering, which both
have in common. Features {oracle["sizes"]["features"]}, {oracle["sizes"]["classes"]} classes, full rings of
{oracle["sizes"]["capacity"]}. The two maps differ by at most {oracle["largest_difference"]:.1e}.

{rows(oracle)}

## Clustering and scikit-learn

{" x ".join(map(str, clustering["sizes"]["points"]))} (classes, points, dimensions). `KMeans(n_init=1, tol=0,
algorithm="lloyd")` on one class after the other, on the CPU; at most {clustering["sizes"]["rounds"]} rounds for both.
Its threads cost more than they bring at this size where they are slow to wake, so it is timed on one thread too.
{clustering["sizes"]["draws"]} draws of the data with {clustering["sizes"]["seeds"]} timed seeds of scikit-learn each.

{rows(clustering)}

## Growth

Features {list(results["sizes"]["growth_shape"][:2])} with side {results["sizes"]["growth_shape"][2]}, full rings. Peak:
memory beyond what the process held before there was a bank, through construction, clustering and a step.

{table(header, grown)}
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything and write ``speed.json`` and ``speed.md``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs: the numbers say nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, help="pictures of the training step and the bank; 16 unless --quick")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    begin, device = time.perf_counter(), torch.device(args.device)
    sizes = QUICK if args.quick else Sizes()
    if args.batch is not None:
        sizes = Sizes(**{**asdict(sizes), "batch": args.batch})
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    threadpool_limits(args.threads)
    results: dict[str, Any] = {"environment": environment(device), "quick": args.quick, "sizes": asdict(sizes)}
    results["step"] = measure_step(sizes, device)
    results["oracle"] = measure_oracle(sizes, results["step"]["sizes"]["features"][1], device)
    results["kmeans"] = measure_kmeans(sizes, device)
    results["growth"] = measure_growth(sizes.growth, sizes.growth_shape, device, sizes.repeats, sizes.seconds / 10)
    results["goals"] = goals(results)
    results["seconds"] = round(time.perf_counter() - begin, 1)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "speed.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (args.output / "speed.md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
