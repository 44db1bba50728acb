"""Reading checkpoints of other projects without running anything that they contain."""

from __future__ import annotations

import collections
import io
import os
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch

# What tensors are made of; nothing else in a file is ever called.
_TRUSTED = {
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}


class Inert:
    """Stands in for an object of a class that is not trusted: takes everything and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        """Forget the value."""

    def extend(self, values: object) -> None:
        """Forget the values."""

    def add(self, value: object) -> None:
        """Forget the value."""


class _Unpickler(pickle._Unpickler):
    # The one in Python, since that in C has no way to refuse a state.
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def load_build(self: Any) -> None:
        """Set the state of an object, but never that of a trusted function or class."""
        owner = self.stack[-2]
        if not isinstance(owner, Inert | collections.OrderedDict):
            raise pickle.UnpicklingError(f"the file sets attributes of {owner!r}")
        pickle._Unpickler.dispatch[pickle.BUILD[0]](self)

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _TRUSTED:
            return _TRUSTED[module, name]
        kind = getattr(torch, name, None) if module == "torch" else None
        if isinstance(kind, torch.dtype) or (isinstance(kind, type) and name.endswith("Storage")):
            return kind
        return type(name, (Inert,), {})


class _Pickle:
    """What ``torch.load`` asks of a pickle module."""

    __name__ = "protoseg.models.checkpoints"
    Unpickler = _Unpickler
    UnpicklingError = pickle.UnpicklingError

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return _Unpickler(file, **options).load()


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Read a PyTorch checkpoint onto the CPU; objects that are neither tensors nor plain values become :class:`Inert`.

    Args:
        path: The file.

    Returns:
        What the file holds, most often a dict.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no PyTorch checkpoint, or a TorchScript archive, whose code loading would run.
    """
    with Path(path).open("rb"):
        pass

    if is_torchscript(path):
        raise ValueError(
            f"{path}: a TorchScript archive, which holds code; expected the weights alone; where it comes from, save "
            "them with torch.save(model.state_dict(), FILE)"
        )

    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_Pickle)
    except Exception as error:  # bytes that are no pickle can be read as anything, and fail in any way
        raise ValueError(f"{path}: not a PyTorch checkpoint, or a damaged one: {error}") from error


class _Recorded(Inert):
    """Stands in for a scripted module: keeps its attributes and does nothing."""

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _ScriptUnpickler(_Unpickler):
    """Reads the attributes of scripted modules, whose code lies in other records that are never looked at."""

    def __init__(self, file: Any, archive: Any) -> None:
        super().__init__(file)
        self.archive = archive

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return type(name, (_Recorded,), {})
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, *_ = pid
        # A copy of the record's own bytes, so that no tensor can reach beyond them.
        content = torch.frombuffer(bytearray(self.archive.get_record(f"data/{key}")), dtype=torch.uint8)
        typed: Any = torch.storage.TypedStorage
        return typed(wrap_storage=content.untyped_storage(), dtype=kind._dtype, _internal=True)


def read_torchscript(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read the tensors of a TorchScript archive, such as OpenAI's CLIP, by name; its code is not even parsed.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no TorchScript archive, or holds no tensors.
    """
    with Path(path).open("rb"):
        pass
    if not is_torchscript(path):
        raise ValueError(f"{path}: expected a TorchScript archive")

    archive = torch._C.PyTorchFileReader(os.fspath(path))
    try:
        module = _ScriptUnpickler(io.BytesIO(archive.get_record("data.pkl")), archive).load()
    except Exception as error:  # as of read_checkpoint
        raise ValueError(f"{path}: a damaged TorchScript archive: {error}") from error

    tensors: dict[str, torch.Tensor] = {}
    parts: list[tuple[str, Any]] = [("", module)]
    while parts:
        prefix, part = parts.pop()
        for name, value in getattr(part, "attributes", {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{prefix}{name}"] = value.detach()
            elif isinstance(value, _Recorded):
                parts.append((f"{prefix}{name}.", value))
    if not tensors:
        raise ValueError(f"{path}: a TorchScript archive without tensors")
    return tensors


def is_torchscript(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a TorchScript archive, which holds code.

    Asks the reader that ``torch.load`` itself asks: it hands such an archive to ``torch.jit.load``, which runs it.
    """
    try:
        records = torch._C.PyTorchFileReader(os.fspath(path)).get_all_records()
    except RuntimeError:  # no archive at all, but a bare pickle
        return False
    return "constants.pkl" in records
