from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import processes


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of the trainer; not to be changed."""
    from tests import trainer  # skips where the extra recipes is not installed

    output = tmp_path_factory.mktemp("finished")
    trainer.run(output)
    return output


@pytest.fixture
def two_processes(tmp_path: Path) -> Callable[[processes.Work], tuple[Any, Any]]:
    """Runs a function of the rank in two processes of a gloo group; gives what both return."""
    return lambda work: processes.run(work, tmp_path)
