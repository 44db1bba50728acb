"""Small networks with the layer names, shapes and habits of the code bases that docs/plug-in.md is about.

With the published numbers of classes and channels where a recipe names them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C, D = 4, 8


def trunk(inputs: int = 3, outputs: int = D) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU(inplace=True))


class Staged(nn.Module):
    """As AMN and SIPE: stages that are registered twice, and a ``train()`` that only freezes the first layers."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__()
        self.classes = classes
        self.stage1, self.stage2, self.stage3 = trunk(), trunk(D), trunk(D)
        self.stage4 = nn.Sequential(trunk(D, dim))
        self.backbone = nn.ModuleList([self.stage1, self.stage2, self.stage3, self.stage4])

    def stages(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(x)).detach()
        out: Tensor = self.stage4(self.stage3(x))
        return out

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        self.stage1.requires_grad_(False)


class AMNFirst(Staged):
    """AMN's CAM network: the classifier sees pooled features only."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__(classes, dim)
        self.classifier = nn.Conv2d(dim, classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.stages(x).mean((-2, -1), keepdim=True))
        return out.view(-1, self.classes)


class AMN(Staged):
    """AMN's activation network: features that the tags condition, background in front."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__(classes, dim)
        self.label_enc = nn.Linear(classes, dim)
        self.classifier = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(dim, classes + 1, 3, padding=1))

    def forward(self, img: Tensor, label_cls: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.stages(img) * self.label_enc(label_cls)[..., None, None])
        return out


class SIPE(Staged):
    """SIPE: a map for every pixel, and one normalized with background in front in a dict."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__(classes, dim)
        self.classifier = nn.Conv2d(dim, classes, 1, bias=False)
        self.side4 = nn.Conv2d(dim, D, 1, bias=False)

    def forward(self, x: Tensor, valid_mask: Tensor) -> dict[str, Tensor]:
        features = self.stages(x)
        cam = self.classifier(features)
        shown = F.relu(cam) / (F.adaptive_max_pool2d(F.relu(cam), 1) + 1e-5)
        shown = torch.cat([1 - shown.amax(1, keepdim=True), shown], 1) * valid_mask
        return {"score": cam.mean((-2, -1), keepdim=True), "cam": shown, "fea": self.side4(features.detach())}


class Attending(nn.Module):
    """A block that returns tokens and weights, as MCTformer's."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        weights = (y @ y.transpose(1, 2)).softmax(-1)
        return x + self.mlp(weights @ y), weights


class MCTformer(nn.Module):
    """MCTformer: a token for each class, and maps that come out detached."""

    def __init__(self, classes: int = C, dim: int = D, plus: bool = False) -> None:
        super().__init__()
        self.plus, self.classes = plus, classes
        self.patch_embed = nn.Conv2d(3, dim, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, classes, dim) * 0.02)
        self.blocks = nn.ModuleList([Attending(dim), Attending(dim)])
        self.head = nn.Conv2d(dim, classes, 3, padding=1)

    def forward(self, x: Tensor, return_att: bool = False) -> Any:
        patches = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
        every = []
        for block in self.blocks:
            tokens, weights = block(tokens)
            every.append(tokens[:, : self.classes])
        maps = self.head(tokens[:, self.classes :].transpose(1, 2).reshape_as(patches))
        logits, patch_logits = tokens[:, : self.classes].mean(-1), maps.mean((-2, -1))
        if return_att:
            cams = F.relu(maps.detach().clone()) * weights[:, : self.classes, self.classes :].reshape_as(maps)
            return (logits + patch_logits) / 2, cams, weights[:, self.classes :, self.classes :]
        return (logits, torch.stack(every), patch_logits) if self.plus else (logits, patch_logits)


class Transformer(nn.Module):
    """A plain vision transformer, as timm's: a class token in front, the mean of the patches classified."""

    num_prefix_tokens = 1

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.Sequential(nn.TransformerEncoderLayer(dim, 2, 16, 0.0, batch_first=True))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = self.norm(self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), patches], 1)))
        out: Tensor = self.head(tokens[:, 1:].mean(1))
        return out


def pictures(count: int = 4, side: int = 64, classes: int = C) -> tuple[Tensor, Tensor]:
    """Pictures whose class is the color of a square, and their tags; all but the first three are never there."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(count, 3, side, side, generator=generator) * 0.2, torch.zeros(count, classes)
    for index in range(count):
        labels[index, index % 3] = 1
        images[index, index % 3, side // 4 : side // 2, side // 4 : 3 * side // 4] += 0.8
    return images, labels
