"""The files of a run: JSON and checkpoints in one step, what a new run would replace, and what it ran on."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from protoseg.utils.files import UNFINISHED, replacing


def to_replace(output: Path, patterns: Sequence[str], *, overwrite: bool, resumes: bool = True) -> list[Path]:
    """Find what a run that starts anew would take the place of, and stop unless the user asked for that.

    Args:
        output: The run's folder.
        patterns: What the run's stages leave there.
        overwrite: ``--overwrite``.
        resumes: Whether the command has ``--resume``.

    Returns:
        The files.
    """
    advice = "take another --output, go on with that run by --resume, or say --overwrite"
    if not resumes:
        advice = "take another --output, or say --overwrite"
    files = [file for pattern in patterns for file in sorted(output.glob(pattern))]
    if files and not overwrite:
        raise SystemExit(
            f"--output: {output} holds results ({files[0].relative_to(output)} and {len(files) - 1} more), which this "
            f"run would delete; {advice}"
        )
    return files


def write_json(path: Path, content: object) -> None:
    """Write JSON in one step; NaN and infinity become null, as JSON has neither."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def write_classes(output: Path, classes: Sequence[str]) -> None:
    """Write ``classes.txt``, the names of the indices in a run's masks, in one step."""
    with replacing(output / "classes.txt") as file:
        file.write_text("\n".join(("background", *classes)) + "\n", encoding="utf-8")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint in one step, tensors and plain values only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        torch.save(state, file)


def leftovers(output: Path) -> list[Path]:
    """What a process that was killed had begun to write: files that never took their place."""
    found = list(output.glob(".*"))
    for name in ("checkpoint", "seeds", "pseudo_masks", "masks", "model"):
        found += (output / name).rglob(".*")
    return [file for file in found if UNFINISHED.fullmatch(file.name) and file.is_file()]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def keywords(flag: str, pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``name=value`` into keyword arguments: numbers, true and false, else text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise SystemExit(f"{flag}: expected NAME=VALUE, got {pair!r}")
        value: Any = {"true": True, "false": False}.get(text.lower(), text)
        for kind in (int, float):
            if isinstance(value, str):
                try:
                    value = kind(text)
                except ValueError:
                    continue
        options[name] = value
    return options


def peak_memory_mb(device: torch.device) -> float:
    """Most memory this process has held: on the GPU where there is one, else in all; NaN where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return math.nan
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
