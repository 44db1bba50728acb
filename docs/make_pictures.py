"""Make the strip of pictures of README and site: ``python docs/make_pictures.py``, with the extras recipes and docs.

The photographs are those of scikit-image's wheel, whose notes say where they are from: ``astronaut`` (NASA) and
``rocket`` (SpaceX) are in the public domain, ``chelsea`` (Stefan van der Walt) and ``coffee`` (Rachel Michetti) are
CC0. Nothing is trained. The CAM is that of EfficientNet-Lite0 with its ImageNet weights, for the classes of ImageNet
that make up the picture's tag. PACAM is that of a bank filled with these four photographs and no other; which
map it compares and how many contexts background has was chosen by looking at them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from skimage import data
from torch import Tensor

from protoseg import ContextPrototypeBank
from protoseg.functional import multi_scale, pixel_adaptive_refine, with_background
from protoseg.models.weights import find_package, read_package
from protoseg.report import overlay

# The classes of ImageNet for each photograph's tag: cat, cup, rocket, space shuttle.
TAGS = {
    "chelsea": [281, 282, 285],
    "coffee": [504, 967, 968],
    "rocket": [657, 744, 812],
    "astronaut": [657, 744, 812],
}
PACKAGE = "efficientnet-lite0"
STRIDE = 16
SHORT_SIDE = 288
SIZE = (180, 120)  # of a picture in the strip
HEADING = 32


def photograph(name: str) -> Tensor:
    """A picture of scikit-image's wheel, ``[3, h, w]`` uint8, its shorter side of 288 pixels."""
    image = torch.from_numpy(np.array(getattr(data, name)())).permute(2, 0, 1)
    scale = SHORT_SIDE / min(image.shape[-2:])
    size = [round(side * scale / STRIDE) * STRIDE for side in image.shape[-2:]]
    small = F.interpolate(image[None].float(), size, mode="bicubic", antialias=True)[0]
    return small.clamp(0, 255).round().to(torch.uint8)


def load_network() -> Any:
    """EfficientNet-Lite0 with its weights."""
    _, name = find_package(PACKAGE)
    network = timm.create_model(name, output_stride=STRIDE)
    network.load_state_dict(read_package(PACKAGE, name))
    return network.eval()


def see(network: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    """The map before the last block ``[1, D, h, w]``, and the CAM of all classes ``[1, 1000, h, w]``."""
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    # The softmax does not see what all rows share.
    rows = network.classifier.weight - network.classifier.weight.mean(0)

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = network.blocks(network.bn1(network.conv_stem(pixels)))
        last = network.bn2(network.conv_head(features))
        return features, F.conv2d(last, rows[:, :, None, None])

    features, cam = multi_scale(run, (image[None] / 255 - mean) / std, scales=(1.0, 1.75), multiple=STRIDE)
    return features, cam


def maps_of(images: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """CAM and PACAM of each picture for its own tag, ``[h, w]`` each, from one bank filled with all of them."""
    network = load_network()
    views = []
    for image, label in zip(images, torch.eye(len(TAGS)), strict=True):
        features, cam = see(network, image)
        own = torch.cat([cam[:, classes].mean(1, keepdim=True) for classes in TAGS.values()], 1)
        views.append((features, own, label[None]))

    # Four pictures have four backgrounds, so that more contexts of it could not be made.
    bank = ContextPrototypeBank(len(TAGS), views[0][0].shape[1], background_contexts=len(TAGS))
    contrast = bank.fill(views)
    print(f"contrast of the CAM {contrast.cam:.3f}, of PACAM {contrast.pacam:.3f}")
    bank.eval()
    found = [bank(*view) for view in views]
    return [(out.cam[0, 1 + index], out.pacam[0, 1 + index]) for index, out in enumerate(found)]


def enlarge(layer: Tensor, image: Tensor) -> Tensor:
    """Bring a map ``[h, w]`` to the size of the picture."""
    return F.interpolate(layer[None, None], image.shape[-2:], mode="bilinear")[0, 0].clamp(0, 1)


def mask_of(layer: Tensor, image: Tensor) -> Tensor:
    """The mask ``[H, W]`` of a map: one half is the threshold, after refinement by the picture's colors."""
    refined = pixel_adaptive_refine(with_background(layer[None])[None], image[None])
    return refined[0].argmax(0)


def strip(rows: Sequence[Sequence[Tensor]], headings: Sequence[str]) -> Image.Image:
    """Lay pictures ``[3, H, W]`` out in rows, with a heading for each column; higher ones lose their lower part."""
    width, height = SIZE
    sheet = Image.new("RGB", (width * len(headings), HEADING + height * len(rows)), "white")
    drawing = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(24)

    for column, heading in enumerate(headings):
        drawing.text((width * (column + 0.5), HEADING / 2), heading, "black", font, "mm")
    for number, row in enumerate(rows):
        for column, image in enumerate(row):
            shown = image[:, : round(image.shape[-1] * height / width)]
            picture = Image.fromarray(shown.permute(1, 2, 0).contiguous().numpy())
            sheet.paste(picture.resize(SIZE, Image.Resampling.LANCZOS), (width * column, HEADING + height * number))
    return sheet


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Write ``strip.jpg``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "_static" / "strip.jpg")
    args = parser.parse_args(argv)

    images = [photograph(name) for name in TAGS]
    rows = []
    for image, maps in zip(images, maps_of(images), strict=True):
        cam, pacam = (enlarge(each, image) for each in maps)
        rows.append([image, overlay(image, cam), overlay(image, pacam), overlay(image, mask_of(pacam, image))])
    strip(rows, ["image", "CAM", "PACAM", "mask"]).save(args.output, quality=85)


if __name__ == "__main__":
    main()
