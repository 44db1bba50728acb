"""Time of GMMPrototypeRegularizer, beside the bare matrix products, the published code and a training step, in one run.

    python benchmarks/speed_pgseg.py [--quick] [--published FOLDER] [--device cpu|cuda] [--output FOLDER]

``--published`` is a copy of the repository Ferenas/PGSeg, which is run as it is, but for packages of it that no longer
install; these are replaced by empty ones. Writes ``speed-pgseg.json`` and ``speed-pgseg.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _measure import Call, environment, ratios, row, spread, table, timed
from torch import Tensor

from protoseg import GMMPrototypeRegularizer
from protoseg.functional import em

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sizes:
    """What is measured: ``(B, L, D, K)`` of each stage, and the batch of the training step."""

    stages: tuple[tuple[int, int, int, int], ...] = ((64, 196, 384, 64), (64, 64, 384, 8))
    step_batch: int = 16
    repeats: int = 9


QUICK = Sizes(((2, 20, 64, 4), (2, 9, 64, 3)), 1, 2)


def regularize(module: GMMPrototypeRegularizer, tokens: Tensor, groups: Tensor) -> Call:
    """Forward and backward."""

    def call() -> None:
        groups.grad = None
        torch.autograd.backward(module(tokens, groups).loss)

    return call


def products(tokens: Tensor, count: int, iterations: int) -> Call:
    """The two matrix products of each round of the plain form, and nothing else."""
    centers = torch.randn(len(tokens), count, tokens.shape[-1], device=tokens.device)
    shares = torch.rand(*tokens.shape[:2], count, device=tokens.device)

    def call() -> None:
        for _ in range(iterations):
            torch.bmm(tokens, centers.transpose(1, 2))
            torch.bmm(shares.transpose(1, 2), tokens)

    return call


def open_published(folder: Path, device: torch.device) -> Any:
    """Build the published image encoder, which owns its matching and loss."""
    import timm.layers
    import timm.loss

    class Registry:
        def __init__(self, name: str) -> None:
            pass

        def register_module(self) -> Any:
            return lambda kind: kind

    stand_ins: dict[str, dict[str, Any]] = {
        "mmcv": {},
        "mmcv.utils": {"Registry": Registry},
        "omegaconf": {"OmegaConf": object},
        "diffdist": {},
        "diffdist.functional": {},
        "timm.models.layers": vars(timm.layers),
    }
    for name, values in stand_ins.items():
        module = types.ModuleType(name)
        module.__dict__.update({key: value for key, value in values.items() if not key.startswith("__")})
        sys.modules[name] = module
    sys.modules["diffdist"].functional = sys.modules["diffdist.functional"]  # type: ignore[attr-defined]
    sys.path.insert(0, str(folder))
    import models  # type: ignore[import-not-found]

    return models.PGSeg(return_attn_o=True).to(device).train()


def published_call(network: Any, stage: int, tokens: Tensor, groups: Tensor) -> Call:
    """Its EM without the mapping MLP, its matching and its loss, forward and backward."""
    npr = network.layers[stage].downsample_spatial
    npr.mapping_x = torch.nn.Identity()

    def call() -> None:
        groups.grad = None
        prototypes = npr(tokens, groups)[0]
        batch, place = network.hug_match(groups, prototypes)
        torch.autograd.backward(network.closs(groups, prototypes[batch, place].reshape(groups.shape)))

    return call


def measure_stage(index: int, sizes: Sizes, published: Any, device: torch.device) -> dict[str, Any]:
    """One stage's regularizer against everything."""
    batch, length, dim, count = sizes.stages[index]
    tokens = torch.randn(batch, length, dim, device=device)
    groups = torch.randn(batch, count, dim, device=device, requires_grad=True)
    module = GMMPrototypeRegularizer(dim, count, device=device)
    calls: dict[str, Call] = {
        "ours": regularize(module, tokens, groups),
        "em": lambda: em(tokens, module.mu, bandwidth=2.0),
        "products": products(tokens, count, module.iterations),
    }
    if published is not None:
        calls["published"] = published_call(published, index, tokens, groups)
    times = timed(calls, device, sizes.repeats)
    rows = [
        row("regularizer: forward, backward, update", times["ours"]),
        row("EM alone", times["em"]),
        row(f"limit of the plain form: the two products of {module.iterations} rounds", times["products"]),
        row("EM alone / the plain form's products", ratios(times["em"], times["products"]), "x"),
    ]
    if published is not None:
        rows += [
            row("published: EM, matching, loss, forward and backward", times["published"]),
            row("published / regularizer", ratios(times["published"], times["ours"]), "x"),
        ]
    return {"sizes": {"B": batch, "L": length, "D": dim, "K": count}, "rows": rows}


def measure_step(sizes: Sizes, quick: bool, device: torch.device) -> dict[str, Any]:
    """The share of both stages' regularizers in a training step of the network."""
    import dataclasses

    from protoseg.models.pgseg.grouping import PRESETS, GroupingEncoder

    config = PRESETS["vit-s"]
    if quick:
        config = dataclasses.replace(config, image_size=32, dim=64, depths=(1, 1, 1), groups=(4, 3))
    network = GroupingEncoder(dataclasses.replace(config, npr=None)).to(device)
    optimizer = torch.optim.AdamW(network.parameters())
    images = torch.randn(sizes.step_batch, 3, config.image_size, config.image_size, device=device)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(network(images).pooled.square().mean())
        optimizer.step()

    lengths = ((config.image_size // config.patch_size) ** 2, *config.groups)
    parts = []
    for length, count in zip(lengths, config.groups, strict=False):
        tokens = torch.randn(sizes.step_batch, length, config.dim, device=device)
        groups = torch.randn(sizes.step_batch, count, config.dim, device=device, requires_grad=True)
        parts.append(regularize(GMMPrototypeRegularizer(config.dim, count, device=device), tokens, groups))
    times = timed({"step": step, "npr": lambda: [part() for part in parts]}, device, sizes.repeats)
    return {
        "sizes": {"batch": sizes.step_batch, "image": config.image_size},
        "rows": [
            row("image encoder of vit-s: forward, backward, AdamW", times["step"]),
            row("the regularizers of both stages", times["npr"]),
            row("their share", [100 * r for r in ratios(times["npr"], times["step"])], "%"),
        ],
    }


def markdown(results: dict[str, Any]) -> str:
    """All results as one page."""
    env = results["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items())

    def rows(section: dict[str, Any]) -> str:
        return table(
            ["what", "median", "quartiles", "repeats"], [[one["what"], *spread(one)] for one in section["rows"]]
        )

    text = f"""# Speed of the PGSeg regularizer

Written by `python benchmarks/speed_pgseg.py{" --quick" if results["quick"] else ""}`. {versions}.
{env["system"]}, {env["cpu_count"]} CPUs, {env["torch_threads"]} threads, load {env["load_before"]} before the run;
device {env["device"]}, {env["dtype"]}. Wall-clock medians after a warm-up; compared calls run in turn, and a ratio is
the median of the ratios of neighbors. "Published" is the code of Ferenas/PGSeg, without its mapping MLP.
"""
    for stage in results["stages"]:
        sizes = ", ".join(f"{name}={value}" for name, value in stage["sizes"].items())
        text += f"\n## {sizes}\n\n{rows(stage)}\n"
    step = results["step"]
    return (
        text + f"\n## Training step, {step['sizes']['batch']} pictures of {step['sizes']['image']} px\n\n{rows(step)}\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs: the numbers say nothing")
    parser.add_argument("--published", type=Path, help="a copy of the repository Ferenas/PGSeg")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    device, sizes = torch.device(args.device), QUICK if args.quick else Sizes()
    torch.manual_seed(0)
    if args.published is not None and args.quick:
        raise SystemExit("--published: its sizes are fixed; leave out --quick")
    published = open_published(args.published, device) if args.published is not None else None
    results: dict[str, Any] = {"environment": environment(device), "quick": args.quick}
    results["stages"] = [measure_stage(index, sizes, published, device) for index in range(len(sizes.stages))]
    results["step"] = measure_step(sizes, args.quick, device)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "speed-pgseg.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (args.output / "speed-pgseg.md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
