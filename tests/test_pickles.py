from __future__ import annotations

import collections
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from protoseg.models.checkpoints import Inert, _Unpickler, read_checkpoint


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Settings(dict[str, Any]):
    """A dict of a foreign class, with state of its own."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.flag = True


class Scripted(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


@pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated", "ignore:.*TorchScript archive")
def test_code_in_a_torchscript_archive_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.jit.script(Scripted()).save(tmp_path / "scripted.pt")
    ran: list[str] = []
    monkeypatch.setattr(torch.jit, "load", lambda *args, **options: ran.append("loaded"))
    with pytest.raises(ValueError, match=r"scripted\.pt: a TorchScript archive, which holds code; .*state_dict"):
        read_checkpoint(tmp_path / "scripted.pt")
    assert not ran


@pytest.mark.parametrize("new_format", [True, False])
def test_tensors_are_read_and_nothing_is_run(new_format: bool, tmp_path: Path) -> None:
    tensors = collections.OrderedDict(
        whole=torch.randn(2, 3),
        parameter=torch.nn.Parameter(torch.randn(4)),
        half=torch.randn(3).half(),
        brain=torch.randn(3).bfloat16(),
        number=torch.tensor(7),
        view=torch.randn(4, 4)[1:, ::2],
    )
    trap = tmp_path / "trap"
    state = {"model": tensors, "config": Settings(a=Settings(b=[1])), "evil": Evil(trap), "epoch": 3, "names": {"x"}}
    torch.save(state, tmp_path / "file.pth", _use_new_zipfile_serialization=new_format)
    found = read_checkpoint(tmp_path / "file.pth")
    assert not trap.exists()
    assert isinstance(found["config"], Inert)
    assert isinstance(found["evil"], Inert)
    assert found["epoch"] == 3
    assert found["names"] == {"x"}
    assert list(found["model"]) == list(tensors)
    for name, value in tensors.items():
        assert torch.equal(found["model"][name], value)
        assert found["model"][name].dtype == value.dtype
    torch.load(tmp_path / "file.pth", weights_only=False)
    assert trap.exists(), "a plain reader falls into the trap"


@pytest.mark.parametrize("owner", [b"ctorch._utils\n_rebuild_tensor_v2\n", b"cnobody\nKnown\n", b"ctorch\nSize\n"])
def test_what_is_trusted_keeps_its_attributes(owner: bytes) -> None:
    before = torch._utils._rebuild_tensor_v2.__defaults__
    for state in (b"}U\x0c__defaults__K\x07sb.", b"N}U\x0c__defaults__K\x07s\x86b."):
        with pytest.raises(pickle.UnpicklingError, match="the file sets attributes of"):
            _Unpickler(io.BytesIO(b"\x80\x02" + owner + state)).load()
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    for content in (b"", b"hello world" * 10):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"file\.pth: not a PyTorch checkpoint"):
            read_checkpoint(path)
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"file\.pth: not a PyTorch checkpoint"):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none.pth")
