"""Two processes of a gloo group, as tests need them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

Work = Callable[[int], Any]


def run(work: Work, folder: Path) -> tuple[Any, Any]:
    """What ``work(rank)`` gives in each of two processes; ``work`` is a function of a module."""
    if not dist.is_available():
        pytest.skip("this torch has no distributed package")
    spawn(_main, (folder, work), nprocs=2)  # type: ignore[no-untyped-call]
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    return first, second


def _main(rank: int, folder: Path, work: Work) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(work(rank), folder / f"{rank}.pt")
    # One that leaves while the other still talks to it can tear down threads that run.
    dist.barrier()
    dist.destroy_process_group()
