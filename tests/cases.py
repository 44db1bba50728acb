"""Banks, small made inputs and comparisons for the tests of the context bank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from protoseg import ContextPrototypeBank
from protoseg.modules.context import ContextPrototypes

C, D = 2, 5
METRICS = ("dot", "cosine", "l1", "l2")
SCORES = ("whitened", "diagonal", "dot", "cosine")
BACKGROUNDS = ("contexts", "image", "one_minus_max")

# Every option; the ring wraps and contexts are renewed within a few batches.
OPTIONS: dict[str, Any] = {
    "capacity": 4,
    "num_contexts": 3,
    "background_contexts": 4,
    "top_k": 2,
    "cam_threshold": 0.4,
    "background_threshold": 0.3,
    "metric": "dot",
    "temperature": 0.3,
    "shift": True,
    "score": "whitened",
    "shrinkage": 0.3,
    "background": "contexts",
    "background_weight": 0.8,
    "exponent": 0.7,
    "locate": "map",
    "center": True,
    "sharpness": 1.0,
    "refresh_every": 2,
    "half_life": 5.0,
    "detach": "none",
}


def batch(step: int, size: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Features 4 x 5, a CAM 3 x 2 and labels; some images have no class, some a class without a positive score."""
    generator = torch.Generator().manual_seed(step)
    features = torch.rand(size, D, 4, 5, generator=generator, dtype=dtype)
    cam = torch.rand(size, C, 3, 2, generator=generator, dtype=dtype) - 0.3
    if step % 3 == 2:
        cam[0, step % C] -= 1
    labels = (torch.rand(size, C, generator=generator) < 0.7).long()
    return features, cam, labels


def make(dtype: torch.dtype = torch.float64, steps: int = 0, **options: Any) -> ContextPrototypeBank:
    """A bank that has seen ``steps`` batches."""
    bank = ContextPrototypeBank(C, D, **{**OPTIONS, **options}).to(dtype)
    for step in range(steps):
        bank(*batch(step, dtype=dtype))
    return bank


def gradients(out: ContextPrototypes, *inputs: Tensor) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(out.loss, inputs, allow_unused=True)


def assert_same(got: Any, want: Any, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def assert_same_output(got: ContextPrototypes, want: ContextPrototypes, tolerance: float = 0.0) -> None:
    assert_same(got._asdict(), want._asdict(), tolerance)
