"""What the speed benchmarks share: a full bank, timing in turn, medians with quartiles, environment, tables."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, TypedDict

import torch
from torch import Tensor

from protoseg import ContextPrototypeBank

NEVER = 10**9
Call = Callable[[], object]


class Row(TypedDict):
    """One measured number."""

    what: str
    unit: str
    median: float
    q1: float
    q3: float
    repeats: int


def row(what: str, values: Sequence[float], unit: str = "ms") -> Row:
    """Median and quartiles of ``values``."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Row(what=what, unit=unit, median=median, q1=q1, q3=q3, repeats=len(values))


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Ratios of neighbors in time."""
    return [a / b for a, b in zip(above, below, strict=True)]


def timed(
    calls: Mapping[str, Call], device: torch.device, repeats: int, seconds: float = float("inf")
) -> dict[str, list[float]]:
    """Milliseconds of each call, in turn, after one call of each as warm-up.

    Args:
        calls: What to time, by name.
        device: Waited for before and after each call.
        repeats: How often, unless time runs out.
        seconds: After these no further repeat begins, once there are three.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    gc.collect()
    gc.disable()
    begin = time.perf_counter()
    try:
        for done in range(repeats):
            if done >= 3 and time.perf_counter() - begin > seconds:
                break
            for name, call in calls.items():
                # The worker threads of one library spin for a while when they are done and would slow the other's.
                time.sleep(0.02)
                wait(device)
                start = time.perf_counter()
                call()
                wait(device)
                times[name].append(1e3 * (time.perf_counter() - start))
    finally:
        gc.enable()
    return times


def wait(device: torch.device) -> None:
    """Wait until ``device`` has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def full_bank(classes: int, dim: int, capacity: int, device: torch.device, **options: Any) -> ContextPrototypeBank:
    """Make a bank whose rings are full and whose contexts are fresh, and which refreshes them only when told."""
    bank = ContextPrototypeBank(classes, dim, capacity=capacity, refresh_every=NEVER, device=device, **options)
    bank.memory.instances.normal_().relu_()
    bank.stored.fill_(capacity)
    bank.refresh()
    bank.memory.step.fill_(1)
    return bank


def pictures(batch: int, dim: int, side: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Features and CAM that want gradients, and labels with two classes a picture."""
    features = torch.randn(batch, dim, side, side, device=device).relu_().requires_grad_()
    cam = torch.randn(batch, classes, side, side, device=device).requires_grad_()
    labels = torch.rand(batch, classes, device=device).argsort(1) < 2
    return features, cam, labels.float()


def training_step(bank: Callable[..., Any], inputs: Sequence[Tensor]) -> Call:
    """Forward, backward and, in the forward, update."""

    def call() -> None:
        for value in inputs:
            value.grad = None
        torch.autograd.backward(bank(*inputs).loss)

    return call


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on; nothing that names the machine or its folders."""
    packages = ("protoseg", "torch", "timm", "scikit-learn", "numpy")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def spread(one: Row) -> list[str]:
    """Median with unit, quartiles and repeats."""
    digits = 3 if one["unit"] else 5
    median, q1, q3 = (f"{value:#.{digits}g}".rstrip(".") for value in (one["median"], one["q1"], one["q3"]))
    return [f"{median} {one['unit']}".strip(), f"{q1} to {q3}", str(one["repeats"])]


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))
