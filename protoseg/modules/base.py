"""What the modules share: when values are looked at, what a pass that is computed again sees, errors of devices."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from protoseg.utils import checks

__all__ = ["Passes", "PrototypeModule", "computed_again"]


def computed_again() -> bool:
    """Whether this runs in a backward pass, as a forward pass does that :mod:`torch.utils.checkpoint` repeats."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


class Passes:
    """The states that recent passes have seen, for checkpointing, which computes a pass again after the state moved.

    Passes are told apart by their inputs: computed again, these are the same to the last bit. What is kept is only
    what a checkpointed pass may ask for, and no more than the last 32 of them.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[list[Tensor], Any]] = deque(maxlen=32)

    def keep(self, inputs: Sequence[Tensor], state: Any) -> None:
        """Keep the state of a pass, if it may be computed again."""
        if torch.compiler.is_compiling():
            return
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        if hooked or not torch.is_grad_enabled():
            self._kept.append((_fingerprint(inputs), state))

    def recall(self, where: str, inputs: Sequence[Tensor]) -> Any:
        """Return the state that the pass with these inputs saw.

        Raises:
            RuntimeError: No such pass is known.
        """
        wanted = _fingerprint(inputs)
        for found, state in reversed(self._kept):
            if all(map(torch.equal, found, wanted)):
                return state
        raise RuntimeError(
            f"{where}: a backward pass computes this forward pass again, with inputs that no recent one had; call the "
            "module outside of what is checkpointed, or make what comes before it deterministic"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Passes:
        return Passes()

    def __reduce__(self) -> tuple[type[Passes], tuple[()]]:
        return Passes, ()


def _fingerprint(inputs: Sequence[Tensor]) -> list[Tensor]:
    """A few values of each input, which are enough to tell passes apart."""
    found = []
    for value in inputs:
        flat = value.detach().reshape(-1)
        found.append(flat[:: max(1, len(flat) // 256)].clone())
    return found


class PrototypeModule(nn.Module):
    """The skeleton of the modules.

    ``forward`` of a module checks its inputs, computes in full precision whatever autocast says, from the state that
    was, and only then, in ``train()``, moves the state. What checkpointing computes again sees the state that the pass
    saw the first time, and moves nothing.

    Args:
        check_values: Whether to look for NaN and the like, which waits for the device. None: on the CPU only.
    """

    def __init__(self, check_values: bool | None = None) -> None:
        super().__init__()
        self.check_values = check_values
        self._passes = Passes()

    def _looks_at_values(self, value: Tensor) -> bool:
        """Whether values are checked now; never while compiling."""
        if torch.compiler.is_compiling() or value.is_meta:
            return False
        return value.device.type == "cpu" if self.check_values is None else self.check_values

    def _same_device(self, expected: torch.device, **values: Tensor | None) -> None:
        """Raise ``ValueError`` where a tensor is not where the state is."""
        for name, value in values.items():
            if value is not None:
                checks.device(type(self).__name__, name, value, expected)
