"""Time and memory of FrozenCLIP.grad_cam, beside loops of the grad-cam package and a bare forward pass of the model.

    python benchmarks/speed_clip.py [--quick] [--threads N] [--device cpu|cuda] [--output FOLDER]

Weights are random, as neither time nor memory depends on them. Writes ``speed-clip.json`` and ``speed-clip.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _growth import _held
from _measure import environment, ratios, row, spread, table, wait
from torch import Tensor, nn

from protoseg.clip import FrozenCLIP

ROOT = Path(__file__).resolve().parents[1]
GOAL = 3.0
CALLS = {
    "ours": "FrozenCLIP.grad_cam",
    "forward": "limit: one bare forward pass",
    "package": "grad-cam package, the model once a class",
    "last": "grad-cam package, the last block once a class",
}


@dataclass(frozen=True)
class Task:
    """What is measured: one picture with sides of ``side`` pixels, all classes, with a model of open_clip's."""

    model: str = "ViT-B-16"
    side: int = 512
    classes: int = 20
    background: int = 25
    repeats: int = 3
    threads: int = 0
    device: str = "cpu"


QUICK = Task("tiny", 64, 3, 2, 2)


class Scores(nn.Module):
    """Probabilities of the classes, from the mean of the patches, by open_clip's own forward alone."""

    def __init__(self, clip: FrozenCLIP, grid: int, prototypes: Tensor) -> None:
        super().__init__()
        self.visual, self.prototypes, self.scale = clip.visual, prototypes, 1 / clip.temperature
        known, side = self.visual.positional_embedding, self.visual.grid_size[0]
        map_ = F.interpolate(known[1:].T.reshape(1, -1, side, side), (grid, grid), mode="bicubic")
        scaled = torch.cat([known[:1], map_[0].flatten(1).T])
        self.visual.positional_embedding = nn.Parameter(scaled, requires_grad=False)
        self.visual.output_tokens = True

    def forward(self, images: Tensor) -> Tensor:
        """``[1, C + K]``."""
        return self.probabilities(self.visual(images)[1])

    def probabilities(self, patches: Tensor) -> Tensor:
        """Of what the last norm put out."""
        whole = F.normalize((patches @ self.visual.proj).mean(1), dim=-1)
        return (self.scale * whole @ self.prototypes.T).softmax(-1)


class LastBlock(Scores):
    """The same by the last block alone, of tokens that are there already, as in CLIP-ES; pictures give their size."""

    tokens: Tensor

    def read(self, images: Tensor) -> None:
        """Run all blocks but the last."""
        with torch.no_grad():
            found = self.visual.forward_intermediates(
                images,
                indices=[len(self.visual.transformer.resblocks) - 2],
                stop_early=True,
                intermediates_only=True,
                output_fmt="NLC",
                output_extra_tokens=True,
            )
        self.tokens = torch.cat([found["image_intermediates_prefix"][0], found["image_intermediates"][0]], 1)

    def forward(self, images: Tensor) -> Tensor:
        """``[1, C + K]``."""
        return self.probabilities(self.visual.ln_post(self.visual.transformer.resblocks[-1](self.tokens))[:, 1:])


class Probability:
    """The package's target: one class's probability, times what lifts its gradient above the package's own epsilon."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, probabilities: Tensor) -> Tensor:
        """Of one picture's ``[C + K]``."""
        return 1e6 * probabilities[self.number]


def build(task: Task) -> FrozenCLIP:
    """A model with random weights."""
    import open_clip

    if task.model != "tiny":
        return FrozenCLIP.load(task.model, device=task.device)
    sizes = {"width": 64, "layers": 2}
    model = open_clip.CLIP(32, {"image_size": 32, "patch_size": 8, "head_width": 32, **sizes}, {"heads": 2, **sizes})
    return FrozenCLIP(model.to(task.device), open_clip.get_tokenizer("ViT-B-16"))


def make_call(name: str, task: Task, clip: FrozenCLIP) -> Callable[[int], Any]:
    """What is to be timed, of so many classes; returns maps ``[C, H, W]``, scaled to between 0 and 1, if any."""
    GradCAM = importlib.import_module("pytorch_grad_cam").GradCAM
    scale_cam_image = importlib.import_module("pytorch_grad_cam.utils.image").scale_cam_image

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, task.side, task.side, generator=generator).to(task.device)
    prototypes = torch.randn(task.classes + task.background, clip.visual.output_dim, generator=generator)
    prototypes = F.normalize(prototypes, dim=-1).to(task.device)

    if name == "ours":

        def ours(classes: int) -> Any:
            maps = clip.grad_cam(images, prototypes[:classes], prototypes[classes:])
            # As the package does: it scales, enlarges and scales again.
            return scale_cam_image(scale_cam_image(maps[0].cpu().numpy(), (task.side, task.side)))

        return ours

    grid, layer = task.side // clip.visual.patch_size[0], clip.visual.transformer.resblocks[-1].ln_1
    scores = (LastBlock if name == "last" else Scores)(clip, grid, prototypes)
    if name == "forward":
        return torch.no_grad()(lambda classes: scores(images))
    # All else stays frozen, in favor of the package: its backward pass ends where Grad-CAM needs no more.
    layer.requires_grad_(True)

    def loop(classes: int) -> Any:
        if isinstance(scores, LastBlock):
            scores.read(images)
        options = {"reshape_transform": lambda tokens: tokens[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))}
        with GradCAM(model=scores, target_layers=[layer], **options) as cam:
            return np.concatenate([cam(images, [Probability(c)]) for c in range(classes)])

    return loop


def serve(wire: Connection, name: str, task: Task) -> None:
    """In a process of its own, for a peak of its own: send maps of two classes, seconds when asked, the peak."""
    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    device, clip = torch.device(task.device), build(task)
    call = make_call(name, task, clip)
    before = _held(device, peak=False)
    maps = call(2)
    wire.send(maps if isinstance(maps, np.ndarray) else None)
    while wire.recv():
        wait(device)
        start = time.perf_counter()
        call(task.classes)
        wait(device)
        wire.send(time.perf_counter() - start)
    wire.send(_held(device, peak=True) - before)


@contextlib.contextmanager
def served(name: str, task: Task) -> Iterator[Connection]:
    """Such a process, which ends with the context."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["open_clip", "pytorch_grad_cam", "protoseg.clip"])
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, name, task), daemon=True)
    process.start()
    there.close()  # so that the end of the process is the end of the wire
    yield here
    process.join()


def measure(task: Task) -> dict[str, Any]:
    """Seconds of every call, in turn, and the peak of all its calls, above the process with the model."""
    with contextlib.ExitStack() as stack:
        wires, maps = {}, {}
        for name in CALLS:
            wires[name] = stack.enter_context(served(name, task))
            maps[name] = wires[name].recv()
        times: dict[str, list[float]] = {name: [] for name in CALLS}
        for _ in range(task.repeats):
            for name, wire in wires.items():
                wire.send(True)
                times[name].append(wire.recv())
        peaks = {}
        for name, wire in wires.items():
            wire.send(False)
            peaks[name] = wire.recv()
    same = {name: float(np.abs(maps[name] - maps["ours"]).max()) for name in ("package", "last")}
    return {
        "calls": [{**row(what, times[name], "s"), "peak_bytes": peaks[name]} for name, what in CALLS.items()],
        "ratios": [
            row(f"{CALLS['package']} / ours", ratios(times["package"], times["ours"]), "x"),
            row(f"{CALLS['last']} / ours", ratios(times["last"], times["ours"]), "x"),
            row("ours / limit", ratios(times["ours"], times["forward"]), "x"),
        ],
        "largest_difference": same,
    }


def markdown(results: dict[str, Any]) -> str:
    """All results as one page."""
    env, task = results["environment"], results["task"]
    versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items())
    calls = [
        [one["what"], *spread(one)[:2], f"{one['peak_bytes'] / 2**20:.0f} MiB", f"{1 / one['median']:.3g}"]
        for one in results["calls"]
    ]
    first = results["ratios"][0]
    met = "met" if first["median"] >= GOAL else "**not met**"
    differences = results["largest_difference"]
    return f"""# Speed and memory of Grad-CAM from a frozen CLIP

Written by `python benchmarks/speed_clip.py{" --quick" if results["quick"] else ""}` in {results["seconds"]:.0f} s.
{versions}.
{env["system"]}, {env["cpu_count"]} CPUs, {task["threads"]} threads, load {env["load_before"]} before the run;
device {env["device"]}, {env["dtype"]}.

{task["model"]} with random weights, one picture of {task["side"]} px, {task["classes"]} classes and \
{task["background"]} background prompts, maps of all classes.
Wall-clock medians of {task["repeats"]} after a call of two classes; calls run in turn, each in a process of its own;
a ratio is the median of the ratios of neighbors. The peak is above the process with the model.

{table(["what", "median", "quartiles", "peak", "pictures per second"], calls)}

{table(["what", "median", "quartiles", "repeats"], [[one["what"], *spread(one)] for one in results["ratios"]])}

Goal: at least {GOAL:g} times as fast as the package with the model once a class: {met}. The package's form is the
favorable one, with all parameters frozen that Grad-CAM needs no gradient of; the last block alone is how CLIP-ES uses
it. Largest difference of the maps of two classes, scaled to between 0 and 1: {differences["package"]:.1g} and \
{differences["last"]:.1g}.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs: the numbers say nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    task = dataclasses.replace(QUICK if args.quick else Task(), threads=args.threads, device=args.device)
    results: dict[str, Any] = {"environment": environment(torch.device(args.device)), "quick": args.quick}
    results["environment"]["versions"].update({name: version(name) for name in ("open_clip_torch", "grad-cam")})
    results["environment"]["torch_threads"] = args.threads
    begin = time.perf_counter()
    results |= {"task": dataclasses.asdict(task), **measure(task), "seconds": time.perf_counter() - begin}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "speed-clip.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (args.output / "speed-clip.md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
