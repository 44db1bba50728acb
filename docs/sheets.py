"""Pictures laid out in rows, with words that can still be read on a phone: for the strip and the gallery."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from protoseg.report import overlay

FONT = 22  # a phone shows a sheet at half of its width
LINE = 32  # height of a line of words
GAP = 4


def resized(image: Tensor, size: tuple[int, int], layer: Tensor | None = None) -> Tensor:
    """A picture ``[3, h, w]`` uint8 of another height and width, with a map or a mask ``[h', w']`` laid over it."""
    pixels = F.interpolate(image[None].float(), size, mode="bicubic", antialias=True)[0]
    picture = pixels.clamp(0, 255).round().to(image.dtype)
    if layer is None:
        return picture

    # Between two classes of a mask there is no third one.
    mode = "bilinear" if layer.is_floating_point() else "nearest-exact"
    return overlay(picture, F.interpolate(layer[None, None], size, mode=mode)[0, 0])


def sheet(
    rows: Sequence[Sequence[Tensor]],
    size: tuple[int, int],
    *,
    headings: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> Image.Image:
    """Lay pictures ``[3, h, w]`` uint8 out in rows; higher ones lose their lower part.

    Args:
        rows: The pictures. A row may be shorter than the others.
        size: Width and height of each in the sheet.
        headings: Words above each column.
        labels: A line above each row.
    """
    width, height = size
    columns = max(map(len, rows))
    top = LINE if headings else 0
    above = LINE if labels else 0
    step = above + height + GAP
    sheet = Image.new("RGB", ((width + GAP) * columns - GAP, top + step * len(rows) - GAP), "white")
    drawing = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT)

    for column, heading in enumerate(headings):
        middle = (width + GAP) * column + width / 2
        drawing.text((middle, LINE / 2), heading, "black", font, "mm")

    for number, row in enumerate(rows):
        if labels:
            drawing.text((0, top + step * number + LINE / 2), labels[number], "black", font, "lm")
        for column, image in enumerate(row):
            cut = image[:, : round(image.shape[-1] * height / width)]
            picture = Image.fromarray(cut.permute(1, 2, 0).contiguous().numpy())
            place = ((width + GAP) * column, top + step * number + above)
            sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), place)
    return sheet
