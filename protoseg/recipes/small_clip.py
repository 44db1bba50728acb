"""The small CLIP of the recipe ``vpl``, where no weights can be had: open_clip's classes, trained in a minute."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.models import register_model
from torch import Tensor, nn
from tqdm import tqdm

from protoseg.clip import FrozenCLIP
from protoseg.data import ScenePairs, Scenes, VOCFolder
from protoseg.recipes.engine import learning_rate
from protoseg.recipes.files import load_checkpoint, save_checkpoint
from protoseg.recipes.pgseg_data import TagPairs, Views, loader_of
from protoseg.recipes.pictures import Shuffle
from protoseg.recipes.session import quiet
from protoseg.recipes.vpl_options import VPLOptions
from protoseg.utils.colors import IMAGENET_MEAN, IMAGENET_STD

CONTEXT = 32  # most tokens of a caption
FORM = 1  # to be raised with every change of network or training, so that no older file is taken


class SmallConv(nn.Module):
    """A convolutional network in the form of timm's, of stride 8, for pictures of 64 pixels.

    Patches by one convolution, as of a ViT, learn the textures of made scenes too slowly for minutes on a CPU.

    Args:
        num_classes: Outputs.
        width: Channels of the last stage.
    """

    def __init__(self, num_classes: int = 0, width: int = 96, **unused: Any) -> None:
        super().__init__()
        widths = (3, width // 4, width // 2, width)
        self.stages = nn.Sequential(*(_stage(*pair) for pair in itertools.pairwise(widths)))
        self.num_features, self.num_classes = width, num_classes
        self.feature_info = [{"num_chs": each, "reduction": 2 ** (place + 1)} for place, each in enumerate(widths[1:])]
        self.default_cfg = {"pool_size": (8, 8)}
        self.fc = nn.Linear(width, num_classes, bias=False)

    def forward_features(self, images: Tensor) -> Tensor:
        """Turn pictures into ``[B, width, H / 8, W / 8]``."""
        maps: Tensor = self.stages(images)
        return maps

    def forward_head(self, maps: Tensor) -> Tensor:
        """Average over places and project."""
        out: Tensor = self.fc(maps.mean((-2, -1)))
        return out

    def forward(self, images: Tensor) -> Tensor:
        """Turn pictures into embeddings."""
        return self.forward_head(self.forward_features(images))


def _stage(ins: int, outs: int) -> nn.Sequential:
    def unit(ins: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.GroupNorm(8, outs), nn.GELU()]

    return nn.Sequential(*unit(ins, 2), *unit(outs, 1))


@register_model
def protoseg_small_conv(pretrained: bool = False, **options: Any) -> SmallConv:
    """What timm, and through it open_clip, makes of the name."""
    return SmallConv(**{key: value for key, value in options.items() if key in ("num_classes", "width")})


def build() -> FrozenCLIP:
    """Make the model with random weights."""
    vision = {"timm_model_name": "protoseg_small_conv", "timm_pool": "avg", "timm_proj": "", "image_size": 64}
    text = {"context_length": CONTEXT, "width": 64, "heads": 2, "layers": 2}
    model = open_clip.CLIP(64, vision, text)
    return FrozenCLIP(model, open_clip.SimpleTokenizer(context_length=CONTEXT), mean=IMAGENET_MEAN, std=IMAGENET_STD)


def load(args: VPLOptions, accelerator: Accelerator) -> FrozenCLIP:
    """Read the model from the cache folder, or train it and keep it there.

    Args:
        args: The flags ``clip_data``, ``clip_scenes``, ``clip_steps``, ``clip_size``, ``cache``, ``seed`` and those
            of folders; everything that changes the weights is in the file's name.
        accelerator: The engine; its main process trains.

    Returns:
        The model.
    """
    settings = {"form": FORM, "data": args.clip_data, "seed": args.seed}
    settings |= {name: getattr(args, name) for name in ("clip_scenes", "clip_steps", "clip_size")}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(args.cache) / f"small-clip-{key}.pt"
    set_seed(args.seed)
    clip = build()
    if accelerator.is_main_process and not path.exists():
        train(clip.to(accelerator.device), open_pairs(args), args, accelerator)
        save_checkpoint(path, {"model": clip.model.state_dict(), "settings": settings})
    accelerator.wait_for_everyone()
    clip.model.load_state_dict(load_checkpoint(path)["model"])
    return clip.to(accelerator.device)


def open_pairs(args: VPLOptions) -> Views:
    """Open the pictures with captions: made scenes, and folders whose tags make a sentence.

    Each source is repeated until it is about as large as the largest. Scenes are seen whole; where there are
    photographs as well, a view is at least half of a picture.
    """
    sources: list[Any] = []
    for name in args.clip_data:
        if name == "scenes":
            sources.append(ScenePairs(Scenes(args.clip_scenes, seed=0, size=args.clip_size)))
        else:
            sources.append(TagPairs(VOCFolder(name, "train", tags=args.tags, masks="none")))
    loaded = [[source[index] for index in range(len(source))] for source in sources]
    largest = max(map(len, loaded))
    pairs = [pair for part in loaded for pair in part * (largest // len(part))]
    return Views(pairs, args.clip_size, 1.0 if args.clip_data == ["scenes"] else 0.5, args.seed)


def train(clip: FrozenCLIP, views: Views, args: VPLOptions, accelerator: Accelerator) -> None:
    """Train by CLIP's own contrast of a batch's pictures and captions, in place.

    Captions that a batch has several times are no negatives of each other's pictures.
    """
    model: Any = clip.model
    model.requires_grad_(True)

    # 49408 words of which some dozens occur: their random vectors do, and no step goes through all of them.
    model.token_embedding.requires_grad_(False)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, 2e-3, betas=(0.9, 0.95), weight_decay=0.1)

    shuffle, step = Shuffle(len(views), args.seed), 0
    loader = loader_of(views, 64, args.workers, shuffle)
    bar = tqdm(total=args.clip_steps, desc="small CLIP", disable=quiet(accelerator), leave=False)
    while step < args.clip_steps:
        for images, captions in loader:
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * learning_rate(step, args.clip_steps, 0.05)
            loss = contrast(model, images.to(accelerator.device), captions, clip.tokenizer)
            optimizer.zero_grad()
            accelerator.backward(loss)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()

            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            step += 1
            bar.update()
            if step == args.clip_steps:
                break
        shuffle.epoch = views.epoch = shuffle.epoch + 1

    bar.close()
    model.requires_grad_(False).eval()


def contrast(model: Any, images: Tensor, captions: Sequence[str], tokenizer: Any) -> Tensor:
    """CLIP's loss: each picture's caption among those of the batch, and each caption's picture."""
    unique = {caption: place for place, caption in enumerate(dict.fromkeys(captions))}
    own = torch.tensor([unique[caption] for caption in captions], device=images.device)
    texts = model.encode_text(tokenizer(list(unique)).to(images.device), normalize=True)[own]
    logits = model.logit_scale.exp() * model.encode_image(images, normalize=True) @ texts.T
    same = (own[:, None] == own) & ~torch.eye(len(own), dtype=torch.bool, device=own.device)
    logits, wanted = logits.masked_fill(same, -torch.inf), torch.arange(len(own), device=own.device)
    return (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2
