"""A frozen open_clip model as a source of prototypes, patch features and maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg.clip.towers import Grid, tower_of
from protoseg.utils import checks
from protoseg.utils.colors import normalize
from protoseg.utils.extras import require
from protoseg.utils.numeric import no_autocast, unit

__all__ = ["BACKGROUND", "TEMPLATES", "Dense", "FrozenCLIP", "Pooling"]

Pooling = Literal["patches", "token"]
# Sentences that a class's name is put into; the first is that of CLIP-ES.
TEMPLATES = ("a clean origami {}.", "a photo of a {}.", "a picture of a {}.", "there is a {} in the scene.")
# What pictures show beside the classes; CLIP-ES's list for VOC.
BACKGROUND = (
    *("ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea", "railway"),
    *("railroad", "keyboard", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock", "street", "valley"),
    *("bridge", "sign"),
)


class Dense(NamedTuple):
    """What :meth:`FrozenCLIP.encode` returns.

    Attributes:
        features: ``[B, E, h, w]``, of every patch, in the space of the texts; of any length. Of a ResNet, a patch is
            a place of the last stage, which the attention pool's value and output projections bring there (MaskCLIP).
        pooled: ``[B, E]``, of the whole picture, of unit length.
        attention: ``[B, h w, h w]``, of patches on patches, mean over heads and blocks; None where not asked for.
        layers: ``[B, W, h, w]`` of each block that was asked for, what it puts out at the patches; of a ResNet's four
            stages, each with a width and a size of its own.
    """

    features: Tensor
    pooled: Tensor
    attention: Tensor | None
    layers: tuple[Tensor, ...] = ()


class FrozenCLIP(nn.Module):
    """A CLIP model that is not trained, asked for text prototypes, patch features, Grad-CAM and affinity.

    Nothing of the model is replaced; hooks are removed when a call ends. Its parameters do not require a gradient, and
    it stays in evaluation mode.

    Args:
        model: An open_clip model with one of its own vision transformers or ResNets, or a ConvNeXt.
        tokenizer: Its tokenizer, texts to ``[n, T]``.
        mean: Of the model's normalization, red, green and blue.
        std: Likewise.

    Raises:
        ValueError: The model's vision network is of another kind.

    Example:
        >>> import open_clip
        >>> sizes = dict(width=64, layers=2)
        >>> model = open_clip.CLIP(32, dict(image_size=32, patch_size=8, **sizes), dict(heads=2, **sizes))
        >>> clip = FrozenCLIP(model, open_clip.get_tokenizer("ViT-B-16"))
        >>> image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
        >>> pixels = clip.prepare(image, 32)
        >>> clip.encode(pixels).features.shape, clip.text_prototypes(["cat", ["dog", "puppy"]]).shape
        (torch.Size([1, 32, 4, 6]), torch.Size([2, 32]))
        >>> clip.grad_cam(pixels, clip.text_prototypes(["cat", "dog"]), clip.text_prototypes(["sky"])).shape
        torch.Size([1, 2, 4, 6])
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        *,
        mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
    ) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self.visual: Any = self.model.visual
        self._tower = tower_of(self.visual)
        self.tokenizer, self.mean, self.std = tokenizer, tuple(mean), tuple(std)
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def load(
        cls, name: str, pretrained: str | None = None, *, device: torch.device | str = "cpu", precision: str = "fp32"
    ) -> FrozenCLIP:
        """Make one of open_clip's models.

        Args:
            name: Such as ``"ViT-B-16"`` or ``"RN50"``.
            pretrained: A tag such as ``"openai"``, which is downloaded, or the path of a checkpoint; random weights
                where not given.
            device: Where to.
            precision: open_clip's: ``"fp32"``, ``"fp16"``, ``"bf16"`` and others.

        Raises:
            ImportError: open_clip is not installed.
            ValueError: There is no such model or tag, where the message lists near ones; or its vision network is of
                another kind.
        """
        open_clip = require("open_clip", "FrozenCLIP.load", "clip")
        if name not in (names := open_clip.list_models()):
            raise ValueError(f"FrozenCLIP: no model {name!r} in open_clip; near ones: {_near(name, names)}")
        if pretrained is not None and not Path(pretrained).is_file():
            tags = [tag for model, tag in open_clip.list_pretrained() if model == name]
            if pretrained not in tags:
                raise ValueError(
                    f"FrozenCLIP: {pretrained!r} is neither a file nor a tag of {name}; near tags: "
                    f"{_near(pretrained, tags)}"
                )
        model = open_clip.create_model(name, pretrained, device=device, precision=precision)
        normalization = {key: getattr(model.visual, f"image_{key}", None) for key in ("mean", "std")}
        known = {key: value for key, value in normalization.items() if value is not None}
        return cls(model, open_clip.get_tokenizer(name), **known)

    @property
    def temperature(self) -> float:
        """The temperature that the model was trained with: what its cosines are divided by."""
        return 1 / float(self.model.logit_scale.exp())

    @property
    def blocks(self) -> int:
        """How many blocks, or stages of a convolutional network, :meth:`encode` knows."""
        return len(self._tower.blocks)

    @property
    def attends(self) -> bool:
        """Whether patches attend to each other, as those of a vision transformer do."""
        return self._tower.attends

    @property
    def _weight(self) -> Tensor:
        """The first weight: pictures go to its device in its precision."""
        return next(part.weight for part in self.visual.modules() if isinstance(part, nn.Conv2d))

    def train(self, mode: bool = True) -> FrozenCLIP:
        """Stay in evaluation mode."""
        return super().train(False)

    def prepare(self, image: Tensor, short_side: int | None = None) -> Tensor:
        """Resize a picture so that its sides are multiples of a patch (32 pixels of a ResNet), and normalize it.

        Args:
            image: ``[3, H, W]`` uint8, RGB.
            short_side: Length of the shorter side in pixels; the picture's own where not given.

        Returns:
            ``[1, 3, h, w]`` in the model's precision, on its device.

        Raises:
            TypeError: The picture is not uint8.
            ValueError: It has another shape, or is smaller than a patch.
        """
        checks.shape("FrozenCLIP.prepare", "image", image, (3, "H", "W"))
        if image.dtype != torch.uint8:
            raise TypeError(f"FrozenCLIP.prepare: image must be uint8 in 0..255, got {image.dtype}")
        weight = self._weight
        patch = self._tower.patch
        scale = (short_side or min(image.shape[-2:])) / min(image.shape[-2:])
        sides = [round(side * scale / patch) * patch for side in image.shape[-2:]]
        if min(sides) < patch:
            raise ValueError(
                f"FrozenCLIP.prepare: a picture of {tuple(image.shape[-2:])} pixels is smaller than a patch of {patch} "
                "pixels; enlarge it by short_side"
            )
        pixels = F.interpolate(image[None].to(weight.device).float(), sides, mode="bicubic", antialias=True) / 255
        return normalize(pixels.clamp(0, 1), self.mean, self.std).to(weight.dtype)

    @torch.no_grad()
    def text_prototypes(self, names: Sequence[str | Sequence[str]], templates: Sequence[str] = TEMPLATES[:1]) -> Tensor:
        """Embed classes by their names: the mean over names and templates; texts are encoded once.

        Args:
            names: A name per class, or several that mean the same.
            templates: Sentences with ``{}`` for the name.

        Returns:
            ``[C, E]`` of unit length, in float32.

        Raises:
            ValueError: No name or template, a name twice, a template without ``{}``, or a text that is longer than
                the model reads.
        """
        me = "FrozenCLIP.text_prototypes"
        classes = [[name] if isinstance(name, str) else list(name) for name in names]
        if not classes or not all(classes) or not templates:
            raise ValueError(f"{me}: needs a name for every class and a template, got {names!r} and {templates!r}")
        every = [name for several in classes for name in several]
        if twice := sorted({name for name in every if every.count(name) > 1}):
            raise ValueError(f"{me}: every name may occur once, and {twice[0]!r} occurs more often")
        if wrong := [each for each in templates if "{}" not in each]:
            raise ValueError(f"{me}: expected {{}} for the name in every template, got {wrong[0]!r}")
        self._encode_texts([template.format(name) for name in every for template in templates])
        rows = [
            torch.stack([self._texts[template.format(name)] for name in several for template in templates]).mean(0)
            for several in classes
        ]
        return unit(torch.stack(rows))

    @torch.no_grad()
    def encode(
        self, images: Tensor, *, attentions: int = 0, layers: Sequence[int] = (), pooling: Pooling = "token"
    ) -> Dense:
        """Encode pictures of any size.

        Args:
            images: ``[B, 3, H, W]``, normalized, sides multiples of the patch, as :meth:`prepare` makes them.
            attentions: Of how many of the last blocks the attention is wanted; 8 in CLIP-ES, 0 of a ResNet.
            layers: Of which blocks the output is wanted, counted from 0, or from the end where negative; of a ResNet,
                of which of its four stages.
            pooling: What stands for the whole picture: ``"token"``, the model's own pooling; ``"patches"``, the mean
                of the patch features, as in CLIP-ES.

        Returns:
            :class:`Dense`.

        Raises:
            ValueError: Wrong shape, sides that are no multiples of the patch, or an option out of range.
        """
        grid = self._check("FrozenCLIP.encode", images, pooling)
        count = self.blocks
        if wrong := [each for each in layers if not -count <= each < count]:
            raise ValueError(
                f"FrozenCLIP.encode: layers must lie between {-count} and {count - 1}, as the model has {count}, got "
                f"{wrong[0]}"
            )
        numbers = [each % count for each in layers]
        with self._tower.watch(attentions=attentions, layers=numbers) as watched:
            features, whole = self._embed(images, grid, pooling)
        attention = None if watched.attention is None else watched.attention[:, 1:, 1:]
        kept = tuple(self._tower.spatial(watched.layers[number].float(), grid) for number in numbers)
        return Dense(features, whole, attention, kept)

    def grad_cam(
        self,
        images: Tensor,
        prototypes: Tensor,
        background: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        pooling: Pooling = "patches",
    ) -> Tensor:
        r"""Grad-CAM of each class on the tokens before the last block's attention (CLIP-ES), or a ResNet's last map.

        With :math:`p = \mathrm{softmax}(\langle x, v \rangle / \tau)` over classes and background, tokens :math:`A_l`,
        and :math:`w_c` the mean over patches of :math:`\partial \log \tfrac{p_c}{1 - p_c} / \partial A_l`,

        .. math:: M_c(l) = \mathrm{ReLU}(\langle w_c, A_l \rangle)

        The published form differentiates :math:`p_c` itself, which is this gradient times :math:`p_c (1 - p_c)`: the
        same map up to its scale, but 0 where the model is sure of the class, as float32 then cannot tell :math:`p_c`
        from 1.

        Only what follows the tokens is differentiated, once for each class that a picture has: pictures do not meet in
        the network, so that each may ask for a class of its own, and a batch takes as many passes as the picture with
        the most labels.

        Args:
            images: ``[B, 3, H, W]``, as of :meth:`encode`.
            prototypes: ``[C, E]``, of texts or learnt, of unit length.
            background: ``[K, E]``, what takes part in the softmax without a map.
            labels: ``[B, C]``; maps of absent classes are 0, and take no time.
            pooling: As of :meth:`encode`.

        Returns:
            ``[B, C, h, w]`` of at least 0, float32, without gradient.

        Raises:
            ValueError: Wrong shapes, sides that are no multiples of the patch.
        """
        me = "FrozenCLIP.grad_cam"
        tower = self._tower
        grid, width = self._check(me, images, pooling), tower.width
        checks.shape(me, "prototypes", prototypes, ("C", width))
        every = prototypes.detach()
        if background is not None:
            checks.shape(me, "background", background, ("K", width))
            every = torch.cat([every, background.detach().to(every)])
        present = torch.ones(len(images), len(prototypes), dtype=torch.bool, device=images.device)
        if labels is not None:
            checks.shape(me, "labels", labels, present.shape, "one row per picture")
            checks.multi_hot(me, "labels", labels)
            present = (labels != 0).to(images.device)
        # Copies, as the graph may not hold what was made in inference mode.
        with torch.inference_mode(False), torch.enable_grad(), tower.watch(leaf=True) as watched:
            _, whole = self._embed(images.detach().clone(), grid, pooling)
            logits = whole @ unit(every.clone().to(whole)).T / self.temperature
        leaf = watched.leaf
        assert leaf is not None
        found = tower.spatial(leaf.detach().float(), grid)
        maps = torch.zeros(*present.shape, *grid, dtype=torch.float32, device=images.device)
        with torch.inference_mode(False):
            rows = torch.arange(len(images), device=images.device)
        most = max(present.sum(1).tolist(), default=0)
        order = present.byte().argsort(dim=1, descending=True, stable=True)
        for place, classes in enumerate(order.T[:most]):
            with torch.inference_mode(False), torch.enable_grad():
                odds = logits[rows, classes.clone()]
                if len(every) > 1:
                    odds = odds - logits.scatter(1, classes[:, None].clone(), -torch.inf).logsumexp(1)
                (slope,) = torch.autograd.grad(odds.sum(), leaf, retain_graph=place + 1 < most)
            with no_autocast(images.device):
                weights = tower.spatial(slope.float(), grid).mean((-2, -1))
                maps[rows, classes] = torch.einsum("bdhw,bd->bhw", found, weights).relu()
        return maps.masked_fill_(~present[:, :, None, None], 0)

    def _embed(self, images: Tensor, grid: Grid, pooling: Pooling) -> tuple[Tensor, Tensor]:
        """Features of the patches ``[B, E, h, w]``, and unit ones of the whole pictures ``[B, E]``, in float32."""
        tower = self._tower
        last = tower.run(images.to(self._weight.dtype))
        features = tower.spatial(tower.project(last), grid).float()
        whole = features.mean((-2, -1)) if pooling == "patches" else tower.pooled(last).float()
        return features, unit(whole)

    def _encode_texts(self, texts: Sequence[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if not new:
            return
        encode, length = getattr(self.tokenizer, "encode", None), getattr(self.tokenizer, "context_length", None)
        if encode is not None and length is not None:
            for text in new:
                if (needed := len(encode(text)) + 2) > length:
                    me = "FrozenCLIP.text_prototypes"
                    raise ValueError(f"{me}: the model reads {length} tokens, and {text!r} has {needed}; shorten it")
        device = self._weight.device
        for first in range(0, len(new), 256):
            part = new[first : first + 256]
            with torch.device("cpu"):
                tokens = self.tokenizer(part)
            found = unit(self.model.encode_text(tokens.to(device)).float())
            self._texts.update(zip(part, found, strict=True))

    def _check(self, me: str, images: Tensor, pooling: str) -> Grid:
        """The patches of the pictures' sides."""
        checks.shape(me, "images", images, ("B", 3, "H", "W"))
        checks.choice(me, "pooling", pooling, get_args(Pooling))
        (height, width), patch = images.shape[-2:], self._tower.patch
        if min(height, width) < patch or height % patch or width % patch:
            raise ValueError(
                f"{me}: the sides of images must be multiples of the patch's {patch} pixels, got "
                f"{(height, width)}; prepare(image) sees to it"
            )
        return height // patch, width // patch


def _near(name: str, names: Sequence[str]) -> str:
    return checks.near_names(name, names, cutoff=0.3) or ", ".join(names[:5]) or "none at all"
