"""A CAM network with its bank as one model that can be saved, shared and loaded by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, get_args

import torch
from torch import Tensor, nn

from protoseg.functional import max_normalize, multi_scale, prototype_cam
from protoseg.models.backbones import BankFeatures
from protoseg.models.cam import build_cam_network
from protoseg.modules import ContextPrototypeBank
from protoseg.utils import checks
from protoseg.utils.colors import normalize

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError as error:
    raise ImportError('protoseg.models.hub needs huggingface_hub; run pip install "protoseg[recipes]"') from error

__all__ = ["HubMap", "PrototypeModel", "PrototypeOutput"]

HubMap = Literal["cam", "instance", "pacam"]

_CARD = """\
---
{{ card_data }}
---

# Masks from image-level tags

A CAM network and its bank of context prototypes, trained from tags by [protoseg](https://pypi.org/project/protoseg/).
`config.json` names the classes.

```python
import torch

from protoseg.models.hub import PrototypeModel

model = PrototypeModel.from_pretrained("FOLDER_OR_REPOSITORY")
image = torch.rand(1, 3, 288, 288)  # colors in 0..1; of about model.size, sides are multiples of model.multiple
labels = torch.ones(1, len(model.classes))  # 1 = the class is in the picture; the model decides without them
maps = model(image, labels).maps  # [1, C, h, w] in 0..1; foreground from model.threshold
```

License, data and figures are for whoever publishes it to say.
"""


class PrototypeOutput(NamedTuple):
    """What :class:`PrototypeModel` returns.

    Attributes:
        probabilities: ``[B, C]`` of the classes to be in the picture.
        maps: ``[B, C, h, w]`` in 0..1, absent classes 0.
    """

    probabilities: Tensor
    maps: Tensor


class PrototypeModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="protoseg",
    tags=["weakly-supervised-semantic-segmentation"],
    model_card_template=_CARD,
):
    """A CAM network and its bank, with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    Of :class:`~protoseg.models.cam.CAMNetwork` and :class:`~protoseg.modules.ContextPrototypeBank`, trained before; it
    makes maps and is not trained itself. Weights are safetensors, and ``config.json`` holds the arguments below;
    nothing is unpickled. A run of ``protoseg masks`` or ``protoseg train cpal`` leaves one in its folder ``model/``.

    Args:
        classes: Names of the ``C`` foreground classes.
        backbone: What :func:`~protoseg.models.cam.build_cam_network` takes; begins with random weights.
        size: Pictures are meant to have the area of a square of this side, in pixels.
        mean: Of the colors, to be subtracted.
        std: Of the colors, to be divided by.
        threshold: Of the maps, in ``[0, 1]``.
        map: Which map: the CAM, that of the picture's own prototypes, or the bank's.
        scales: What pictures are looked at in, each also mirrored; maps have the grid of the first.
        stride: Pixels per feature of a timm backbone.
        bank_features: Of :class:`~protoseg.models.cam.CAMNetwork`.
        prior: Likewise.
        bank: Arguments of :class:`~protoseg.modules.ContextPrototypeBank`.

    Attributes:
        multiple: What the sides of pictures should be multiples of.

    Shape:
        ``[B, 3, H, W]`` in 0..1 and perhaps labels ``[B, C]`` to :class:`PrototypeOutput`.

    Raises:
        ValueError: No class, an unknown backbone or map, or a threshold outside of 0..1.
        ImportError: huggingface_hub, or timm where the backbone is one of its, is not installed.

    Example:
        >>> import tempfile
        >>> model = PrototypeModel(["cat", "dog"], "small:4", size=64, map="cam")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = model.save_pretrained(folder)
        ...     again = PrototypeModel.from_pretrained(folder)
        Loading weights from local directory
        >>> again.classes, again(torch.rand(1, 3, 64, 64), torch.tensor([[1, 0]])).maps.shape
        (('cat', 'dog'), torch.Size([1, 2, 8, 8]))
    """

    def __init__(
        self,
        classes: Sequence[str],
        backbone: str,
        *,
        size: int,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        threshold: float = 0.5,
        map: HubMap = "pacam",
        scales: Sequence[float] = (1.0,),
        stride: int = 16,
        bank_features: BankFeatures = "last",
        prior: float | None = None,
        bank: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        checks.unit_interval("PrototypeModel", "threshold", threshold)
        checks.choice("PrototypeModel", "map", map, get_args(HubMap))
        self.classes = tuple(classes)
        self.size = size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.threshold = threshold
        self.map: HubMap = map
        self.scales = tuple(scales)
        self.network = build_cam_network(
            backbone, len(self.classes), stride=stride, bank_features=bank_features, prior=prior
        )
        self.bank = ContextPrototypeBank(len(self.classes), self.network.channels, **(bank or {}))
        self.multiple = self.network.backbone.multiple

    @torch.no_grad()
    def forward(self, images: Tensor, labels: Tensor | None = None) -> PrototypeOutput:
        """Say what is in the pictures, and where; the bank stores nothing.

        Args:
            images: ``[B, 3, H, W]`` in 0..1.
            labels: ``[B, C]``, 1 = the class is in the picture; by default those that are more probable than not.
        """
        seen = normalize(images, self.mean, self.std)
        both = torch.stack([self.network(seen).logits, self.network(seen.flip(-1)).logits])
        probabilities = both.float().sigmoid().mean(0)
        if labels is None:
            labels = probabilities > 0.5

        features, cam = multi_scale(self._look, seen, scales=self.scales, multiple=self.multiple)
        present = labels.to(cam)
        if self.map == "cam":  # which needs no memory
            return PrototypeOutput(probabilities, max_normalize(cam) * present[:, :, None, None])

        out = self.bank(features, cam, present, store=False)
        if self.map == "pacam":
            return PrototypeOutput(probabilities, out.pacam[:, 1:])

        own = prototype_cam(features, out.instances.unsqueeze(2))
        return PrototypeOutput(probabilities, max_normalize(own) * present[:, :, None, None])

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        out = self.network(images)
        return out.features.float(), out.cam.float()

    @classmethod
    def _from_pretrained(cls, **options: Any) -> PrototypeModel:
        # A tensor that is missing would keep its random beginning.
        model: PrototypeModel = super()._from_pretrained(**{**options, "strict": True})
        return model

    @classmethod
    def _load_as_pickle(cls, *args: Any, **options: Any) -> NoReturn:
        raise ValueError("PrototypeModel.from_pretrained: there is no model.safetensors; files of pickles are not read")
