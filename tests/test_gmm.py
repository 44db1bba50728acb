"""GMMPrototypeRegularizer against loops from the equations, and on its edges."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from protoseg import GMMPrototypeRegularizer
from protoseg.functional import em, match, symmetric_contrast
from protoseg.modules import GroupPrototypes, PublishedPrototypeRegularizer
from protoseg.modules.gmm import PATIENCE

D, K, L, B = 6, 4, 11, 3


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def batch(step: int = 0, size: int = B, groups: int = K, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randn(size, L, D, generator=generator, dtype=dtype)
    return tokens, torch.randn(size, groups, D, generator=generator, dtype=dtype)


def make(dtype: torch.dtype = torch.float64, **options: Any) -> GMMPrototypeRegularizer:
    torch.manual_seed(1)
    return GMMPrototypeRegularizer(D, K, **options).to(dtype)


def expected(mu: Tensor, tokens: Tensor, groups: Tensor, mask: Tensor, **options: Any) -> dict[str, Any]:
    """One image and one group at a time; EM itself has a loop of its own in its tests."""
    found: dict[str, Any] = {"prototypes": [], "match": [], "similarity": [], "accepted": [], "loss": []}
    for x, g, counts in zip(tokens, groups, mask, strict=True):
        x = x[counts]
        length = sum(float(each.norm()) for each in x) / len(x)
        bandwidth = options["bandwidth"] * length ** {"dot": 1, "gaussian": 2, "cosine": 0}[options["kernel"]]
        start = mu * length if options["kernel"] == "gaussian" else mu
        prototypes = em(x[None], start, kernel=options["kernel"], bandwidth=bandwidth).prototypes[0]
        cosines = torch.stack([torch.stack([F.cosine_similarity(a, p, dim=0) for p in prototypes]) for a in g])
        pairs = match(cosines[None])[0].tolist()
        own = [cosines[a, k] if k >= 0 else torch.zeros(()) for a, k in enumerate(pairs)]
        tested = own
        if options["reject_on"] == "minmax":
            low, high = cosines.min(0).values, cosines.max(0).values
            tested = [(own[a] - low[k]) / (high[k] - low[k]) if k >= 0 else own[a] for a, k in enumerate(pairs)]
        kept = [k >= 0 and bool(t > options["phi"]) for t, k in zip(tested, pairs, strict=True)]
        terms = [
            -F.log_softmax(10 * cosines[a], 0)[k] - F.log_softmax(10 * cosines[:, k], 0)[a]
            for a, k in enumerate(pairs)
            if kept[a]
        ]
        found["prototypes"].append(prototypes)
        found["match"].append(pairs)
        found["similarity"].append(torch.stack([each.to(g.dtype) for each in own]))
        found["accepted"].append(kept)
        found["loss"].append(torch.stack(terms).mean() if terms else torch.zeros((), dtype=g.dtype))
    found["loss"] = torch.stack(found["loss"]).mean()
    return found


@pytest.mark.parametrize("groups", [K, 2, 7], ids=["square", "fewer", "more"])
@pytest.mark.parametrize("reject_on", ["cosine", "minmax"])
@pytest.mark.parametrize("kernel", ["dot", "gaussian", "cosine"])
def test_equals_a_loop(kernel: Any, reject_on: Any, groups: int) -> None:
    module = make(kernel=kernel, reject_on=reject_on, bandwidth=0.2, reject_threshold=0.3)
    for step in range(3):
        tokens, g = batch(step, groups=groups)
        g.requires_grad_()
        mask = torch.rand(B, L) < 0.8
        mu = module.mu.clone()
        out = module(tokens, g, mask)
        want = expected(mu, tokens, g, mask, kernel=kernel, reject_on=reject_on, bandwidth=0.2, phi=0.3)
        torch.testing.assert_close(out.prototypes, torch.stack(want["prototypes"]))
        assert out.match.tolist() == want["match"]
        torch.testing.assert_close(out.similarity, torch.stack(want["similarity"]))
        assert out.accepted.tolist() == want["accepted"]
        torch.testing.assert_close(out.loss, want["loss"])
        rate = sum(map(sum, want["accepted"])) / (B * min(groups, K))
        assert out.accept_rate.item() == pytest.approx(rate)
        (got,) = torch.autograd.grad(out.loss, g)
        (wanted,) = torch.autograd.grad(want["loss"], g)
        torch.testing.assert_close(got, wanted)
        moved = 0.9 * mu + 0.1 * torch.stack(want["prototypes"]).mean(0)
        torch.testing.assert_close(module.mu, moved / moved.norm(dim=-1, keepdim=True))


def test_rejection_keeps_exactly_the_pairs_above_the_threshold() -> None:
    tokens, groups = batch()
    everything = make(reject_threshold=-1.0)(tokens, groups)
    assert everything.accepted.all()
    for phi in everything.similarity.flatten().tolist():
        out = make(reject_threshold=phi)(tokens, groups)
        assert torch.equal(out.accepted, out.similarity > phi)
        assert out.accept_rate.item() == pytest.approx(float((out.similarity > phi).double().mean()))


def test_all_rejected_is_a_zero_with_finite_gradients() -> None:
    module = make(reject_threshold=1.0)
    tokens, groups = batch()
    groups.requires_grad_()
    out = module(tokens, groups)
    torch.autograd.backward(out.loss)
    assert out.loss.item() == 0
    assert out.accept_rate.item() == 0
    assert groups.grad is not None
    assert not groups.grad.any()
    assert module.log_scale.grad is not None
    assert module.log_scale.grad.item() == 0


def test_the_gradient_is_that_of_differences() -> None:
    module = make().eval()
    tokens, groups = batch(groups=5)
    groups.requires_grad_()
    assert torch.autograd.gradcheck(lambda g: module(tokens, g).loss, (groups,))


def test_the_gradient_reaches_groups_and_temperature_but_not_tokens() -> None:
    module = make(reject_threshold=-1.0)
    tokens, groups = (each.requires_grad_() for each in batch())
    torch.autograd.backward(module(tokens, groups).loss)
    assert tokens.grad is None
    assert groups.grad is not None
    assert groups.grad.abs().amax((0, 2)).all()
    assert module.log_scale.grad is not None
    assert module.log_scale.grad != 0
    assert list(dict(make(learnable_temperature=False).named_parameters())) == ["log_scale"]
    assert not make(learnable_temperature=False).log_scale.requires_grad


@pytest.mark.parametrize("kernel", ["dot", "gaussian", "cosine"])
def test_the_gradient_reaches_tokens_when_told_to(kernel: Any) -> None:
    module = make(kernel=kernel, detach_tokens=False, reject_threshold=-1.0).eval()
    tokens, groups = (each.requires_grad_() for each in batch())
    mask = torch.arange(L).expand(B, -1) < L - 2
    out, want = module(tokens, groups, mask), make(kernel=kernel, reject_threshold=-1.0).eval()(tokens, groups, mask)
    torch.testing.assert_close(out.loss, want.loss)
    (got,) = torch.autograd.grad(out.loss, tokens)
    assert not got[:, -2:].any()

    def loss(x: Tensor) -> Tensor:
        """With the shares as constants."""
        directions = F.normalize(x, dim=-1) if kernel == "cosine" else x
        sums = out.responsibilities.mT @ (directions * mask.unsqueeze(-1))
        similarity = F.normalize(groups, dim=-1) @ F.normalize(sums, dim=-1).mT
        return symmetric_contrast(similarity, out.match, out.accepted, 10.0)

    torch.testing.assert_close(got, torch.autograd.grad(loss(tokens), tokens)[0])
    assert not out.prototypes.requires_grad


def test_the_temperature_is_clamped() -> None:
    module = make(reject_threshold=-1.0)
    tokens, groups = batch()
    with torch.no_grad():
        module.log_scale.fill_(9.0)
    out = module.eval()(tokens, groups)
    similarity = F.normalize(groups, dim=-1) @ out.prototypes.mT
    torch.testing.assert_close(out.loss, symmetric_contrast(similarity, out.match, out.accepted, 100.0))


def test_padding_changes_nothing() -> None:
    tokens, groups = batch()
    want = make()(tokens, groups)
    padded = torch.cat([tokens, torch.full((B, 5, D), math.nan).double()], 1)
    module = make()
    out = module(padded, groups, (torch.arange(L + 5) < L).expand(B, -1))
    plain = make()
    plain(tokens, groups)
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(out.prototypes, want.prototypes)
    torch.testing.assert_close(module.mu, plain.mu)
    assert not out.responsibilities[:, L:].any()


def test_an_image_without_tokens_counts_for_nothing() -> None:
    tokens, groups = batch()
    mask = torch.tensor([True, False, True])[:, None].expand(B, L)
    module, other = make(reject_threshold=-1.0), make(reject_threshold=-1.0)
    out, want = module(tokens, groups, mask), other(tokens[::2], groups[::2])
    torch.testing.assert_close(out.loss, want.loss * 2 / 3)
    assert not out.accepted[1].any()
    for name in ("accept_rate", "prototype_cosine"):
        torch.testing.assert_close(getattr(out, name), getattr(want, name))
    torch.testing.assert_close(module.mu, other.mu)
    before = module.mu.clone()
    none = module(tokens, groups, torch.zeros(B, L, dtype=torch.bool))
    assert none.loss.item() == 0
    assert none.accept_rate.item() == 0
    torch.testing.assert_close(module.mu, before, rtol=0, atol=0)


def test_evaluation_changes_nothing() -> None:
    module = make().eval()
    before = copy.deepcopy(module.state_dict())
    first, second = module(*batch()), module(*batch())
    torch.testing.assert_close(first._asdict(), second._asdict(), rtol=0, atol=0)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("kernel", ["dot", "gaussian", "cosine"])
def test_prototypes_do_not_collapse_by_default(kernel: Any, scale: float) -> None:
    """Whatever the length of the tokens; with the published bandwidth those of unit length do."""
    directions = torch.randn(8, 32) + 0.5
    tokens = directions[torch.randint(8, (4, 196))] + 0.5 * torch.randn(4, 196, 32)
    tokens = F.normalize(tokens, dim=-1)
    groups = torch.randn(4, 8, 32)
    truth = GMMPrototypeRegularizer(32, 8, estimator="random")(directions[None], groups[:1]).prototype_cosine
    out = GMMPrototypeRegularizer(32, 8, kernel=kernel)(scale * tokens, groups)
    assert out.prototype_cosine < (1 + truth) / 2
    if kernel == "dot":
        assert PublishedPrototypeRegularizer(32, 8)(tokens, groups).prototype_cosine > 0.999


def test_estimators_to_compare_with() -> None:
    tokens, groups = batch()
    hard = make(estimator="kmeans")(tokens, groups)
    assert set(hard.responsibilities.unique().tolist()) == {0, 1}
    drawn = make(estimator="random")(tokens, groups, (torch.arange(L) < 3).expand(B, -1))
    directions = F.normalize(tokens[:, :3], dim=-1)
    for image in range(B):
        for prototype in drawn.prototypes[image]:
            assert any(torch.allclose(prototype, each) for each in directions[image])
    few = drawn.prototypes[0].unique(dim=0)
    assert len(few) == 3, "fewer tokens than prototypes: each of them, and one again"
    assert (drawn.responsibilities.sum(-1) == (torch.arange(L) < 3)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    tokens, groups = (each.to(dtype) for each in batch(dtype=torch.float32))
    module, other = make(torch.float32), make(torch.float32)
    leaf = groups.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(tokens, leaf)
    want = other(tokens.float(), groups.float())
    assert out.loss.dtype == torch.float32
    assert {value.dtype for value in out[1:] if value.is_floating_point()} == {dtype}
    torch.testing.assert_close(out.loss, want.loss, rtol=0, atol=0)
    torch.testing.assert_close(module.mu, other.mu, rtol=0, atol=0)
    torch.autograd.backward(out.loss)
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def steps(module: nn.Module, call: Any, count: int = 4) -> list[Tensor]:
    record = []
    for step in range(count):
        tokens, groups = batch(step, dtype=torch.float32)
        groups.requires_grad_()
        out = call(tokens, groups)
        torch.autograd.backward(out.loss)
        assert groups.grad is not None
        record += [out.loss.detach(), groups.grad]
    return [*record, *module.state_dict().values()]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_break(backend: str) -> None:
    plain, compiled = make(torch.float32), make(torch.float32)
    want = steps(plain, plain)
    got = steps(compiled, torch.compile(compiled, fullgraph=True, backend=backend))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_copies_and_checkpoints_go_on_alike() -> None:
    module = make(torch.float32)
    steps(module, module, 2)
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    loaded = make(torch.float32)
    loaded.load_state_dict(torch.load(io.BytesIO(stream.getvalue()), weights_only=True))
    others = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded)
    want = steps(module, module)
    for other in others:
        torch.testing.assert_close(steps(other, other), want, rtol=0, atol=0)


class Network(nn.Module):
    """Projected groups and the regularizer behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(D, D)
        self.regularizer = GMMPrototypeRegularizer(D, K)

    def forward(self, tokens: Tensor, groups: Tensor) -> Tensor:
        out: GroupPrototypes = self.regularizer(tokens, self.project(groups))
        return out.loss


def train(network: nn.Module, half: slice) -> dict[str, Any]:
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    record: dict[str, Any] = {"loss": [], "gradients": [], "state": []}
    for step in range(4):
        tokens, groups = batch(step, 6, dtype=torch.float32)
        optimizer.zero_grad()
        loss = network(tokens[half], groups[half])
        torch.autograd.backward(loss)
        record["gradients"].append([p.grad.clone() for p in network.parameters() if p.grad is not None])
        optimizer.step()
        record["loss"].append(loss.detach())
        record["state"].append([buffer.clone() for buffer in network.buffers()])
    return record


def rank_main(rank: int) -> Any:
    network = DistributedDataParallel(Network(), broadcast_buffers=False)
    return train(network, slice(3 * rank, 3 * rank + 3))


@pytest.mark.slow
def test_two_processes_equal_one(two_processes: Any) -> None:
    first, second = two_processes(rank_main)
    alone = train(Network(), slice(None))
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    torch.testing.assert_close(first["state"], alone["state"], rtol=0, atol=1e-6)
    for step in range(4):
        assert first["loss"][step] != second["loss"][step]
        mean = (first["loss"][step] + second["loss"][step]) / 2
        torch.testing.assert_close(mean, alone["loss"][step], rtol=0, atol=1e-5)
        torch.testing.assert_close(first["gradients"][step], alone["gradients"][step], rtol=1e-4, atol=1e-5)


def test_a_loss_that_trains_nothing_for_long_is_told() -> None:
    module = make(reject_threshold=1.0)
    tokens, groups = batch()
    for _ in range(PATIENCE - 1):
        module(tokens, groups)
    with pytest.warns(UserWarning, match=r"no pair was accepted in 100 passes.* lower reject_threshold=1\.0"):
        module(tokens, groups)
    module(tokens, groups)  # and only once


def test_bad_input() -> None:
    module = make()
    tokens, groups = batch()
    with pytest.raises(ValueError, match=r"tokens must have shape \(B, L, 6\), got \(3, 11, 5\); construct"):
        module(tokens[..., :5], groups)
    with pytest.raises(ValueError, match=r"group_tokens must have shape \(3, G, 6\), got \(2, 4, 6\)"):
        module(tokens, groups[:2])
    with pytest.raises(ValueError, match="group_tokens must not be empty"):
        module(tokens, groups[:, :0])
    with pytest.raises(ValueError, match="group_tokens must be on the module's device cpu, got meta; move"):
        module(tokens, groups.to("meta"))
    with pytest.raises(TypeError, match=r"tokens must be floating point, got torch\.int64"):
        module(tokens.long(), groups)
    with pytest.raises(ValueError, match="tokens must be finite, got 1 NaN or infinite"):
        module(tokens.index_put((torch.tensor(0),) * 3, torch.tensor(math.nan).double()), groups)
    with pytest.raises(ValueError, match=r"token_mask must have shape \(3, 11\)"):
        module(tokens, groups, torch.ones(B, L - 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="token_mask must be on the module's device cpu, got meta"):
        module(tokens, groups, torch.ones(B, L, dtype=torch.bool, device="meta"))
    with pytest.raises(TypeError, match=r"token_mask must be bool, got torch\.float32"):
        module(tokens, groups, torch.ones(B, L))
    published = PublishedPrototypeRegularizer(D, K)
    with pytest.raises(ValueError, match="knows no token_mask"):
        published(tokens, groups, torch.ones(B, L, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"needs as many groups as prototypes \(4\), got 3"):
        published(tokens, groups[:, :3])
    with pytest.raises(RuntimeError, match=r"mu is \(4, 6\) and this module's is \(5, 6\)"):
        GMMPrototypeRegularizer(D, 5).load_state_dict(module.state_dict())
    for name, value, message in (
        ("bandwidth", 0.0, "bandwidth must be above 0"),
        ("iterations", 0, "iterations must be above 0"),
        ("momentum", 1.5, "momentum must lie between 0 and 1"),
        ("kernel", "rbf", "kernel must be one of"),
        ("reject_on", "l2", "reject_on must be one of"),
        ("estimator", "vb", "estimator must be one of"),
        ("matching", "auction", "matching must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**{name: value})


def test_unchecked_nan_never_reaches_the_state() -> None:
    tokens, groups = batch()
    tokens[0, 0, 0] = math.nan
    module, other = make(check_values=False), make()
    assert module(tokens, groups).prototypes[0].isnan().any()
    other(tokens[1:], groups[1:])
    torch.testing.assert_close(module.mu, other.mu)
