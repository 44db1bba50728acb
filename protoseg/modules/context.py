"""ContextPrototypeBank: context prototype-aware learning (CPAL, arXiv 2403.07630)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.functional import (
    Metric,
    cosine_map,
    dot_map,
    margin_map,
    masked_average_pooling,
    max_normalize,
    mean_direction,
    metric_scale,
    positiveness,
    select_top_k,
    similarity,
    weighted_mean,
    with_background,
)
from protoseg.metrics import RegionContrast
from protoseg.modules.base import PrototypeModule, computed_again
from protoseg.modules.statistics import from_space, to_space
from protoseg.modules.support_bank import BankState, Statistics, SupportBank
from protoseg.utils import checks, distributed
from protoseg.utils.numeric import full_precision, no_autocast, unit

__all__ = ["Background", "ContextPrototypeBank", "ContextPrototypes", "Detach", "Locate", "MapContrast", "Score"]

Background = Literal["contexts", "image", "one_minus_max"]
Detach = Literal["pacam", "cam", "none"]
Locate = Literal["map", "cam"]
Score = Literal["diagonal", "whitened", "dot", "cosine"]
_STATISTICS: dict[Score, Statistics] = {
    "diagonal": "variance",
    "whitened": "covariance",
    "dot": "mean",
    "cosine": "none",
}


class ContextPrototypes(NamedTuple):
    """What :class:`ContextPrototypeBank` returns; the class axis ``C`` counts foreground only.

    Attributes:
        loss: ``[]``, the self-supervised loss; zero and connected to the graph where nothing is present. float32
            (float64 of float64 features); all other floating point tensors have the dtype of the features.
        pacam: ``[B, C+1, H, W]`` in ``[0, 1]``, the prototype-aware map, background in front; absent classes are 0.
        cam: ``[B, C+1, H, W]`` in ``[0, 1]``, the normalized CAM that ``pacam`` was compared with.
        instances: ``[B, C, D]`` instance prototypes; 0 where not valid.
        valid: ``[B, C]`` bool: the class is present and its CAM has a pixel above the threshold.
        positiveness: ``[B, C, k]`` weights of the selected contexts, largest first; 0 = nothing selected.
        selected: ``[B, C, k]`` int64 indices into ``contexts[c]``; -1 = nothing selected. A class without contexts
            is served by its own instance: positiveness 1, selected -1, in the first place.
        shift: ``[C, D]``, mean context minus mean instance of each class.
    """

    loss: Tensor
    pacam: Tensor
    cam: Tensor
    instances: Tensor
    valid: Tensor
    positiveness: Tensor
    selected: Tensor
    shift: Tensor


class MapContrast(NamedTuple):
    """How well CAM and PACAM part what a network sees, by :class:`protoseg.metrics.RegionContrast`; no masks are used.

    Attributes:
        cam: The best of all thresholds for the CAM, 0..1; NaN without a picture of a class.
        pacam: Likewise for PACAM.
    """

    cam: float
    pacam: float


class _Space(NamedTuple):
    """The state before the update, in the space of step 3."""

    contexts: Tensor  # [R, K, D], around the origin
    exists: Tensor  # [R, K] bool
    shift: Tensor  # [R, D]
    origin: Tensor  # [D], what centering subtracts
    factor: Tensor  # of the space, see protoseg.modules.statistics


class _Seen(NamedTuple):
    """What the update needs of a batch."""

    features: Tensor  # [B, D, H, W]
    cam: Tensor  # [B, C, H, W], normalized, absent classes 0
    maps: Tensor  # [B, C, H, W], PACAM likewise
    present: Tensor  # [B, C] bool
    valid: Tensor  # [B, C] bool
    known: Tensor  # [C] bool, the classes that have contexts
    pixels: Tensor | None  # [B, H, W] bool, those of the picture


class ContextPrototypeBank(PrototypeModule):
    r"""A memory of instance prototypes that turns a CAM into a prototype-aware CAM and a loss between the two.

    For each present class :math:`n` of an image with features :math:`F` and max-normalized CAM :math:`M`
    (:func:`protoseg.functional.max_normalize`: its maximum counts as a constant in the gradient):

    1. Instance prototype: :math:`P_n` = mean of :math:`F(j)` over the pixels with :math:`M_n(j) > \tau`; a class
       without such a pixel is not valid. Background's is the mean over the pixels where no present class reaches
       ``background_threshold``.
    2. Support bank: per class a ring with the last ``capacity`` instances of all ranks, clustered by k-means into
       ``num_contexts`` context prototypes :math:`p_i` every ``refresh_every`` steps. With ``background="contexts"``
       background has a ring too, for images all of whose present classes are valid. What is stored is the mean over
       the pixels of ``locate``: of the map of step 7 where the class has contexts, else of the CAM.
    3. Space: features, contexts and instances are seen from the mean :math:`\mu` of all pixels, and every channel is
       divided by its deviation, :math:`F_d \to (F_d - \mu_d) / \sqrt{\sigma_d^2 + \lambda \bar\sigma^2}` with the mean
       variance :math:`\bar\sigma^2`; see ``score`` for others.
    4. Alignment: :math:`a_n = P_n + \delta_n` with :math:`\delta_n = \bar p - \bar P_n` (section 3.3).
    5. Positiveness: :math:`w_i = \mathrm{softmax}_i(\mathrm{sim}(a_n, p_i) / T z)`, of which the ``top_k`` stay;
       :math:`z` is :func:`protoseg.functional.metric_scale` of all contexts, which frees :math:`T` of their scale. All
       of background's contexts stay.
    6. Score: :math:`s_n(j) = \sum_i w_i \langle F(j), p_i\rangle / \sum_i w_i`. A class without contexts has
       :math:`\langle F(j), P_n\rangle`; for background without an instance all its contexts weigh the same.
    7. PACAM: :math:`\tilde M_n` is :math:`\mathrm{ReLU}(s_n - \beta s_0)` divided by its maximum over the image, to the
       power of ``exponent``.
    8. Loss: :math:`L_{self} = \frac{1}{N + 1} \|M - \tilde M\|_1` over the image's :math:`N` valid classes and
       background, as a mean over pixels and images (section 3.4); an image without a valid class adds 0.

    With :math:`w` fixed, :math:`\beta = 1` and one covariance for all, :math:`s_n - s_0` is the log odds of two
    Gaussians but for a constant: the bank is a mixture model, and ``locate="map"`` its repeated estimate.

    There is no published code. **The paper** scores by cosine (step 6), without step 3, :math:`s_0` or ``locate``: that
    is :meth:`paper`. On pretrained networks its map is below the CAM (``docs/cpal.md``), as a cosine throws away the
    length of a feature. Not stated there: :math:`\tau`, the number of contexts, ``top_k``, the temperature and
    :math:`z`, the clustering, the schedule and the detaching. Only ``capacity`` (1000; the paper does not say if in
    all or per class) and ``metric`` come from the paper, which also projects the features first: pass projected
    features to do so. The defaults were chosen on the train and val pictures of a part of PASCAL VOC and of MSRC-15.

    :math:`\delta_n` is nearly 0 where contexts are the centers of the very ring whose mean is subtracted.

    In ``train()`` a call first computes from the state that was and then stores this batch's instances; in ``eval()``
    it changes nothing. All state is in buffers. Under DDP every rank must pass as many images as the others; each
    writes the same state, so ``DistributedDataParallel(..., broadcast_buffers=False)`` saves sending it.

    Args:
        num_classes: ``C``, foreground classes.
        dim: ``D``, channels of the features.
        capacity: Instances kept per class, at least the number of contexts made of them.
        num_contexts: Context prototypes per class. With up to 300 pictures a class, one was best or as good. With one,
            ``top_k``, ``metric`` and ``temperature`` matter for background alone, and :math:`\delta_n` is 0.
        background_contexts: Contexts of background.
        top_k: Contexts that make the map, 1 to ``num_contexts``; by default all.
        cam_threshold: :math:`\tau` in ``[0, 1)`` on the max-normalized CAM.
        background_threshold: Pixels where every present class's normalized map is below it, in ``(0, 1]``, are
            background.
        metric: Similarity for the positiveness: ``"dot"``, ``"cosine"``, ``"l1"`` or ``"l2"``.
        temperature: :math:`T` above 0, in units of :math:`z`. The default was chosen for background's contexts, with
            one context a class.
        shift: Align instances with contexts (step 4).
        score: ``"diagonal"`` as above; ``"whitened"``, by the factor of the whole covariance,
            :math:`F \to L^{-1}(F - \mu)` with :math:`L L^\top = \Sigma + \lambda \bar\sigma^2 I`, which keeps ``2 D^2``
            numbers (0.6 MB for 256 channels, 34 MB for 2048); ``"dot"``, only the mean is subtracted; ``"cosine"``,
            :math:`\cos(F(j), p_i)` in step 6, see ``center`` and ``sharpness``.
        shrinkage: :math:`\lambda` above 0 of step 3.
        background: What :math:`s_0` is: ``"contexts"``, the score of background, a class with a bank of its own;
            ``"image"``, that of the image's own background prototype; ``"one_minus_max"``, nothing. The background
            channel of a map is :math:`1 - \max_n \tilde M_n` in each case.
        background_weight: :math:`\beta`, at least 0.
        exponent: In (0, 1]. Below 1 the map reaches its middle values sooner; which pixel ranks before which stays. At
            0.5 one half is a good threshold, and the map a target that is wider than the CAM. Not for ``"cosine"`` with
            a background, whose middle is one half anyway.
        locate: Where the stored instances are: ``"map"``, before ``exponent``, or ``"cam"``, see step 2.
        center: Subtract a point in step 3: :math:`\mu`, or for ``"cosine"``, and there only with
            ``background="contexts"``, that half way between the mean class instance and the mean background instance.
        sharpness: :math:`\kappa` above 0, for ``"cosine"``: with a background, :math:`\tilde M_n` is then
            :math:`\mathrm{clamp}(\kappa (s_n - \beta s_0) + 1/2, 0, 1)`, see :func:`protoseg.functional.margin_map`.
        refresh_every: Steps between two clusterings, the first of which is in the first step.
        half_life: Pictures after which a picture counts half in :math:`\mu` and :math:`\Sigma`, above 0; features
            change while a network learns.
        detach: Where the loss sends no gradient: ``"pacam"`` (it is a target for the CAM, and ``features`` get no
            gradient), ``"cam"`` or ``"none"``.
        check_values: Whether to look for NaN, infinity and labels other than 0 and 1, which waits for the device. By
            default on the CPU only. Never while compiling. What is not finite is never stored.
        device: Where the state lives.

    Shape:
        - features: ``[B, D, H, W]``
        - cam: ``[B, C, h, w]`` raw scores; resized to ``H W``, bilinearly
        - labels: ``[B, C]`` multi-hot, any dtype
        - valid: ``[B, h, w]`` bool, False where a picture was padded: no instance, no statistics, no loss; optional
        - output: :class:`ContextPrototypes`

    Raises:
        ValueError: Sizes or options out of range, wrong shapes or devices, values that are not finite, labels that are
            neither 0 nor 1.
        TypeError: Something is no tensor, or features or CAM are not floating point.
        RuntimeError: A ``state_dict`` of another size.

    Example:
        >>> bank = ContextPrototypeBank(num_classes=3, dim=8, capacity=16, num_contexts=2)
        >>> features, cam = torch.rand(4, 8, 16, 16), torch.rand(4, 3, 16, 16, requires_grad=True)
        >>> out = bank(features, cam, torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 0]]))
        >>> out.loss.backward()
        >>> out.pacam.shape, bank.stored.tolist()
        (torch.Size([4, 4, 16, 16]), [1, 2, 1, 3])
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        capacity: int = 1000,
        num_contexts: int = 1,
        background_contexts: int = 10,
        top_k: int | None = None,
        cam_threshold: float = 0.4,
        background_threshold: float = 0.3,
        metric: Metric = "dot",
        temperature: float = 0.03,
        shift: bool = True,
        score: Score = "diagonal",
        shrinkage: float = 0.5,
        background: Background = "contexts",
        background_weight: float = 1.0,
        exponent: float = 0.5,
        locate: Locate = "map",
        center: bool = True,
        sharpness: float = 3.0,
        refresh_every: int = 10,
        half_life: float = 1000.0,
        detach: Detach = "pacam",
        check_values: bool | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(check_values)
        me = type(self).__name__
        top_k = num_contexts if top_k is None else top_k
        for name, value in {
            "num_classes": num_classes,
            "dim": dim,
            "num_contexts": num_contexts,
            "background_contexts": background_contexts,
            "temperature": temperature,
            "shrinkage": shrinkage,
            "sharpness": sharpness,
            "refresh_every": refresh_every,
            "half_life": half_life,
        }.items():
            checks.positive(me, name, value)
        checks.between(me, "cam_threshold", cam_threshold, 0, 1, high_open=True)
        checks.between(me, "background_threshold", background_threshold, 0, 1, low_open=True)
        checks.between(me, "exponent", exponent, 0, 1, low_open=True)
        checks.between(me, "background_weight", background_weight, 0)
        checks.choice(me, "metric", metric, get_args(Metric))
        checks.choice(me, "score", score, get_args(Score))
        checks.choice(me, "background", background, get_args(Background))
        checks.choice(me, "locate", locate, get_args(Locate))
        checks.choice(me, "detach", detach, get_args(Detach))
        if not 1 <= top_k <= num_contexts:
            raise ValueError(
                f"{me}: top_k must lie between 1 and num_contexts={num_contexts}, got {top_k}; "
                "lower top_k or raise num_contexts"
            )
        most = max(num_contexts, background_contexts if background == "contexts" else 0)
        if capacity < most:
            raise ValueError(
                f"{me}: capacity must be at least {most}, the contexts that are made of a ring, "
                f"got {capacity}; raise it, or lower num_contexts or background_contexts"
            )

        self._num_classes = num_classes
        self._dim = dim
        self._background: Background = background
        self._score: Score = score
        self.top_k = top_k
        self.cam_threshold = cam_threshold
        self.background_threshold = background_threshold
        self.metric: Metric = metric
        self.temperature = temperature
        self.shift = shift
        self.background_weight = background_weight
        self.exponent = exponent
        self.locate: Locate = locate
        self.center = center
        self.sharpness = sharpness
        self.refresh_every = refresh_every
        self.half_life = half_life
        self.detach: Detach = detach
        self._told_empty = False
        self.memory = SupportBank(
            num_classes,
            dim,
            capacity=capacity,
            num_contexts=num_contexts,
            background_contexts=background_contexts if background == "contexts" else 0,
            statistics=_STATISTICS[score],
            shrinkage=shrinkage,
            device=device,
        )

    # What the memory is made for cannot be changed afterwards.

    @property
    def num_classes(self) -> int:
        """``C``."""
        return self._num_classes

    @property
    def dim(self) -> int:
        """``D``."""
        return self._dim

    @property
    def score(self) -> Score:
        """As in the constructor."""
        return self._score

    @property
    def background(self) -> Background:
        """As in the constructor."""
        return self._background

    @property
    def num_contexts(self) -> int:
        """Contexts of a class."""
        return self.memory.num_contexts

    @property
    def background_contexts(self) -> int:
        """Contexts of background; 0 where it has none."""
        return self.memory.background_contexts

    @property
    def capacity(self) -> int:
        """Instances kept per class."""
        return self.memory.capacity

    @property
    def stored(self) -> Tensor:
        """``[R]`` int64, the instances of each class and, last, of background where it has contexts."""
        return self.memory.stored

    @classmethod
    def paper(cls, num_classes: int, dim: int, **options: Any) -> ContextPrototypeBank:
        """Make the bank that is nearest to the paper's words: a cosine, no background, instances where the CAM is.

        It has three contexts a class; the paper does not state how many.

        Args:
            num_classes: ``C``.
            dim: ``D``.
            options: Further arguments, which may also change these.

        Returns:
            The bank.

        Example:
            >>> ContextPrototypeBank.paper(20, 256).score
            'cosine'
        """
        literal: dict[str, Any] = {
            "num_contexts": 3, "temperature": 0.3, "score": "cosine", "background": "one_minus_max", "exponent": 1.0,
            "locate": "cam",
        }  # fmt: skip
        return cls(num_classes, dim, **{**literal, **options})

    def forward(
        self, features: Tensor, cam: Tensor, labels: Tensor, valid: Tensor | None = None, *, store: bool = True
    ) -> ContextPrototypes:
        """Compute maps and loss; in ``train()`` then store this batch. See the class for shapes and errors.

        Args:
            features: ``[B, D, H, W]``.
            cam: ``[B, C, h, w]``.
            labels: ``[B, C]``.
            valid: ``[B, h, w]`` bool, False where a picture was padded.
            store: False leaves the state as it is, also in ``train()``: for a second view of the same pictures.
        """
        self._check(features, cam, labels, valid)
        if not self.training and self._looks_at_values(features):
            self._check_state()
        inputs = (features, cam, labels)
        again = self.training and computed_again()
        state = self._passes.recall(type(self).__name__, inputs) if again else self.memory.snapshot()

        out, seen = self._compute(features, cam, labels, valid, state)
        if self.training and not again:
            self._passes.keep(inputs, state)
        if self.training and store and not again:
            retain = 0.5 ** (len(features) * distributed.world_size() / self.half_life)
            self._store(seen, retain=retain, refresh_every=self.refresh_every)
        return out

    def _compute(
        self, features: Tensor, cam: Tensor, labels: Tensor, valid: Tensor | None, state: BankState
    ) -> tuple[ContextPrototypes, _Seen]:
        with no_autocast(features.device):
            return self._steps(features, cam, labels, valid, state)

    def _steps(
        self, features: Tensor, cam: Tensor, labels: Tensor, valid: Tensor | None, state: BankState
    ) -> tuple[ContextPrototypes, _Seen]:
        dtype, classes = features.dtype, self.num_classes
        features = full_precision(features)
        present = labels > 0
        pixels = None if valid is None else _resized_mask(valid, features)
        cam = self._normalized(cam.to(features.dtype), present, features, pixels)

        # 1. Instances: the mean feature where the CAM is sure.
        instances, sure = self._instances(features, cam, present, pixels)

        # 3. Space: what is seen from the mean of all pixels, every channel by its deviation.
        space = self._space(state, features.dtype)

        # 4 and 5. Alignment, and how much each context counts for this image.
        directions, weights, selected = self._directions(instances, sure, space)

        # 6. Scores. Features that are all zero have no direction: map and loss of such a class are 0.
        shown = sure[:, :classes] & (directions[:, :classes].detach() != 0).any(-1)
        score = cosine_map if self.score == "cosine" else dot_map
        scores = score(features, directions, space.origin)

        # 7. PACAM, with background in front, like the CAM.
        maps = self._maps(scores, pixels) * shown[:, :, None, None]
        mine, pacam = with_background(cam), with_background(self._raised(maps))

        # 8. Loss.
        out = ContextPrototypes(
            loss=self._loss(mine, pacam, shown, pixels),
            pacam=pacam.to(dtype),
            cam=mine.to(dtype),
            instances=instances[:, :classes].to(dtype),
            valid=sure[:, :classes],
            positiveness=weights[:, :classes].to(dtype),
            selected=selected[:, :classes],
            shift=state.shift[:classes].to(dtype),
        )
        known = space.exists[:classes].any(-1)
        return out, _Seen(features.detach(), cam.detach(), maps.detach(), present, out.valid, known, pixels)

    def _normalized(self, cam: Tensor, present: Tensor, features: Tensor, pixels: Tensor | None) -> Tensor:
        """The CAM in 0..1 on the features' grid; 0 for absent classes and outside the picture."""
        if cam.shape[-2:] != features.shape[-2:]:
            cam = F.interpolate(cam, features.shape[-2:], mode="bilinear", align_corners=False)
        if pixels is not None:
            cam = cam * pixels.unsqueeze(1)
        return max_normalize(cam) * present[:, :, None, None]

    def _instances(
        self, features: Tensor, maps: Tensor, present: Tensor, pixels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Means ``[B, C+1, D]`` of classes and, last, background, and which of them exist ``[B, C+1]``."""
        empty = maps.amax(1, keepdim=True) < self.background_threshold
        if pixels is not None:
            empty = empty & pixels.unsqueeze(1)
        instances, found = masked_average_pooling(features, torch.cat([maps > self.cam_threshold, empty], 1))
        return instances, found & present.any(1, keepdim=True)

    def _space(self, state: BankState, dtype: torch.dtype) -> _Space:
        """The state as step 3 sees it."""
        factor = state.factor.to(dtype)
        if not self.center or (self.score == "cosine" and self.background != "contexts"):
            origin = torch.zeros_like(state.mean, dtype=dtype)
        elif self.score == "cosine":
            origin = state.midpoint.to(dtype)
        else:
            origin = state.mean.to(dtype)
        contexts = to_space(state.contexts.to(dtype) - origin, factor)
        return _Space(contexts, state.context_valid, to_space(state.shift.to(dtype), factor), origin, factor)

    def _directions(self, instances: Tensor, valid: Tensor, space: _Space) -> tuple[Tensor, Tensor, Tensor]:
        """Weigh the contexts of every row for every image.

        Returns:
            Directions ``[B, C+1, D]`` among features; positiveness and indices of the selected contexts, ``[B, R, k]``,
            where ``R`` is ``C``, or ``C+1`` where background has contexts.
        """
        rows = len(space.contexts)
        instances = to_space(instances - space.origin, space.factor) * valid.unsqueeze(-1)

        # 4. Alignment.
        anchors = instances[:, :rows]
        if self.shift:
            anchors = anchors + space.shift

        # 5. Positiveness, of which the best stay; all of background's do.
        scores = similarity(anchors.transpose(0, 1), space.contexts, self.metric).transpose(0, 1)
        scale = metric_scale(space.contexts, space.exists, self.metric)
        share = positiveness(scores, space.exists, self.temperature * scale)
        weights, selected = select_top_k(share, self.top_k)
        kept = torch.zeros_like(share).scatter(-1, selected, weights)
        kept = torch.cat([kept[:, : self.num_classes], share[:, self.num_classes :]], 1)

        # The mean context of a row is where its map points; a row without contexts has the image's own instance.
        seen, known = valid[:, :rows, None], space.exists.any(-1, keepdim=True)
        own = instances
        average = weighted_mean
        if self.score == "cosine":
            own = unit(instances)
            average = mean_direction
        nearest = average(space.contexts, torch.where(seen, kept, space.exists))
        directions = torch.cat([torch.where(known, nearest, own[:, :rows]), own[:, rows:]], 1)

        first = torch.arange(self.top_k, device=weights.device) == 0
        weights = torch.where(known, weights, first) * seen
        selected = selected.masked_fill((weights == 0) | ~known, -1)
        return from_space(directions, space.factor), weights, selected

    def _maps(self, scores: Tensor, pixels: Tensor | None) -> Tensor:
        """Step 7 before ``exponent``: maps ``[B, C, H, W]`` in 0..1 of scores ``[B, C+1, H, W]``."""
        if pixels is not None:
            scores = scores.masked_fill(~pixels.unsqueeze(1), 0.0)
        foreground, background = torch.split(scores, [self.num_classes, 1], 1)
        background = self.background_weight * background
        if self.background == "one_minus_max":
            maps = max_normalize(foreground)
        elif self.score == "cosine":
            maps = margin_map(foreground, background, self.sharpness)
        else:
            maps = max_normalize(foreground - background)
        return maps if pixels is None else maps * pixels.unsqueeze(1)

    def _raised(self, maps: Tensor) -> Tensor:
        """Maps to the power of ``exponent``."""
        if self.exponent == 1 or (self.score == "cosine" and self.background != "one_minus_max"):
            return maps
        # At 0 a root has no slope.
        return torch.where(maps > 1e-6, maps.clamp_min(1e-6) ** self.exponent, torch.zeros_like(maps))

    def _loss(self, cam: Tensor, pacam: Tensor, shown: Tensor, pixels: Tensor | None) -> Tensor:
        """Step 8: the mean over pixels, over the maps that count, over images."""
        if self.detach == "pacam":
            pacam = pacam.detach()
        elif self.detach == "cam":
            cam = cam.detach()

        counted = torch.cat([shown.any(1, keepdim=True), shown], 1).to(cam.dtype)
        distance = (cam - pacam).abs()
        if pixels is None:
            distance = distance.mean(dim=(-2, -1))
        else:
            area = pixels.sum((-2, -1)).clamp_min(1).unsqueeze(1)
            distance = (distance * pixels.unsqueeze(1)).sum((-2, -1)) / area
        distance = distance * counted
        return (distance.sum(1) / counted.sum(1).clamp_min(1.0)).mean()

    @torch.no_grad()
    def _store(self, seen: _Seen, *, measured: bool = True, retain: float, refresh_every: int) -> None:
        """Step 2: write a batch's instances into the rings and, where asked, its pixels into the statistics."""
        features, valid, rows = seen.features, seen.valid, len(self.memory.instances)
        with no_autocast(features.device):
            located = seen.cam
            if self.locate == "map":
                located = torch.where((seen.known & valid)[:, :, None, None], seen.maps, seen.cam)
            instances, found = self._instances(features, located, seen.present, seen.pixels)

            # Around a class whose CAM shows nothing, what looks like background holds the object.
            complete = (valid == seen.present).all(1, keepdim=True)
            found = found & torch.cat([valid, complete], 1)

        instances = instances[:, :rows].to(self.memory.instances.dtype)
        found = found[:, :rows] & instances.isfinite().all(-1)
        counted = seen.present.any(1).to(features.dtype)
        if seen.pixels is not None:
            # Every picture weighs the same, however much of it is padding; and padding weighs nothing.
            counted = counted / seen.pixels.to(features.dtype).mean((-2, -1)).clamp_min(1e-6)
            features = features.masked_fill(~seen.pixels.unsqueeze(1), torch.nan)
        self.memory.store(
            instances, found, features, counted, measured=measured, retain=retain, refresh_every=refresh_every
        )

    @torch.no_grad()
    def fill(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]], *, rounds: int = 3) -> MapContrast:
        """Fill the bank anew with what a trained network sees, and find contexts; nothing is trained for it.

        Each round empties the rings, stores the instances of the pictures, the last ``capacity`` of a class, and
        clusters them. The first round takes them from where the CAM is, with ``locate="map"`` every later one from
        where the map is that the contexts before make. Mean and covariance are those of all pixels of the first round,
        but for pictures without a class. Last it compares its map with the CAM on the same pictures, and warns where
        the map is probably the worse one. After an error the bank is as it was.

        Args:
            batches: Features ``[B, D, H, W]``, CAM ``[B, C, h, w]`` and labels ``[B, C]``, as for a call; read once a
                round and once more, so a list, a loader or any object with ``__iter__``, but no generator. Shuffled
                where a class has more pictures than ``capacity``. In a process group every rank brings as many, of the
                same sizes.
            rounds: At least 1; with ``locate="cam"`` one is as good as many.

        Returns:
            How well CAM and PACAM part the features of these pictures. It also tells which options of a bank suit a
            network, for the same features.

        Raises:
            ValueError: ``rounds`` below 1, no batch, or one that a call refuses.
            TypeError: ``batches`` can be read only once.

        Warns:
            UserWarning: Nothing was stored, or the bank's map is probably the worse one.

        Example:
            >>> bank = ContextPrototypeBank(num_classes=3, dim=8, num_contexts=1)
            >>> batch = (torch.rand(4, 8, 6, 6), torch.rand(4, 3, 6, 6), torch.tensor([[1, 1, 0]] * 4))
            >>> contrast = bank.fill([batch, batch])
            >>> bank.stored.tolist(), contrast.pacam > contrast.cam
            ([8, 8, 0, 8], True)
        """
        me = f"{type(self).__name__}.fill"
        checks.positive(me, "rounds", rounds)
        if isinstance(batches, Iterator):
            raise TypeError(f"{me}: batches must be readable once a round, got a {type(batches).__name__}; pass a list")

        before = [buffer.clone() for buffer in self.buffers()]
        try:
            self.reset_parameters()
            for index in range(rounds):
                self._fill_once(batches, measured=index == 0)
            self.memory.restart_schedule(self.refresh_every)
            if not bool(self.memory.stored.any()):
                self._told_empty = True
                warnings.warn(
                    f"{me}: nothing was stored of these pictures, as they have no tags or a CAM that is above 0 for "
                    "none, so that every map is made from its picture; train the network, or see whether the tags are "
                    "in its order",
                    stacklevel=2,
                )
            return self._compare(batches)
        except BaseException:
            for buffer, old in zip(self.buffers(), before, strict=True):
                buffer.copy_(old)
            raise

    def _fill_once(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]], *, measured: bool) -> None:
        self.memory.empty_rings()
        for batch in batches:
            self._check(*batch, None)
            _, seen = self._compute(*batch, None, self.memory.snapshot())

            # Nothing fades, nothing is clustered before all is seen, and later rounds see the same pixels again.
            self._store(seen, measured=measured, retain=1.0, refresh_every=0)
        if self.memory.step == 0:
            raise ValueError(
                f"{type(self).__name__}.fill: batches must hold at least one, got none; pass what to store"
            )
        self.refresh()

    def _compare(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> MapContrast:
        cam, pacam = RegionContrast(self.num_classes), RegionContrast(self.num_classes)
        for features, scores, labels in batches:
            out, _ = self._compute(features, scores, labels, None, self.memory.snapshot())
            for index, picture in enumerate(features):
                cam.update(picture, out.cam[index, 1:], labels[index])
                pacam.update(picture, out.pacam[index, 1:], labels[index])

        found = MapContrast(cam.all_reduce().result().best[0], pacam.all_reduce().result().best[0])
        if found.pacam < found.cam:
            warnings.warn(
                f"{type(self).__name__}.fill: the bank's map parts the features of these pictures less well than the "
                f"CAM does ({found.pacam:.3f} < {found.cam:.3f}), so it is probably the worse map; keep the CAM, or "
                "try other features or options of the bank and take what parts them best",
                stacklevel=3,
            )
        return found

    def refresh(self) -> None:
        """Cluster the bank into contexts now, whatever the schedule says; for instance after filling it."""
        self.memory.refresh()

    def reset_parameters(self) -> None:
        """Empty the bank, and forget the contexts and the statistics."""
        self.memory.reset_parameters()

    def extra_repr(self) -> str:
        """Sizes and modes, as in the constructor."""
        return (
            f"num_classes={self.num_classes}, dim={self.dim}, capacity={self.capacity}, "
            f"num_contexts={self.num_contexts}, background_contexts={self.background_contexts}, top_k={self.top_k}, "
            f"metric={self.metric!r}, score={self.score!r}, background={self.background!r}, locate={self.locate!r}"
        )

    def _check(self, features: Tensor, cam: Tensor, labels: Tensor, valid: Tensor | None) -> None:
        me, classes = type(self).__name__, self.num_classes
        remedy = "construct the bank with dim = the channels of the features"
        checks.shape(me, "features", features, ("B", self.dim, "H", "W"), remedy)
        remedy = "pass the foreground classes only, one map for each picture"
        checks.shape(me, "cam", cam, (len(features), classes, "h", "w"), remedy)
        remedy = "pass the multi-hot labels of the foreground classes"
        checks.shape(me, "labels", labels, (len(features), classes), remedy)
        for name, value in (("features", features), ("cam", cam)):
            checks.floating(me, name, value)
            checks.not_empty(me, name, value)
        checks.same_aspect(me, "cam", cam, "features", features)
        if valid is not None:
            checks.shape(me, "valid", valid, (len(features), "H", "W"), "True where the picture is, not its padding")
            checks.boolean(me, "valid", valid)
            checks.same_aspect(me, "valid", valid, "features", features)
        self._same_device(self.memory.stored.device, features=features, cam=cam, labels=labels, valid=valid)

        if self._looks_at_values(features):
            checks.finite(me, "features", features)
            checks.finite(me, "cam", cam)
            checks.multi_hot(me, "labels", labels)

    def _check_state(self) -> None:
        self.memory.check_whole(type(self).__name__)
        if not self._told_empty and not bool(self.memory.context_valid.any()):
            self._told_empty = True
            warnings.warn(
                f"{type(self).__name__}: the bank is empty, so each class is served by the picture's own instance; "
                "train it, fill() it, or load a state_dict",
                stacklevel=4,
            )


def _resized_mask(valid: Tensor, features: Tensor) -> Tensor:
    """A mask ``[B, h, w]`` on the features' grid: a place counts where all of it is picture."""
    if valid.shape[-2:] == features.shape[-2:]:
        return valid
    share = F.interpolate(valid.unsqueeze(1).to(features.dtype), features.shape[-2:], mode="area")
    return share[:, 0] > 1 - 1e-3
