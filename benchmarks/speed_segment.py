"""``protoseg segment`` with the pocket model: one thread, two threads, and two processes of a thread each.

    python benchmarks/speed_segment.py PICTURES [--most N] [--repeats N] [--output FOLDER]

Writes ``speed-segment.json`` and ``speed-segment.md``. The three run in turn, each in processes of its own. Loading the
model and the names is not part of the time. The masks of one process and of two have to be the same byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _measure import environment, ratios, row, spread, table

from protoseg.data import VOC_CLASSES
from protoseg.data.images import is_picture

PYTHON = [sys.executable, "-m"]
LAUNCHES = {
    "one process, one thread": (1, PYTHON),
    "one process, two threads": (2, PYTHON),
    "two processes, a thread each": (1, [*PYTHON, "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]),
}


def segment(pictures: Path, output: Path, threads: int, launch: Sequence[str]) -> dict[str, Any]:
    """Run the command; returns its summary."""
    names = [name for name in VOC_CLASSES if name != "background"]
    command = [*launch, "protoseg", "segment", str(pictures), "--classes", *names, "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([*command, "--output", str(output), "--overwrite"], check=True, capture_output=True, env=environment)
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    return summary


def measure(pictures: Path, repeats: int, folder: Path) -> dict[str, Any]:
    """Time the three in turn."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in LAUNCHES}
    for _ in range(repeats):
        for name, (threads, launch) in LAUNCHES.items():
            found[name].append(segment(pictures, folder / name, threads, launch))

    speed = {name: [each["pictures per second"] for each in summaries] for name, summaries in found.items()}
    one, _, two = LAUNCHES
    same = sum(
        (folder / one / "masks" / mask.name).read_bytes() == mask.read_bytes()
        for mask in (folder / two / "masks").iterdir()
    )
    return {
        "masks": found[one][0]["masks"],
        "masks that are the same": same,
        "rows": [
            *(row(name, values, "pictures per second") for name, values in speed.items()),
            row("two processes / one thread", ratios(speed[two], speed[one]), "x"),
            *(
                row(f"memory of a process: {name}", [each["peak_memory_mb"] for each in summaries], "MB")
                for name, summaries in found.items()
            ),
        ],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="a folder of pictures")
    parser.add_argument("--most", type=int, default=200, help="pictures")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as temporary:
        some = Path(temporary, "pictures")
        some.mkdir()
        for picture in sorted(each for each in args.pictures.iterdir() if is_picture(each.name))[: args.most]:
            shutil.copy(picture, some)
        found = {"environment": environment(torch.device("cpu")), **measure(some, args.repeats, Path(temporary))}

    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "speed-segment.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    rows = table(("what", "median", "quartiles", "repeats"), [[each["what"], *spread(each)] for each in found["rows"]])
    text = (
        f"# Masks by names\n\n`python benchmarks/speed_segment.py PICTURES`; {found['masks']} pictures of VOC 2012 of "
        f"at most 320 pixels a side, its 20 classes, 25 background prompts; CPU, "
        f"torch {found['environment']['versions']['torch']}. Of the masks of two processes, "
        f"{found['masks that are the same']} are those of one, byte for byte.\n\n{rows}\n"
    )
    (args.output / "speed-segment.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
