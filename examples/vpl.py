"""VPL: masks from image-level tags, by a frozen CLIP and class prototypes that are learnt in its vision space.

    python examples/vpl.py                                # made scenes: about 4 minutes on one CPU core
    python examples/vpl.py --data VOC2012 --size 288      # photographs, with a model that pip installs, or --clip
    accelerate launch examples/vpl.py                     # several processes

After "Toward Modality Gap: Vision Prototype Learning for Weakly-supervised Semantic Segmentation with CLIP" (arXiv
2412.19650). For scenes, a small CLIP is trained first. It prints the mIoU of maps, masks and a decoder told no tags.
"""

import argparse
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import open_clip
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from einops import rearrange
from timm.layers.norm_act import GroupNormAct
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from protoseg import RegionalSemanticContrast, VisionPrototypeLearner
from protoseg.clip import BACKGROUND, FrozenCLIP, segment
from protoseg.data import Sample, ScenePairs, Scenes, VOCFolder, load_mask, save_mask
from protoseg.functional import otsu_threshold, pixel_adaptive_refine, to_mask
from protoseg.metrics import ConfusionMatrix, ThresholdSweep
from protoseg.models.decoder import FrozenDecoder, affinity_loss, balanced_cross_entropy
from protoseg.models.pgseg.network import image_text_contrast


def train(model: nn.Module, loader: Any, epochs: int, loss_of: Callable[..., Tensor], accelerator: Accelerator) -> None:
    """Train a network by AdamW, at a rate that rises for a few steps and then falls by a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = OneCycleLR(optimizer, 2e-3, epochs * len(loader), pct_start=0.07, cycle_momentum=False)
    network, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for epoch in range(1, epochs + 1):
        total = 0.0
        for batch in tqdm(loader, desc=f"epoch {epoch}", leave=False):
            loss = loss_of(network, *batch)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total += loss.item()
        accelerator.print(f"{type(model).__name__}, epoch {epoch}: loss {total / len(loader):.4f}")


def train_clip(scenes: int, accelerator: Accelerator) -> FrozenCLIP:
    """Train a small CLIP from scratch on made scenes with captions."""
    # open_clip's model, but with plain convolutions, as patches of a transformer learn textures too slowly.
    blocks = (ByoBlockCfg("basic", d=1, c=48), ByoBlockCfg("basic", d=1, c=96))
    norm: Any = partial(GroupNormAct, num_groups=8)
    sizes = ByoModelCfg(blocks, downsample="", stem_chs=24, stem_pool="", norm_layer=norm, act_layer="gelu")
    model = open_clip.CLIP(64, {"layers": 0}, {"context_length": 32, "width": 64, "heads": 2, "layers": 2})
    model.visual = nn.Sequential(OrderedDict(trunk=ByobNet(sizes, num_classes=0), head=nn.Linear(96, 64, bias=False)))
    tokenizer = open_clip.SimpleTokenizer(context_length=32)
    normalize = v2.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)

    # Scenes are drawn anew at each access: keep them.
    pairs: Any = list(tqdm(ScenePairs(Scenes(scenes, size=64), transform=lambda pair: (pair.image, pair.caption))))

    def contrast(network: nn.Module, images: Tensor, captions: Sequence[str]) -> Tensor:
        pictures, sentences, scale = network(normalize(images / 255), tokenizer(captions).to(images.device))

        # Equal captions are no negatives of each other's pictures.
        same = torch.tensor([crc32(caption.encode()) for caption in captions], device=images.device)
        return image_text_contrast(pictures, sentences, scale, same)

    train(model, DataLoader(pairs, 64, shuffle=True, drop_last=True), 5, contrast, accelerator)
    return FrozenCLIP(model, tokenizer)


def main(argv: Sequence[str] | None = None) -> None:
    """Learn prototypes, make masks with them, and train a decoder on the masks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="VOC-layout folder with the splits train and val (default: made scenes)")
    parser.add_argument("--clip", default="pocket", help="with --data: pocket, or open_clip's name such as ViT-B-16")
    parser.add_argument("--pretrained", help="open_clip's tag of its weights")
    parser.add_argument("--attentions", type=int, default=0, help="blocks whose attention spreads maps, 8 in CLIP-ES")
    parser.add_argument("--size", type=int, default=64, help="shorter side of pictures, and side of crops, in pixels")
    parser.add_argument("--scenes", type=int, default=600, help="to train on; half as many are held out")
    parser.add_argument("--clip-scenes", type=int, default=8000, help="that the small CLIP is trained on")
    parser.add_argument("--epochs", type=int, default=8, help="of the decoder")
    parser.add_argument("--output", type=Path, default=Path("runs/vpl"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    accelerator = Accelerator()
    set_seed(args.seed)

    # 1. Pictures with tags, a frozen CLIP, and names of what else the pictures show.
    if args.data is None:
        pictures: Any = {"tagged": Scenes(args.scenes, size=64), "held-out": Scenes(args.scenes // 2, seed=1, size=64)}
        around = [pictures["tagged"].home(label) for label in range(1, 1 + len(pictures["tagged"].classes))]
        clip = train_clip(args.clip_scenes, accelerator)
    else:
        pictures = {"tagged": VOCFolder(args.data, "train"), "held-out": VOCFolder(args.data, "val")}
        around = [name for name in BACKGROUND if name not in pictures["tagged"].classes]
        if args.clip == "pocket":
            clip = FrozenCLIP.pocket(device=accelerator.device)
        else:
            clip = FrozenCLIP.load(args.clip, args.pretrained, device=accelerator.device)

    def own_share(split: str) -> Iterator[Sample]:
        """Give each process pictures of its own."""
        indices = range(accelerator.process_index, len(pictures[split]), accelerator.num_processes)
        for index in tqdm(indices, desc=split, leave=False):
            yield pictures[split][index]

    # 2. Text prototypes of classes and of background; vision prototypes of classes, from embeddings and tags.
    text = clip.text_prototypes(pictures["tagged"].classes, ["a photo of a {}"])
    background = clip.text_prototypes(around, ["a photo of a {}"])
    embeddings = []
    tags = []
    for sample in own_share("tagged"):
        pixels = clip.prepare(sample.image, args.size)
        embeddings.append(clip.encode(pixels, pooling="patches").pooled)
        tags.append(sample.labels)
    learner = VisionPrototypeLearner(text, text_temperature=clip.temperature, vision_temperature=2 * clip.temperature)
    vision = learner.fit(torch.cat(embeddings), torch.stack(tags)).prototypes.detach()

    # 3. Grad-CAM maps of the classes in a picture; refined ones are spread by affinity and by the picture's colors.
    def maps_of(sample: Sample) -> dict[str, Tensor]:
        find = partial(segment, clip, sample.image, background=background, labels=sample.labels, short_side=args.size)
        spread = find(vision, attentions=args.attentions).maps
        refined = pixel_adaptive_refine(spread[None], sample.image[None].to(spread.device))[0].cpu()
        return {"text": find(text, attentions=0).maps, "vision": find(vision, attentions=0).maps, "refined": refined}

    for split in ("held-out", "tagged"):
        sweeps = {kind: ThresholdSweep(len(text)) for kind in ("text", "vision", "refined")}
        for sample in own_share(split):
            for kind, maps in maps_of(sample).items():
                sweeps[kind].update(maps, sample.labels, sample.mask)
        told = ", ".join(f"{kind} {sweep.all_reduce().result().best.miou:.4f}" for kind, sweep in sweeps.items())
        accelerator.print(f"maps of {split} pictures, mIoU at the best threshold: {told}")

    # 4. Masks of the tagged pictures: refined maps, cut at Otsu's threshold, which needs no true mask.
    threshold = otsu_threshold(sweeps["refined"].score_histogram)
    accelerator.print(f"masks of tagged pictures: mIoU {sweeps['refined'].result().at(threshold).miou:.4f}")
    args.output.mkdir(parents=True, exist_ok=True)
    for sample in own_share("tagged"):
        save_mask(args.output / f"{sample.id}.png", to_mask(maps_of(sample)["refined"], sample.labels, threshold))
    accelerator.wait_for_everyone()

    # 5. A decoder on the frozen features of the last blocks, trained on random crops of pictures and masks.
    crop = v2.RandomResizedCrop(args.size, scale=(0.5, 1.0))
    color = v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3)
    scale = v2.ToDtype(torch.float32, scale=True)
    augment = v2.Compose([crop, v2.RandomHorizontalFlip(), color, scale, v2.Normalize(clip.mean, clip.std)])

    def crops(samples: list[Sample]) -> Any:
        triples = []
        for sample in samples:
            mask = load_mask(args.output / f"{sample.id}.png", len(text))
            triples.append(augment((tv_tensors.Image(sample.image), tv_tensors.Mask(mask), sample.labels)))
        return default_collate(triples)

    layers = list(range(-min(4, clip.blocks), 0))
    seen = clip.encode(clip.prepare(pictures["tagged"][0].image, args.size), layers=layers)
    decoder = FrozenDecoder([each.shape[1] for each in seen.layers], len(text), text.shape[1], dim=64, depth=2, heads=2)
    contrast = RegionalSemanticContrast()

    def decoder_loss(network: nn.Module, images: Tensor, masks: Tensor, labels: Tensor) -> Any:
        out = network(clip.encode(images, layers=layers).layers)
        logits = F.interpolate(out.logits, masks.shape[-2:], mode="bilinear")
        grid = F.interpolate(masks[:, None].float(), out.logits.shape[-2:], mode="nearest-exact")[:, 0].long()

        # Regions of present classes are those of the masks, of absent ones what the decoder takes for them.
        found = rearrange(F.one_hot(grid, 1 + len(text)), "b h w c -> b c h w")[:, 1:]
        absent = rearrange(labels == 0, "b c -> b c 1 1")
        regions = torch.where(absent, out.logits.softmax(1)[:, 1:], found.float())
        regional = 0.1 * contrast(out.features, regions, vision, labels, background).loss
        return balanced_cross_entropy(logits, masks) + 0.1 * affinity_loss(out.affinity, grid) + regional

    loader = DataLoader(pictures["tagged"], 16, shuffle=True, drop_last=True, collate_fn=crops)
    train(decoder, loader, args.epochs, decoder_loss, accelerator)

    # 6. Masks of held-out pictures, whose tags are not used.
    confusion = ConfusionMatrix(len(text))
    for sample in own_share("held-out"):
        features = clip.encode(clip.prepare(sample.image, args.size), layers=layers).layers
        logits = F.interpolate(decoder(features).logits, sample.image.shape[-2:], mode="bilinear")
        if sample.mask is not None:
            confusion.update(logits[0].argmax(0).cpu(), sample.mask)
    accelerator.print(f"decoder on held-out pictures: mIoU {confusion.all_reduce().result().miou:.4f}")


if __name__ == "__main__":
    main()
