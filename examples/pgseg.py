"""PGSeg: masks for classes that are given by name, learnt from pictures with captions by groups and prototypes.

    python examples/pgseg.py                                         # made scenes: about 3 minutes on one CPU core
    python examples/pgseg.py --data pairs.csv --eval-data VOC2012    # your captions, and masks to score with
    accelerate launch examples/pgseg.py                              # several processes

After "Uncovering Prototypical Knowledge for Weakly Open-Vocabulary Semantic Segmentation" (NeurIPS 2023,
https://arxiv.org/abs/2310.19001). The network gathers the patches of a picture in groups, and learns from a contrast
of pictures and captions. Inside it GMMPrototypeRegularizer finds prototypes of the patches, and of the caption's
words, by a Gaussian mixture, and pulls each group to the prototype that it is matched with.

A CSV has the columns path and caption; the folder to score with has the layout of PASCAL VOC. "--preset vit-s" is the
paper's network, which wants millions of pairs, --epochs 30 --batch 256 --lr 1e-4 and --smallest-crop 0.08.

Prints the losses of each epoch, and the mIoU of masks of pictures that the network has not seen. These masks and the
weights go to --output.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from protoseg.data import CsvPairs, Pair, Sample, ScenePairs, Scenes, VOCFolder, save_mask
from protoseg.metrics import ConfusionMatrix, ThresholdSweep
from protoseg.models.pgseg.network import PRESETS, PGSeg
from protoseg.models.pgseg.text import vocabulary
from protoseg.models.pgseg.zeroshot import Score
from protoseg.utils.colors import IMAGENET_MEAN, IMAGENET_STD

EVAL_SCENES = 300
Pictures = Scenes | VOCFolder


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags; the defaults suit made scenes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="scenes", help="'scenes' or a CSV of pictures and captions")
    add("--eval-data", help="VOC-layout folder with masks: train chooses the threshold, val is scored")
    add("--preset", choices=tuple(PRESETS), default="tiny", help="sizes of the network")
    add("--scenes", type=int, default=8000, help="made scenes to train on")
    add("--smallest-crop", type=float, default=1.0, help="smallest share of a picture's area in a training crop")
    add("--epochs", type=int, default=6)
    add("--batch", type=int, default=32, help="pairs in a step of each process")
    add("--lr", type=float, default=1e-3)
    add("--weight-image", type=float, default=0.1, help="of the prototypes of patches")
    add("--weight-text", type=float, default=0.01, help="of the prototypes of words")
    add("--output", type=Path, default=Path("runs/pgseg"))
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.data != "scenes" and args.eval_data is None:
        parser.error("--data: a CSV has no masks to score with; name a folder by --eval-data")
    return args


class Views(Dataset[tuple[Tensor, str]]):
    """Random views of pictures, with their captions."""

    def __init__(self, pairs: Sequence[Pair] | CsvPairs, side: int, smallest_crop: float) -> None:
        self.pairs = pairs
        crop = v2.RandomResizedCrop(side, scale=(smallest_crop, 1.0))
        scale = v2.ToDtype(torch.float32, scale=True)
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip(), scale, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        pair = self.pairs[index]
        return self.transform(pair.image), pair.caption


def open_pairs(args: argparse.Namespace, side: int) -> tuple[Sequence[Pair] | CsvPairs, tuple[str, ...]]:
    """Open the pairs to train on, and find the words that name what they show."""
    if args.data != "scenes":
        listed = CsvPairs(args.data)
        captions = (listed[index].caption for index in range(len(listed)))
        return listed, vocabulary(captions, least=2)

    # Scenes are drawn anew at each access: keep them. Their adjectives name no thing, and are left out.
    scenes = Scenes(args.scenes, size=side)
    drawn = ScenePairs(scenes)
    kept = [drawn[index] for index in tqdm(range(len(drawn)), desc="scenes", leave=False)]
    nouns = {*scenes.classes, *(scenes.home(label) for label in range(1, 1 + len(scenes.classes)))}
    return kept, tuple(word for word in vocabulary(pair.caption for pair in kept) if word in nouns)


def train(model: PGSeg, views: Views, args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Train by the contrast of pictures and captions, that of single nouns, and the prototypes."""
    loader = DataLoader(views, args.batch, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05)
    scheduler = OneCycleLR(optimizer, args.lr, args.epochs * len(loader), pct_start=0.06, cycle_momentum=False)
    network, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    for epoch in range(1, args.epochs + 1):
        network.train()
        sums = torch.zeros(4, device=accelerator.device)
        for images, captions in tqdm(loader, desc=f"epoch {epoch}", leave=False):
            out = network(images, model.text.tokenize(captions).to(accelerator.device))
            image = args.weight_image * out.image_prototypes
            text = args.weight_text * out.text_prototypes
            losses = torch.stack([out.contrast, out.nouns, image, text])

            accelerator.backward(losses.sum())
            accelerator.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            sums += losses.detach()

        names = ("contrast", "nouns", "prototypes of patches", "prototypes of words")
        means = (sums / len(loader)).tolist()
        told = ", ".join(f"{name} {mean:.4f}" for name, mean in zip(names, means, strict=True))
        accelerator.print(f"epoch {epoch}: loss {sum(means):.4f} ({told})")


def open_pictures(args: argparse.Namespace, side: int) -> tuple[Pictures, Pictures]:
    """Open the pictures that the threshold is chosen on, and those that are scored."""
    if args.eval_data is not None:
        return VOCFolder(args.eval_data, "train"), VOCFolder(args.eval_data, "val")
    return Scenes(EVAL_SCENES, seed=2, size=side), Scenes(EVAL_SCENES, seed=1, size=side)


def own_share(pictures: Pictures, accelerator: Accelerator) -> Iterator[Sample]:
    """Give each process pictures of its own."""
    indices = range(accelerator.process_index, len(pictures), accelerator.num_processes)
    for index in tqdm(indices, desc="masks", leave=False):
        yield pictures[index]


def choose_threshold(model: PGSeg, pictures: Pictures, score: Score, accelerator: Accelerator) -> float:
    """Find the score below which a pixel is best taken for background; no tag is used."""
    sweep = ThresholdSweep(len(pictures.classes))
    every = torch.ones(len(pictures.classes))
    for sample in own_share(pictures, accelerator):
        found = model.segment(sample.image, pictures.classes, score=score)
        sweep.update(found.scores.cpu(), every, sample.mask)
    return sweep.all_reduce().result().best.threshold


def main(argv: Sequence[str] | None = None) -> None:
    """Train the network, then segment pictures by the names of their classes."""
    args = parse(argv)
    accelerator = Accelerator()
    set_seed(args.seed)

    # 1. Pairs of pictures and captions, seen in random views.
    config = PRESETS[args.preset]
    side = config.image.image_size
    pairs, words = open_pairs(args, side)
    views = Views(pairs, side, args.smallest_crop)

    # 2. The network. The tiny one reads a caption as a bag of words, and contrasts its nouns one by one.
    if config.text == "words":
        config = dataclasses.replace(config, vocabulary=words, nouns=words)
    model = PGSeg(config)

    # 3. Training, with the prototypes as regularizers of patches and of words.
    train(model, views, args, accelerator)
    model.eval()

    # 4. The threshold of background, chosen on other pictures than those that are scored.
    tuning, held_out = open_pictures(args, side)
    score: Score = "cosine" if args.preset == "tiny" else "softmax"
    threshold = choose_threshold(model, tuning, score, accelerator)

    # 5. Zero-shot masks: the names of the classes are all that the network is told.
    folder = args.output / "masks"
    folder.mkdir(parents=True, exist_ok=True)
    confusion = ConfusionMatrix(len(held_out.classes))
    for sample in own_share(held_out, accelerator):
        found = model.segment(sample.image, held_out.classes, background_threshold=threshold, score=score)
        save_mask(folder / f"{sample.id}.png", found.mask)
        if sample.mask is not None:
            confusion.update(found.mask.cpu(), sample.mask)

    miou = confusion.all_reduce().result().miou
    accelerator.print(f"held-out pictures: mIoU {miou:.4f} at threshold {threshold}")
    accelerator.save(model.state_dict(), args.output / "pgseg.pt")


if __name__ == "__main__":
    main()
