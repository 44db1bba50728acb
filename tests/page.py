"""What the code of each section of docs/plug-in.md finds around it in its code base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from protoseg import ContextPrototypeBank, VisionPrototypeLearner, attach
from tests import hosts
from tests.stand_ins import AMN, SIPE, AMNFirst, MCTformer, Transformer, pictures


class Classifier(nn.Module):
    """A torchvision classifier's names, inside of what looks like a LightningModule."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.model = resnet()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.multilabel_soft_margin_loss(self.model(batch[0]), batch[1])


def resnet(channels: int = 2048, classes: int = 20) -> nn.Module:
    stage = nn.Sequential(nn.Conv2d(3, channels, 8, stride=8), nn.ReLU(inplace=True))
    layers = {"layer4": stage, "avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(1)}
    network = nn.Sequential()
    for name, layer in {**layers, "fc": nn.Linear(channels, classes)}.items():
        network.add_module(name, layer)
    return network


def training(found: dict[str, Any]) -> dict[str, Any]:
    model, bank = resnet(), ContextPrototypeBank(20, 2048, capacity=50)
    return {
        "model": model,
        "bank": bank,
        "tap": attach(model, features="layer4", cam="fc", bank=bank),
        "loader": [(found["img"], found["label"])],
        "epochs": 4,
        "criterion": F.multilabel_soft_margin_loss,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
    }


def trained(found: dict[str, Any]) -> dict[str, Any]:
    images, labels = found["img"], found["label"]
    each = [(str(index), images[index, None], labels[index, None]) for index in range(len(images))]
    return {"model": resnet().requires_grad_(False), "loader": [(images, labels)], "pictures": each}


def test_time(found: dict[str, Any]) -> dict[str, Any]:
    network = hosts.Unpooled(20, 2048)
    bank = ContextPrototypeBank(20, 2048, capacity=50)
    with attach(network, features="stage4", cam=lambda x: F.conv2d(x, network.classifier.weight), bank=bank) as tap:
        tap.fill([(found["img"], found["label"])])
    pair = torch.stack([found["img"][0], found["img"][0].flip(-1)])
    small = F.interpolate(pair, scale_factor=0.5)
    return {"cam_model": network, "bank": bank, "pack": {"img": [pair, small]}, "label": found["label"][:1]}


def clip_es(found: dict[str, Any]) -> dict[str, Any]:
    images, labels = found["img"].repeat(3, 1, 1, 1), found["label"].repeat(3, 1)
    images = images + 0.1 * torch.rand_like(images)
    return {
        "model": hosts.CLIP(),
        "images": list(images.split(1)),
        "labels": labels,
        "fg_text_features": torch.randn(20, 512).half(),
    }


def weclip(found: dict[str, Any]) -> dict[str, Any]:
    model = hosts.WeCLIP(20)
    surroundings = clip_es(found)
    learner = VisionPrototypeLearner(model.fg_text_features)
    names = {"img_names": ["a"] * 4, "seg_loss": torch.ones(()), "cls_labels": found["label"], "learner": learner}
    return {**surroundings, **names, "model": model}


def grouping(found: dict[str, Any]) -> dict[str, Any]:
    return {"groupvit": hosts.GroupViT(384, 64), "contrastive_loss": torch.ones(())}


def histopathology(found: dict[str, Any]) -> dict[str, Any]:
    # Four kinds of tissue, so the first four classes.
    label = found["label"][:, :4]
    return {"model": hosts.PBIP(512), "cls_label": label, "classification_loss": lambda out, y: out[0].mean()}


SECTIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "In short": lambda found: {"model": resnet(), "criterion": F.multilabel_soft_margin_loss},
    "Find the names": lambda found: {"model": resnet()},
    "Add the loss": training,
    "From a checkpoint to maps": trained,
    "At test time, in `make_cam.py`": test_time,
    "Save and load the bank": lambda found: {"model": resnet(), "bank": ContextPrototypeBank(20, 2048)},
    "AMN": lambda found: {
        "cam_model": AMNFirst(20, 2048),
        "model": AMN(20, 2048),
        "label_cls": found["label"],
        "loss_pcl": lambda logit: logit.square().mean(),
    },
    "SIPE and SFC": lambda found: {
        "model": SIPE(20, 2048),
        "valid_mask_lowres": F.pad(found["label"], (1, 0), value=1)[..., None, None],
        "label": found["label"][..., None, None],
    },
    "PuzzleCAM": lambda found: {
        "model": hosts.Puzzle(20, 2048),
        "images": found["img"],
        "labels": found["label"],
        "tiled_images": found["img"].repeat(4, 1, 1, 1)[..., :32, :32],
        "class_loss_fn": nn.MultiLabelSoftMarginLoss(reduction="none"),
    },
    "ResNet-38d": lambda found: {"model": hosts.SEAM(20, 4096), "l2g": hosts.L2G(20, 4096)},
    "OAA": lambda found: {"model": hosts.OAA(20, 512), "epoch": 1, "index": 0},
    "MCTformer and WeakTr": lambda found: {
        "model": MCTformer(20, 384, plus=True),
        "samples": found["img"],
        "targets": found["label"],
    },
    "ToCo, SeCo and DuPL": lambda found: {
        "model": hosts.PatchClassifier(20, 768),
        "inputs": found["img"],
        "cls_label": found["label"],
    },
    "afa": lambda found: {
        "wetr": hosts.MixTransformer(20, 512),
        "inputs": found["img"],
        "cls_labels": found["label"],
        "cfg": SimpleNamespace(train=SimpleNamespace(seg_detach=True)),
    },
    "Histopathology": histopathology,
    "CLIP-ES": clip_es,
    "WeCLIP": weclip,
    "torchvision and timm": lambda found: {
        "vit": Transformer(20, 384),
        "convnext": hosts.ConvNeXt(20, 320),
        "mobilenet": torchvision.models.mobilenet_v3_small(num_classes=20),
    },
    "Hugging Face": lambda found: {"segformer": hosts.Segformer(20, 256), "dinov2": hosts.TwiceWide(20, 384)},
    "open_clip": lambda found: {"clip": hosts.CLIP(), "texts": F.normalize(torch.randn(20, 512), dim=-1)},
    "Lightning": lambda found: {"Classifier": Classifier},
    "Grouping transformers": grouping,
}


def surroundings(section: str, folder: Path) -> dict[str, Any]:
    """Names that a section's code may use."""
    torch.manual_seed(0)
    images, label = pictures(classes=20)
    found: dict[str, Any] = {"torch": torch, "F": F, "device": "cpu", "img": images, "label": label}
    found |= {"folder": str(folder), "path": folder / "state.pt"}
    return {**found, **SECTIONS[section](found)}
