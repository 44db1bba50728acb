"""The stages of ``train_cpal.py`` after training: seeds, pseudo masks, scores and the report."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from common import Pictures, scaled_image
from cpal_heads import Head, reader
from pseudo_masks import enlarge, named, score_maps, shard
from torch import Tensor, nn
from tqdm import tqdm

from protoseg import ContextPrototypeBank
from protoseg.cam import multi_scale, normalize
from protoseg.data import Sample
from protoseg.functional import prototype_cam
from protoseg.metrics import ConfusionMatrix

MAPS = ("cam", "instance", "pacam")
KEPT = 2**30  # bytes of features and CAM that a process keeps from filling the bank until it makes the maps
SIDE = 32  # what the sides of a segmentation network's pictures must be multiples of


class Network(NamedTuple):
    """A network with CAM and its bank."""

    cam: Head
    bank: ContextPrototypeBank


def infer(net: Network, sample: Sample, args: argparse.Namespace, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Features ``[1, D, h, w]`` and raw CAM ``[1, C, h, w]``, over scales and mirrored: the same for every map."""
    image = scaled_image(sample.image, args.size).to(accelerator.device)

    labels = sample.labels[None].to(accelerator.device)
    features, cam = multi_scale(reader(net.cam, labels, args.affinity), image, scales=args.scales)
    return features, cam


def picture_maps(
    bank: ContextPrototypeBank, features: Tensor, cam: Tensor, labels: Tensor, names: Sequence[str]
) -> dict[str, Tensor]:
    """Those of the three maps ``[C, h, w]`` of one picture that are named, in 0..1, absent classes 0."""
    out = bank(features, cam, labels)
    # As in SIPE: every pixel against the picture's own prototype of the class.
    instance = normalize(prototype_cam(features, out.instances.unsqueeze(2))) * labels[:, :, None, None]
    maps = {"cam": out.cam[0, 1:], "instance": instance[0], "pacam": out.pacam[0, 1:]}
    return {name: maps[name] for name in names}


@torch.no_grad()
def fill(
    net: Network, pictures: Pictures, args: argparse.Namespace, accelerator: Accelerator
) -> dict[str, tuple[Tensor, Tensor]]:
    """Fill the bank anew with the instances that the final network sees in the training pictures, and cluster it.

    Returns what this process saw in its first pictures by their names, so that they need not be run again.
    """
    known, room = {}, KEPT
    net.bank.reset_parameters()
    net.bank.train()
    world, main = accelerator.num_processes, accelerator.is_main_process
    for first in tqdm(range(0, len(pictures), world), "fill bank", disable=not main, leave=False):
        index = first + accelerator.process_index
        sample = pictures[min(index, len(pictures) - 1)]
        # Every process must call the bank equally often: one without a picture left brings no label.
        labels = sample.labels * (index < len(pictures))
        seen = infer(net, sample, args, accelerator)
        net.bank(*seen, labels[None].to(accelerator.device))
        room -= sum(each.nbytes for each in seen)
        if room >= 0 and index < len(pictures):
            known[sample.id] = seen
    net.bank.refresh()
    net.bank.eval()
    return known


@torch.no_grad()
def seeds(
    net: Network, splits: Mapping[str, Pictures], args: argparse.Namespace, accelerator: Accelerator
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write each training picture's maps of ``--maps`` and score them at every threshold, in one pass over a split."""
    net.cam.eval()
    net.bank.eval()
    # Only "pacam" needs the memory.
    known = fill(net, splits["train"], args, accelerator) if "pacam" in args.maps else {}

    def maps_of(sample: Sample) -> dict[str, Tensor]:
        features, cam = known.pop(sample.id) if sample.id in known else infer(net, sample, args, accelerator)
        return picture_maps(net.bank, features, cam, sample.labels[None].to(features.device), args.maps)

    return score_maps(splits, maps_of, args.maps, args, accelerator)


@torch.no_grad()
def score_segmentation(
    model: nn.Module, test: Pictures, args: argparse.Namespace, accelerator: Accelerator
) -> dict[str, Any]:
    """Scores of a segmentation network, with mirrored pictures and without tags; and of background everywhere."""
    model.eval()
    confusion, floor = ConfusionMatrix(len(test.classes)), ConfusionMatrix(len(test.classes))
    for index in tqdm(shard(len(test), accelerator), "score", disable=not accelerator.is_main_process, leave=False):
        sample = test[index]
        if sample.mask is None:
            continue
        image = scaled_image(sample.image, args.size, multiple=SIDE).to(accelerator.device)
        (logits,) = multi_scale(lambda images: (model(images).float().softmax(1),), image, multiple=SIDE)
        confusion.update(enlarge(logits[0], sample.image).argmax(0).cpu(), sample.mask)
        floor.update(torch.zeros_like(sample.mask), sample.mask)
    return {**named(confusion.all_reduce(), test.classes), "all_background": floor.all_reduce().result().miou}
