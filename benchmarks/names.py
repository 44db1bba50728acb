"""How often ``candidates`` finds the names to attach to, on networks with random weights whose names are known.

    python benchmarks/names.py

Needs timm and torchvision, and transformers for some; what is not installed is left out, and said. A pair is right when
it captures the same tensors as the names that are known to be right, whatever it calls them.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from protoseg import attach
from protoseg.tap import candidates

CLASSES = 20


class Host(NamedTuple):
    """A network, and how to attach to it."""

    name: str
    package: str
    build: Callable[[], nn.Module]
    features: str
    cam: str
    reshape: Any = None
    size: tuple[int, int] = (96, 64)


def last(x: Tensor) -> Tensor:
    """Channels-last maps as PyTorch has them."""
    return x.permute(0, 3, 1, 2)


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Build a network of timm."""

    def build() -> nn.Module:
        import timm

        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)
        return network

    return build


def torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Build a network of torchvision."""

    def build() -> nn.Module:
        import torchvision

        network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)
        return network

    return build


def transformers(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """Build a network of transformers, small."""

    def build() -> nn.Module:
        package = importlib.import_module("transformers")
        network: nn.Module = getattr(package, model)(getattr(package, config)(num_labels=CLASSES, **options))
        return network

    return build


SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WINDOWS = {"img_size": (224, 160), "window_size": 7, "strict_img_size": False}
SWIN = {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
HOSTS = [
    Host("resnet18", "torchvision", torchvision("resnet18"), "layer4", "fc"),
    Host("resnext50", "torchvision", torchvision("resnext50_32x4d"), "layer4", "fc"),
    Host("mobilenet_v2", "torchvision", torchvision("mobilenet_v2"), "features", "classifier.1"),
    Host("efficientnet_b0", "torchvision", torchvision("efficientnet_b0"), "features", "classifier.1"),
    Host("regnet_y_400mf", "torchvision", torchvision("regnet_y_400mf"), "trunk_output", "fc"),
    Host("densenet121", "torchvision", torchvision("densenet121"), "features", "classifier"),
    Host("swin_t", "torchvision", torchvision("swin_t"), "permute", "head"),
    Host("vit_b_16", "torchvision", torchvision("vit_b_16", image_size=64), "encoder.ln", "heads.head", 1, (64, 64)),
    Host("squeezenet1_1", "torchvision", torchvision("squeezenet1_1"), "classifier.1:input", "classifier.1"),
    Host("fcn_resnet50", "torchvision", torchvision("fcn_resnet50", weights_backbone=None), "classifier.4:input",
         "classifier.4"),
    Host("resnet18", "timm", timm("resnet18"), "layer4", "fc"),
    Host("efficientnet_lite0", "timm", timm("tf_efficientnet_lite0"), "bn2", "classifier"),
    Host("densenet121", "timm", timm("densenet121"), "features", "classifier"),
    Host("resnetv2_50", "timm", timm("resnetv2_50"), "norm", "head.fc"),
    Host("convnext_atto", "timm", timm("convnext_atto"), "norm_pre", "head.fc"),
    Host("swin_tiny", "timm", timm("swin_tiny_patch4_window7_224", **WINDOWS), "norm", "head.fc", last, (224, 160)),
    Host("vit_tiny, token", "timm", timm("vit_tiny_patch16_224", img_size=(96, 64)), "norm", "head", 1),
    Host("vit_tiny, mean", "timm", timm("vit_tiny_patch16_224", img_size=(96, 64), global_pool="avg", fc_norm=False),
         "norm", "head", 1),
    Host("deit3_small", "timm", timm("deit3_small_patch16_224", img_size=(96, 64)), "norm", "head", 1),
    Host("vit_reg4", "timm", timm("vit_small_patch14_reg4_dinov2", img_size=(84, 56)), "norm", "head", 5, (84, 56)),
    Host("mobilenetv3_small", "timm", timm("mobilenetv3_small_100"), "blocks", "classifier"),
    Host("ConvNext", "transformers", transformers("ConvNextForImageClassification", "ConvNextConfig",
         hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1]), "convnext.encoder:last_hidden_state", "classifier"),
    Host("Segformer", "transformers", transformers("SegformerForSemanticSegmentation", "SegformerConfig",
         hidden_sizes=[16, 32, 48, 64], num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=64),
         "decode_head.classifier:input", "decode_head.classifier"),
    Host("ViT", "transformers", transformers("ViTForImageClassification", "ViTConfig", image_size=(96, 64), **SMALL),
         "vit.layernorm", "classifier", 1),
    Host("Swin", "transformers", transformers("SwinForImageClassification", "SwinConfig", **SWIN),
         "swin.layernorm", "classifier", 0, (224, 224)),
    Host("DINOv2", "transformers", transformers("Dinov2ForImageClassification", "Dinov2Config", image_size=96,
         patch_size=16, **SMALL), "dinov2.layernorm", "classifier", 1),
]  # fmt: skip


def captured(network: nn.Module, images: Tensor, features: str, cam: str) -> tuple[Tensor, Tensor | None]:
    """What the two names see in a pass."""
    with torch.no_grad(), attach(network.eval(), features=features, cam=cam, changed=True) as tap:
        network(images)
        seen = tap._recorder.read([])[-1].seen
        return seen["features"].clone(), seen["cam"].clone()


def place(host: Host) -> tuple[int | None, str, str]:
    """At which place the right pair stands, the line there, and the first line."""
    torch.manual_seed(0)
    network, images = host.build(), torch.rand(2, 3, *host.size)
    found = candidates(network, images)
    want = captured(network, images, host.features, host.cam)
    for index, each in enumerate(found, 1):
        got = captured(network, images, each.features, each.cam)
        reshape = "channels_last" if callable(host.reshape) else host.reshape
        if (
            (each.cam, each.reshape) == (host.cam, reshape)
            and got[0].shape == want[0].shape
            and torch.equal(got[0], want[0])
        ):
            return index, each.line, found[0].line
    return None, "", found[0].line if found else "none"


def main() -> None:
    """Try all hosts that are installed."""
    warnings.simplefilter("ignore")
    right = tried = 0
    for host in HOSTS:
        if importlib.util.find_spec(host.package) is None:
            print(f"{host.package} {host.name}: {host.package} is not installed")
            continue
        index, line, first = place(host)
        tried += 1
        right += index is not None and index <= 2
        print(f"{host.package} {host.name}: {index}  {line or first}")
    print(f"right pair first or second in {right} of {tried}")


if __name__ == "__main__":
    main()
