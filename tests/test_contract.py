"""What every module promises, whatever it computes: one suite over all four."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from protoseg import (
    ContextPrototypeBank,
    GMMPrototypeRegularizer,
    RegionalSemanticContrast,
    VisionPrototypeLearner,
)

B, C, D, K = 4, 3, 6, 5
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A module, what it is called with, and which of these inputs its loss trains."""

    make: Callable[..., nn.Module]
    inputs: Callable[[int], Inputs]
    trains: int
    state: str | None  # name of a buffer that training moves


def generator(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(step)


def bank_inputs(step: int) -> Inputs:
    features = torch.rand(B, D, 4, 6, generator=generator(step))
    cam = torch.rand(B, C, 4, 6, generator=generator(step + 100)) - 0.2
    labels = (torch.rand(B, C, generator=generator(step + 200)) < 0.6).float()
    return features, cam, labels


def regularizer_inputs(step: int) -> Inputs:
    return (
        torch.randn(B, 11, D, generator=generator(step)),
        torch.randn(B, K, D, generator=generator(step + 100)),
    )


def learner_inputs(step: int) -> Inputs:
    features = F.normalize(torch.randn(B, D, generator=generator(step)), dim=-1)
    return features, torch.eye(C)[[0, 1, 2, 0]]


def regional_inputs(step: int) -> Inputs:
    return (
        torch.randn(B, D, 4, 6, generator=generator(step)),
        torch.rand(B, C, 4, 6, generator=generator(step + 100)),
        torch.randn(C, D, generator=generator(step + 200)),
        torch.eye(C)[[0, 1, 2, 0]],
    )


def make_bank(**options: Any) -> ContextPrototypeBank:
    sizes = {"capacity": 8, "num_contexts": 2, "background_contexts": 3, "refresh_every": 2, "half_life": 8.0}
    return ContextPrototypeBank(C, D, **{**sizes, **options})


def make_regularizer(**options: Any) -> GMMPrototypeRegularizer:
    torch.manual_seed(0)
    # Random groups have no prototype that is near.
    return GMMPrototypeRegularizer(D, K, reject_threshold=-1.0, **options)


def make_learner(device: str | None = None) -> VisionPrototypeLearner:
    text = torch.randn(C, D, generator=generator(0)) if device is None else torch.randn(C, D, device=device)
    return VisionPrototypeLearner(text, text_temperature=0.1, vision_temperature=0.2)


def make_regional(device: str | None = None) -> RegionalSemanticContrast:
    return RegionalSemanticContrast()


CASES = {
    "bank": Case(make_bank, bank_inputs, 1, "memory.instances"),
    "regularizer": Case(make_regularizer, regularizer_inputs, 1, "mu"),
    "learner": Case(make_learner, learner_inputs, 0, None),
    "regional": Case(make_regional, regional_inputs, 0, None),
}
STATEFUL = [name for name, case in CASES.items() if case.state]
every = pytest.mark.parametrize("name", CASES)
stateful = pytest.mark.parametrize("name", STATEFUL)


def used(name: str, steps: int = 3) -> nn.Module:
    """A module that has seen a few batches."""
    module = CASES[name].make()
    for step in range(steps):
        module(*CASES[name].inputs(step))
    return module


def loss_and_gradient(module: nn.Module, name: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The loss, and its slope by the input that it trains, or by the parameter."""
    place = CASES[name].trains
    inputs = tuple(each.clone().requires_grad_(i == place) for i, each in enumerate(inputs))
    loss = module(*inputs).loss
    by = next(module.parameters()) if name == "learner" else inputs[place]
    (slope,) = torch.autograd.grad(loss, by)
    return loss.detach(), slope


def assert_same_state(one: nn.Module, other: nn.Module, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=0, atol=tolerance)


@every
def test_the_loss_comes_first_and_the_output_has_one_type(name: str) -> None:
    module = CASES[name].make()
    out = module(*CASES[name].inputs(0))
    assert out._fields[0] == "loss"
    assert out.loss.shape == ()
    with pytest.warns(UserWarning, match="the bank is empty") if name == "bank" else _nothing():
        assert type(CASES[name].make().eval()(*CASES[name].inputs(0))) is type(out)


class _nothing:  # noqa: N801
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


@every
def test_eval_changes_nothing_and_train_computes_before_it_updates(name: str) -> None:
    module = used(name)
    inputs, before = CASES[name].inputs(7), copy.deepcopy(module)
    quiet = module.eval()(*inputs)
    assert_same_state(module, before)
    torch.testing.assert_close(module.train()(*inputs).loss, quiet.loss, rtol=0, atol=0)
    if CASES[name].state:
        moved = CASES[name].state or ""
        assert not torch.equal(module.state_dict()[moved], before.state_dict()[moved])


@every
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_break(name: str, backend: str) -> None:
    torch._dynamo.reset()
    plain = used(name)
    module = copy.deepcopy(plain)
    compiled: Any = torch.compile(module, fullgraph=True, backend=backend)
    for step in (5, 6):
        want = loss_and_gradient(plain, name, CASES[name].inputs(step))
        got = loss_and_gradient(compiled, name, CASES[name].inputs(step))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert_same_state(module, plain, 1e-6)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_full_precision(name: str, dtype: torch.dtype) -> None:
    inputs = CASES[name].inputs(5)
    want = used(name)(*inputs).loss
    with torch.autocast("cpu", dtype=dtype):
        got = used(name)(*inputs).loss
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@every
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_equal_and_independent(name: str, clone: Any) -> None:
    module = used(name)
    other, kept = clone(module), copy.deepcopy(module)
    inputs = CASES[name].inputs(5)
    torch.testing.assert_close(other(*inputs).loss, kept(*inputs).loss, rtol=0, atol=0)
    assert_same_state(other, kept)
    if CASES[name].state:
        assert_same_state(module, used(name))


@every
def test_a_checkpoint_in_mid_run_goes_on_bit_for_bit(name: str) -> None:
    module, file = used(name), io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    resumed = CASES[name].make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 7):
        got = loss_and_gradient(resumed, name, CASES[name].inputs(step))
        want = loss_and_gradient(module, name, CASES[name].inputs(step))
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert_same_state(resumed, module)


@every
@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_activation_checkpointing_it_is_as_without(name: str, reentrant: bool) -> None:
    place = CASES[name].trains
    plain, inside = used(name), used(name)
    for step in (5, 6):
        inputs = CASES[name].inputs(step)
        want = loss_and_gradient(plain, name, inputs)
        leaves = tuple(each.clone().requires_grad_(i == place) for i, each in enumerate(inputs))
        weight = torch.ones((), requires_grad=True)

        # The layers before the module are computed again too, as in a network.
        def block(*given: Tensor, weight: Tensor = weight) -> Tensor:
            scaled = tuple(each * weight if i == place else each for i, each in enumerate(given))
            loss: Tensor = inside(*scaled).loss
            return loss

        loss = checkpoint(block, *leaves, use_reentrant=reentrant)
        loss.backward()
        by = next(inside.parameters()) if name == "learner" else leaves[place]
        assert by.grad is not None
        torch.testing.assert_close((loss.detach(), by.grad), want, rtol=0, atol=1e-7)
        by.grad = None
    assert_same_state(inside, plain)


@stateful
def test_two_checkpointed_passes_before_one_backward(name: str) -> None:
    place = CASES[name].trains
    plain, inside = used(name), used(name)
    batches = [CASES[name].inputs(step) for step in (5, 6)]
    want = [loss_and_gradient(plain, name, inputs)[1] for inputs in batches]
    leaves = [tuple(x.clone().requires_grad_(i == place) for i, x in enumerate(inputs)) for inputs in batches]
    losses = [checkpoint(lambda *given: inside(*given).loss, *given, use_reentrant=False) for given in leaves]
    torch.stack(losses).sum().backward()
    for given, slope in zip(leaves, want, strict=True):
        torch.testing.assert_close(given[place].grad, slope, rtol=0, atol=1e-7)
    assert_same_state(inside, plain)


@stateful
def test_a_pass_that_cannot_be_found_again_is_an_error(name: str) -> None:
    place = CASES[name].trains
    module = used(name)
    inputs = tuple(each.requires_grad_(i == place) for i, each in enumerate(CASES[name].inputs(5)))

    def block(*given: Tensor) -> Tensor:
        noisy = tuple(each + torch.rand_like(each) * (i == place) for i, each in enumerate(given))
        loss: Tensor = module(*noisy).loss
        return loss

    loss = checkpoint(block, *inputs, use_reentrant=True, preserve_rng_state=False)
    with pytest.raises(RuntimeError, match="computes this forward pass again, with inputs that no recent one had"):
        loss.backward()


@stateful
def test_an_average_that_copies_buffers_is_right(name: str) -> None:
    module = CASES[name].make()
    network = nn.ModuleList([nn.Linear(2, 2), module])
    average: Any = AveragedModel(network)
    for step in range(4):
        module(*CASES[name].inputs(step))
        average.update_parameters(network)
    inputs = CASES[name].inputs(7)
    got, want = average.module[1].eval()(*inputs), module.eval()(*inputs)
    torch.testing.assert_close(got.loss, want.loss, rtol=0, atol=1e-6)


def averaged(name: str, kind: str) -> tuple[nn.Module, nn.Module]:
    """A module, and a moving average of it that mixes buffers."""
    module = CASES[name].make()
    if kind == "torch":
        average: Any = AveragedModel(
            module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
        )
        update = average.update_parameters
    else:
        average = pytest.importorskip("timm.utils", reason="timm is not installed").ModelEmaV2(module, decay=0.9)
        update = average.update
    for step in range(6):
        module(*CASES[name].inputs(step))
        update(module)
    return module, average.module


@pytest.mark.parametrize("kind", ["torch", "timm"])
def test_an_average_of_banks_is_no_bank_and_says_so(kind: str) -> None:
    module, average = averaged("bank", kind)
    inputs = bank_inputs(7)
    with pytest.raises(RuntimeError, match=r"the state is an average of several banks.*load_state_dict"):
        average.eval()(*inputs)
    average.load_state_dict(module.state_dict())
    torch.testing.assert_close(average(*inputs).loss, module.eval()(*inputs).loss, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["torch", "timm"])
def test_an_average_of_regularizers_works(kind: str) -> None:
    _, average = averaged("regularizer", kind)
    assert average.eval()(*regularizer_inputs(7)).loss.isfinite()


@every
def test_meta(name: str) -> None:
    """Built and called without memory, as tools do that count operations or place layers."""
    module = CASES[name].make(device="meta")
    inputs = tuple(each.to("meta") for each in CASES[name].inputs(0))
    for training in (True, False):
        out = module.train(training)(*inputs)
        assert out.loss.is_meta
    with torch.device("meta"):
        other = CASES[name].make() if name != "learner" else CASES[name].make(device="meta")
        out = other(*inputs)
    assert out.loss.is_meta


@every
def test_default_dtype(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        module = CASES[name].make()
        inputs = tuple(each.double() for each in CASES[name].inputs(0))
        out = module(*inputs)
        assert out.loss.dtype == torch.float64
        assert all(value.dtype != torch.float32 for value in module.state_dict().values())
    finally:
        torch.set_default_dtype(torch.float32)


@every
def test_default_device(name: str) -> None:
    """Tensors that a module makes on its way are made where its inputs are, not where the default says."""
    module, inputs = used(name), CASES[name].inputs(5)
    want = copy.deepcopy(module)(*inputs).loss
    torch.set_default_device("meta")
    try:
        got = module(*inputs).loss
    finally:
        torch.set_default_device("cpu")
        torch.set_default_device(None)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@every
def test_inference_mode(name: str) -> None:
    module, inputs = used(name).eval(), CASES[name].inputs(5)
    want = module(*inputs).loss
    with torch.inference_mode():
        torch.testing.assert_close(module(*inputs).loss, want.detach(), rtol=0, atol=0)


@every
def test_an_input_on_another_device_is_named(name: str) -> None:
    module, inputs = used(name), list(CASES[name].inputs(5))
    inputs[1] = inputs[1].to("meta")
    with pytest.raises(ValueError, match=r"must be on .*device cpu, got meta"):
        module(*inputs)


@every
def test_functional_gradient(name: str) -> None:
    place, inputs = CASES[name].trains, CASES[name].inputs(5)
    module = used(name).eval()
    if name == "learner":
        parameters = dict(module.named_parameters())

        def by_parameter(vision: Tensor) -> Tensor:
            loss: Tensor = torch.func.functional_call(module, {"vision": vision}, inputs).loss
            return loss

        slope = torch.func.grad(by_parameter)(parameters["vision"].detach())
    else:

        def by_input(given: Tensor) -> Tensor:
            loss: Tensor = module(*inputs[:place], given, *inputs[place + 1 :]).loss
            return loss

        slope = torch.func.grad(by_input)(inputs[place])
    torch.testing.assert_close(slope, loss_and_gradient(module, name, inputs)[1], rtol=0, atol=1e-7)


@every
def test_a_loss_over_nothing_is_zero_and_connected(name: str) -> None:
    inputs = list(CASES[name].inputs(5))
    module = CASES[name].make()
    if name == "regularizer":
        module = GMMPrototypeRegularizer(D, K, reject_threshold=1.0)
    else:
        labels = {"bank": 2, "learner": 1, "regional": 3}[name]
        inputs[labels] = torch.zeros_like(inputs[labels])
        if name == "regional":
            inputs[1] = torch.zeros_like(inputs[1])
    loss, slope = loss_and_gradient(module, name, tuple(inputs))
    assert loss == 0
    assert not slope.any()


def two_ranks(rank: int, name: str) -> dict[str, Any]:
    """Train beside, not inside, DistributedDataParallel, each rank with a seed of its own and half of each batch."""
    torch.manual_seed(rank)
    case = CASES[name]
    module = GMMPrototypeRegularizer(D, K, reject_threshold=-1.0) if name == "regularizer" else case.make()
    losses, slopes = [], []
    for step in range(4):
        inputs = case.inputs(step)
        half = slice(rank * B // 2, (rank + 1) * B // 2)
        mine = tuple(each[half] if len(each) == B else each for each in inputs)
        if name != "regularizer" and rank == 1 and step == 2:
            mine = (*mine[:-1], torch.zeros_like(mine[-1]))  # no class in any picture of this rank
        loss, slope = loss_and_gradient(module, name, mine)
        losses.append(loss)
        slopes.append(slope)
        if name == "regularizer":
            module.zero_grad()
            torch.autograd.backward(module(*mine).loss)
            scale: Any = module.log_scale
            slopes.append(scale.grad.clone())
            with torch.no_grad():
                scale -= 0.1 * scale.grad
    return {"losses": losses, "slopes": slopes, "state": dict(module.state_dict())}


def bank_ranks(rank: int) -> dict[str, Any]:
    return two_ranks(rank, "bank")


def regularizer_ranks(rank: int) -> dict[str, Any]:
    return two_ranks(rank, "regularizer")


@pytest.mark.parametrize("work", [bank_ranks, regularizer_ranks])
def test_ranks_with_different_seeds_hold_the_same_state(work: Any, two_processes: Any) -> None:
    first, second = two_processes(work)
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    assert all(loss.isfinite() for each in (first, second) for loss in each["losses"])
    if work is regularizer_ranks:
        torch.testing.assert_close(first["slopes"][1::2], second["slopes"][1::2], rtol=0, atol=0)
