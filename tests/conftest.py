from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of the trainer; not to be changed."""
    from tests import trainer  # skips where the extra examples is not installed

    output = tmp_path_factory.mktemp("finished")
    trainer.run(output)
    return output
