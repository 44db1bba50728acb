"""Plain loops that compute what the modules must compute, written from the equations in their docstrings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.functional import kmeans
from protoseg.modules.context import ContextPrototypes


class LoopBank:
    """``ContextPrototypeBank`` as loops over images, classes and contexts, with Python lists for the memory.

    Only the clustering is the library's, of one class at a time; ``test_functional.py`` tests that by itself. The
    arguments are those of the module, all of them given. Differentiable, like the module.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        capacity: int,
        num_contexts: int,
        background_contexts: int,
        top_k: int,
        cam_threshold: float,
        background_threshold: float,
        metric: str,
        temperature: float,
        shift: bool,
        score: str,
        shrinkage: float,
        background: str,
        background_weight: float,
        exponent: float,
        locate: str,
        center: bool,
        sharpness: float,
        refresh_every: int,
        half_life: float,
        detach: str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.num_classes, self.dim, self.capacity, self.top_k = num_classes, dim, capacity, top_k
        self.cam_threshold, self.background_threshold = cam_threshold, background_threshold
        self.metric, self.temperature, self.align = metric, temperature, shift
        self.score, self.shrinkage, self.locate = score, shrinkage, locate
        self.exponent = exponent
        self.background, self.beta, self.sharpness = background, background_weight, sharpness
        self.refresh_every, self.detach = refresh_every, detach
        self.training = True
        self.sizes = [num_contexts] * num_classes
        if background == "contexts":
            self.sizes.append(background_contexts)
        self.centered = center and (score != "cosine" or background == "contexts")
        self.zero = torch.zeros(dim, dtype=dtype)
        self.half_life = half_life
        self.pixels: list[tuple[Tensor, float]] = []  # every pixel's feature and weight
        self.factor = torch.eye(dim, dtype=dtype)
        self.rings: list[list[Tensor]] = [[] for _ in self.sizes]
        self.written = [0 for _ in self.sizes]
        self.contexts: list[dict[int, Tensor]] = [{} for _ in self.sizes]
        self.shift = [self.zero for _ in self.sizes]
        self.midpoint = self.zero
        self.step = 0

    def __call__(self, features: Tensor, cam: Tensor, labels: Tensor) -> ContextPrototypes:
        """Maps and loss from the state that was, which then takes in the batch."""
        arrivals: list[dict[int, Tensor]] = []
        images = [self._image(*image, arrivals) for image in zip(features, cam, labels, strict=True)]
        loss, *maps = (torch.stack(values) for values in zip(*images, strict=True))
        shift = torch.stack(self.shift[: self.num_classes])
        if self.training:
            self._measure(features[labels.bool().any(1)], len(features))
            self._update(arrivals)
        return ContextPrototypes._make([loss.mean(), *maps, shift])

    def _image(
        self, features: Tensor, raw: Tensor, labels: Tensor, arrivals: list[dict[int, Tensor]]
    ) -> tuple[Tensor, ...]:
        """Everything of one image in the order of ``ContextPrototypes``; what to store is appended to ``arrivals``."""
        classes, size = range(self.num_classes), features.shape[1:]
        present = [c for c in classes if labels[c]]

        cam = [features.new_zeros(size) for _ in classes]
        for c in present:
            cam[c] = normalized(F.interpolate(raw[None, None, c], size, mode="bilinear")[0, 0])

        # Step 1: instances.
        instances = self._instances(features, cam, present)
        valid = [c for c in instances if c < self.num_classes]

        # Steps 3 to 6: scores, under the state before this batch.
        weights = [[self.zero[0]] * self.top_k for _ in classes]
        selected = [[-1] * self.top_k for _ in classes]
        score: dict[int, Tensor] = {}
        for c in [*valid, self.num_classes]:
            neighbors = self._neighbors(c, instances.get(c))
            total = sum(w for _, w, _ in neighbors)
            score[c] = features.new_zeros(size)
            for _, w, p in neighbors:
                score[c] = score[c] + w / total * self._compare(features, p)
            if c < self.num_classes:
                for place, (i, w, _) in enumerate(neighbors):
                    weights[c][place], selected[c][place] = w, i

        # Step 7: maps, with background in front.
        pacam = [features.new_zeros(size) for _ in classes]
        for c in valid:
            behind = 0 if self.background == "one_minus_max" else self.beta * score[self.num_classes]
            if self.score == "cosine" and self.background != "one_minus_max":
                pacam[c] = (self.sharpness * (score[c] - behind) + 0.5).clamp(0, 1)
            else:
                pacam[c] = normalized(score[c] - behind)

        # Where the stored instances are.
        located = list(cam)
        for c in valid:
            if self.locate == "map" and self.contexts[c]:
                located[c] = pacam[c].detach()
        kept = self._instances(features, located, present)
        if self.score != "cosine" or self.background == "one_minus_max":
            pacam = [torch.where(each > 1e-6, each.clamp_min(1e-6) ** self.exponent, 0 * each) for each in pacam]

        cam = [1 - torch.stack(cam).amax(0), *cam]
        pacam = [1 - torch.stack(pacam).amax(0), *pacam]

        # Step 8: loss.
        loss = 0 * cam[0].sum()
        if valid:
            for channel in [0, *(c + 1 for c in valid)]:
                m = cam[channel].detach() if self.detach == "cam" else cam[channel]
                target = pacam[channel].detach() if self.detach == "pacam" else pacam[channel]
                loss = loss + (m - target).abs().mean() / (len(valid) + 1)

        arrivals.append({c: kept[c] for c in valid if c in kept})
        if self.background == "contexts" and valid == present and self.num_classes in kept:
            arrivals[-1][self.num_classes] = kept[self.num_classes]
        return (
            loss,
            torch.stack(pacam),
            torch.stack(cam),
            torch.stack([instances.get(c, self.zero) for c in classes]),
            torch.tensor([c in valid for c in classes]),
            torch.stack([torch.stack(row) for row in weights]),
            torch.tensor(selected),
        )

    def _instances(self, features: Tensor, maps: list[Tensor], present: list[int]) -> dict[int, Tensor]:
        """The means of the classes where their maps are high, and of background where none is."""
        instances: dict[int, Tensor] = {}
        for c in present:
            inside = maps[c] > self.cam_threshold
            if inside.any():
                instances[c] = features[:, inside].mean(1)
        if present:
            outside = torch.ones(features.shape[1:], dtype=torch.bool)
            for c in present:
                outside &= maps[c] < self.background_threshold
            if outside.any():
                instances[self.num_classes] = features[:, outside].mean(1)
        return instances

    @property
    def origin(self) -> Tensor:
        if not self.centered:
            return self.zero
        return self.midpoint if self.score == "cosine" else self._mean()

    def _compare(self, features: Tensor, prototype: Tensor) -> Tensor:
        if self.score == "cosine":
            return cosine(features, prototype, self.origin)
        inverse = (self.factor @ self.factor.T).inverse()
        return torch.einsum("dhw,de,e->hw", features - self.origin[:, None, None], inverse, prototype - self.origin)

    def _seen(self, vector: Tensor) -> Tensor:
        """A vector in the space of step 3."""
        return self.factor.inverse() @ vector

    def _mean(self) -> Tensor:
        total = sum(w for _, w in self.pixels)
        return sum((w * x for x, w in self.pixels), self.zero) / total if self.pixels else self.zero

    def _measure(self, features: Tensor, pictures: int) -> None:
        if self.score == "cosine" or not len(features):
            return
        self.pixels = [(x, w * 0.5 ** (pictures / self.half_life)) for x, w in self.pixels]
        share = 1.0 / features[0, 0].numel()
        self.pixels += [(x.detach(), share) for x in features.permute(0, 2, 3, 1).flatten(0, 2)]

    def _covariance(self) -> Tensor:
        mean, total = self._mean(), sum(w for _, w in self.pixels)
        result = torch.zeros_like(self.factor)
        for x, w in self.pixels:
            result = result + w / total * torch.outer(x - mean, x - mean)
        return result

    def _neighbors(self, c: int, instance: Tensor | None) -> list[tuple[int, Tensor, Tensor]]:
        """Indices, weights and prototypes that stand for class ``c`` in an image: steps 4 to 6."""
        known = self.contexts[c] if c < len(self.contexts) else {}
        one = torch.ones_like(self.zero[0])
        if not known:
            return [] if instance is None else [(-1, one, instance)]
        if instance is None:
            return [(i, one, p) for i, p in known.items()]
        anchor = instance - self.origin + self.shift[c] if self.align else instance - self.origin
        anchor = self._seen(anchor)
        everything = [self._seen(p - self.origin) for contexts in self.contexts for p in contexts.values()]
        scale = sum(length(p, self.metric) for p in everything) / len(everything)
        scores = [
            similarity(anchor, self._seen(p - self.origin), self.metric) / (self.temperature * scale)
            for p in known.values()
        ]
        shares = torch.stack(scores).softmax(0)
        neighbors = list(zip(known, shares, known.values(), strict=True))
        neighbors.sort(key=lambda neighbor: -neighbor[1].item())
        return neighbors if c == self.num_classes else neighbors[: self.top_k]

    def _update(self, arrivals: list[dict[int, Tensor]]) -> None:
        for instances in arrivals:
            for row, instance in instances.items():
                if not instance.isfinite().all():
                    continue
                ring = self.rings[row]
                if len(ring) < self.capacity:
                    ring.append(instance.detach())
                else:
                    ring[self.written[row] % self.capacity] = instance.detach()
                self.written[row] += 1
        if self.step % self.refresh_every == 0:
            self._refresh()
        self.step += 1

    def _refresh(self) -> None:
        covariance = self._covariance() if self.pixels else torch.zeros_like(self.factor)
        ridge = self.shrinkage * covariance.trace() / self.dim if self.pixels else 1.0
        if self.score == "whitened":
            self.factor = torch.linalg.cholesky(covariance + ridge * torch.eye(self.dim, dtype=covariance.dtype))
        elif self.score == "diagonal":
            self.factor = (covariance.diagonal() + ridge).sqrt().diag()

        self.contexts = [{} for _ in self.sizes]
        means: list[Tensor | None] = [None for _ in self.sizes]
        for row, ring in enumerate(self.rings):
            if not ring:
                continue
            points = torch.stack(ring)
            clusters = kmeans(torch.stack([self._seen(p) for p in ring])[None], num_clusters=self.sizes[row])
            for i in range(self.sizes[row]):
                if clusters.valid[0, i]:
                    self.contexts[row][i] = points[clusters.assignment[0] == i].mean(0)
            mean = points.mean(0)
            self.shift[row] = torch.stack(list(self.contexts[row].values())).mean(0) - mean
            means[row] = mean
        seen = [mean for mean in means[: self.num_classes] if mean is not None]
        behind = means[-1] if self.background == "contexts" else None
        self.midpoint = (torch.stack(seen).mean(0) + behind) / 2 if seen and behind is not None else self.zero

    def state(self) -> dict[str, Tensor]:
        """The same as the module's ``state_dict()``."""
        rings = self.zero.new_zeros(len(self.sizes), self.capacity, self.dim)
        contexts = self.zero.new_zeros(len(self.sizes), max(self.sizes), self.dim)
        context_valid = torch.zeros(contexts.shape[:2], dtype=torch.bool)
        for row in range(len(self.sizes)):
            for slot, instance in enumerate(self.rings[row]):
                rings[row, slot] = instance
            for i, context in self.contexts[row].items():
                contexts[row, i], context_valid[row, i] = context, True
        found = {
            "instances": rings,
            "pointer": torch.tensor([n % self.capacity for n in self.written]),
            "stored": torch.tensor([len(ring) for ring in self.rings]),
            "contexts": contexts,
            "context_valid": context_valid,
            "shift": torch.stack(self.shift),
            "midpoint": self.midpoint,
            "weight": torch.as_tensor(sum(w for _, w in self.pixels), dtype=self.zero.dtype),
            "mean": self._mean(),
            **self._square(),
            "step": torch.tensor(self.step),
            "seal": torch.tensor(self.step**2),
            "layout": torch.tensor([self.num_classes, sum(self.sizes[self.num_classes :])]),
        }
        return {f"memory.{name}": value for name, value in found.items()}

    def _square(self) -> dict[str, Tensor]:
        covariance = self._covariance() if self.pixels else torch.zeros_like(self.factor)
        if self.score == "whitened":
            return {"covariance": covariance, "factor": self.factor}
        if self.score == "diagonal":
            return {"covariance": covariance.diagonal(), "factor": self.factor.diagonal()}
        return {"covariance": self.zero[:0], "factor": self.zero[:0]}


def normalized(scores: Tensor) -> Tensor:
    """A map clipped at 0, divided by its maximum."""
    scores = scores.clamp_min(0)
    return scores / scores.max().detach() if scores.max() > 0 else scores


def cosine(features: Tensor, prototype: Tensor, origin: Tensor) -> Tensor:
    """Cosine of every pixel with a prototype, seen from ``origin``."""
    return F.cosine_similarity(features - origin[:, None, None], (prototype - origin)[:, None, None], dim=0)


def similarity(a: Tensor, p: Tensor, metric: str) -> Tensor:
    """One number for a pair of vectors, larger is nearer."""
    if metric == "dot":
        return (a * p).sum()
    if metric == "cosine":
        return F.cosine_similarity(a, p, dim=0)
    return -(a - p).abs().sum() if metric == "l1" else -(a - p).square().sum().sqrt()


def length(p: Tensor, metric: str) -> Tensor:
    """What one vector adds to the scale of a metric."""
    if metric == "dot":
        return p.square().sum()
    if metric == "cosine":
        return torch.ones_like(p[0])
    return p.abs().sum() if metric == "l1" else p.square().sum().sqrt()
