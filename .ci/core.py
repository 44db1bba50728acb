"""The wheel with nothing but its core dependencies: every module runs, and a missing extra says how to get it."""

import importlib.abc
import importlib.metadata
import pathlib
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import nn

import protoseg

CORE = {"torch", "einops", "numpy", "scipy"}
EXTRAS = (
    "timm",
    "open_clip",
    "torchvision",
    "PIL",
    "matplotlib",
    "accelerate",
    "webdataset",
    "segmentation_models_pytorch",
)


class Missing(importlib.abc.MetaPathFinder):
    """Makes what the extras bring look as if it were not there."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        """Refuse."""
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


wheel = pathlib.Path(sys.prefix).resolve()
assert wheel in pathlib.Path(protoseg.__file__).resolve().parents, protoseg.__file__
assert (pathlib.Path(protoseg.__file__).parent / "py.typed").exists()
assert protoseg.__version__ == importlib.metadata.version("protoseg")
assert not {*EXTRAS, "scipy"} & set(sys.modules), "import protoseg is to be light"
needs = {
    each.partition(";")[0].strip(" ") for each in importlib.metadata.requires("protoseg") if "extra ==" not in each
}
assert {each.split(">")[0].split("=")[0].strip() for each in needs} == CORE, needs

sys.meta_path.insert(0, Missing())

features, cam, labels = (
    torch.rand(2, 8, 6, 6, requires_grad=True),
    torch.randn(2, 3, 6, 6, requires_grad=True),
    torch.eye(3)[:2],
)
protoseg.ContextPrototypeBank(3, 8)(features, cam, labels).loss.backward()
tokens, groups = torch.rand(2, 20, 8), torch.rand(2, 4, 8, requires_grad=True)
protoseg.GMMPrototypeRegularizer(8, 4)(tokens, groups).loss.backward()
learner = protoseg.VisionPrototypeLearner(torch.randn(3, 8)).fit(
    nn.functional.normalize(torch.randn(30, 8), dim=-1), torch.eye(3).repeat(10, 1)
)
protoseg.RegionalSemanticContrast()(features, torch.rand(2, 3, 6, 6), learner.prototypes, labels).loss.backward()
network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
with protoseg.attach(network, features="1", cam="4", bank=protoseg.ContextPrototypeBank(3, 8)) as tap:
    network(torch.rand(2, 3, 16, 16))
    tap.loss(labels).backward()


def module(name: str) -> ModuleType:
    """A part of the package, imported where the extras are missing."""
    return importlib.import_module(f"protoseg.{name}")


def hint(call: Callable[[], object]) -> str:
    """What is said where an extra is missing."""
    try:
        call()
    except ImportError as error:
        return str(error)
    return "nothing"


hints = {
    "timm": [
        lambda: module("models.backbones").TimmBackbone("resnet18"),
        lambda: module("models.mct").Hybrid(module("models.backbones").SmallResNet(8)),
    ],
    "clip": [lambda: module("clip").FrozenCLIP.load("ViT-B-16")],
    "recipes": [lambda: module("data").save_mask("mask.png", torch.zeros(2, 2, dtype=torch.uint8))],
}
wrong = [said for extra, calls in hints.items() for call in calls if f"protoseg[{extra}]" not in (said := hint(call))]
assert not wrong, wrong
print("protoseg", protoseg.__version__, "from the wheel, with", ", ".join(sorted(CORE)), "alone")
