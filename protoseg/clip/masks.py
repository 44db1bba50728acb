"""Masks of a picture from a frozen CLIP and prototypes, with tags or without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.clip.model import FrozenCLIP, Pooling
from protoseg.functional import attention_affinity, feature_attention, max_normalize, refine_by_affinity, to_mask
from protoseg.utils import checks
from protoseg.utils.numeric import unit

__all__ = ["Segmented", "segment", "segment_batch"]


class Segmented(NamedTuple):
    """What :func:`segment` returns.

    Attributes:
        mask: ``[H, W]`` uint8, 0 = background, 1.. = the classes in the order of the prototypes.
        maps: ``[C, H, W]`` in ``[0, 1]``, 0 for absent classes.
        labels: ``[C]``, 1 = the class is taken to be in the picture.
    """

    mask: Tensor
    maps: Tensor
    labels: Tensor


def segment(
    clip: FrozenCLIP,
    image: Tensor,
    prototypes: Tensor,
    background: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    threshold: float = 0.4,
    presence: float = 0.1,
    attentions: int = 8,
    pooling: Pooling = "patches",
    short_side: int | None = None,
) -> Segmented:
    r"""Give each pixel of a picture one of the classes that are in it, or background.

    Grad-CAM of each present class (:meth:`FrozenCLIP.grad_cam`), divided by its maximum, refined by the affinity of
    the last attentions (of the features, where a network has no attention), and divided by its maximum again; a pixel
    takes the class with the largest value, background where that is below the threshold. Without tags a class is
    present where

    .. math:: \mathrm{softmax}_c(\langle x, v_c \rangle / \tau) \ge \mathrm{presence}

    over classes and background. CLIP-ES (arXiv 2212.09506) and VPL (2412.19650) know the tags and state no threshold;
    0.4 and 0.1 are ours, not tuned on real weights.

    Args:
        clip: The model.
        image: ``[3, H, W]`` uint8, RGB.
        prototypes: ``[C, E]``, of texts or learnt.
        background: ``[K, E]``, of what else pictures show; recommended.
        labels: ``[C]``, 1 = the class is in the picture; found by the model where not given.
        threshold: In ``[0, 1]``.
        presence: In ``[0, 1]``, least probability of a class that is present.
        attentions: Of how many of the last blocks the affinity is made, at most all of them; 0 leaves it out.
        pooling: What stands for the whole picture, as of :meth:`FrozenCLIP.encode`.
        short_side: Length of the shorter side in pixels that the model sees; the picture's own where not given.

    Returns:
        :class:`Segmented`.

    Raises:
        ValueError: Wrong shapes, or a number out of range.
        TypeError: The picture is not uint8.

    Example:
        >>> import open_clip
        >>> from protoseg.clip import FrozenCLIP
        >>> sizes = dict(width=64, layers=2)
        >>> model = open_clip.CLIP(32, dict(image_size=32, patch_size=8, **sizes), dict(heads=2, **sizes))
        >>> clip = FrozenCLIP(model, open_clip.get_tokenizer("ViT-B-16"))
        >>> image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
        >>> found = segment(clip, image, clip.text_prototypes(["cat", "dog"]), clip.text_prototypes(["sky"]))
        >>> found.mask.shape, found.maps.shape
        (torch.Size([40, 60]), torch.Size([2, 40, 60]))
    """
    several = None if labels is None else labels[None]
    return segment_batch(
        clip, [image], prototypes, background, several, threshold=threshold, presence=presence, attentions=attentions,
        pooling=pooling, short_side=short_side,
    )[0]  # fmt: skip


def segment_batch(
    clip: FrozenCLIP,
    images: Sequence[Tensor],
    prototypes: Tensor,
    background: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    threshold: float = 0.4,
    presence: float = 0.1,
    attentions: int = 8,
    pooling: Pooling = "patches",
    short_side: int | None = None,
) -> list[Segmented]:
    """:func:`segment` of pictures that the model sees at one size, together.

    Args:
        clip: The model.
        images: Each ``[3, H, W]`` uint8, RGB; :meth:`FrozenCLIP.prepare` has to bring all of them to one size.
        prototypes: As of :func:`segment`.
        background: Likewise.
        labels: ``[B, C]``.
        threshold: As of :func:`segment`; so are the others.
        presence: See above.
        attentions: See above.
        pooling: See above.
        short_side: See above.

    Raises:
        ValueError: No picture, pictures of several sizes, wrong shapes, or a number out of range.
        TypeError: A picture is not uint8.
    """
    checks.unit_interval("segment", "threshold", threshold)
    checks.unit_interval("segment", "presence", presence)
    prepared = [clip.prepare(image, short_side) for image in images]
    if len({each.shape for each in prepared}) != 1:
        sizes = sorted({tuple(each.shape[-2:]) for each in prepared})
        raise ValueError(f"segment_batch: the model has to see all pictures at one size, got {sizes or 'no picture'}")
    pixels = torch.cat(prepared)
    seen = clip.encode(pixels, attentions=min(attentions, clip.blocks) if clip.attends else 0, pooling=pooling)

    # 1. Which classes are there.
    every = prototypes if background is None else torch.cat([prototypes, background.to(prototypes)])
    if labels is None:
        probability = (seen.pooled @ unit(every.to(seen.pooled)).T / clip.temperature).softmax(-1)
        labels = (probability[:, : len(prototypes)] >= presence).to(pixels.dtype)
    checks.shape("segment", "labels", labels, (len(images), len(prototypes)), "one number per prototype")
    labels = labels.to(pixels.device)

    # 2. Where they are.
    maps = max_normalize(clip.grad_cam(pixels, prototypes, background, labels, pooling=pooling, seen=seen))
    if attentions:
        attention = feature_attention(seen.features) if seen.attention is None else seen.attention
        maps = max_normalize(refine_by_affinity(maps, attention_affinity(attention)))

    # 3. A class or background for each pixel.
    return [_at_full_size(*found, threshold) for found in zip(images, maps, labels, strict=True)]


def _at_full_size(image: Tensor, maps: Tensor, labels: Tensor, threshold: float) -> Segmented:
    """Enlarge the maps of the classes that are there, and choose among these: all maps of a large photograph are GB."""
    side = image.shape[-2:]
    present = labels.nonzero().flatten()
    large = maps.new_zeros(len(maps), *side)
    mask = torch.zeros(side, dtype=torch.uint8, device=maps.device)

    if len(present):
        found = F.interpolate(maps[None, present], side, mode="bilinear", align_corners=False)[0].clamp_(0, 1)
        large[present] = found
        names = torch.cat([present.new_zeros(1), present + 1]).to(torch.uint8)
        mask = names[to_mask(found, labels[present], threshold)]
    return Segmented(mask, large, labels)
