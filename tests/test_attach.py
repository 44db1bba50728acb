"""attach: any network, in a few lines, with nothing left behind."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from protoseg import ContextPrototypeBank, attach
from protoseg.tap.recorder import _rank
from tests.stand_ins import AMN, SIPE, AMNFirst, C, D, MCTformer, Transformer, pictures


def bank(**options: Any) -> ContextPrototypeBank:
    return ContextPrototypeBank(C, D, capacity=16, num_contexts=2, top_k=1, background_contexts=2, **options)


def masks(labels: Tensor, side: int = 4) -> Tensor:
    return F.pad(labels, (1, 0), value=1)[..., None, None].expand(-1, -1, side, side)


WEIGHT = torch.randn(C, D, 1, 1, generator=torch.Generator().manual_seed(0))
# The network, how it is attached to, and how it is called.
Call = Callable[[nn.Module, Tensor, Tensor], Any]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Call]] = {
    "amn first": (AMNFirst, {"features": "stage4", "cam": "classifier"}, lambda net, x, y: net(x)),
    "amn": (
        AMN,
        {"features": "stage4", "cam": "classifier", "channels": range(1, C + 1), "background": 0},
        lambda net, x, y: net(x, y),
    ),
    "sipe": (SIPE, {"features": "stage4", "cam": "classifier"}, lambda net, x, y: net(x, masks(y))),
    "mct v2": (MCTformer, {"features": "head:input", "cam": "head"}, lambda net, x, y: net(x)),
    "mct plus": (lambda: MCTformer(plus=True), {"features": "head:input", "cam": "head"}, lambda net, x, y: net(x)),
    "transformer": (
        Transformer, {"features": "norm", "cam": "head", "reshape": 1}, lambda net, x, y: net(x)
    ),
    "callable": (
        SIPE,
        {"features": "backbone.3", "cam": lambda features: F.conv2d(features, WEIGHT)},
        lambda net, x, y: net(x, masks(y)),
    ),
}  # fmt: skip


def leftovers(network: nn.Module) -> list[Any]:
    names = [name for name in vars(network) if name.endswith("hooks")]
    return [hook for module in network.modules() for name in names for hook in vars(module).get(name, {})]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_fills_the_bank_and_reaches_the_network(name: str) -> None:
    torch.manual_seed(0)
    make, names, call = NETWORKS[name]
    network, images, (x, y) = make(), pictures(8), pictures(8)
    network.train()
    before, modes = list(network.state_dict()), [module.training for module in network.modules()]
    untouched = copy.deepcopy(network)
    memory = bank(background="one_minus_max", detach="none")
    with attach(network, bank=memory, **names) as tap:
        torch.manual_seed(1)
        call(network, x, y)
        assert tap.features.shape[:2] == (8, D)
        assert tap.cam.shape[:2] == (8, C)
        loss = tap.loss(y)
        loss.backward()
        pacam = tap.pacam(y)
        assert list(network.state_dict()) == before
    assert loss > 0
    assert pacam.shape[:2] == (8, C + 1)
    assert memory.stored[: C - 1].sum() > 0
    assert memory.stored[C - 1] == 0
    assert any(each.grad is not None and each.grad.abs().sum() > 0 for each in network.parameters())
    assert not leftovers(network)
    assert [module.training for module in network.modules()] == modes
    with torch.no_grad():
        for kept, now in zip(untouched.parameters(), network.parameters(), strict=True):
            assert torch.equal(kept, now)
        torch.manual_seed(2)
        want = call(untouched, images[0], images[1])
        torch.manual_seed(2)
        got = call(network, images[0], images[1])
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_loss_is_the_banks_own(name: str) -> None:
    """With what the network's code has inside, taken without a hook."""
    make, names, call = NETWORKS[name]
    network, (x, y) = make(), pictures()
    network.eval()  # of which AMN's returns nothing
    with attach(network, bank=(used := bank()), **names) as tap:
        call(network, x, y)
        loss, features, cam = tap.loss(y), tap.features, tap.cam
    want = bank()(features, cam, y)
    torch.testing.assert_close(loss, want.loss, rtol=0, atol=0)
    assert used.stored.sum() == want.valid.sum() + (used.stored[-1])


def test_cam_of_a_pooled_classifier_is_its_weights_at_every_pixel() -> None:
    network, (x, _) = AMNFirst(), pictures()
    with attach(network, features="stage4", cam="classifier") as tap:
        logits = network(x)
        torch.testing.assert_close(tap.cam.mean((-2, -1)), logits)
        assert torch.equal(tap.cam, F.conv2d(tap.features, network.classifier.weight))


def test_channels_give_the_order_of_the_labels() -> None:
    network, (x, y) = AMN(), pictures()
    with attach(network, features="classifier.1:input", cam="classifier", channels=[2, 4]) as tap:
        logits = network(x, y)
        assert torch.equal(tap.cam, logits[:, [2, 4]])
    with attach(network, features="stage4", cam="classifier", channels=[2, 4], background=1) as tap:
        logits = network(x, y)
        assert torch.equal(tap.cam, logits[:, [2, 4]] - logits[:, 1:2])


def test_tokens_become_a_map_row_by_row() -> None:
    network = nn.Sequential(nn.Identity(), nn.Identity())
    tokens = torch.rand(2, 1 + 6, D)
    with attach(network, features="0", reshape=lambda each: each[:, 1:].transpose(1, 2).unflatten(2, (2, 3))) as tap:
        network(tokens)
        assert torch.equal(tap.features[1, :, 1, 2], tokens[1, -1])
    with attach(network, features="0", reshape=2) as tap:
        network(tokens[:, :6])
        assert torch.equal(tap.features[0, :, 0, 1], tokens[0, 3])
    for reshape, problem in ((1, "no square of patches"), (None, "pass reshape=")):
        with attach(network, features="0", reshape=reshape) as tap:
            network(tokens)
            with pytest.raises(ValueError, match=problem):
                _ = tap.features


class TestSeveralForwardPasses:
    NAMES: ClassVar[dict[str, Any]] = {"features": "stage4", "cam": "classifier"}

    def test_views_of_one_step_are_averaged_and_stored_once(self) -> None:
        network, (x, y) = AMNFirst(), pictures()
        state = bank()
        state(torch.rand(4, D, 4, 4), torch.rand(4, C, 4, 4), y)
        one, two = copy.deepcopy(state), copy.deepcopy(state)
        with attach(network, bank=one, forwards=2, **self.NAMES) as tap:
            network(x)
            first = tap.features, tap.cam
            network(x[..., ::2, ::2])
            second = tap.features, tap.cam
            loss = tap.loss(y)
        wanted = [copy.deepcopy(state).eval()(*each, y).loss for each in (first, second)]
        torch.testing.assert_close(loss, torch.stack(wanted).mean())
        two(*first, y)
        assert torch.equal(one.memory.instances, two.memory.instances)
        assert torch.equal(one.stored, two.stored)

    def test_only_as_many_as_make_a_step_are_kept(self) -> None:
        network, (x, y) = AMNFirst(), pictures()
        with attach(network, bank=bank(), **self.NAMES) as tap:
            network(x)
            old = weakref.ref(tap.features)
            network(x)
            gc.collect()
            assert old() is None
            tap.loss(y)
            network(x[:2])  # another step
            assert tap.loss(y[:2]).isfinite()

    def test_a_step_begins_anew_after_the_loss(self) -> None:
        network, (x, y) = AMNFirst(), pictures()
        with attach(network, bank=bank(), forwards=2, **self.NAMES) as tap:
            network(x)
            network(x)
            tap.loss(y)
            network(x[:2])
            assert tap.loss(y[:2]).isfinite()

    def test_accumulated_batches_are_stored_like_one(self) -> None:
        network, (x, y) = AMNFirst(), pictures(8)
        whole, parts = bank(locate="cam"), bank(locate="cam")  # by the map, the first part would help the second
        with attach(network, bank=whole, **self.NAMES) as tap:
            network(x)
            tap.loss(y)
        with attach(network, bank=parts, **self.NAMES) as tap:
            for part in (slice(0, 4), slice(4, 8)):
                network(x[part])
                tap.loss(y[part]).backward()
        assert torch.equal(whole.stored, parts.stored)
        torch.testing.assert_close(whole.memory.instances, parts.memory.instances)

    def test_a_second_loss_stores_nothing(self) -> None:
        network, (x, y), memory = AMNFirst(), pictures(), bank()
        with attach(network, bank=memory, **self.NAMES) as tap:
            network(x)
            tap.loss(y)
            before = copy.deepcopy(memory.state_dict())
            tap.loss(y)
            tap.pacam(y)
        torch.testing.assert_close(dict(memory.state_dict()), dict(before), rtol=0, atol=0)
        assert memory.training

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_stores_once(self, reentrant: bool) -> None:
        class Checkpointed(AMNFirst):
            def stages(self, x: Tensor) -> Tensor:
                x = self.stage2(self.stage1(x))
                out: Tensor = checkpoint(self.stage4, self.stage3(x), use_reentrant=reentrant)
                return out

        torch.manual_seed(0)
        # With as many contexts as instances, a cosine against the nearest is the same before and after the update.
        same: dict[str, Any] = {"detach": "none", "score": "cosine", "locate": "cam"}
        network, (x, y), memory = Checkpointed(), pictures(), bank(**same)
        plain = AMNFirst()
        plain.load_state_dict(network.state_dict())
        with attach(network, bank=memory, forwards=2, **self.NAMES) as tap:
            out = network(x)
            if reentrant:  # the layer runs without a graph, and again with one when nobody looks
                with pytest.raises(ValueError, match="use_reentrant=False"):
                    tap.loss(y)
                return
            loss = tap.loss(y)
            (F.multilabel_soft_margin_loss(out, y) + loss).backward()
            assert tap.loss(y) == loss  # nothing came in during the backward pass
        expected = bank(**same)
        with attach(plain, bank=expected, **self.NAMES) as tap:
            (F.multilabel_soft_margin_loss(plain(x), y) + tap.loss(y)).backward()
        assert torch.equal(memory.memory.instances, expected.memory.instances)
        for got, want in zip(network.parameters(), plain.parameters(), strict=True):
            if want.grad is not None:
                torch.testing.assert_close(got.grad, want.grad)


class TestModes:
    @pytest.mark.filterwarnings("ignore:.*the bank is empty")
    def test_without_gradients_there_are_maps_and_nothing_is_stored(self) -> None:
        network, (x, y), memory = AMNFirst(), pictures(), bank()
        with attach(network, features="stage4", cam="classifier", bank=memory) as tap, torch.no_grad():
            network(x)
            assert tap.loss(y).isfinite()
            assert tap.pacam(y).shape == (4, C + 1, 4, 4)
        assert memory.stored.sum() == 0

    @pytest.mark.filterwarnings("ignore:.*the bank is empty")
    def test_a_bank_in_eval_stores_nothing_whatever_the_networks_mode(self) -> None:
        network, (x, y), memory = AMNFirst(), pictures(), bank().eval()
        network.eval()  # which does nothing there
        with attach(network, features="stage4", cam="classifier", bank=memory) as tap:
            network(x)
            tap.loss(y)
        assert memory.stored.sum() == 0

    @pytest.mark.filterwarnings("ignore:.*the bank is empty")
    def test_a_detached_cam_is_refused_with_the_remedy(self) -> None:
        network, (x, y) = SIPE(), pictures()
        names = {"features": "stage4", "cam": lambda features: network.classifier(features).detach()}
        with attach(network, bank=bank(), **names) as tap:
            network(x, masks(y))
            with pytest.raises(ValueError, match="for MCTformer 'head'"):
                tap.loss(y)
            assert tap.pacam(y).isfinite().all()
        with attach(network, bank=bank(detach="cam"), **names) as tap:  # there the CAM is the target
            network(x, masks(y))
            assert tap.loss(y).isfinite()
            with torch.no_grad():
                network(x, masks(y))
            with pytest.raises(ValueError, match="the features must be connected"):
                tap.loss(y)

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compiled(self, backend: str) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        network, (x, y) = MCTformer(), pictures()
        losses = []
        for runs in (network, torch.compile(network, backend=backend)):
            with attach(runs, features="head:input", cam="head", bank=bank(detach="none")) as tap:
                for _ in range(2):
                    network.zero_grad()
                    runs(x)
                    loss = tap.loss(y)
                    loss.backward()
                losses.append((loss, [each.grad.clone() for each in network.parameters() if each.grad is not None]))
        torch.testing.assert_close(losses[0], losses[1])
        runs(x)  # released
        assert not tap._recorder.holding
        assert not leftovers(network)

    def test_data_parallel_before_and_after(self) -> None:
        network, (x, y) = AMNFirst(), pictures()
        wrapped = nn.DataParallel(network)
        for whole in (network, wrapped):
            with attach(whole, features="stage4", cam="classifier", bank=bank()) as tap:
                wrapped(x)
                assert tap.loss(y).isfinite()

    def test_parts_of_several_devices_come_in_the_order_of_the_batch(self) -> None:
        """As the replicas of DataParallel leave them, whichever is done first."""
        network, (x, _) = AMNFirst(), pictures()
        with attach(network, features="stage4", cam="classifier", bank=bank()) as tap:
            whole = network(x)
            features = tap.features
            tap.clear()
            kept = tap._recorder._kept[True]
            for index, part in ((0, slice(2, 4)), (1, slice(0, 2))):
                network(x[part])
                kept[torch.device("cuda", index)] = kept.pop(torch.device("cpu"))
            order = sorted(kept, key=lambda device: _rank(device, [1, 0]))
            assert [device.index for device in order] == [1, 0]
            parts = [kept[device][0].seen["features"].tensor for device in order]
        torch.testing.assert_close(torch.cat(parts), features)
        assert whole.shape == (4, C)

    def test_half_precision(self) -> None:
        network, (x, y) = AMNFirst(), pictures()
        with attach(network, features="stage4", cam="classifier", bank=bank()) as tap:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = network(x)
                loss = F.multilabel_soft_margin_loss(out, y) + tap.loss(y)
            loss.backward()
            assert tap.features.dtype == torch.bfloat16
        assert loss.isfinite()

    def test_a_copy_of_the_network_is_not_listened_to(self) -> None:
        network, (x, _) = AMNFirst(), pictures()
        with attach(network, features="stage4", cam="classifier") as tap:
            teacher = copy.deepcopy(network)
            network(x)
            before = tap.features
            teacher(x * 0)
            assert tap.features is before
