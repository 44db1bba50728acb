"""CPAL in one file: from pictures with image-level tags to masks, and to a segmentation network that needs no tags.

    python examples/cpal.py                                        # made scenes, about 5 minutes on one CPU core
    accelerate launch examples/cpal.py --data VOCdevkit/VOC2012    # photographs, on every device that there is

After Tang et al., "Hunting Attributes: Context Prototype-Aware Learning for Weakly Supervised Semantic Segmentation"
(arXiv 2403.07630). It prints the settings, the losses of each epoch, and the mIoU of the CAM, of the prototype-aware
map (PACAM), of the pseudo masks, which it writes to --output, and of the segmentation network.
"""

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from protoseg import ContextPrototypeBank
from protoseg.data import Sample, Scenes, VOCFolder, load_mask, save_mask
from protoseg.functional import multi_scale, otsu_threshold, pixel_adaptive_refine, to_mask
from protoseg.metrics import ConfusionMatrix, ThresholdSweep
from protoseg.models.cam import build_cam_network
from protoseg.models.segmentation import build_segmentation_network

LossesOf = Callable[[nn.Module, Tensor, Tensor, int], dict[str, Tensor]]  # of network, images, targets and epoch


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags; made scenes and photographs have defaults of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="scenes", help="'scenes', or a folder with the splits train and val")
    parser.add_argument("--scenes", type=int, default=600, help="made scenes to train on; a quarter more are held out")
    parser.add_argument("--output", type=Path, default=Path("runs/cpal-masks"), help="folder of the pseudo masks")
    parser.add_argument("--epochs", type=int, help="of the CAM network")
    parser.add_argument("--workers", type=int, default=0, help="processes that load pictures")
    parser.add_argument("--seed", type=int, default=0)

    if parser.parse_args(argv).data == "scenes":
        parser.set_defaults(backbone="small:32", weights=None, bank_features="last", score="whitened", lr=2e-3)
        parser.set_defaults(size=96, smallest_crop=0.5, scales=[1.0], weight=0.1, epochs=16, segmentation_epochs=5)
    else:
        parser.set_defaults(backbone="tf_efficientnet_lite0", weights="package:efficientnet-lite0", lr=3e-4)
        parser.set_defaults(bank_features="penultimate", score="diagonal", size=256, smallest_crop=0.3)
        parser.set_defaults(scales=[1.0, 1.75], weight=1.0, epochs=6, segmentation_epochs=10)
    return parser.parse_args(argv)


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Augmented crops with the picture's tags or, given a folder of masks, with the same crop of its mask."""

    def __init__(self, pictures: Scenes | VOCFolder, augment: v2.Transform, masks: Path | None = None) -> None:
        self.pictures = pictures
        self.augment = augment
        self.masks = masks

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sample = self.pictures[index]
        if self.masks is None:
            return self.augment(sample.image), sample.labels

        mask = load_mask(self.masks / f"{sample.id}.png", len(sample.labels))
        image, mask = self.augment(sample.image, tv_tensors.Mask(mask))
        return image, mask.long()


def train(
    network: nn.Module, crops: Crops, losses_of: LossesOf, epochs: int, args: argparse.Namespace, engine: Accelerator
) -> None:
    """Train a network by the sum of its losses, and print their means after each epoch."""
    loader = DataLoader(crops, batch_size=16, shuffle=True, drop_last=True, num_workers=args.workers)
    optimizer = torch.optim.AdamW(network.parameters(), args.lr, weight_decay=0.05)
    scheduler = OneCycleLR(optimizer, args.lr, total_steps=epochs * len(loader), pct_start=0.15, cycle_momentum=False)
    model, optimizer, loader, scheduler = engine.prepare(network, optimizer, loader, scheduler)

    for epoch in range(epochs):
        model.train()
        means: dict[str, float] = {}
        for images, targets in tqdm(loader, leave=False):
            losses = losses_of(model, images, targets, epoch)
            optimizer.zero_grad()
            engine.backward(sum(losses.values()))
            optimizer.step()
            scheduler.step()
            for name, loss in losses.items():
                means[name] = means.get(name, 0.0) + loss.item() / len(loader)
        engine.print(f"epoch {epoch + 1}/{epochs}:", ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
    network.eval()


def share(pictures: Scenes | VOCFolder, engine: Accelerator) -> Iterator[Sample]:
    """Give the pictures that this process looks at."""
    for index in tqdm(range(engine.process_index, len(pictures), engine.num_processes), leave=False):
        yield pictures[index]


def main(argv: Sequence[str] | None = None) -> None:
    """Go from pictures with tags to a segmentation network."""
    args = read_arguments(argv)
    engine = Accelerator()
    set_seed(args.seed)
    engine.print(vars(args))

    # 1. Data: pictures with tags. Their true masks are for scores only.
    if args.data == "scenes":
        training: Scenes | VOCFolder = Scenes(args.scenes, size=args.size)
        held_out: Scenes | VOCFolder = Scenes(args.scenes // 4, seed=1, size=args.size)
    else:
        training = VOCFolder(args.data, "train")
        held_out = VOCFolder(args.data, "val")

    # 2. Network: a classifier whose map comes with its prediction, and a bank of prototypes.
    num_classes = len(training.classes)
    network = build_cam_network(args.backbone, num_classes, weights=args.weights, bank_features=args.bank_features)
    bank = ContextPrototypeBank(num_classes, network.channels, score=args.score, device=engine.device)

    crop = v2.RandomResizedCrop(args.size, scale=(args.smallest_crop, 1.0))
    to_input = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(network.backbone.mean, network.backbone.std)]
    augment = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.ColorJitter(0.3, 0.3, 0.3), *to_input])
    whole = v2.Compose([v2.Resize(args.size), *to_input])

    # 3. Loop: the bank's loss counts in the last quarter. In the two epochs before that, the bank only fills.
    start = 3 * args.epochs // 4

    def classify(model: nn.Module, images: Tensor, labels: Tensor, epoch: int) -> dict[str, Tensor]:
        out = model(images)
        losses = {"classification": F.multilabel_soft_margin_loss(out.logits, labels)}
        if epoch >= start - 2:
            weight = args.weight * (epoch >= start)
            losses["bank"] = weight * bank(out.features, out.cam, labels).loss
        return losses

    train(network, Crops(training, augment), classify, args.epochs, args, engine)

    # 4. Maps: the bank is filled anew with what the trained network sees in whole pictures, and gives PACAM.
    @torch.no_grad()
    def see(sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
        image = whole(sample.image)[None].to(engine.device)
        features, cam = multi_scale(lambda images: network(images)[1:], image, scales=args.scales, multiple=32)
        return features, cam, sample.labels[None].to(engine.device)

    bank.eval()
    views = [see(sample) for sample in share(training, engine)]
    bank.fill(random.sample(views, len(training) // engine.num_processes))

    sweeps = {name: ThresholdSweep(num_classes) for name in ("train cam", "train pacam", "val cam", "val pacam")}
    for split, pictures in {"train": training, "val": held_out}.items():
        for sample in share(pictures, engine):
            out = bank(*see(sample))
            for name, maps in {"cam": out.cam, "pacam": out.pacam}.items():
                scores = F.interpolate(maps[:, 1:], sample.image.shape[-2:], mode="bilinear")[0]
                sweeps[f"{split} {name}"].update(scores, sample.labels, sample.mask)
    for name, sweep in sweeps.items():
        engine.print(f"{name}: mIoU {sweep.all_reduce().result().best.miou:.4f}")

    # 5. Masks: a threshold that needs no masks parts objects from background, and colors move the edges.
    threshold = otsu_threshold(sweeps["train pacam"].score_histogram)
    args.output.mkdir(parents=True, exist_ok=True)
    confusion = ConfusionMatrix(num_classes)
    for sample, view in zip(share(training, engine), views, strict=True):
        maps = F.interpolate(bank(*view).pacam[:, 1:], sample.image.shape[-2:], mode="bilinear")
        refined = pixel_adaptive_refine(maps, sample.image[None].to(engine.device))
        mask = to_mask(refined[0].cpu(), sample.labels, threshold)
        save_mask(args.output / f"{sample.id}.png", mask)
        if sample.mask is not None:
            confusion.update(mask, sample.mask)
    engine.wait_for_everyone()
    engine.print(f"train pseudo masks: mIoU {confusion.all_reduce().result().miou:.4f}")

    # 6. Segmentation: a network on the same backbone learns from the masks, and needs no tags.
    segmentation = build_segmentation_network("unet:backbone", num_classes + 1, backbone=network.backbone)

    def segment(model: nn.Module, images: Tensor, masks: Tensor, epoch: int) -> dict[str, Tensor]:
        return {"segmentation": F.cross_entropy(model(images), masks)}

    train(segmentation, Crops(training, augment, args.output), segment, args.segmentation_epochs, args, engine)

    confusion = ConfusionMatrix(num_classes)
    for sample in share(held_out, engine):
        image = whole(sample.image)[None].to(engine.device)
        with torch.no_grad():
            scores = multi_scale(lambda images: [segmentation(images).softmax(1)], image, multiple=32)[0]
        prediction = F.interpolate(scores, sample.image.shape[-2:], mode="bilinear")[0].argmax(0)
        if sample.mask is not None:
            confusion.update(prediction, sample.mask)
    engine.print(f"val segmentation: mIoU {confusion.all_reduce().result().miou:.4f}")


if __name__ == "__main__":
    main()
