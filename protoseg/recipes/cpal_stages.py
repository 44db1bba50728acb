"""The stages of the recipe ``cpal`` after training: seeds, pseudo masks, scores and the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from protoseg import ContextPrototypeBank
from protoseg.data import Sample
from protoseg.functional import max_normalize, multi_scale, prototype_cam
from protoseg.metrics import ConfusionMatrix
from protoseg.recipes.cpal_heads import Head, colors, reader
from protoseg.recipes.cpal_options import CPALOptions
from protoseg.recipes.pictures import Pictures, scaled_image, seeded
from protoseg.recipes.pseudo_masks import Scores, enlarge, named, score_maps
from protoseg.recipes.session import quiet, share
from protoseg.utils.colors import IMAGENET_MEAN, IMAGENET_STD, Color

MAPS = ("cam", "instance", "pacam")
KEPT = 2**30  # bytes of features and CAM that a process keeps while it fills the bank, and until it makes the maps
SIDE = 32  # what the sides of a segmentation network's pictures must be multiples of


class Network(NamedTuple):
    """A network with CAM and its bank."""

    cam: Head
    bank: ContextPrototypeBank


def infer(network: Head, sample: Sample, args: CPALOptions, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Features ``[1, D, h, w]`` and raw CAM ``[1, C, h, w]``, over scales and mirrored: the same for every map."""
    multiple = network.backbone.multiple
    mean, std = colors(network)
    image = scaled_image(sample.image, args.size, multiple, mean, std).to(accelerator.device)

    labels = sample.labels[None].to(accelerator.device)
    run = reader(network, labels, args.affinity)
    features, cam = multi_scale(run, image, scales=args.scales, multiple=multiple)
    return features, cam


def picture_maps(
    bank: ContextPrototypeBank, features: Tensor, cam: Tensor, labels: Tensor, names: Sequence[str]
) -> dict[str, Tensor]:
    """Those of the three maps ``[C, h, w]`` of one picture that are named, in 0..1, absent classes 0."""
    out = bank(features, cam, labels, store=False)
    # As in SIPE: every pixel against the picture's own prototype of the class.
    instance = max_normalize(prototype_cam(features, out.instances.unsqueeze(2))) * labels[:, :, None, None]
    maps = {"cam": out.cam[0, 1:], "instance": instance[0], "pacam": out.pacam[0, 1:]}
    return {name: maps[name] for name in names}


class Views:
    """What the network sees in the pictures of this process, as batches of one, to be read more than once.

    The first of them are kept in memory, the others computed anew each time. Every process gives equally many: one
    without a picture left gives one of another process without its tags.

    Args:
        network: What sees them.
        pictures: All of them.
        args: The flags.
        accelerator: The engine.

    Attributes:
        known: Features and CAM by the names of the pictures that are kept.
    """

    def __init__(self, network: Head, pictures: Pictures, args: CPALOptions, accelerator: Accelerator) -> None:
        self.network, self.pictures, self.args, self.accelerator = network, pictures, args, accelerator
        self.known: dict[str, tuple[Tensor, Tensor]] = {}
        self.room = KEPT

    def see(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Features ``[1, D, h, w]`` and raw CAM ``[1, C, h, w]``."""
        if sample.id in self.known:
            return self.known[sample.id]
        seen = infer(self.network, sample, self.args, self.accelerator)
        self.room -= sum(each.nbytes for each in seen)
        if self.room >= 0:
            self.known[sample.id] = seen
        return seen

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        world = self.accelerator.num_processes
        # A ring keeps the last pictures of a class: those shall not be the last by name.
        order = torch.randperm(len(self.pictures), generator=seeded(self.args.seed)).tolist()
        steps = range(0, len(order), world)
        for first in tqdm(steps, "fill bank", disable=quiet(self.accelerator), leave=False):
            index = first + self.accelerator.process_index
            sample = self.pictures[order[min(index, len(order) - 1)]]
            labels = sample.labels * (index < len(order))
            yield *self.see(sample), labels[None].to(self.accelerator.device)


@torch.no_grad()
def seeds(net: Network, splits: Mapping[str, Pictures], args: CPALOptions, accelerator: Accelerator) -> Scores:
    """Write each training picture's maps of ``--maps`` and score them at every threshold, in one pass over a split."""
    net.cam.eval()
    views = Views(net.cam, splits["train"], args, accelerator)
    if "pacam" in args.maps:  # the others need no memory
        net.bank.eval().fill(views, rounds=args.bank_rounds)

    def maps_of(sample: Sample) -> tuple[dict[str, Tensor], Tensor]:
        features, cam = views.see(sample)
        views.known.pop(sample.id, None)  # what is no longer needed
        maps = picture_maps(net.bank, features, cam, sample.labels[None].to(features.device), args.maps)
        return maps, features[0]

    return score_maps(splits, maps_of, args.maps, args, accelerator)


@torch.no_grad()
def score_segmentation(
    model: nn.Module,
    test: Pictures,
    args: CPALOptions,
    accelerator: Accelerator,
    mean: Color = IMAGENET_MEAN,
    std: Color = IMAGENET_STD,
) -> dict[str, Any]:
    """Scores of a segmentation network, with mirrored pictures and without tags; and of background everywhere."""
    model.eval()
    confusion, floor = ConfusionMatrix(len(test.classes)), ConfusionMatrix(len(test.classes))
    for index in share(len(test), "score", accelerator):
        sample = test[index]
        if sample.mask is None:
            continue
        image = scaled_image(sample.image, args.size, SIDE, mean, std).to(accelerator.device)
        (logits,) = multi_scale(lambda images: (model(images).float().softmax(1),), image, multiple=SIDE)
        confusion.update(enlarge(logits[0], sample.image).argmax(0).cpu(), sample.mask)
        floor.update(torch.zeros_like(sample.mask), sample.mask)
    return {**named(confusion.all_reduce(), test.classes), "all_background": floor.all_reduce().result().miou}
