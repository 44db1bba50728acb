"""A run from outside: the engine it computes with, its share of the work, what it prints and how it is stopped."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from tqdm import tqdm

from protoseg.recipes.options import RunOptions, plain
from protoseg.utils.checks import near_names

__all__ = ["as_line", "duration", "launch", "quiet", "share", "start_engine", "start_trackers", "stoppable"]


def launch(options: RunOptions) -> Accelerator:
    """Start the engine on the device that was asked for, and the trackers.

    Raises:
        SystemExit: The device is not there, or a tracker is unknown or not installed.
    """
    for name in options.log_with:
        if name not in LOGGER_TYPE_TO_CLASS:
            near = near_names(name, LOGGER_TYPE_TO_CLASS) or ", ".join(LOGGER_TYPE_TO_CLASS)
            raise SystemExit(f"--log-with: accelerate knows no tracker {name!r}; near names: {near}")
        if name not in map(str, get_available_trackers()):
            raise SystemExit(f"--log-with: the package of {name} is not installed")

    return start_engine(
        options.device,
        mixed_precision=options.precision,
        log_with=options.log_with or None,
        project_dir=options.output,
    )


def start_engine(device: str, **options: Any) -> Accelerator:
    """Start accelerate's engine on a device: ``"auto"``, ``"cpu"``, or the type of what accelerate finds.

    Raises:
        SystemExit: accelerate found another device, or takes each of several processes for the only one.
    """
    accelerator = Accelerator(cpu=device == "cpu", **options)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise SystemExit(
            f"--device: {launched} processes were started, and accelerate takes each of them for the only one, as it "
            "found no GPU; say --device cpu"
        )
    if device not in ("auto", "cpu", accelerator.device.type):
        raise SystemExit(f"--device: accelerate found {accelerator.device}, not {device}; say 'auto' or 'cpu'")
    return accelerator


def start_trackers(options: RunOptions, accelerator: Accelerator) -> None:
    """Open the trackers of ``--log-with``, which are told the options."""
    if options.log_with:
        told = {
            key: value if isinstance(value, int | float | str | bool) else str(value)
            for key, value in plain(options).items()
        }
        accelerator.init_trackers("protoseg", told)


def share(length: int, what: str, accelerator: Accelerator) -> Iterator[int]:
    """Give the indices of this process, under a bar where there is a terminal.

    Args:
        length: How many pictures all processes have.
        what: Name of the work, for the bar.
        accelerator: The engine.
    """
    indices = range(accelerator.process_index, length, accelerator.num_processes)
    yield from tqdm(indices, what, disable=quiet(accelerator), leave=False)


def quiet(accelerator: Accelerator) -> bool | None:
    """What tqdm's ``disable`` has to be: ``None`` is quiet unless the output is a terminal."""
    return None if accelerator.is_main_process else True


@contextlib.contextmanager
def stoppable(options: RunOptions) -> Iterator[None]:
    """Turn Ctrl-C into one line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped; the same command with --resume goes on in {options.output}", file=sys.stderr)
        raise SystemExit(130) from None


def duration(seconds: float) -> str:
    """Say a time as people do: ``41 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def as_line(words: Sequence[str]) -> str:
    """A command as a line to copy, without what belongs to one run alone: a copy shall never delete a run.

    Example:
        >>> as_line(["protoseg", "masks", "my pictures", "--overwrite"])
        "protoseg masks 'my pictures'"
    """
    return shlex.join(word for word in words if word not in ("--overwrite", "--resume"))
