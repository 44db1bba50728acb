"""A frozen open_clip model as a source of prototypes, patch features and maps."""

from __future__ import annotations

import os
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from protoseg.clip import pocket
from protoseg.clip.towers import Grid, tower_of
from protoseg.models.checkpoints import is_torchscript, read_torchscript
from protoseg.models.weights import read_file
from protoseg.utils import checks
from protoseg.utils.colors import normalize
from protoseg.utils.extras import require
from protoseg.utils.numeric import no_autocast, unit

__all__ = [
    "BACKGROUND",
    "TEMPLATES",
    "Dense",
    "FrozenCLIP",
    "Pooling",
    "background_names",
    "linear_cam",
    "readable",
]

Pooling = Literal["patches", "token"]
# Sentences that a class's name is put into; the first is that of CLIP-ES.
TEMPLATES = ("a clean origami {}.", "a photo of a {}.", "a picture of a {}.", "there is a {} in the scene.")
# What pictures show beside the classes; CLIP-ES's list for VOC.
BACKGROUND = (
    *("ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea", "railway"),
    *("railroad", "keyboard", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock", "street", "valley"),
    *("bridge", "sign"),
)
# Names of VOC in which two words are one.
_COMPOUNDS = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}


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
        templates: Sentences with ``{}`` for a name; :meth:`text_prototypes` takes the first where none are given.

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
        templates: Sequence[str] = TEMPLATES,
    ) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self.visual: Any = self.model.visual
        self._tower = tower_of(self.visual)
        self.tokenizer, self.mean, self.std = tokenizer, tuple(mean), tuple(std)
        self.templates = tuple(templates)
        # Texts that were encoded, and the weights that did it, so that those of other weights are never given out.
        self._texts: dict[str, Tensor] = {}
        self._read_by: list[tuple[Tensor, int]] = []

    @classmethod
    def load(
        cls,
        name: str,
        pretrained: str | os.PathLike[str] | None = None,
        *,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        quick_gelu: bool | None = None,
    ) -> FrozenCLIP:
        """Make one of open_clip's models; nothing in a file is executed.

        Args:
            name: Such as ``"ViT-B-16"`` or ``"RN50"``, or ``"hf-hub:OWNER/NAME"`` or ``"local-dir:FOLDER"``, which
                bring their weights along.
            pretrained: A tag such as ``"openai"``, which is downloaded, or the path of a checkpoint: safetensors, a
                state dict alone or in a larger checkpoint, or one of OpenAI's own archives; random weights where not
                given.
            device: Where to.
            precision: open_clip's: ``"fp32"``, ``"fp16"``, ``"bf16"`` and others.
            quick_gelu: Whether the weights were trained with QuickGELU, as OpenAI's were. Tags and OpenAI's archives
                say it themselves. Other files do not, and a wrong activation gives wrong features without an error: of
                a file the name's own is taken, with a warning where this is not given.

        Raises:
            ImportError: open_clip is not installed.
            FileNotFoundError: The folder of ``local-dir:`` is not there.
            ValueError: There is no such model or tag, where the message lists near ones; the file holds no weights of
                the model; or its vision network is of another kind.
        """
        model, tokenizer = load_open_clip(name, pretrained, device=device, precision=precision, quick_gelu=quick_gelu)
        normalization = {key: getattr(model.visual, f"image_{key}", None) for key in ("mean", "std")}
        known = {key: value for key, value in normalization.items() if value is not None}
        return cls(model, tokenizer, **known)

    @classmethod
    def pocket(
        cls,
        network: str | nn.Module = "efficientnet-lite0",
        sentences: tuple[nn.Module, Callable[[list[str]], Tensor]] | None = None,
        *,
        device: torch.device | str = "cpu",
        stride: int = 16,
        strength: float = pocket.STRENGTH,
        temperature: float = pocket.TEMPERATURE,
    ) -> FrozenCLIP:
        """Make a small open-vocabulary model of what pip installs, without training and without a network.

        An ImageNet classifier sees, a sentence encoder reads, and ridge regression from what it reads of ImageNet's
        classes to the rows of the classifier joins them (``protoseg.clip.pocket``). It is no rival of CLIP: it has
        seen the 1000 classes of ImageNet, so it knows cats and cups but hardly people.

        Args:
            network: ``"efficientnet-lite0"``, ``"efficientnet-lite1"`` or ``"efficientnet-lite2"``, or a timm
                classifier with its ImageNet head, such as ``timm.create_model("resnet50", pretrained=True)``.
            sentences: A sentence encoder, tokens ``[n, T]`` to ``[n, D]`` of unit length, and its tokenizer; MiniLM
                where not given.
            device: Where to.
            stride: Pixels of a side of a feature's cell, of a network that is given by name.
            strength: Of the ridge.
            temperature: What cosines are divided by.

        Raises:
            ImportError: A package of the extra ``pocket`` is not installed.
            ValueError: A file is not the one that was published, or the network's head is not linear.
        """
        model, tokenizer, colors = pocket.build(
            network, sentences, stride=stride, strength=strength, temperature=temperature
        )
        return cls(model, tokenizer, templates=pocket.POCKET_TEMPLATES, **colors).to(device)

    @property
    def temperature(self) -> float:
        """The temperature that the model was trained with: what its cosines are divided by."""
        return 1 / float(self.model.logit_scale.exp())

    @property
    def blocks(self) -> int:
        """How many blocks, or stages of a convolutional network, :meth:`encode` knows."""
        return len(self._tower.blocks)

    @property
    def patch(self) -> int:
        """What the sides of pictures are multiples of, in pixels."""
        return self._tower.patch

    @property
    def attends(self) -> bool:
        """Whether patches attend to each other, as those of a vision transformer do."""
        return self._tower.attends

    @property
    def linear(self) -> bool:
        """Whether Grad-CAM follows from the features alone, by :func:`linear_cam`."""
        return self._tower.linear

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
    def text_prototypes(self, names: Sequence[str | Sequence[str]], templates: Sequence[str] | None = None) -> Tensor:
        """Embed classes by their names: the mean over names and templates; texts are encoded once.

        Args:
            names: A name per class, or several that mean the same.
            templates: Sentences with ``{}`` for the name; the model's first where not given.

        Returns:
            ``[C, E]`` of unit length, in float32.

        Raises:
            TypeError: Names or templates are one text, not several.
            ValueError: No name or template, a name twice, a template without ``{}``, or a text that is longer than
                the model reads.
        """
        me = "FrozenCLIP.text_prototypes"
        templates = self.templates[:1] if templates is None else templates
        for what, given in (("names", names), ("templates", templates)):
            if isinstance(given, str):
                raise TypeError(f"{me}: {what} must be a sequence of texts, got {given!r}; write [{given!r}]")
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
        seen: Dense | None = None,
    ) -> Tensor:
        r"""Grad-CAM of each class on the tokens before the last block's attention (CLIP-ES), or a ResNet's last map.

        With :math:`p = \mathrm{softmax}(\langle x, v \rangle / \tau)` over classes and background, tokens :math:`A_l`,
        and :math:`w_c` the mean over patches of :math:`\partial \log \tfrac{p_c}{1 - p_c} / \partial A_l`,

        .. math:: M_c(l) = \mathrm{ReLU}(\langle w_c, A_l \rangle)

        Where the network pools linearly, as the pocket model, the log-odds are a sum over places, and

        .. math:: w_c = v_c - \sum_{k \ne c} q_k v_k, \quad q_k \propto \exp(\langle x, v_k \rangle / \tau)

        needs no gradient. The length of :math:`x` counts as fixed there: its gradient takes each map's own mean away,
        after which half of every picture is background (0.31 instead of 0.42 mIoU on VOC).

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
            seen: What :meth:`encode` gave of the pictures; saves a model that pools linearly a second look at them.

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
        if tower.linear:
            seen = self.encode(images, pooling=pooling) if seen is None else seen
            maps = linear_cam(seen, every, len(prototypes), self.temperature)
            return maps.masked_fill_(~present[:, :, None, None], 0)

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
        self._forget_other_weights()
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

    def _forget_other_weights(self) -> None:
        """Drop the texts where weights have been loaded, moved or changed since."""
        now = [each.detach() for each in (*self.model.parameters(), *self.model.buffers())]
        # A tensor counts the changes in place; those of inference mode do not.
        versions = [-1 if each.is_inference() else each._version for each in now]
        before = [(each.data_ptr(), each.device, each.dtype, version) for each, version in self._read_by]
        same = before == [(a.data_ptr(), a.device, a.dtype, b) for a, b in zip(now, versions, strict=True)]
        if not same or -1 in versions:
            self._texts.clear()
        # Holding them keeps their memory from being given to others.
        self._read_by = list(zip(now, versions, strict=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenCLIP:
        self._texts.clear()
        self._read_by.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_texts": {}, "_read_by": []}

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


def readable(name: str) -> str:
    """A class's name as people write it in a sentence.

    Example:
        >>> readable("traffic_light"), readable("pottedplant"), readable("cat")
        ('traffic light', 'potted plant', 'cat')
    """
    return _COMPOUNDS.get(name, " ".join(name.replace("_", " ").split()))


def background_names(
    classes: Sequence[str | Sequence[str]], names: Sequence[str] = BACKGROUND
) -> tuple[list[str], list[str]]:
    """Background prompts without those that are classes, which would share their probability with them.

    Args:
        classes: A name per class, or several.
        names: Of what pictures show besides.

    Returns:
        The names that stay, and those that do not.

    Example:
        >>> background_names(["grass", ["car", "automobile"]], ["sky", "grass"])
        (['sky'], ['grass'])
    """
    several = [[each] if isinstance(each, str) else each for each in classes]
    taken = {readable(name).casefold() for each in several for name in each}
    kept = [name for name in names if readable(name).casefold() not in taken]
    return kept, [name for name in names if name not in kept]


@torch.no_grad()
def linear_cam(seen: Dense, every: Tensor, count: int, temperature: float) -> Tensor:
    """:meth:`FrozenCLIP.grad_cam` of a network that pools linearly, ``[B, C, h, w]``, from its features alone.

    Args:
        seen: Of the pictures.
        every: ``[C + K, E]``, prototypes of classes and of background.
        count: ``C``.
        temperature: What cosines are divided by.
    """
    with no_autocast(seen.features.device):
        vectors = unit(every.to(seen.pooled))
        logits = seen.pooled @ vectors.T / temperature

        # 1. What a class has to be told from: the others, each as probable as it is without that class.
        others = repeat(logits, "b k -> b c k", c=count).clone()
        others[:, range(count), range(count)] = -torch.inf
        shares = others.softmax(-1).nan_to_num(0)  # of one class alone there are none
        weights = vectors[:count] - shares @ vectors

        # 2. Each place's share of the log-odds.
        return torch.einsum("bce,behw->bchw", weights, seen.features).relu()


def load_open_clip(
    name: str,
    pretrained: str | os.PathLike[str] | None,
    *,
    device: torch.device | str,
    precision: str,
    quick_gelu: bool | None,
) -> tuple[Any, Any]:
    """A model of open_clip with its weights, and its tokenizer; see :meth:`FrozenCLIP.load`."""
    open_clip = require("open_clip", "FrozenCLIP.load", "clip")
    given = {"device": device, "precision": precision}

    # Names with a scheme bring configuration and weights along.
    if name.startswith(("hf-hub:", "local-dir:")):
        if pretrained is not None:
            raise ValueError(f"FrozenCLIP: {name} brings its own weights; leave out pretrained, got {pretrained!r}")
        model = open_clip.create_model(name, force_quick_gelu=bool(quick_gelu), require_pretrained=True, **given)
        return model, open_clip.get_tokenizer(name)

    if name not in (names := open_clip.list_models()):
        raise ValueError(f"FrozenCLIP: no model {name!r} in open_clip; near ones: {_near(name, names)}")
    tokenizer = open_clip.get_tokenizer(name)
    if pretrained is None:
        return open_clip.create_model(name, force_quick_gelu=bool(quick_gelu), **given), tokenizer

    if Path(pretrained).is_file():
        scripted = is_torchscript(pretrained)
        state = read_torchscript(pretrained) if scripted else read_file(Path(pretrained))
        # OpenAI's archives, and state dicts made of them, tell these numbers beside the weights.
        theirs = {"input_resolution", "context_length", "vocab_size"}
        quick = bool(quick_gelu)
        if quick_gelu is None:
            quick = scripted or theirs <= state.keys()
            if not quick and "quickgelu" not in name:
                warnings.warn(
                    f"FrozenCLIP: {pretrained} does not say whether its weights were trained with QuickGELU, and GELU "
                    "is taken; say quick_gelu=True or False",
                    UserWarning,
                    stacklevel=3,
                )
        model = open_clip.create_model(name, force_quick_gelu=quick, **given)
        weights = {key.removeprefix("module."): value for key, value in state.items() if key not in theirs}
        try:
            with tempfile.TemporaryDirectory() as folder:  # open_clip knows the forms of others, and reads files only
                torch.save(weights, Path(folder, "weights.pt"))
                open_clip.load_checkpoint(model, str(Path(folder, "weights.pt")))
        except (KeyError, RuntimeError) as error:
            found = ", ".join(list(weights)[:5])
            raise ValueError(
                f"FrozenCLIP: the tensors of {pretrained} are not those of {name}; found are {found} and others: "
                f"{textwrap.shorten(str(error), 300)}"
            ) from error
        return model, tokenizer

    tags = [tag for model, tag in open_clip.list_pretrained() if model == name]
    tag = os.fspath(pretrained)
    if tag not in tags:
        raise ValueError(f"FrozenCLIP: {tag!r} is neither a file nor a tag of {name}; near tags: {_near(tag, tags)}")
    quick = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu")) if quick_gelu is None else quick_gelu
    return open_clip.create_model(name, tag, force_quick_gelu=quick, **given), tokenizer


def _near(name: str, names: Sequence[str]) -> str:
    return checks.near_names(name, names, cutoff=0.3) or ", ".join(names[:5]) or "none at all"
