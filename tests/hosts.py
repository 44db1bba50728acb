"""Small networks with the habits of families of code bases that attach has to serve, beside those of ``stand_ins``."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.stand_ins import C, D, trunk


class WideBlock(nn.Module):
    """As resnet38d's: ``__call__`` is a method of its own, so no hook on a block ever runs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)


class Wide(nn.Module):
    """A resnet38d: blocks that cannot be named, and ``fc8`` on maps or, with ``pool``, on what is pooled."""

    def __init__(self, classes: int = C, dim: int = D, *, pool: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.pool, self.twice = pool, twice
        self.conv1a = nn.Conv2d(3, dim, 3, stride=2, padding=1)
        self.b2, self.b3 = WideBlock(dim, dim), WideBlock(dim, dim)
        self.fc8 = nn.Conv2d(dim, classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        features = self.b3(self.b2(self.conv1a(x)))
        if self.pool:
            features = F.adaptive_avg_pool2d(features, 1)
        maps = self.fc8(features)
        if self.twice:  # as L2G: once more, on what is left when the first is erased
            maps = maps + self.fc8(features * (features < 0.5))
        out: Tensor = maps.mean((-2, -1))
        return out


class NormHead(nn.Module):
    """As ConvNeXt's: a norm between pooling and classifier."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__()
        self.stages = nn.Sequential(trunk(3, dim), trunk(dim, dim))
        self.pool, self.norm, self.fc = nn.AdaptiveAvgPool2d(1), nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.norm(self.pool(self.stages(x)).flatten(1)))
        return out


class NormMaps(NormHead):
    """As ResNetV2's: the norm is behind the stages, before the pooling."""

    def forward(self, x: Tensor) -> Tensor:
        maps = self.norm(self.stages(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out: Tensor = self.fc(maps.mean((-2, -1)))
        return out


class ChannelsLast(nn.Module):
    """As timm's Swin: maps ``[B, H, W, D]``."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 8, stride=8)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.patch_embed(x).permute(0, 2, 3, 1)).mean((1, 2)))
        return out


class Output(OrderedDict[str, Any]):
    """As transformers' ``ModelOutput``: a dict whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Encoder(nn.Module):
    """The inner part of a network that returns a dict, with a list of maps in it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.patch_embed, self.layernorm = nn.Conv2d(3, dim, 8, stride=8), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Output:
        maps = self.patch_embed(x)
        tokens = self.layernorm(maps.flatten(2).transpose(1, 2))
        return Output(last_hidden_state=tokens, pooler_output=tokens.mean(1), hidden_states=(maps, tokens))


class HuggingFace(nn.Module):
    """As a classifier of transformers."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__()
        self.encoder, self.classifier = Encoder(dim), nn.Linear(dim, classes)

    def forward(self, pixel_values: Tensor) -> Output:
        return Output(logits=self.classifier(self.encoder(pixel_values).pooler_output))


class TwiceWide(nn.Module):
    """As DINOv2's classifier, which sees the class token beside the mean of the patches."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__()
        self.dinov2 = Encoder(dim)
        self.cls_token, self.classifier = nn.Parameter(torch.zeros(dim)), nn.Linear(2 * dim, classes)

    def forward(self, pixel_values: Tensor) -> Output:
        tokens = self.dinov2(pixel_values).last_hidden_state
        token = self.cls_token.expand(len(tokens), -1)
        return Output(logits=self.classifier(torch.cat([token, tokens.mean(1)], 1)))


class Segformer(nn.Module):
    """As Segformer: four maps of falling size, and a classifier of every place, with background in front."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__()
        self.segformer = nn.ModuleList([trunk(3, dim), trunk(dim, dim), trunk(dim, dim)])
        self.decode_head = nn.ModuleDict({"classifier": nn.Conv2d(dim, classes + 1, 1)})

    def forward(self, pixel_values: Tensor) -> Output:
        maps = [pixel_values]
        for stage in self.segformer:
            maps.append(stage(maps[-1]))
        return Output(logits=self.decode_head["classifier"](maps[-1]))


class Assign(nn.Module):
    """Assigns tokens to group tokens, which are its second input."""

    def forward(self, tokens: Tensor, group_tokens: Tensor) -> Tensor:
        return (group_tokens @ tokens.transpose(1, 2)).softmax(1) @ tokens


class GroupViT(nn.Module):
    """As GroupViT: group tokens that a layer is given beside the tokens."""

    def __init__(self, dim: int = D, groups: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 8, stride=8)
        self.group_tokens = nn.Parameter(torch.randn(1, groups, dim))
        self.downsample = Assign()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2)
        out: Tensor = self.downsample(tokens, self.group_tokens.expand(len(tokens), -1, -1))
        return out


class MixTransformer(nn.Module):
    """As afa's: an encoder that returns a tuple of lists, and a classifier of every place."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__()
        self.encoder = MixEncoder(dim)
        self.classifier = nn.Conv2d(dim, classes, 1, bias=False)

    def forward(self, x: Tensor, cam_only: bool = False) -> Any:
        maps, _ = self.encoder(x)
        cam = F.conv2d(maps[-1], self.classifier.weight)
        if cam_only:
            return cam.detach()
        return F.adaptive_max_pool2d(self.classifier(maps[-1]), 1).flatten(1), cam


class MixEncoder(nn.Module):
    """Gives its maps and its attention, each as a list."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.block1, self.block4 = trunk(3, dim), nn.Sequential(trunk(dim, dim), trunk(dim, dim))
        self.norm4 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        first = self.block1(x)
        last = self.block4(first)
        tokens = self.norm4(last.flatten(2).transpose(1, 2))
        last = tokens.transpose(1, 2).reshape(last.shape)
        return [first, last], [tokens @ tokens.transpose(1, 2)]


class PatchClassifier(nn.Module):
    """As ToCo's and DuPL's: tokens with a class token, and a convolution that classifies every patch."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"patch_embed": nn.Conv2d(3, dim, 8, stride=8), "norm": nn.LayerNorm(dim)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.classifier = nn.Conv2d(dim, classes, 1, bias=False)
        self.decoder = nn.Conv2d(dim, classes + 1, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.encoder["patch_embed"](x)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), maps.flatten(2).transpose(1, 2)], 1)
        tokens = self.encoder["norm"](tokens)[:, 1:]
        features = tokens.transpose(1, 2).reshape(maps.shape)
        return self.classifier(F.adaptive_max_pool2d(features, 1)).flatten(1), self.decoder(features)


class DenseNet(nn.Module):
    """As torchvision's: what ``features`` gives is changed in place behind it."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__()
        self.features = nn.Sequential(trunk(3, dim), nn.Conv2d(dim, dim, 3, padding=1), nn.BatchNorm2d(dim))
        self.classifier = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(F.relu(self.features(x), inplace=True).mean((-2, -1)))
        return out


class Unpooled(nn.Module):
    """As a class for test time: a pair of a picture and its mirror image, and a classifier that is never called."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__()
        self.stage4, self.classifier = trunk(3, dim), nn.Conv2d(dim, classes, 1, bias=False)

    def forward(self, pair: Tensor) -> Tensor:
        maps = F.relu(F.conv2d(self.stage4(pair), self.classifier.weight))
        out: Tensor = maps[0] + maps[1].flip(-1)
        return out
