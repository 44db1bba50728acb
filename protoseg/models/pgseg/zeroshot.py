"""Masks for classes that are given by name, from a network that groups pictures and embeds texts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from protoseg.models.pgseg.text import WordBag
from protoseg.modules.gmm import LARGEST_SCALE
from protoseg.utils import checks
from protoseg.utils.colors import normalize
from protoseg.utils.numeric import unit

if TYPE_CHECKING:
    from protoseg.models.pgseg.grouping import Encoded
    from protoseg.models.pgseg.network import PGSeg

__all__ = ["TEMPLATES", "Score", "ZeroShot", "class_embeddings", "group_maps", "normalized", "segment"]

Score = Literal["softmax", "cosine"]
# Sentences that a class's name is put into; their embeddings are averaged.
TEMPLATES = (
    "a photo of a {}",
    "a picture of a {}",
    "a photo of the {}",
    "there is a {} in the scene",
    "a close photo of a {}",
)


class ZeroShot(NamedTuple):
    """What :func:`segment` returns.

    Attributes:
        mask: ``[H, W]`` uint8, 0 = background, 1.. = the classes in the order of their names.
        scores: ``[C, H, W]`` in ``[0, 1]``, before the threshold.
    """

    mask: Tensor
    scores: Tensor


@torch.no_grad()
def class_embeddings(
    model: PGSeg, names: Sequence[str | Sequence[str]], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """Embed classes by their names.

    Args:
        model: The network.
        names: A name per class, or several names that mean the same.
        templates: Sentences with ``{}`` for the name.

    Returns:
        ``[C, E]`` of unit length: the mean over names and templates.

    Raises:
        TypeError: Names or templates are one text, not several.
        ValueError: There is no name or no template, or a name has words that a network of words has never read.
    """
    if not names or not templates:
        raise ValueError(f"class_embeddings: needs a class and a template, got {len(names)} and {len(templates)}")
    if isinstance(names, str) or isinstance(templates, str):
        raise TypeError(
            f"class_embeddings: names and templates must be sequences of texts, got {names!r}, {templates!r}"
        )
    if isinstance(model.text, WordBag):
        every = [each for name in names for each in ([name] if isinstance(name, str) else name)]
        if unknown := [name for name in every if model.text.unknown(name)]:
            words = [word for name in unknown for word in model.text.unknown(name)]
            raise ValueError(
                f"class_embeddings: {', '.join(map(repr, dict.fromkeys(unknown)))}: the network has never read "
                f"{', '.join(map(repr, dict.fromkeys(words)))}; take other names, or train it with them"
            )

    device = next(model.parameters()).device
    rows = []
    for name in names:
        texts = [
            template.format(each) for each in ([name] if isinstance(name, str) else name) for template in templates
        ]
        with evaluating(model):
            embedded, _ = model.encode_text(model.text.tokenize(texts).to(device))
        rows.append(unit(embedded.float()).mean(0))
    return unit(torch.stack(rows))


def group_maps(encoded: Encoded, size: Sequence[int] | None = None) -> Tensor:
    """Follow every patch through all units to the last groups.

    Args:
        encoded: What the image encoder found.
        size: Height and width to resize to; the grid of patches where not given.

    Returns:
        ``[B, G, H, W]``, the share of each of the last groups, sum 1 over ``G``.
    """
    shares = encoded.stages[0].grouping.soft
    for stage in encoded.stages[1:]:
        shares = stage.grouping.soft @ shares
    maps = shares.reshape(*shares.shape[:2], *encoded.grid)
    return maps if size is None else F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


@torch.no_grad()
def segment(
    model: PGSeg,
    image: Tensor,
    class_names: Sequence[str | Sequence[str]] | Tensor,
    *,
    background_names: Sequence[str | Sequence[str]] | Tensor = (),
    background_threshold: float = 0.95,
    templates: Sequence[str] = TEMPLATES,
    score: Score = "softmax",
    short_side: int | None = None,
    stride: int | None = None,
    top_classes: int = 5,
) -> ZeroShot:
    r"""Give each pixel of a picture the class that its group is most like, or background.

    A pixel belongs to the group with the largest share (:func:`group_maps`, resized bilinearly). With
    ``score="softmax"``, as published, a group has for class :math:`c` the score
    :math:`\mathrm{softmax}_c(t \cos) \cdot \mathrm{softmax}_{c \in T}(t \cos)`, :math:`T` the ``top_classes`` of the
    whole picture; with ``"cosine"`` it is :math:`(1 + \cos) / 2`, which needs no other class to compare with. Pixels
    whose best score is below the threshold, or below the best of the picture where that is lower, are background.

    The picture is resized so that its shorter side is ``short_side``, and read in square windows of that side; scores
    of windows that overlap are averaged.

    Args:
        model: The network; it is asked in evaluation mode, and left as it was.
        image: ``[3, H, W]`` uint8, RGB.
        class_names: A name per class, or several that mean the same; or what :func:`class_embeddings` made of them,
            which saves reading them again for each of many pictures.
        background_names: Names that count as background where they win, in either form; they take part in the softmax.
        background_threshold: In ``[0, 1]``. Published for ``"softmax"``: 0.95 on VOC, 0.85 on COCO, 0.36 on Context.
        templates: Sentences with ``{}`` for the name.
        score: What groups are scored with.
        short_side: In pixels; by default ``config.test_side`` of the network.
        stride: Of the windows, in pixels; half a window where not given, as published.
        top_classes: Size of :math:`T`, 5 in the published code.

    Returns:
        :class:`ZeroShot`.

    Raises:
        TypeError: ``image`` is not uint8.
        ValueError: Shape, threshold, names or score out of range.
    """
    checks.shape("segment", "image", image, (3, "H", "W"))
    checks.unit_interval("segment", "background_threshold", background_threshold)
    if isinstance(class_names, str) or isinstance(background_names, str):
        raise TypeError(f"segment: names must be sequences of texts, got {class_names!r} and {background_names!r}")
    checks.choice("segment", "score", score, get_args(Score))
    if image.dtype != torch.uint8:
        raise TypeError(f"segment: image must be uint8 in 0..255, got {image.dtype}")

    device = next(model.parameters()).device
    texts = _embedded(model, class_names, templates)
    if len(background_names):
        texts = torch.cat([texts, _embedded(model, background_names, templates)])
    # A window of whole patches: what hangs over would not be seen, and the map would be off.
    patch = model.config.image.patch_size
    window = max(1, round((short_side or model.config.test_side) / patch)) * patch
    scaled = _resized(image.to(device), window, patch)

    # 1. Scores: the mean over windows that overlap.
    total = torch.zeros(len(texts), *scaled.shape[-2:], device=device)
    count = torch.zeros(scaled.shape[-2:], device=device)
    with evaluating(model):
        for rows, columns in _windows(scaled.shape[-2:], window, stride or max(1, window // 2)):
            part = scaled[..., rows, columns]
            total[:, rows, columns] += _scores(model, part, texts, score, top_classes)
            count[rows, columns] += 1
    scores = F.interpolate((total / count)[None], image.shape[-2:], mode="bilinear", align_corners=False)[0]

    # 2. A pixel is its best class where that is sure enough; the best pixel of a picture always is.
    best, winner = scores.max(0)
    foreground = (winner < len(class_names)) & (best >= min(background_threshold, float(best.max())))
    mask = torch.where(foreground, winner + 1, torch.zeros_like(winner)).to(torch.uint8)
    return ZeroShot(mask, scores[: len(class_names)])


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a network in evaluation mode until the context is left, and then each part in its own again."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _embedded(model: PGSeg, names: Sequence[str | Sequence[str]] | Tensor, templates: Sequence[str]) -> Tensor:
    return names if isinstance(names, Tensor) else class_embeddings(model, names, templates)


def _scores(model: PGSeg, images: Tensor, texts: Tensor, score: Score, top: int) -> Tensor:
    """Score one window ``[1, 3, h, w]``: ``[C, h, w]``."""
    pooled, encoded = model.encode_image(images)
    cosines = unit(model.image_projector(encoded.groups)[0].float()) @ texts.T
    if score == "cosine":
        values = (1 + cosines) / 2
    else:
        scale = model.log_scale.exp().clamp_max(LARGEST_SCALE)
        whole = unit(pooled[0].float()) @ texts.T
        kept = torch.zeros_like(whole, dtype=torch.bool).scatter(0, whole.topk(min(top, len(whole))).indices, True)
        values = (scale * cosines).softmax(-1) * (scale * cosines).masked_fill(~kept, -torch.inf).softmax(-1)
    group = group_maps(encoded, images.shape[-2:])[0].argmax(0)
    return rearrange(values[group], "h w c -> c h w")


def _resized(image: Tensor, side: int, multiple: int) -> Tensor:
    """Resize so that the shorter side is ``side``, sides multiples of ``multiple``, and normalize."""
    scale = side / min(image.shape[-2:])
    return normalized(image, [max(1, round(edge * scale / multiple)) * multiple for edge in image.shape[-2:]])


def normalized(image: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a uint8 picture ``[3, H, W]`` and normalize it by ImageNet's mean and deviation: ``[1, 3, h, w]``."""
    pixels = F.interpolate(image[None].float(), tuple(size), mode="bilinear", align_corners=False, antialias=True) / 255
    return normalize(pixels.clamp(0, 1))


def _windows(size: Sequence[int], window: int, stride: int) -> Iterator[tuple[slice, slice]]:
    """Yield squares that cover the picture; the last ones of a row or column end at its edge."""

    def starts(edge: int) -> list[int]:
        if edge <= window:
            return [0]
        return [*range(0, edge - window, stride), edge - window]

    for top in starts(size[0]):
        for left in starts(size[1]):
            yield slice(top, top + window), slice(left, left + window)
