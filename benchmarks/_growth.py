"""How time and memory of the bank grow: one bank a process, so that one's peak is not another's."""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _measure import full_bank, pictures, row, timed, training_step


def measure_growth(
    cases: Sequence[tuple[int, int]],
    shape: tuple[int, int, int],
    device: torch.device,
    repeats: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """Time and memory of a full bank of every size.

    Args:
        cases: Classes and capacity.
        shape: Pictures, channels and side of the features.
        device: Where the bank is.
        repeats: Of each time.
        seconds: After these no further repeat begins, once there are three.

    Returns:
        What :func:`probe` returns; ``{"failed": code}`` where the process ended early, for instance for want of memory.
    """
    results = []
    for classes, capacity in cases:
        size = {"classes": classes, "capacity": capacity}
        task = {**size, "shape": shape, "device": str(device), "repeats": repeats, "seconds": seconds}
        command = [sys.executable, __file__, json.dumps({**task, "threads": torch.get_num_threads()})]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        results.append({**size, "failed": ran.returncode} if ran.returncode else json.loads(ran.stdout))
    return results


def probe(task: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one bank; the peak is above what the process held before there was one."""
    torch.set_num_threads(task["threads"])
    device, (batch, dim, side) = torch.device(task["device"]), task["shape"]
    # What the first call loads is not the bank's.
    training_step(full_bank(2, dim, 16, device), pictures(batch, dim, side, 2, device))()
    inputs = pictures(batch, dim, side, task["classes"], device)
    before = _held(device, peak=False)
    bank = full_bank(task["classes"], dim, task["capacity"], device)
    step = training_step(bank, inputs)
    step()
    peak = _held(device, peak=True) - before
    times = timed({"step": step, "refresh": bank.refresh}, device, task["repeats"], task["seconds"])
    return {
        "classes": task["classes"],
        "capacity": task["capacity"],
        "state_bytes": sum(buffer.numel() * buffer.element_size() for buffer in bank.buffers()),
        "peak_bytes": peak,
        "step": row("step without refresh", times["step"]),
        "refresh": row("refresh", times["refresh"]),
    }


def _held(device: torch.device, *, peak: bool) -> int:
    """Bytes held now, from when on the peak counts, or the peak since then."""
    if device.type == "cuda":
        if peak:
            return torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        resource = importlib.import_module("resource")
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
    if not peak:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


if __name__ == "__main__":
    print(json.dumps(probe(json.loads(sys.argv[1]))))
