"""Make the pictures of the gallery from runs on made scenes: ``python docs/make_gallery.py``, with the extra recipes.

A run that ``--runs`` does not hold is made first, by a command that is printed. All of them take about a quarter of an
hour on two CPU cores, and the pictures another minute. Which pictures are best, median and worst is told by the mean
IoU of their masks. What a prototype looks like is told by the pictures, or the patches, that are nearest to it.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from plots import Bars, Curves, write_bars, write_curves
from sheets import resized, sheet
from torch import Tensor

from protoseg.functional import masked_average_pooling
from protoseg.metrics import prototype_diagnostics
from protoseg.models.pgseg.grouping import Encoded
from protoseg.models.pgseg.network import PGSeg
from protoseg.models.pgseg.zeroshot import normalized, segment
from protoseg.modules.statistics import to_space
from protoseg.recipes import cli
from protoseg.recipes.cpal_options import CPALOptions
from protoseg.recipes.cpal_stages import Network, infer
from protoseg.recipes.files import load_checkpoint
from protoseg.recipes.options import MaskOptions
from protoseg.recipes.pgseg import configure
from protoseg.recipes.pgseg_eval import Setting, panels
from protoseg.recipes.pgseg_options import PGSegOptions
from protoseg.recipes.pgseg_options import parse as parse_pgseg
from protoseg.recipes.pictures import Pictures, open_pictures
from protoseg.recipes.predict import load_run
from protoseg.recipes.pseudo_masks import enlarge, pseudo_mask, read_seeds
from protoseg.recipes.vpl import open_clip_model
from protoseg.recipes.vpl_options import parse as parse_vpl

# The last stage of CPAL and VPL trains a network on the masks, and is not shown.
RUNS = {
    "cpal": "train cpal --stages classify seeds refine",
    "vpl": "train vpl --stages prototypes seeds refine",
    "pgseg": "train pgseg",
    "pgseg-0.1": "train pgseg --npr-options bandwidth=0.1",
    "pgseg-1": "train pgseg --npr-options bandwidth=1",
}
BANDWIDTHS = {"bandwidth 1": "pgseg-1", "0.3, the default": "pgseg", "0.1": "pgseg-0.1"}
CELL = 150  # side of a picture among five
SMALL = 124  # among six
NEAREST = 6
ROWS = 4  # prototypes of a kind that are shown
WITHOUT = (214, 39, 40)  # frame of a picture without the class


class Example(NamedTuple):
    """A picture with what a method makes of it.

    Attributes:
        label: What it is an example of.
        image: ``[3, H, W]`` uint8.
        layers: Maps and masks by heading, ``[h, w]`` each.
    """

    label: str
    image: Tensor
    layers: Mapping[str, Tensor]


class Shown(NamedTuple):
    """What there is to show of a method.

    Attributes:
        examples: Best, median and worst.
        nearest: The pictures nearest to some prototypes, by the prototype's name.
        usage: How much each prototype is used.
    """

    examples: list[Example]
    nearest: dict[str, list[Tensor]]
    usage: list[Bars]


def make(folder: Path, command: str) -> None:
    """Make a run, or go on with it, where it is not finished."""
    if (folder / "metrics.json").is_file():
        return
    words = [*command.split(), "--output", str(folder), "--resume"]
    print(f"$ protoseg {shlex.join(words)}", flush=True)
    cli.main(words)


def rank(scores: Mapping[str, float]) -> dict[str, str]:
    """The names with the best, the median and the worst score."""
    ordered = sorted(scores, key=lambda name: (scores[name], name))
    return {"best": ordered[-1], "median": ordered[len(ordered) // 2], "worst": ordered[0]}


def nearest(distances: Tensor, count: int = NEAREST) -> list[int]:
    """Indices of the smallest distances ``[N]``, nearest first; what is infinitely far is left out."""
    order = distances.argsort()[:count].tolist()
    return [index for index in order if distances[index].isfinite()]


def counts(distances: Tensor) -> list[float]:
    """To how many columns each row of ``[K, N]`` is the nearest one; a column of infinities has none."""
    known = distances.isfinite().any(0)
    winners = distances.argmin(0)[known]
    found: list[float] = winners.bincount(minlength=len(distances)).tolist()
    return found


def cosine(prototypes: Tensor) -> str:
    """The mean cosine of any two prototypes ``[K, D]``: near 1, they have collapsed."""
    return f"{float(prototype_diagnostics(prototypes).cosine):.2f}"


def framed(image: Tensor, color: Sequence[int], width: int = 5) -> Tensor:
    """A picture of the size of a small cell, in a frame."""
    picture = resized(image, (SMALL, SMALL))
    inside = F.pad(torch.ones(SMALL - 2 * width, SMALL - 2 * width, dtype=torch.bool), [width] * 4)
    return torch.where(inside, picture, torch.tensor(color, dtype=torch.uint8)[:, None, None])


def read_json(path: Path) -> Any:
    """What a file of a run says."""
    return json.loads(path.read_text(encoding="utf-8"))


def from_tags(folder: Path, args: MaskOptions, pictures: Pictures, maps: Mapping[str, str]) -> list[Example]:
    """Best, median and worst training picture of a run that makes pseudo masks; a map's largest value counts."""
    metrics = read_json(folder / "metrics.json")
    scores: dict[str, float] = metrics["pseudo_masks"]["train"]["pictures"]
    args.output = folder  # the run may have been moved
    examples = []
    for place, name in rank(scores).items():
        sample = pictures[pictures.ids.index(name)]
        assert sample.mask is not None
        seeds = read_seeds(args, name)
        layers = {heading: enlarge(seeds[kind], sample.image).amax(0) for kind, heading in maps.items()}
        layers |= {"mask": pseudo_mask(sample, args), "truth": sample.mask}
        examples.append(Example(f"{place}: mean IoU {scores[name]:.2f}", sample.image, layers))
    return examples


@torch.no_grad()
def show_cpal(folder: Path) -> Shown:
    """Contexts, and the instances of the training pictures that are nearest to them."""
    net, args, classes = load_run(folder, "cpu")
    pictures = open_pictures(args.data, args.train_split, args)
    points, exists = instances_of(net, args, pictures)
    memory = net.bank.memory
    contexts = to_space(memory.contexts - memory.mean, memory.factor)

    # How far the contexts of each row are from the instances of the same row, [R, K, N].
    missing = ~exists[:, None] | ~memory.context_valid[..., None]
    distances = torch.cdist(contexts, points).masked_fill(missing, torch.inf)
    background = distances[-1]
    used = counts(background)
    frequent = torch.tensor(used).argsort(descending=True)[:ROWS].tolist()
    near = {f"{classes[row]}: the pictures nearest to its context": distances[row, 0] for row in range(ROWS)}
    near |= {f"background, context {place + 1}": background[place] for place in frequent}

    # A class has one context. Which of them is the nearest to an instance, of whatever class?
    centers = contexts[:-1, 0]
    rivals = counts(torch.cdist(centers, points[:-1][exists[:-1]]))
    heights = {"tagged": exists[:-1].sum(1).tolist(), "nearest by context": rivals}
    names = [str(place + 1) for place in range(len(used))]
    return Shown(
        from_tags(folder, args, pictures, {"cam": "CAM", "pacam": "PACAM"}),
        {label: [pictures[index].image for index in nearest(each)] for label, each in near.items()},
        [
            Bars(f"instances of each class (cosine of contexts {cosine(centers)})", classes, heights),
            Bars(f"pictures by context of background (cosine {cosine(contexts[-1])})", names, {"pictures": used}),
        ],
    )


def instances_of(net: Network, args: CPALOptions, pictures: Pictures) -> tuple[Tensor, Tensor]:
    """Instances as the bank stores them, background last, in the space in which it compares them.

    Returns:
        ``[C+1, N, D]``, and which of them exist, ``[C+1, N]`` bool.
    """
    bank = net.bank
    points = []
    exists = []
    for sample in pictures:
        features, cam = infer(net.cam, sample, args, Accelerator(cpu=True))
        out = bank(features, cam, sample.labels[None], store=False)

        # They are found by the map before it is raised to a power.
        maps = out.pacam[:, 1:] ** (1 / bank.exponent)
        empty = maps.amax(1, keepdim=True) < bank.background_threshold
        instances, found = masked_average_pooling(features, torch.cat([maps > bank.cam_threshold, empty], 1))
        points.append(to_space(instances[0] - bank.memory.mean, bank.memory.factor))
        exists.append(found[0])
    return torch.stack(points, 1), torch.stack(exists, 1)


@torch.no_grad()
def show_vpl(folder: Path) -> Shown:
    """Prototypes of text and of vision, and the features of the training pictures."""
    args = parse_vpl(["--config", str(folder / "config.json"), "--device", "cpu"])
    pictures = open_pictures(args.data, args.train_split, args)
    clip = open_clip_model(args, Accelerator(cpu=True))
    stored = load_checkpoint(folder / "checkpoint" / "prototypes.pt")

    seen = [clip.encode(clip.prepare(sample.image, args.size), pooling=args.pooling).pooled for sample in pictures]
    features = torch.cat(seen)
    labels = torch.stack([sample.labels for sample in pictures], 1)
    distances = {kind: 1 - stored[kind] @ features.T for kind in ("text", "vision")}

    near = {}
    for row, name in enumerate(pictures.classes[: ROWS - 1]):
        for kind, each in distances.items():
            images = [
                pictures[index].image if labels[row, index] else framed(pictures[index].image, WITHOUT)
                for index in nearest(each[row])
            ]
            near[f"{name}: the pictures nearest to its {kind} prototype"] = images

    heights = {"tagged": labels.sum(1).tolist()}
    heights |= {f"nearest by {kind}": counts(each) for kind, each in distances.items()}
    told = ", ".join(f"{kind} {cosine(stored[kind])}" for kind in distances)
    return Shown(
        from_tags(folder, args, pictures, {"text": "text", "vision": "vision"}),
        near,
        [Bars(f"pictures of each class (cosine: {told})", pictures.classes, heights)],
    )


def load_pgseg(folder: Path) -> tuple[PGSeg, PGSegOptions, Pictures]:
    """The network of a run, its flags, and the pictures that it was scored on."""
    args = parse_pgseg(["--config", str(folder / "config.json"), "--device", "cpu"])
    progress = read_json(folder / "checkpoint" / "progress.json")
    model = PGSeg(configure(args, tuple(progress["words"])))
    model.load_state_dict(load_checkpoint(folder / "checkpoint" / "train.pt")["model"])
    return model.eval(), args, open_pictures(args.eval_data or args.data, args.eval_split, args)


@torch.no_grad()
def show_pgseg(folder: Path) -> Shown:
    """Masks by name, prototypes that EM finds in each picture from one shared start, and how much each is used."""
    model, args, pictures = load_pgseg(folder)
    metrics = read_json(folder / "metrics.json")

    setting = Setting(pictures.classes, args.background, args.score)
    threshold = metrics["maps"]["eval"]["zeroshot"]["threshold"]
    made = {each.id: each for each in panels(model, pictures, setting, threshold, most=len(pictures))}
    scores = {name: each.score for name, each in made.items() if each.score is not None}
    examples = []
    for place, name in rank(scores).items():
        each = made[name]
        assert each.truth is not None
        found = segment(model, each.image, setting.names, background_names=setting.background, score="cosine")
        # Scores are (1 + cosine) / 2.
        layers = {"groups": each.panels["groups"], "cosine": 2 * found.scores.amax(0) - 1}
        layers |= {"mask": each.panels["mask"], "truth": each.truth}
        examples.append(Example(f"{place}: mean IoU {scores[name]:.2f}", each.image, layers))

    encoded, shares = patch_shares(model, args, pictures)
    owners = encoded.stages[0].grouping.soft.argmax(1)
    prototypes = usage_of(shares.argmax(-1), shares.shape[-1], "share of the patches, by their likeliest prototype")
    groups = usage_of(owners, encoded.groups.shape[1], "share of the patches, by their group")
    return Shown(examples, nearest_patches(shares, pictures, encoded.grid), [prototypes, groups])


@torch.no_grad()
def show_prototypes(folder: Path) -> dict[str, list[Tensor]]:
    """The patches nearest to the prototypes of a run of PGSeg."""
    model, args, pictures = load_pgseg(folder)
    encoded, shares = patch_shares(model, args, pictures)
    return nearest_patches(shares, pictures, encoded.grid)


def patch_shares(model: PGSeg, args: PGSegOptions, pictures: Pictures) -> tuple[Encoded, Tensor]:
    """What the network makes of all pictures, and the share ``[N, L, K]`` of each patch in the prototypes."""
    pixels = torch.cat([normalized(sample.image, (args.size, args.size)) for sample in pictures])
    encoded: Encoded = model.image(pixels)
    regularized = encoded.stages[0].regularized
    assert regularized is not None
    return encoded, regularized.responsibilities


def nearest_patches(shares: Tensor, pictures: Pictures, grid: tuple[int, int]) -> dict[str, list[Tensor]]:
    """The patches with the largest share in each prototype, of different pictures.

    Prototypes that have the same ones stand together.
    """
    largest, patch = shares.max(1)
    alike: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for row in range(shares.shape[-1]):
        places = tuple((index, int(patch[index, row])) for index in nearest(1 - largest[:, row]))
        alike.setdefault(places, []).append(str(row + 1))

    return {
        f"prototype {', '.join(names)}": [patch_of(pictures[index].image, place, grid) for index, place in places]
        for places, names in alike.items()
    }


def usage_of(choices: Tensor, count: int, title: str) -> Bars:
    """How often each of some numbers was chosen, as a share of all."""
    often = choices.flatten().bincount(minlength=count)
    return Bars(title, [str(row + 1) for row in range(count)], {title: (often / often.sum()).tolist()})


def patch_of(image: Tensor, index: int, grid: tuple[int, int]) -> Tensor:
    """A patch with one patch on each side; where there is none, with two on the other."""
    height, width = (side // cells for side, cells in zip(image.shape[-2:], grid, strict=True))
    row, column = divmod(index, grid[1])
    top = min(max(row - 1, 0), grid[0] - 3) * height
    left = min(max(column - 1, 0), grid[1] - 3) * width
    return image[:, top : top + 3 * height, left : left + 3 * width]


def collapse(runs: Mapping[str, Path]) -> list[Curves]:
    """How alike the prototypes of a picture are, and how many are in use, over the epochs of several runs."""
    panels = {
        "image 1 prototype cosine": "mean cosine of two prototypes",
        "image 1 prototypes in use": "prototypes in use, by their shares",
    }
    histories = {name: read_json(folder / "metrics.json")["history"] for name, folder in runs.items()}
    return [
        Curves(title, {name: [entry["prototypes"][key] for entry in each] for name, each in histories.items()})
        for key, title in panels.items()
    ]


def write_examples(examples: Sequence[Example], path: Path) -> None:
    """Best, median and worst picture, each in a row."""
    size = (CELL, CELL)
    rows = [
        [resized(each.image, size), *(resized(each.image, size, layer) for layer in each.layers.values())]
        for each in examples
    ]
    headings = ["image", *examples[0].layers]
    labels = [each.label for each in examples]
    sheet(rows, size, headings=headings, labels=labels).save(path, quality=85, optimize=True)


def write_nearest(found: Mapping[str, Sequence[Tensor]], path: Path) -> None:
    """The pictures nearest to each prototype, in rows."""
    size = (SMALL, SMALL)
    rows = [[resized(image, size) for image in images] for images in found.values()]
    sheet(rows, size, labels=list(found)).save(path, quality=85, optimize=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Write ``gallery-METHOD-examples.jpg``, ``-nearest.jpg`` and ``-usage.png``, and two more of PGSeg."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/gallery"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "_static")
    args = parser.parse_args(argv)

    for name, command in RUNS.items():
        make(args.runs / name, command)
    for method, show in {"cpal": show_cpal, "vpl": show_vpl, "pgseg": show_pgseg}.items():
        shown = show(args.runs / method)
        write_examples(shown.examples, args.output / f"gallery-{method}-examples.jpg")
        write_nearest(shown.nearest, args.output / f"gallery-{method}-nearest.jpg")
        write_bars(shown.usage, args.output / f"gallery-{method}-usage.png")

    # Prototypes of PGSeg that collapse, and that do not.
    runs = {name: args.runs / folder for name, folder in BANDWIDTHS.items()}
    write_curves(collapse(runs), args.output / "gallery-pgseg-collapse.png", "epoch")
    write_nearest(show_prototypes(args.runs / "pgseg-0.1"), args.output / "gallery-pgseg-apart.jpg")


if __name__ == "__main__":
    main()
