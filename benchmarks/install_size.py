"""What an installation takes on the disk: the package alone, and what each extra adds.

    python benchmarks/install_size.py

Reads the metadata of what is installed, so everything has to be: ``pip install -e ".[recipes,docs,test]"``. A size is
that of all files of all packages that an extra brings, directly or through others, beyond those of the package alone.
Writes ``install-size.json`` and ``.md`` into ``--output``.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

from _measure import table
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

COMMAND = "python benchmarks/install_size.py"
EXTRAS = ("weights", "clip", "pocket", "pairs", "recipes", "docs", "test")
NVIDIA = ("nvidia-", "cuda-", "triton")  # what torch's CUDA build brings along on Linux


def brought(name: str, extras: Iterable[str] = (), known: dict[str, set[str]] | None = None) -> dict[str, set[str]]:
    """Every package that a package brings, itself included, each with the extras that were asked for."""
    known = {} if known is None else known
    name = canonicalize_name(name)
    new = set(extras) - known.get(name, set())
    if name in known and not new:
        return known

    known.setdefault(name, set()).update(new)
    asked = [{"extra": extra} for extra in ("", *known[name])]
    for line in distribution(name).requires or []:
        needed = Requirement(line)
        if needed.marker is None or any(needed.marker.evaluate(each) for each in asked):
            brought(needed.name, needed.extras, known)
    return known


def megabytes(names: Iterable[str]) -> float:
    """Size of all files of some packages, in MB of 10^6 bytes."""
    total = 0
    for name in names:
        files = distribution(name).files
        if files is None:
            raise SystemExit(f"{name}: its installer has not noted its files; install it by pip")
        paths = (Path(str(file.locate())) for file in files)
        total += sum(path.stat().st_size for path in paths if path.is_file())
    return total / 1e6


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)

    core = set(brought("protoseg"))
    nvidia = {name for name in core if name.startswith(NVIDIA)}
    sizes = {"core": megabytes(core), "of it for NVIDIA GPUs": megabytes(nvidia)}
    for extra in EXTRAS:
        sizes[extra] = megabytes(set(brought("protoseg", [extra])) - core)

    packages = ("protoseg", "torch", "timm", "transformers")
    found: dict[str, Any] = {
        "command": COMMAND,
        "environment": {
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "system": f"{platform.system()} {platform.machine()}",
        },
        "megabytes": {name: round(size, 1) for name, size in sizes.items()},
    }
    versions = ", ".join(f"{name} {number}" for name, number in found["environment"]["versions"].items())
    lines = [[name, f"{size:.0f}"] for name, size in sizes.items()]
    page = (
        f"# What an installation takes on the disk\n\n`{COMMAND}`, {versions}, {found['environment']['system']}. MB of "
        "all files of all packages; of extras, what they add to the core. What two extras share counts in both.\n\n"
        f"{table(('what', 'MB'), lines)}\n"
    )
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "install-size.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (args.output / "install-size.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
