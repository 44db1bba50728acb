"""Small networks with the habits of families of code bases that attach has to serve, beside those of ``stand_ins``."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
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
        self.conv1a = nn.Conv2d(3, D, 3, stride=2, padding=1)
        self.b2, self.b3 = WideBlock(D, D), WideBlock(D, dim)
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

    def __init__(self, dim: int, prefix: int = 0) -> None:
        super().__init__()
        self.patch_embed, self.layernorm = nn.Conv2d(3, dim, 8, stride=8), nn.LayerNorm(dim)
        self.prefix = nn.Parameter(torch.zeros(1, prefix, dim))

    def forward(self, x: Tensor) -> Output:
        maps = self.patch_embed(x)
        tokens = torch.cat([self.prefix.expand(len(x), -1, -1), maps.flatten(2).transpose(1, 2)], 1)
        tokens = self.layernorm(tokens)
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
        self.dinov2, self.classifier = Encoder(dim, 1), nn.Linear(2 * dim, classes)

    def forward(self, pixel_values: Tensor) -> Output:
        tokens = self.dinov2(pixel_values).last_hidden_state
        return Output(logits=self.classifier(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)))


class Segformer(nn.Module):
    """As Segformer: maps of falling size, and a classifier of every place."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__()
        self.segformer = nn.ModuleList([trunk(3, dim), trunk(dim, dim), trunk(dim, dim)])
        self.decode_head = nn.ModuleDict({"classifier": nn.Conv2d(dim, classes, 1)})

    def forward(self, pixel_values: Tensor) -> Output:
        maps = [pixel_values]
        for stage in self.segformer:
            maps.append(stage(maps[-1]))
        return Output(logits=self.decode_head["classifier"](maps[-1]))


class Assign(nn.Module):
    """Assigns tokens to group tokens, which are its second input."""

    def forward(self, tokens: Tensor, group_tokens: Tensor) -> tuple[Tensor, Tensor]:
        attention = (group_tokens @ tokens.transpose(1, 2)).softmax(1)
        return attention @ tokens, attention


class GroupViT(nn.Module):
    """As GroupViT: group tokens that a layer is given beside the tokens."""

    def __init__(self, dim: int = D, groups: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 8, stride=8)
        self.group_tokens = nn.Parameter(torch.randn(1, groups, dim))
        stages = nn.ModuleList([nn.ModuleDict({"downsample": Assign()})])
        self.vision_model = nn.ModuleDict({"encoder": nn.ModuleDict({"stages": stages})})

    def forward(self, pixel_values: Tensor) -> Output:
        tokens = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        assign = self.vision_model["encoder"]["stages"][0]["downsample"]  # type: ignore[index]
        grouped, _ = assign(tokens, self.group_tokens.expand(len(tokens), -1, -1))
        return Output(image_embeds=grouped)


class MixTransformer(nn.Module):
    """As afa's: an encoder that returns a tuple of lists, and a classifier of every place."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__()
        self.encoder = MixEncoder(dim)
        self.classifier = nn.Conv2d(dim, classes, 1, bias=False)

    def forward(self, x: Tensor, cam_only: bool = False, seg_detach: bool = True) -> Any:
        maps, attention = self.encoder(x)
        if cam_only:
            return F.conv2d(maps[-1], self.classifier.weight).detach(), attention[-1]
        logits = self.classifier(F.adaptive_max_pool2d(maps[-1], 1)).flatten(1)
        return logits, maps[-1].detach(), attention, attention[-1]


class MixEncoder(nn.Module):
    """Gives its four maps and its attention, each as a list."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.block1, self.block4 = trunk(3, dim), nn.Sequential(trunk(dim, dim), trunk(dim, dim))
        self.norm4 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        first = self.block1(x)
        last = self.block4(first)
        tokens = self.norm4(last.flatten(2).transpose(1, 2))
        last = tokens.transpose(1, 2).reshape(last.shape)
        return [first, first, first, last], [tokens @ tokens.transpose(1, 2)]


class PatchClassifier(nn.Module):
    """As ToCo's and DuPL's: tokens with a class token, and a convolution that classifies every patch."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"patch_embed": nn.Conv2d(3, dim, 8, stride=8), "norm": nn.LayerNorm(dim)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.classifier = nn.Conv2d(dim, classes, 1, bias=False)
        self.decoder = nn.Conv2d(dim, classes + 1, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = self.encoder["patch_embed"](x)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), maps.flatten(2).transpose(1, 2)], 1)
        tokens = self.encoder["norm"](tokens)[:, 1:]
        features = tokens.transpose(1, 2).reshape(maps.shape)
        logits = self.classifier(F.adaptive_max_pool2d(features, 1)).flatten(1)
        return logits, self.decoder(features), features, logits


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
        self.stage4, self.classifier = nn.Conv2d(3, dim, 8, stride=8), nn.Conv2d(dim, classes, 1, bias=False)

    def forward(self, pair: Tensor) -> Tensor:
        maps = F.relu(F.conv2d(self.stage4(pair), self.classifier.weight))
        out: Tensor = maps[0] + maps[1].flip(-1)
        return out


class Puzzle(nn.Module):
    """As PuzzleCAM's classifier: stages counted from 1, and with the map where it is asked for."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__()
        self.stage1, self.stage5 = nn.Conv2d(3, D, 4, stride=4), trunk(D, dim)
        self.classifier = nn.Conv2d(dim, classes, 1, bias=False)

    def forward(self, x: Tensor, with_cam: bool = False) -> tuple[Tensor, Tensor]:
        maps = self.classifier(self.stage5(self.stage1(x)))
        return maps.mean((-2, -1)), maps


class SEAM(Wide):
    """As SEAM: background in front, maps of the picture's size, and refined ones."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__(classes + 1, dim)
        self.dropout7 = nn.Dropout2d(0.5)

    def forward(self, x: Tensor) -> Any:
        cam = self.fc8(self.dropout7(self.b3(self.b2(self.conv1a(x)))))
        whole = F.interpolate(cam, x.shape[-2:], mode="bilinear")
        return whole, whole.detach()


class L2G(Wide):
    """As L2G: background last, and ``fc8`` a second time behind attention."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__(classes + 1, dim)

    def forward(self, x: Tensor) -> Any:
        features = self.b3(self.b2(self.conv1a(x)))
        maps = self.fc8(features) + self.fc8(features.mean((-2, -1), keepdim=True).expand_as(features))
        return maps, maps[:, :-1].mean((-2, -1))


class OAA(nn.Module):
    """As OAA's VGG: extra convolutions whose last one is the classifier."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, dim, 8, stride=8)
        layers = [nn.Conv2d(dim, dim, 3, padding=1) if index % 2 == 0 else nn.ReLU(True) for index in range(6)]
        self.extra_convs = nn.Sequential(*layers, nn.Conv2d(dim, classes, 1))

    def forward(self, x: Tensor, epoch: int = 1, label: Tensor | None = None, index: int | None = None) -> Tensor:
        maps = self.extra_convs(self.features(x))
        self.map1 = maps.clone().detach()
        out: Tensor = maps.mean((-2, -1))
        return out


class PBIP(nn.Module):
    """As PBIP: a mix transformer whose maps are compared with several texts of each class."""

    def __init__(self, dim: int = D) -> None:
        super().__init__()
        self.encoder = MixEncoder(dim)
        self.l_fea, self.k_list, self.l_fc4 = torch.randn(8, 16), [2, 2, 2, 2], nn.Linear(16, dim)
        self.logit_scale4 = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Any:
        maps, _ = self.encoder(x)
        texts = self.l_fc4(self.l_fea)[..., None, None]
        scores = self.logit_scale4 * F.conv2d(F.normalize(maps[-1], dim=1), texts)
        return scores.mean((-2, -1)), scores.detach()


class ResBlock(nn.Module):
    """As the blocks of CLIP-ES: tokens first, and their attention behind them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.mlp(x), torch.zeros(1)


class CLIPVision(nn.Module):
    """As CLIP-ES': what goes into the last block, as ``[1 + hw, B, width]``; or of all blocks, as WeCLIP's."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.conv1, self.ln_post = nn.Conv2d(3, width, 16, stride=16), nn.LayerNorm(width)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(ResBlock(width), ResBlock(width))
        self.proj = nn.Parameter(torch.randn(width, dim) * width**-0.5)

    def tokens(self, image: Tensor) -> Tensor:
        patches = self.conv1(image).flatten(2).permute(2, 0, 1)
        return torch.cat([self.class_embedding.expand(1, len(image), -1), patches])

    def forward(self, image: Tensor) -> Tensor:
        """As open_clip's."""
        tokens = self.ln_post(self.tokens(image).transpose(0, 1))
        return tokens[:, 0] @ self.proj


class CLIP(nn.Module):
    """As CLIP-ES', and with ``every`` as WeCLIP's."""

    def __init__(self, width: int = 768, dim: int = 512, every: bool = False) -> None:
        super().__init__()
        self.visual, self.every = CLIPVision(width, dim), every

    def encode_image(self, image: Tensor, h: int = 0, w: int = 0, require_all_fts: bool = True) -> Any:
        if not h:
            return self.visual(image)
        tokens = self.visual.tokens(image)
        return ([tokens, tokens] if self.every else tokens), [torch.zeros(1)]


class GridHook:
    """As the hook of WeCLIP's Grad-CAM, which makes a map of what it sees and has to be told its size."""

    def __init__(self, layer: nn.Module) -> None:
        layer.register_forward_hook(self.save)

    def save(self, layer: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        self.activations = output[0][1:].unflatten(0, (self.height, self.width))  # type: ignore[attr-defined]


class WeCLIP(nn.Module):
    """As WeCLIP: its CLIP, texts, what fuses the tokens and what makes masks of them."""

    def __init__(self, classes: int = C) -> None:
        super().__init__()
        self.encoder = CLIP(every=True)
        self.fg_text_features = torch.randn(classes, 512)
        self.grad_cam = SimpleNamespace(activations_and_grads=GridHook(self.encoder.visual.transformer.resblocks[-1]))
        self.decoder_fts_fuse, self.decoder = nn.Conv2d(768, 256, 1), nn.Conv2d(256, classes + 1, 1)

    def forward(self, img: Tensor, img_names: Any) -> tuple[Tensor, Tensor, Tensor]:
        every, _ = self.encoder.encode_image(img, *img.shape[-2:])
        side = img.shape[-1] // 16
        maps = every[-1][1:].permute(1, 2, 0).unflatten(2, (-1, side))
        segs = self.decoder(self.decoder_fts_fuse(maps))
        return segs, segs.argmax(1), segs


class ConvNeXt(nn.Module):
    """As timm's: a norm for maps between pooling and classifier."""

    def __init__(self, classes: int = C, dim: int = D) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Conv2d(3, D, 4, stride=4), trunk(D, dim))
        self.head = nn.Module()
        self.head.norm, self.head.fc = Norm2d(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.stages(x).mean((-2, -1), keepdim=True)
        out: Tensor = self.head.fc(self.head.norm(pooled).flatten(1))
        return out


class Norm2d(nn.LayerNorm):
    """A norm over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
