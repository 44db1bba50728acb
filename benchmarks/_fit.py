"""What speed_fit.py measures, in a process of its own: made pictures, time, cosines, memory."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import types
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _growth import _held
from torch import Tensor

from protoseg import VisionPrototypeLearner
from protoseg.utils.numeric import unit

_BLOCK = 2**15  # pictures made at a time
_ROUNDING = 1e-6  # of a KL, relative; both sides are float32
_GROWTH = 1.2  # of the number of steps from one try to the next


class Made(NamedTuple):
    """Pictures and texts of classes whose vision prototypes are known.

    Attributes:
        planted: ``[C, D]``, the prototypes, of unit length and mean 0.
        text: ``[C, D]``, of unit length.
        features: ``[n, D]``, of unit length.
        labels: ``[n, C]`` bool, at least one class a picture.
    """

    planted: Tensor
    text: Tensor
    features: Tensor
    labels: Tensor


def made(task: Mapping[str, Any]) -> Made:
    """Make pictures around one mean and texts around another: the gap between the modalities.

    Up to its length, a text is a prototype, the texts' mean and an error of its own; a picture is the direction of the
    sum of its classes' prototypes, the pictures' mean and noise. The prototypes have length 1.

    Args:
        task: ``n``, ``classes`` and ``dim``; ``tags``, classes a picture on average; the lengths ``gap`` of both means,
            ``error`` and, on average, ``noise``; ``half``, whether the features are in half precision.
    """
    generator = torch.Generator().manual_seed(0)
    n, classes, dim = task["n"], task["classes"], task["dim"]

    def directions(count: int) -> Tensor:
        return unit(torch.randn(count, dim, generator=generator))

    # What all prototypes share can be planted but not found: the softmax does not see it.
    planted = directions(classes)
    planted = unit(planted - planted.mean(0))
    means = task["gap"] * directions(2)
    text = unit(planted + means[0] + task["error"] * directions(classes))
    frequency = 1 / torch.arange(5.0, 5.0 + classes)
    labels = torch.rand(n, classes, generator=generator) < (task["tags"] - 1) * frequency / frequency.sum()
    labels[torch.arange(n), torch.multinomial(frequency, n, replacement=True, generator=generator)] = True
    features = torch.empty(n, dim, dtype=torch.float16 if task.get("half") else torch.float32)
    for first in range(0, n, _BLOCK):
        some = unit(labels[first : first + _BLOCK].float()) @ planted + means[1]
        some += torch.randn(some.shape, generator=generator) * (task["noise"] / dim**0.5)
        features[first : first + _BLOCK] = unit(some)
    return Made(planted, text, features, labels)


def cosines(found: Tensor, planted: Tensor) -> dict[str, float]:
    """Mean cosine of prototypes and planted ones; the same less the mean of all prototypes, and the least of these."""
    raw = (unit(found) * planted).sum(-1)
    centered = (unit(found - found.mean(0)) * unit(planted - planted.mean(0))).sum(-1)
    return {"raw": raw.mean().item(), "centered": centered.mean().item(), "least": centered.min().item()}


def open_published(folder: str) -> Callable[..., Tensor]:
    """Load the optimization of the published script, without what it needs only to read pictures."""
    for name in ("clip", "torchvision", "torchvision.datasets"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchvision"].datasets = sys.modules["torchvision.datasets"]  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("published", Path(folder) / "main.py")
    if spec is None or spec.loader is None:
        raise SystemExit("--published: no main.py there")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    optimize: Callable[..., Tensor] = module.image_opt
    return optimize


def clocks() -> tuple[float, float]:
    """Now, by the wall and by what this process has computed, which others on the machine hardly change."""
    return time.perf_counter(), time.process_time()


def since(begin: tuple[float, float]) -> dict[str, float]:
    """What has passed since ``begin``."""
    wall, computed = clocks()
    return {"seconds": wall - begin[0], "cpu_seconds": computed - begin[1]}


def new(data: Made, task: Mapping[str, Any]) -> VisionPrototypeLearner:
    """Make a learner with the temperatures of the task."""
    text, vision = task["temperatures"]
    return VisionPrototypeLearner(
        data.text, text_temperature=text, vision_temperature=vision, balance=task.get("balance", 0)
    )


def fitted(data: Made, task: Mapping[str, Any], **options: Any) -> tuple[VisionPrototypeLearner, dict[str, Any]]:
    """A fresh fit, and its time from construction on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it is to be cut short
        begin = clocks()
        learner = new(data, task).fit(data.features, data.labels if task["with_tags"] else None, **options)
        taken = since(begin)
    fit = learner.last_fit
    assert fit is not None
    counts = {"iterations": fit.iterations, "evaluations": fit.evaluations}
    return learner, {**taken, **counts, **quality(data, task, learner.prototypes)}


@torch.no_grad()
def quality(data: Made, task: Mapping[str, Any], prototypes: Tensor) -> dict[str, Any]:
    """KL, the same way for everyone, and cosines."""
    learner = new(data, task)
    learner.vision.copy_(prototypes)
    kl = learner(data.features, data.labels if task["with_tags"] else None).loss.item()
    return {"kl": kl, "cosine": cosines(learner.prototypes, data.planted)}


def race(task: Mapping[str, Any]) -> dict[str, Any]:
    """Time of the published schedule, and of fits with more and more steps until one has reached its KL.

    Both get the same target. The published code makes one class certain where its share is above a bound; the bound is
    set to what no share is above, so that it minimizes the same KL. Its time is that of its loop alone, that of a fit
    everything from construction on.
    """
    small = {**task, "n": 64}
    warm = made(small)
    fitted(warm, small)  # what the first call loads is not the fit's
    data = made(task)
    _, whole = fitted(data, task)
    published: list[dict[str, Any]] = []
    if task["published"] is not None:
        optimize = open_published(task["published"])
        learner = new(data, task)
        with torch.no_grad():
            target = learner(data.features, data.labels if task["with_tags"] else None).target
        optimize(warm.features, learner.text.T, target[: len(warm.features)], 10, 2, task["temperatures"][1], 2.0)
        for steps in task["steps"]:
            begin = clocks()
            found = optimize(data.features, learner.text.T, target, 10, steps, task["temperatures"][1], 2.0)
            published.append({"steps": steps, **since(begin), **quality(data, task, found.T)})
    tries: list[dict[str, Any]] = []
    most = 8
    goal = min((one["kl"] for one in published), default=torch.inf) * (1 + _ROUNDING)
    while not tries or (tries[-1]["kl"] > goal and tries[-1]["iterations"] == most):
        most = max(most + 1, round(most * _GROWTH)) if tries else most
        tries.append(fitted(data, task, max_iterations=most)[1])
    for one in published:
        reached = [each for each in tries if each["kl"] <= one["kl"] * (1 + _ROUNDING)]
        one["reached"] = reached[0] if reached else None
        for times, clock in (("times", "seconds"), ("cpu_times", "cpu_seconds")):
            one[times] = one[clock] / reached[0][clock] if reached else None
    text = quality(data, task, data.text)
    return {"text": text, "whole": whole, "published": published, "tries": tries}


def recovery(task: Mapping[str, Any]) -> dict[str, Any]:
    """Cosines of texts, of what least squares make of pictures and tags, and of a fit; the KL of the planted."""
    data = made(task)
    least_squares = torch.linalg.lstsq(unit(data.labels.float()), data.features - data.features.mean(0)).solution
    return {
        "text": cosines(data.text, data.planted),
        "least_squares": cosines(least_squares, data.planted),
        "planted_kl": quality(data, task, data.planted)["kl"],
        "fit": fitted(data, task)[1],
    }


def memory(task: Mapping[str, Any]) -> dict[str, Any]:
    """Peak of a fit above what the process held with features and tags."""
    small = {**task, "n": 64}
    fitted(made(small), small)  # what the first call loads is not the fit's
    data = made(task)
    learner, device = new(data, task), torch.device("cpu")
    held = sum(value.numel() * value.element_size() for value in (data.features, data.labels))
    before = _held(device, peak=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it is to be cut short
        begin = clocks()
        learner.fit(data.features, data.labels if task["with_tags"] else None, max_iterations=task["iterations"])
        taken = since(begin)
    assert learner.last_fit is not None
    return {
        "data_bytes": held,
        "peak_bytes": _held(device, peak=True) - before,
        **taken,
        "evaluations": learner.last_fit.evaluations,
    }


def main(tasks: list[dict[str, Any]]) -> None:
    """Measure one after the other and print what was found."""
    measure = {"race": race, "recovery": recovery, "memory": memory}
    found = []
    for task in tasks:
        torch.set_num_threads(task["threads"])
        found.append(measure[task["what"]](task))
        print({name: value for name, value in task.items() if name != "published"}, file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
