"""ContextPrototypeBank: context prototype-aware learning (CPAL, arXiv 2403.07630)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg import _checks
from protoseg._bank import refresh, snapshot, update_bank
from protoseg._numeric import unit
from protoseg.cam import with_background
from protoseg.functional import (
    Metric,
    cosine_map,
    full_precision,
    judge,
    masked_average,
    max_normalize,
    mean_direction,
    metric_scale,
    positiveness,
    select_top_k,
    similarity,
)

__all__ = ["Background", "ContextPrototypeBank", "ContextPrototypes", "Detach"]

Background = Literal["contexts", "image", "one_minus_max"]
Detach = Literal["pacam", "cam", "none"]


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


class _State(NamedTuple):
    """The state before the update, which changes it in place while the backward pass still needs it."""

    contexts: Tensor  # [R, K, D], around origin
    exists: Tensor  # [R, K] bool
    shift: Tensor  # [R, D]
    origin: Tensor  # [D], what centring subtracts


class ContextPrototypeBank(nn.Module):
    r"""A memory of instance prototypes that turns a CAM into a prototype-aware CAM and a loss between the two.

    For each present class :math:`n` of an image with features :math:`F` and max-normalised CAM :math:`M`
    (:func:`protoseg.functional.max_normalize`: its maximum counts as a constant in the gradient):

    1. Instance prototype: :math:`P_n` = mean of :math:`F(j)` over the pixels with :math:`M_n(j) > \tau`; a class
       without such a pixel is not valid. Background's is the mean over the pixels where no present class reaches
       ``background_threshold``.
    2. Support bank: per class a ring with the last ``capacity`` instances of all ranks, clustered by k-means into
       ``num_contexts`` context prototypes :math:`p_i` every ``refresh_every`` steps. With ``background="contexts"``
       background has a ring too, for images all of whose present classes are valid.
    3. Centring: the point of ``centre`` is subtracted from :math:`F`, :math:`p_i` and :math:`P_n` in what follows.
    4. Alignment: :math:`a_n = P_n + \delta_n` with :math:`\delta_n = \bar p - \bar P_n` (section 3.3).
    5. Positiveness: :math:`w_i = \mathrm{softmax}_i(\mathrm{sim}(a_n, p_i) / T z)`, of which the ``top_k`` stay;
       :math:`z` is :func:`protoseg.functional.metric_scale` of all contexts, which frees :math:`T` of their scale.
    6. Score: :math:`s_n(j) = \sum_i w_i \cos(F(j), p_i) / \sum_i w_i`. A class without contexts has
       :math:`\cos(F(j), P_n)`; for background without an instance all its contexts weigh the same.
    7. PACAM: :math:`\tilde M_n` from :math:`s_n`, see ``background``.
    8. Loss: :math:`L_{self} = \frac{1}{N + 1} \|M - \tilde M\|_1` over the image's :math:`N` valid classes and
       background, as a mean over pixels and images (section 3.4); an image without a valid class adds 0.

    There is no published code. Not in the paper, or not stated there: :math:`\tau`, the number of contexts, ``top_k``,
    the temperature and :math:`z`, the clustering, the schedule, the detaching and all of ``background="contexts"``.
    The defaults of these were chosen by measurement on the train and val pictures of MSRC-15 (``docs/cpal.md``); the
    schedule and the clustering were not tuned. Only ``capacity`` (1000; the paper does not say whether in all or per
    class) and ``metric`` come from the paper, which also projects the features first: pass projected features to do so.

    In ``train()`` a call first computes from the state that was and then stores this batch's instances; in ``eval()``
    it changes nothing. All state is in buffers. Under DDP every rank must pass as many images as the others; each
    writes the same state, so ``DistributedDataParallel(..., broadcast_buffers=False)`` saves sending it.

    Args:
        num_classes: ``C``, foreground classes.
        dim: ``D``, channels of the features.
        capacity: Instances kept per class, at least the number of contexts made of them.
        num_contexts: Context prototypes per class. Few (1 to 5) suit 10 to 30 pictures a class.
        background_contexts: Contexts of background.
        top_k: Contexts that make the map, 1 to ``num_contexts``; where fewer exist, all of them.
        cam_threshold: :math:`\tau` in ``[0, 1)`` on the max-normalised CAM.
        background_threshold: Pixels where every present class's normalised CAM is below it, in ``(0, 1]``, are
            background.
        metric: Similarity for the positiveness: ``"dot"``, ``"cosine"``, ``"l1"`` or ``"l2"``.
        temperature: :math:`T` above 0, in units of :math:`z`.
        shift: Align instances with contexts (step 4).
        background: What a class's score is judged against, on the scale of :func:`protoseg.functional.judge`:
            ``"contexts"``: the score of background, a class with a bank of its own; ``"image"``: the cosine with the
            image's own background prototype; ``"one_minus_max"``: nothing, :math:`\tilde M_n` is
            :math:`\mathrm{ReLU}(s_n)` divided by its maximum, as the CAM is. The background channel is
            :math:`1 - \max_n \tilde M_n` in each case.
        centre: Subtract the point half way between the mean class instance and the mean background instance from
            features, contexts and instances before cosines and dot products: ReLU features share a large common part
            that makes all cosines alike. Not in the paper. Only with ``background="contexts"``.
        sharpness: :math:`\kappa` of :func:`protoseg.functional.judge`, above 0.
        refresh_every: Steps between two clusterings, the first of which is in the first step.
        detach: Where the loss sends no gradient: ``"pacam"`` (it is a target for the CAM, and ``features`` get no
            gradient), ``"cam"`` or ``"none"``.
        check_values: Whether to look for NaN, infinity and labels other than 0 and 1, which waits for the device. By
            default on the CPU only. Never while compiling. Instances that are not finite are never stored.
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
        >>> bank = ContextPrototypeBank(num_classes=3, dim=8, capacity=16, num_contexts=2, top_k=1)
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
    centre: Tensor
    step: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        capacity: int = 1000,
        num_contexts: int = 3,
        background_contexts: int = 10,
        top_k: int = 3,
        cam_threshold: float = 0.4,
        background_threshold: float = 0.3,
        metric: Metric = "dot",
        temperature: float = 0.3,
        shift: bool = True,
        background: Background = "contexts",
        centre: bool = True,
        sharpness: float = 3.0,
        refresh_every: int = 10,
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
            "sharpness": sharpness,
            "refresh_every": refresh_every,
        }.items():
            _checks.positive(me, name, value)
        if not 0 <= cam_threshold < 1:
            raise ValueError(f"{me}: cam_threshold must be at least 0 and below 1, got {cam_threshold}")
        if not 0 < background_threshold <= 1:
            raise ValueError(f"{me}: background_threshold must be above 0 and at most 1, got {background_threshold}")
        _checks.choice(me, "metric", metric, get_args(Metric))
        _checks.choice(me, "background", background, get_args(Background))
        _checks.choice(me, "detach", detach, get_args(Detach))
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
        self.background: Background = background
        self.centred = centre and background == "contexts"
        self.refresh_every = refresh_every
        self.detach: Detach = detach
        self.check_values = check_values
        # Background has the last row, so that the others are numbered as the labels are.
        rows, most = num_classes + (background == "contexts"), max(self._sizes)
        self.register_buffer("bank", torch.zeros(rows, capacity, dim, device=device))
        self.register_buffer("pointer", torch.zeros(rows, dtype=torch.long, device=device))
        self.register_buffer("count", torch.zeros(rows, dtype=torch.long, device=device))
        self.register_buffer("contexts", torch.zeros(rows, most, dim, device=device))
        self.register_buffer("context_valid", torch.zeros(rows, most, dtype=torch.bool, device=device))
        self.register_buffer("shift", torch.zeros(rows, dim, device=device))
        self.register_buffer("centre", torch.zeros(dim, device=device))
        self.register_buffer("step", torch.zeros((), dtype=torch.long, device=device))

    def forward(self, features: Tensor, cam: Tensor, labels: Tensor) -> ContextPrototypes:
        """Compute maps and loss; in ``train()`` then store this batch. See the class for shapes and errors."""
        self._check(features, cam, labels)
        with torch.autocast(features.device.type, enabled=False):
            return self._forward(features, cam, labels)

    def _forward(self, features: Tensor, cam: Tensor, labels: Tensor) -> ContextPrototypes:
        dtype, present, classes = features.dtype, labels.bool(), self.num_classes
        features = full_precision(features)
        cam = cam.to(features.dtype)
        if cam.shape[-2:] != features.shape[-2:]:
            cam = F.interpolate(cam, features.shape[-2:], mode="bilinear", align_corners=False)
        cam = max_normalize(cam) * present[:, :, None, None]

        empty = cam.amax(1, keepdim=True) < self.background_threshold
        instances, valid = masked_average(features, torch.cat([cam > self.cam_threshold, empty], 1))
        valid = valid & present.any(1, keepdim=True)
        state = self._snapshot(features.dtype)
        directions, weights, selected = self._directions(instances, valid, state)
        scores = cosine_map(features, directions, state.origin)
        # Features that are all zero have no direction: map and loss of such a class are 0.
        shown = valid[:, :classes] & (directions[:, :classes].detach() != 0).any(-1)
        pacam = self._pacam(scores) * shown[:, :, None, None]

        cam, pacam = with_background(cam), with_background(pacam)
        loss = self._loss(cam, pacam, shown)
        if self.training:
            # Around a class whose CAM shows nothing, what looks like background holds the object.
            located = (valid[:, :classes] == present).all(1, keepdim=True)
            self._update(instances.detach(), torch.cat([valid[:, :classes], valid[:, classes:] & located], 1))
        return ContextPrototypes(
            loss=loss,
            pacam=pacam.to(dtype),
            cam=cam.to(dtype),
            instances=instances[:, :classes].to(dtype),
            valid=valid[:, :classes],
            positiveness=weights[:, :classes].to(dtype),
            selected=selected[:, :classes],
            shift=state.shift[:classes].to(dtype),
        )

    def _snapshot(self, dtype: torch.dtype) -> _State:
        contexts, exists, shift, centre = snapshot(self.contexts, self.context_valid, self.shift, self.centre)
        origin = centre.to(dtype) * self.centred
        return _State(contexts.to(dtype) - origin, exists, shift.to(dtype), origin)

    def _directions(self, instances: Tensor, valid: Tensor, state: _State) -> tuple[Tensor, Tensor, Tensor]:
        """Weigh the contexts of every row for every image.

        Returns:
            Directions ``[B, C+1, D]``; positiveness and indices of the selected contexts, ``[B, R, k]``, where ``R`` is
            ``C``, or ``C+1`` where background has contexts.
        """
        rows = len(state.contexts)
        instances = (instances - state.origin) * valid.unsqueeze(-1)
        anchors = instances[:, :rows] + state.shift if self.align else instances[:, :rows]
        scores = similarity(anchors.transpose(0, 1), state.contexts, self.metric).transpose(0, 1)
        scale = metric_scale(state.contexts, state.exists, self.metric)
        share = positiveness(scores, state.exists, self.temperature * scale)
        weights, selected = select_top_k(share, self.top_k)
        kept = torch.zeros_like(share).scatter(-1, selected, weights)
        seen, known = valid[:, :rows, None], state.exists.any(-1, keepdim=True)
        nearest = mean_direction(state.contexts, torch.where(seen, kept, state.exists))
        own = unit(instances)
        directions = torch.cat([torch.where(known, nearest, own[:, :rows]), own[:, rows:]], 1)

        first = torch.arange(self.top_k, device=weights.device) == 0
        weights = torch.where(known, weights, first) * seen
        return directions, weights, selected.masked_fill((weights == 0) | ~known, -1)

    def _pacam(self, scores: Tensor) -> Tensor:
        foreground, background = torch.split(scores, [self.num_classes, 1], 1)
        if self.background == "one_minus_max":
            return max_normalize(foreground)
        return judge(foreground, background, self.sharpness)

    def _loss(self, cam: Tensor, pacam: Tensor, shown: Tensor) -> Tensor:
        if self.detach == "pacam":
            pacam = pacam.detach()
        elif self.detach == "cam":
            cam = cam.detach()
        counted = torch.cat([shown.any(1, keepdim=True), shown], 1).to(cam.dtype)
        distance = (cam - pacam).abs().mean(dim=(-2, -1)) * counted
        return (distance.sum(1) / counted.sum(1).clamp_min(1.0)).mean()

    @torch.no_grad()
    def _update(self, instances: Tensor, valid: Tensor) -> None:
        rows = len(self.bank)
        instances = instances[:, :rows].to(self.bank.dtype)
        update_bank(
            instances,
            valid[:, :rows] & instances.isfinite().all(-1),
            self.bank,
            self.pointer,
            self.count,
            self.contexts,
            self.context_valid,
            self.shift,
            self.centre,
            self.step,
            self.refresh_every,
            *self._sizes,
        )

    def refresh(self) -> None:
        """Cluster the bank into contexts now, whatever the schedule says; for instance after filling it."""
        refresh(self.bank, self.count, self.contexts, self.context_valid, self.shift, self.centre, *self._sizes)

    def reset_parameters(self) -> None:
        """Empty the bank and forget the contexts."""
        for buffer in self.buffers():
            buffer.zero_()

    def extra_repr(self) -> str:
        """Sizes and modes, as in the constructor."""
        return (
            f"num_classes={self.num_classes}, dim={self.dim}, capacity={self.capacity}, "
            f"num_contexts={self.num_contexts}, background_contexts={self.background_contexts}, top_k={self.top_k}, "
            f"metric={self.metric!r}, background={self.background!r}"
        )

    def _check(self, features: Tensor, cam: Tensor, labels: Tensor) -> None:
        me, classes = type(self).__name__, self.num_classes
        remedy = "construct the bank with dim = the channels of the features"
        _checks.shape(me, "features", features, ("B", self.dim, "H", "W"), remedy)
        remedy = "pass the foreground classes only, one map for each picture"
        _checks.shape(me, "cam", cam, (len(features), classes, "h", "w"), remedy)
        remedy = "pass the multi-hot labels of the foreground classes"
        _checks.shape(me, "labels", labels, (len(features), classes), remedy)
        _checks.floating(me, "features", features)
        _checks.floating(me, "cam", cam)
        _checks.not_empty(me, "features", features)
        _checks.not_empty(me, "cam", cam)
        for name, value in (("features", features), ("cam", cam), ("labels", labels)):
            _checks.device(me, name, value, self.bank.device)
        wanted = features.device.type == "cpu" if self.check_values is None else self.check_values
        if wanted and not torch.compiler.is_compiling():
            _checks.finite(me, "features", features)
            _checks.finite(me, "cam", cam)
            _checks.multi_hot(me, "labels", labels)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, axis in (("bank", "capacity"), ("contexts", "most contexts")):
            theirs, mine = state_dict.get(prefix + name), getattr(self, name)
            if theirs is not None and theirs.shape != mine.shape:
                raise RuntimeError(
                    f"{type(self).__name__}: the state_dict's {name} is {tuple(theirs.shape)} and this module's is "
                    f"{tuple(mine.shape)}, as (classes and background, {axis}, dim); construct the module with the "
                    "sizes and the background that the checkpoint was made with"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
