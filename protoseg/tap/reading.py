"""From what was captured to features and CAM: tokens become maps, and weights a CAM."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from protoseg.tap.survey import Survey

__all__ = ["CAMReader", "as_map", "grid_of", "pointwise", "pooled"]

Reshape = Callable[[Tensor], Tensor] | int | None


def pooled(tensor: Tensor) -> bool:
    """Whether nothing is left of a map but a vector a picture."""
    return tensor.dim() == 2 or (tensor.dim() == 4 and tensor.shape[-2:] == (1, 1))


def grid_of(places: int, picture: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns of a picture's patches.

    Args:
        places: How many patches there are.
        picture: Height and width; None: they are taken for a square.

    Returns:
        None where no grid has so many.
    """
    side = math.isqrt(max(places, 0))
    if picture is None:
        return (side, side) if side > 0 and side * side == places else None

    best: tuple[float, tuple[int, int]] | None = None
    height, width = picture
    for rows in range(1, places + 1):
        columns, rest = divmod(places, rows)
        # One patch size has to serve both sides, whether the rest of a side is cut off or padded.
        low = max(height / (rows + 1), width / (columns + 1))
        high = min(height / max(rows - 1, 0.5), width / max(columns - 1, 0.5))
        if rest == 0 and low < high:
            stretch = abs(math.log(height / rows * columns / width))
            if best is None or stretch < best[0]:
                best = (stretch, (rows, columns))
    return None if best is None else best[1]


def as_map(kind: str, tensor: Tensor, reshape: Reshape, picture: tuple[int, int] | None = None) -> Tensor:
    """Make a map ``[B, D, h, w]`` of what was captured.

    Args:
        kind: ``"features"`` or ``"cam"``, for the message.
        tensor: Of any rank.
        reshape: A function that gives the map; or how many of the tokens ``[B, L, D]`` come before the patches, which
            lie as the picture does.
        picture: Its height and width.

    Raises:
        ValueError: It is no map.
    """
    shape = tuple(tensor.shape)
    if callable(reshape):
        found = reshape(tensor)
        if not isinstance(found, Tensor) or found.dim() != 4:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"attach: reshape must give a map [B, D, h, w], got {got} of {kind} {shape}")
        return found
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() != 3 or reshape is None:
        advice = ""
        if tensor.dim() == 3:
            advice = "; pass reshape= for tokens: how many come before the patches, or a function"
        elif tensor.dim() > 4:
            advice = "; pass as reshape= a function to [B, D, h, w]"
        raise ValueError(f"attach: {kind} must be a map [B, D, h, w], got {shape}{advice}")

    grid = grid_of(tensor.shape[1] - reshape, picture)
    if grid is None:
        told = "no square" if picture is None else f"no grid like the picture's {picture}"
        raise ValueError(
            f"attach: {kind} {shape} has {told} of patches after {reshape} tokens; pass as reshape a function from "
            "[B, L, D] to [B, D, h, w]"
        )
    return rearrange(tensor[:, reshape:], "b (h w) d -> b d h w", h=grid[0])


def pointwise(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weights ``[C, D, 1, 1]`` and bias of a layer that a pooled vector runs through, where it is that simple."""
    if isinstance(layer, nn.Linear):
        return layer.weight[..., None, None], layer.bias
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
        return layer.weight, layer.bias
    return None


class CAMReader:
    """Reads a CAM from what was captured of a pass, as the arguments of :func:`protoseg.attach` say.

    Args:
        cam: A layer's name as the user wrote it, a function of the features, or None.
        layer: The layer, where it is a name.
        features: The features' name, for messages.
        channels: See :func:`protoseg.attach`, also ``background`` and ``reshape``.
        background: See there.
        reshape: See there.
    """

    def __init__(
        self,
        cam: str | Callable[[Tensor], Tensor] | None,
        layer: nn.Module | None,
        features: str,
        *,
        channels: Sequence[int] | None,
        background: int | None,
        reshape: Reshape,
    ) -> None:
        self._cam = cam
        self._layer = layer
        self._features = features
        self._channels = None if channels is None else list(channels)
        self._background = background
        self._reshape = reshape
        self._compared = False
        if self._channels is not None and min(self._channels, default=-1) < 0:
            raise ValueError(f"attach: channels must be one or more numbers of at least 0, got {self._channels}")
        if background is not None and (self._channels is None or background < 0 or background in self._channels):
            raise ValueError(
                f"attach: background must be a channel beside those in channels, got {background} beside {channels}"
            )

    def features(self, captured: Tensor, picture: tuple[int, int] | None, survey: Survey | None) -> Tensor:
        """Return the features ``[B, D, h, w]``.

        Raises:
            ValueError: They are no map, or a pooled one.
        """
        before = captured
        if not pooled(captured) or callable(self._reshape):
            captured = as_map("features", captured, self._reshape, picture)
        if not pooled(captured):
            return captured
        # Behind a pooling every loss would be 0, whatever the network does.
        maps = [each.name for each in survey.ran if each.is_map] if survey is not None else []
        near = maps[-3:]
        raise ValueError(
            f"attach: {self._features!r} is pooled already, {tuple(before.shape)}, and one place is no map; name what "
            "is pooled" + (f"; maps of this network: {', '.join(near)}" if near else "")
        )

    def read(
        self,
        features: Tensor,
        captured: Tensor | None,
        picture: tuple[int, int] | None,
        survey: Survey | None,
        rank: int,
    ) -> Tensor:
        """Return the CAM ``[B, C, h, w]`` in the order of the labels.

        Args:
            features: ``[B, D, h, w]``.
            captured: What the CAM's layer gave, if it ran.
            picture: Height and width of the network's input.
            survey: Which layers ran.
            rank: Axes that the features had when they were captured.

        Raises:
            RuntimeError: No CAM was named.
            ValueError: There is none in what was captured, or it has too few channels.
        """
        cam = self._of_all_channels(features, captured, picture, survey, rank)
        named = [*(self._channels or ()), *(() if self._background is None else (self._background,))]
        if max(named, default=0) >= cam.shape[1]:
            raise ValueError(
                f"attach: channels and background must be below the CAM's {cam.shape[1]} channels, got {max(named)}"
            )
        if self._background is not None:
            cam = cam - cam[:, self._background, None]
        if self._channels is not None:
            cam = cam[:, self._channels]
        return cam

    def _of_all_channels(
        self,
        features: Tensor,
        captured: Tensor | None,
        picture: tuple[int, int] | None,
        survey: Survey | None,
        rank: int,
    ) -> Tensor:
        if self._cam is None:
            raise RuntimeError("attach: a CAM was asked for and none was named; pass cam= to attach")
        if callable(self._cam):
            return as_map("cam", self._cam(features), None if callable(self._reshape) else self._reshape, picture)
        if captured is None or pooled(captured):
            return self._by_weights(features, captured, survey)
        # A function for the features' rank is not one for a CAM that has another one.
        reshape = self._reshape
        if callable(reshape) and captured.dim() == 4 != rank:
            reshape = None
        return as_map("cam", captured, reshape, picture)

    def _by_weights(self, features: Tensor, captured: Tensor | None, survey: Survey | None) -> Tensor:
        layer = self._layer
        found = None if layer is None else pointwise(layer)
        if found is None:
            raise ValueError(
                f"attach: {self._cam!r} must give a map or be a linear layer or a 1x1 convolution, whose weights "
                f"give one, got {type(layer).__name__} with {'no' if captured is None else 'pooled'} output; pass "
                "a callable that makes the CAM from the features"
            )
        weight, bias = found
        if weight.dim() != 4 or weight.numel() == 0 or hasattr(weight, "full_tensor"):
            raise ValueError(
                f"attach: the weights of {self._cam!r} are sharded, as FSDP does outside of the layer's own forward "
                "pass; name a layer whose output is a map, or keep this layer out of the sharding"
            )
        if weight.shape[1] != features.shape[1]:
            last = ""
            if weight.shape[1] == features.shape[-1]:
                last = "; these look like channels-last maps, so pass reshape=lambda x: x.permute(0, 3, 1, 2)"
            raise ValueError(
                f"attach: {self._cam!r} takes {weight.shape[1]} channels and the features have "
                f"{features.shape[1]}; name as features what is pooled before it{last}"
            )
        # What inference_mode has made cannot have a graph.
        if features.is_inference():
            weight = weight.detach()
        cam = F.conv2d(features, weight.to(features.dtype))
        if captured is not None and not self._compared:
            self._compare(features, weight, bias, captured, survey)
        return cam

    @torch.no_grad()
    def _compare(
        self, features: Tensor, weight: Tensor, bias: Tensor | None, captured: Tensor, survey: Survey | None
    ) -> None:
        """Warn where the classifier does not say what it would of the features' mean, or maximum; once."""
        between = [] if survey is None else survey.between(self._features.partition(":")[0], str(self._cam))
        # Dropout changes what it says, so another pass has to tell.
        dropouts = [each.layer for each in between if isinstance(each.layer, nn.modules.dropout._DropoutNd)]
        if any(each.training and each.p > 0 for each in dropouts):
            return
        self._compared = True
        said = captured.flatten(1).float()
        if bias is not None:
            said = said - bias.float()
        matrix = weight[:, :, 0, 0].float()
        wanted = [pool.float() @ matrix.T for pool in (features.mean((-2, -1)), features.amax((-2, -1)))]
        off = min(float((each - said).norm() / said.norm().clamp_min(1e-12)) for each in wanted)
        if off < 0.05:
            return

        layers = ", ".join(f"{each.name} ({type(each.layer).__name__})" for each in between)
        maps = [each.name for each in between if each.is_map and len(each.shape or ()) == 4]
        advice = "pass as cam= a function of the features that does the same at every pixel"
        if maps:
            advice = f"name {maps[-1]!r} as features, or {advice}"
        told = f"; between them ran {layers}" if layers else "; something between them is no layer, or no mean"
        warnings.warn(
            f"attach: the CAM is not that of the classifier: {self._cam!r} gives {100 * off:.0f} % other than it would "
            f"of the pooled {self._features!r}{told}. Where this is not meant (as for a class token), {advice}",
            stacklevel=6,
        )
