"""A trained network to maps: a classifier by plain PyTorch, its bank filled by ``tap.fill``, PACAM beside CAM.

    python benchmarks/checkpoint.py --data ../shared/data/voc20

Trains ``tf_efficientnet_lite0`` with the ImageNet weights of the extra ``weights`` by a loop that knows nothing of this
library, and keeps it in ``--checkpoint``; a checkpoint that is there is not trained again. Then, from the checkpoint
alone, the bank is filled and every picture's maps are made, once through ``attach`` and once, to compare, by the
network's own methods and the bank, as ``protoseg train cpal`` does. Writes ``checkpoint-NAME.json`` and ``.md`` into
``--output``.

The maps are given the true tags, and thresholds are the best ones of each split, as in ``protoseg train cpal``.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from protoseg import ContextPrototypeBank, attach
from protoseg.data import VOCFolder
from protoseg.functional import multi_scale
from protoseg.metrics import ThresholdSweep
from protoseg.models.weights import read_package
from protoseg.recipes.files import versions
from protoseg.utils.files import replacing

NAME = "tf_efficientnet_lite0"
MULTIPLE = 16  # the stride of the network, see build()
MEAN, STD = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.5)  # this network's own colors


def build(classes: int) -> nn.Module:
    """The network with a stride of 16, so that its maps are not too coarse."""
    network: nn.Module = timm.create_model(NAME, num_classes=classes, output_stride=16)
    state = read_package("efficientnet-lite0", NAME)
    own = network.state_dict()
    network.load_state_dict({key: state[key] if state[key].shape == own[key].shape else own[key] for key in own})
    return network


def scaled(image: Tensor, side: int) -> Tensor:
    """A picture ``[1, 3, H, W]`` with the area of a square."""
    scale = side / (image.shape[-1] * image.shape[-2]) ** 0.5
    size = [max(1, round(edge * scale / MULTIPLE)) * MULTIPLE for edge in image.shape[-2:]]
    resized = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False, antialias=True)
    return (resized / 255 - MEAN) / STD


def crop(image: Tensor, side: int) -> Tensor:
    """A part of a picture with a third of its area or more, perhaps mirrored."""
    share = random.uniform(0.33, 1.0) ** 0.5
    height, width = (max(1, int(edge * share)) for edge in image.shape[-2:])
    top, left = random.randint(0, image.shape[-2] - height), random.randint(0, image.shape[-1] - width)
    part = image[None, :, top : top + height, left : left + width].float()
    part = F.interpolate(part, (side, side), mode="bilinear", align_corners=False, antialias=True)[0]
    if random.random() < 0.5:
        part = part.flip(-1)
    return (part / 255 - MEAN) / STD


def train(network: nn.Module, data: VOCFolder, args: argparse.Namespace) -> None:
    """A plain training: crops, AdamW, a cosine."""
    optimizer = torch.optim.AdamW(network.parameters(), args.lr, weight_decay=0.05)
    steps = args.epochs * (len(data) // args.batch)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for epoch in range(args.epochs):
        order = random.sample(range(len(data)), len(data))
        for first in tqdm(range(0, len(order) - args.batch + 1, args.batch), f"epoch {epoch + 1}"):
            samples = [data[index] for index in order[first : first + args.batch]]
            images = torch.stack([crop(sample.image, args.crop) for sample in samples])
            labels = torch.stack([sample.labels for sample in samples])
            loss = F.multilabel_soft_margin_loss(network(images), labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            scheduler.step()


class Loader:
    """Pictures of a split one by one, in an order that keeps no class to the end, to be read more than once."""

    def __init__(self, data: VOCFolder, side: int) -> None:
        self.data, self.side = data, side
        self.order = random.Random(0).sample(range(len(data)), len(data))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in tqdm(self.order, "fill", leave=False):
            sample = self.data[index]
            yield scaled(sample.image, self.side), sample.labels[None]


class Views:
    """Features and CAM of a loader's pictures without ``attach``: by the network's own parts."""

    def __init__(self, network: Any, loader: Loader) -> None:
        self.network, self.loader = network, loader

    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What goes into the last block, and the classifier on every pixel of what comes behind it."""
        x = self.network.bn1(self.network.conv_stem(images))
        features = self.network.blocks[:-1](x)
        last = self.network.bn2(self.network.conv_head(self.network.blocks[-1](features)))
        return features, F.conv2d(last, self.network.classifier.weight[..., None, None])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for images, labels in self.loader:
            yield *self.see(images), labels


@torch.no_grad()
def score(network: nn.Module, folders: dict[str, VOCFolder], side: int) -> dict[str, Any]:
    """Score CAM and PACAM on each split, through ``attach`` and without."""
    classes = len(folders["train"].classes)
    weight = network.get_parameter("classifier.weight")[..., None, None]
    bank, plain = ContextPrototypeBank(classes, 192), ContextPrototypeBank(classes, 192)
    tap = attach(network.eval(), features="blocks.6:input", cam=("bn2", lambda last: F.conv2d(last, weight)), bank=bank)
    loader = Loader(folders["train"], side)
    contrast = tap.fill(loader)
    views = Views(network, loader)
    plain.fill(list(views))
    plain.eval()

    found: dict[str, Any] = {"contrast": contrast._asdict()}
    for split, data in folders.items():
        sweeps = {name: ThresholdSweep(classes) for name in ("cam", "pacam", "cam by hand", "pacam by hand")}
        for index in tqdm(range(len(data)), split, leave=False):
            sample = data[index]
            image, labels = scaled(sample.image, side), sample.labels[None]
            maps = tap.maps(image, labels, multiple=MULTIPLE)
            out = plain(*multi_scale(views.see, image, multiple=MULTIPLE), labels)
            each = {"cam": maps.cam, "pacam": maps.pacam}
            each |= {"cam by hand": out.cam[:, 1:], "pacam by hand": out.pacam[:, 1:]}
            for name, value in each.items():
                whole = F.interpolate(value, sample.image.shape[-2:], mode="bilinear", align_corners=False)
                sweeps[name].update(whole[0].clamp(0, 1), sample.labels, sample.mask)
        found[split] = {name: sweep.result().best.miou for name, sweep in sweeps.items()}
    tap.release()
    return found


def main() -> None:
    """Train, fill, score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/checkpoint-lite0.pt"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--size", type=int, default=288, help="side of the square with the area of a picture")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    torch.manual_seed(args.seed)

    folders = {split: VOCFolder(args.data, split) for split in ("train", "val")}
    network = build(len(folders["train"].classes))
    if args.checkpoint.exists():
        network.load_state_dict(torch.load(args.checkpoint, weights_only=True))
    else:
        train(network, folders["train"], args)
        args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with replacing(args.checkpoint) as file:
            torch.save(network.state_dict(), file)

    found = score(network, folders, args.size)
    found["versions"] = versions("protoseg", "torch", "timm", "numpy")
    args.output.mkdir(parents=True, exist_ok=True)
    for ending, text in {"json": json.dumps(found, indent=2) + "\n", "md": markdown(found, args.data.name)}.items():
        with replacing(args.output / f"checkpoint-{args.data.name}.{ending}") as file:
            file.write_text(text, encoding="utf-8")
    print(markdown(found, args.data.name))


def markdown(found: dict[str, Any], name: str) -> str:
    """The page of the results."""
    rows = [
        f"| {kind} | {found['train'][kind]:.3f} | {found['val'][kind]:.3f} |"
        for kind in ("cam", "pacam", "cam by hand", "pacam by hand")
    ]
    contrast = {kind: f"{value:.3f}" for kind, value in found["contrast"].items()}
    return "\n".join(
        [
            f"# A trained checkpoint to maps, on {name}",
            "",
            f"`python benchmarks/checkpoint.py --data ../shared/data/{name}`",
            "",
            "A classifier of plain PyTorch, one seed; mIoU, tags given, best threshold.",
            '"By hand" does without `attach`.',
            "",
            "| map | train | val |",
            "|---|---|---|",
            *rows,
            "",
            f"Contrast, which needs no masks: CAM {contrast['cam']}, PACAM {contrast['pacam']}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
