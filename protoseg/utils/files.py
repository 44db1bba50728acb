"""Files that are written wholly or not at all, and read only where they are what they say."""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

__all__ = ["UNFINISHED", "check_sha256", "replacing"]

UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}")
"""Names of the files that :func:`replacing` gives; only a process that was killed leaves such a file behind."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file to write beside ``path`` that takes its place when the block ends without an error.

    No reader sees half a file, and a run that is stopped leaves none behind.
    """
    # Beside the target, as only a rename within one file system is atomic.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_sha256(path: Path, expected: str) -> Path:
    """Give the path back where the file is the one that was published.

    Raises:
        ValueError: It is another file.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(
            f"{path}: expected the file with the SHA-256 {expected}, got {found}; it is damaged or was changed: "
            "install its package again"
        )
    return path
