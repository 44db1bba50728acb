"""ContextPrototypeBank: context prototype-aware learning (CPAL, arXiv 2403.07630)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from protoseg.modules.statistics import from_space, to_space
from protoseg.modules.support_bank import Memory, refresh, snapshot, update_bank
from protoseg.utils import checks, distributed
from protoseg.utils.numeric import full_precision, unit

__all__ = ["Background", "ContextPrototypeBank", "ContextPrototypes", "Detach", "Locate", "MapContrast", "Score"]

Background = Literal["contexts", "image", "one_minus_max"]
Detach = Literal["pacam", "cam", "none"]
Locate = Literal["map", "cam"]
Score = Literal["diagonal", "whitened", "dot", "cosine"]


class ContextPrototypes(NamedTuple):
    """What :class:`ContextPrototypeBank` returns; the class axis ``C`` counts foreground only.

    Attributes:
        loss: ``[]``, the self-supervised loss; zero and connected to the graph where nothing is present. float32
            (float64 of float64 features); all other floating point tensors have the dtype of the features.
        pacam: ``[B, C+1, H, W]`` in ``[0, 1]``, the prototype-aware map, background in front; absent classes are 0.
        cam: ``[B, C+1, H, W]`` in ``[0, 1]``, the normalised CAM that ``pacam`` was compared with.
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


class _State(NamedTuple):
    """The state before the update, which changes it in place while the backward pass still needs it."""

    contexts: Tensor  # [R, K, D], in the space, around origin
    exists: Tensor  # [R, K] bool
    shift: Tensor  # [R, D], in the space
    raw_shift: Tensor  # [R, D], among features
    origin: Tensor  # [D], what centring subtracts
    factor: Tensor  # of the space, see protoseg.modules.statistics


class _Seen(NamedTuple):
    """What the update needs of a batch."""

    features: Tensor  # [B, D, H, W]
    cam: Tensor  # [B, C, H, W], normalised, absent classes 0
    maps: Tensor  # [B, C, H, W], PACAM likewise
    present: Tensor  # [B, C] bool
    valid: Tensor  # [B, C] bool
    known: Tensor  # [C] bool, the classes that have contexts


class ContextPrototypeBank(nn.Module):
    r"""A memory of instance prototypes that turns a CAM into a prototype-aware CAM and a loss between the two.

    For each present class :math:`n` of an image with features :math:`F` and max-normalised CAM :math:`M`
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

    :math:`\delta_n` is nearly 0 where contexts are the centres of the very ring whose mean is subtracted.

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
        cam_threshold: :math:`\tau` in ``[0, 1)`` on the max-normalised CAM.
        background_threshold: Pixels where every present class's normalised map is below it, in ``(0, 1]``, are
            background.
        metric: Similarity for the positiveness: ``"dot"``, ``"cosine"``, ``"l1"`` or ``"l2"``.
        temperature: :math:`T` above 0, in units of :math:`z`. The default was chosen for background's contexts, with
            one context a class.
        shift: Align instances with contexts (step 4).
        score: ``"diagonal"`` as above; ``"whitened"``, by the factor of the whole covariance,
            :math:`F \to L^{-1}(F - \mu)` with :math:`L L^\top = \Sigma + \lambda \bar\sigma^2 I`, which keeps ``2 D^2``
            numbers (0.6 MB for 256 channels, 34 MB for 2048); ``"dot"``, only the mean is subtracted; ``"cosine"``,
            :math:`\cos(F(j), p_i)` in step 6, see ``centre`` and ``sharpness``.
        shrinkage: :math:`\lambda` above 0 of step 3.
        background: What :math:`s_0` is: ``"contexts"``, the score of background, a class with a bank of its own;
            ``"image"``, that of the image's own background prototype; ``"one_minus_max"``, nothing. The background
            channel of a map is :math:`1 - \max_n \tilde M_n` in each case.
        background_weight: :math:`\beta`, at least 0.
        exponent: In (0, 1]. Below 1 the map reaches its middle values sooner; which pixel ranks before which stays. At
            0.5 one half is a good threshold, and the map a target that is wider than the CAM. Not for ``"cosine"`` with
            a background, whose middle is one half anyway.
        locate: Where the stored instances are: ``"map"``, before ``exponent``, or ``"cam"``, see step 2.
        centre: Subtract a point in step 3: :math:`\mu`, or for ``"cosine"``, and there only with
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
        >>> out.pacam.shape, bank.count.tolist()
        (torch.Size([4, 4, 16, 16]), [1, 2, 1, 3])
    """

    bank: Tensor
    pointer: Tensor
    count: Tensor
    contexts: Tensor
    context_valid: Tensor
    shift: Tensor
    midpoint: Tensor
    weight: Tensor
    mean: Tensor
    covariance: Tensor
    factor: Tensor
    step: Tensor

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
        centre: bool = True,
        sharpness: float = 3.0,
        refresh_every: int = 10,
        half_life: float = 1000.0,
        detach: Detach = "pacam",
        check_values: bool | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        me = type(self).__name__
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
        if not 0 <= cam_threshold < 1:
            raise ValueError(f"{me}: cam_threshold must be at least 0 and below 1, got {cam_threshold}")
        if not 0 < background_threshold <= 1:
            raise ValueError(f"{me}: background_threshold must be above 0 and at most 1, got {background_threshold}")
        if not background_weight >= 0:
            raise ValueError(f"{me}: background_weight must be at least 0, got {background_weight}")
        if not 0 < exponent <= 1:
            raise ValueError(f"{me}: exponent must be above 0 and at most 1, got {exponent}")
        checks.choice(me, "metric", metric, get_args(Metric))
        checks.choice(me, "score", score, get_args(Score))
        checks.choice(me, "background", background, get_args(Background))
        checks.choice(me, "locate", locate, get_args(Locate))
        checks.choice(me, "detach", detach, get_args(Detach))
        top_k = num_contexts if top_k is None else top_k
        if not 1 <= top_k <= num_contexts:
            raise ValueError(
                f"{me}: top_k must lie between 1 and num_contexts={num_contexts}, got {top_k}; "
                "lower top_k or raise num_contexts"
            )
        self._sizes = (num_contexts, background_contexts if background == "contexts" else 0)
        if capacity < max(self._sizes):
            raise ValueError(
                f"{me}: capacity must be at least {max(self._sizes)}, the contexts that are made of a ring, "
                f"got {capacity}; raise it, or lower num_contexts or background_contexts"
            )

        self.num_classes, self.dim, self.capacity = num_classes, dim, capacity
        self.num_contexts, self.background_contexts, self.top_k = num_contexts, background_contexts, top_k
        self.cam_threshold, self.background_threshold = cam_threshold, background_threshold
        self.metric: Metric = metric
        self.temperature, self.align, self.sharpness = temperature, shift, sharpness
        self.score: Score = score
        self.shrinkage, self.background_weight, self.exponent = shrinkage, background_weight, exponent
        self.background: Background = background
        self.locate: Locate = locate
        self.centred = centre and (score != "cosine" or background == "contexts")
        self.refresh_every, self.half_life = refresh_every, half_life
        self.detach: Detach = detach
        self.check_values = check_values

        # Background has the last row, so that the others are numbered as the labels are.
        rows, most = num_classes + (background == "contexts"), max(self._sizes)
        square = {"whitened": (dim, dim), "diagonal": (dim,)}.get(score, (0,))
        self.register_buffer("bank", torch.zeros(rows, capacity, dim, device=device))
        self.register_buffer("pointer", torch.zeros(rows, dtype=torch.long, device=device))
        self.register_buffer("count", torch.zeros(rows, dtype=torch.long, device=device))
        self.register_buffer("contexts", torch.zeros(rows, most, dim, device=device))
        self.register_buffer("context_valid", torch.zeros(rows, most, dtype=torch.bool, device=device))
        self.register_buffer("shift", torch.zeros(rows, dim, device=device))
        self.register_buffer("midpoint", torch.zeros(dim, device=device))
        self.register_buffer("weight", torch.zeros((), device=device))
        self.register_buffer("mean", torch.zeros(dim, device=device))
        self.register_buffer("covariance", torch.zeros(square, device=device))
        self.register_buffer("factor", torch.zeros(square, device=device))
        self.register_buffer("step", torch.zeros((), dtype=torch.long, device=device))
        self.reset_parameters()

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

    def forward(self, features: Tensor, cam: Tensor, labels: Tensor) -> ContextPrototypes:
        """Compute maps and loss; in ``train()`` then store this batch. See the class for shapes and errors."""
        out, seen = self._compute(features, cam, labels)
        if self.training:
            retain = 0.5 ** (len(features) * distributed.world_size() / self.half_life)
            self._store(seen, measure=True, retain=retain, refresh_every=self.refresh_every)
        return out

    def _compute(self, features: Tensor, cam: Tensor, labels: Tensor) -> tuple[ContextPrototypes, _Seen]:
        self._check(features, cam, labels)
        with torch.autocast(features.device.type, enabled=False):
            return self._compute_in_full_precision(features, cam, labels)

    def _compute_in_full_precision(
        self, features: Tensor, cam: Tensor, labels: Tensor
    ) -> tuple[ContextPrototypes, _Seen]:
        dtype, present, classes = features.dtype, labels.bool(), self.num_classes
        features = full_precision(features)
        cam = cam.to(features.dtype)
        if cam.shape[-2:] != features.shape[-2:]:
            cam = F.interpolate(cam, features.shape[-2:], mode="bilinear", align_corners=False)
        cam = max_normalize(cam) * present[:, :, None, None]

        # 1. Instances: the mean feature where the CAM is sure.
        instances, valid = self._instances(features, cam, present)

        # 3 to 6. Scores, under the state before this batch.
        state = self._snapshot(features.dtype)
        directions, weights, selected = self._directions(instances, valid, state)
        # Features that are all zero have no direction: map and loss of such a class are 0.
        shown = valid[:, :classes] & (directions[:, :classes].detach() != 0).any(-1)
        scores = (cosine_map if self.score == "cosine" else dot_map)(features, directions, state.origin)

        # 7. Maps, with background in front.
        maps = self._maps(scores) * shown[:, :, None, None]
        mine, pacam = with_background(cam), with_background(self._raise(maps))

        # 8. Loss.
        out = ContextPrototypes(
            loss=self._loss(mine, pacam, shown),
            pacam=pacam.to(dtype),
            cam=mine.to(dtype),
            instances=instances[:, :classes].to(dtype),
            valid=valid[:, :classes],
            positiveness=weights[:, :classes].to(dtype),
            selected=selected[:, :classes],
            shift=state.raw_shift[:classes].to(dtype),
        )
        known = state.exists[:classes].any(-1)
        return out, _Seen(features.detach(), cam.detach(), maps.detach(), present, out.valid, known)

    def _instances(self, features: Tensor, maps: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Means ``[B, C+1, D]`` of classes and, last, background, and which of them exist ``[B, C+1]``."""
        empty = maps.amax(1, keepdim=True) < self.background_threshold
        instances, valid = masked_average_pooling(features, torch.cat([maps > self.cam_threshold, empty], 1))
        return instances, valid & present.any(1, keepdim=True)

    def _snapshot(self, dtype: torch.dtype) -> _State:
        buffers = (self.contexts, self.context_valid, self.shift, self.midpoint, self.mean, self.factor)
        contexts, exists, shift, midpoint, mean, factor = snapshot(*buffers)
        contexts, shift, factor = contexts.to(dtype), shift.to(dtype), factor.to(dtype)
        origin = (midpoint if self.score == "cosine" else mean).to(dtype) * self.centred
        return _State(to_space(contexts - origin, factor), exists, to_space(shift, factor), shift, origin, factor)

    def _directions(self, instances: Tensor, valid: Tensor, state: _State) -> tuple[Tensor, Tensor, Tensor]:
        """Weigh the contexts of every row for every image.

        Returns:
            Directions ``[B, C+1, D]`` among features; positiveness and indices of the selected contexts, ``[B, R, k]``,
            where ``R`` is ``C``, or ``C+1`` where background has contexts.
        """
        rows = len(state.contexts)
        instances = to_space(instances - state.origin, state.factor) * valid.unsqueeze(-1)
        anchors = instances[:, :rows] + state.shift if self.align else instances[:, :rows]

        scores = similarity(anchors.transpose(0, 1), state.contexts, self.metric).transpose(0, 1)
        scale = metric_scale(state.contexts, state.exists, self.metric)
        share = positiveness(scores, state.exists, self.temperature * scale)
        weights, selected = select_top_k(share, self.top_k)
        kept = torch.zeros_like(share).scatter(-1, selected, weights)
        kept = torch.cat([kept[:, : self.num_classes], share[:, self.num_classes :]], 1)

        seen, known = valid[:, :rows, None], state.exists.any(-1, keepdim=True)
        average = mean_direction if self.score == "cosine" else weighted_mean
        nearest = average(state.contexts, torch.where(seen, kept, state.exists))
        own = unit(instances) if self.score == "cosine" else instances
        directions = torch.cat([torch.where(known, nearest, own[:, :rows]), own[:, rows:]], 1)

        first = torch.arange(self.top_k, device=weights.device) == 0
        weights = torch.where(known, weights, first) * seen
        selected = selected.masked_fill((weights == 0) | ~known, -1)
        return from_space(directions, state.factor), weights, selected

    def _maps(self, scores: Tensor) -> Tensor:
        foreground, background = torch.split(scores, [self.num_classes, 1], 1)
        if self.background == "one_minus_max":
            return max_normalize(foreground)
        background = self.background_weight * background
        if self.score == "cosine":
            return margin_map(foreground, background, self.sharpness)
        return max_normalize(foreground - background)

    def _raise(self, maps: Tensor) -> Tensor:
        if self.exponent == 1 or (self.score == "cosine" and self.background != "one_minus_max"):
            return maps
        # At 0 a root has no slope.
        return torch.where(maps > 1e-6, maps.clamp_min(1e-6) ** self.exponent, torch.zeros_like(maps))

    def _loss(self, cam: Tensor, pacam: Tensor, shown: Tensor) -> Tensor:
        if self.detach == "pacam":
            pacam = pacam.detach()
        elif self.detach == "cam":
            cam = cam.detach()
        counted = torch.cat([shown.any(1, keepdim=True), shown], 1).to(cam.dtype)
        distance = (cam - pacam).abs().mean(dim=(-2, -1)) * counted
        return (distance.sum(1) / counted.sum(1).clamp_min(1.0)).mean()

    @torch.no_grad()
    def _store(self, seen: _Seen, *, measure: bool, retain: float, refresh_every: int) -> None:
        """Write a batch's instances into the rings and, where asked, its pixels into the statistics."""
        features, valid, rows = seen.features, seen.valid, len(self.bank)
        with torch.autocast(features.device.type, enabled=False):
            located = seen.cam
            if self.locate == "map":
                located = torch.where((seen.known & valid)[:, :, None, None], seen.maps, seen.cam)
            instances, found = self._instances(features, located, seen.present)

            # Around a class whose CAM shows nothing, what looks like background holds the object.
            complete = (valid == seen.present).all(1, keepdim=True)
            found = found & torch.cat([valid, complete], 1)

        instances = instances[:, :rows].to(self.bank.dtype)
        found = found[:, :rows] & instances.isfinite().all(-1)
        counted = seen.present.any(1)
        settings = (measure and self.score != "cosine", retain, refresh_every, self.shrinkage, *self._sizes)
        update_bank(instances, found, features, counted, *self._memory(), self.step, *settings)

    def _memory(self) -> Memory:
        rings = (self.bank, self.pointer, self.count)
        found = (self.contexts, self.context_valid, self.shift, self.midpoint)
        return Memory(*rings, *found, self.weight, self.mean, self.covariance, self.factor)

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

        Example:
            >>> bank = ContextPrototypeBank(num_classes=3, dim=8, num_contexts=1)
            >>> batch = (torch.rand(4, 8, 6, 6), torch.rand(4, 3, 6, 6), torch.tensor([[1, 1, 0]] * 4))
            >>> contrast = bank.fill([batch, batch])
            >>> bank.count.tolist(), contrast.pacam > contrast.cam
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
                self._fill_once(batches, measure=index == 0)
            return self._compare(batches)
        except BaseException:
            for buffer, old in zip(self.buffers(), before, strict=True):
                buffer.copy_(old)
            raise

    def _fill_once(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]], *, measure: bool) -> None:
        self.pointer.zero_()
        self.count.zero_()
        for batch in batches:
            _, seen = self._compute(*batch)
            # Nothing fades, nothing is clustered before all is seen, and later rounds see the same pixels again.
            self._store(seen, measure=measure, retain=1.0, refresh_every=0)
        if self.step == 0:
            raise ValueError(
                f"{type(self).__name__}.fill: batches must hold at least one, got none; pass what to store"
            )
        self.refresh()
        self.step.zero_()

    def _compare(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> MapContrast:
        cam, pacam = RegionContrast(self.num_classes), RegionContrast(self.num_classes)
        for features, scores, labels in batches:
            out, _ = self._compute(features, scores, labels)
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
        refresh(self._memory(), self.shrinkage, *self._sizes)

    def reset_parameters(self) -> None:
        """Empty the bank, and forget the contexts and the statistics."""
        for buffer in self.buffers():
            buffer.zero_()
        if self.factor.dim() == 2:
            self.factor.fill_diagonal_(1.0)
        else:
            self.factor.fill_(1.0)

    def extra_repr(self) -> str:
        """Sizes and modes, as in the constructor."""
        return (
            f"num_classes={self.num_classes}, dim={self.dim}, capacity={self.capacity}, "
            f"num_contexts={self.num_contexts}, background_contexts={self.background_contexts}, top_k={self.top_k}, "
            f"metric={self.metric!r}, score={self.score!r}, background={self.background!r}, locate={self.locate!r}"
        )

    def _check(self, features: Tensor, cam: Tensor, labels: Tensor) -> None:
        me, classes = type(self).__name__, self.num_classes
        remedy = "construct the bank with dim = the channels of the features"
        checks.shape(me, "features", features, ("B", self.dim, "H", "W"), remedy)
        remedy = "pass the foreground classes only, one map for each picture"
        checks.shape(me, "cam", cam, (len(features), classes, "h", "w"), remedy)
        remedy = "pass the multi-hot labels of the foreground classes"
        checks.shape(me, "labels", labels, (len(features), classes), remedy)
        checks.floating(me, "features", features)
        checks.floating(me, "cam", cam)
        checks.not_empty(me, "features", features)
        checks.not_empty(me, "cam", cam)
        for name, value in (("features", features), ("cam", cam), ("labels", labels)):
            checks.device(me, name, value, self.bank.device)
        wanted = features.device.type == "cpu" if self.check_values is None else self.check_values
        if wanted and not torch.compiler.is_compiling():
            checks.finite(me, "features", features)
            checks.finite(me, "cam", cam)
            checks.multi_hot(me, "labels", labels)

    def _apply(self, fn: Any, recurse: bool = True) -> ContextPrototypeBank:
        """Move the module, but keep sums over all pixels in full precision in a bank of half precision."""
        names = ("weight", "mean", "covariance", "factor")
        before = {name: self._buffers[name] for name in names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = full_precision(old).to(new.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        me = type(self).__name__
        theirs, weight = state_dict.get(prefix + "covariance"), state_dict.get(prefix + "weight")
        if prefix + "bank" in state_dict and (theirs is None or weight is None):
            raise RuntimeError(
                f"{me}: the state_dict is of a bank that kept no mean and covariance of pixels; fill a new one"
            )
        if theirs is not None and theirs.shape != self.covariance.shape:
            raise RuntimeError(
                f"{me}: the state_dict's covariance is {tuple(theirs.shape)} and this module's is "
                f"{tuple(self.covariance.shape)}; construct the module with the score and dim that the checkpoint was "
                "made with"
            )
        filled = state_dict.get(prefix + "context_valid")
        used = filled is not None and bool(filled.any())
        if used and weight is not None and bool(weight > 0) != (self.score != "cosine"):
            kept = "no " if self.score != "cosine" else ""
            raise RuntimeError(
                f"{me}: the state_dict has {kept}statistics of pixels, which does not go with score={self.score!r}; "
                "construct the module with the score that the checkpoint was made with"
            )
        for name, axis in (("bank", "capacity"), ("contexts", "most contexts")):
            theirs, mine = state_dict.get(prefix + name), getattr(self, name)
            if theirs is not None and theirs.shape != mine.shape:
                raise RuntimeError(
                    f"{type(self).__name__}: the state_dict's {name} is {tuple(theirs.shape)} and this module's is "
                    f"{tuple(mine.shape)}, as (classes and background, {axis}, dim); construct the module with the "
                    "sizes and the background that the checkpoint was made with"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
