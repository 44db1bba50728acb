"""What the habits of code bases do to attach, each on a stand-in that has it; messages are compared in full."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from protoseg import ContextPrototypeBank, attach
from protoseg.tap import LastStep, candidates, save_maps
from tests import hosts
from tests.stand_ins import AMN, SIPE, AMNFirst, C, D, MCTformer, Transformer, pictures
from tests.test_attach import bank, leftovers


def message(kind: type[Exception], run: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        run()
    return str(caught.value)


def warned(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in caught]


class TestWhatIsCaptured:
    def test_pooled_features_are_refused(self) -> None:
        network, (x, y) = hosts.Wide(pool=True), pictures()
        with attach(network, features="fc8:input", cam="fc8", bank=bank()) as tap:
            network(x)
            assert message(ValueError, lambda: tap.loss(y)) == (
                "attach: 'fc8:input' is pooled already, (4, 8, 1, 1), and one place is no map; name what is pooled; "
                "maps of this network: conv1a, b2.conv, b3.conv"
            )
        linear = hosts.ChannelsLast()
        with attach(linear, features="head:input", cam="head") as tap:
            linear(x)
            assert message(ValueError, lambda: tap.features) == (
                "attach: 'head:input' is pooled already, (4, 8), and one place is no map; name what is pooled; maps of "
                "this network: patch_embed, norm"
            )

    def test_a_norm_behind_the_pooling_is_noticed(self) -> None:
        torch.manual_seed(0)
        network, (x, _) = hosts.NormHead(), pictures()
        with attach(network, features="stages", cam="fc") as tap:
            network(x)
            (told,) = warned(lambda: tap.cam)
            percent = told.partition("'fc' gives ")[2].partition(" ")[0]
            assert int(percent) > 5
            assert told == (
                f"attach: the CAM is not that of the classifier: 'fc' gives {percent} % other than it would of the "
                "pooled 'stages'; between them ran pool (AdaptiveAvgPool2d), norm (LayerNorm). Where this is not meant "
                "(as for a class token), pass as cam= a function of the features that does the same at every pixel"
            )
            assert not warned(lambda: tap.cam)  # once

    def test_a_function_does_the_same_at_every_pixel(self) -> None:
        network, (x, _) = hosts.NormHead(), pictures()

        def cam(features: Tensor) -> Tensor:
            out: Tensor = network.fc(network.norm(features.permute(0, 2, 3, 1)))
            return out.permute(0, 3, 1, 2)

        with attach(network, features="stages", cam=cam) as tap:
            network(x)
            assert not warned(lambda: tap.cam)
            want = network.fc(network.norm(tap.features[0, :, 1, 2]))
            torch.testing.assert_close(tap.cam[0, :, 1, 2], want)

    def test_a_norm_before_the_pooling_is_named(self) -> None:
        class Maps(hosts.NormHead):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.GroupNorm(1, D)  # type: ignore[assignment]

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.fc(self.pool(self.norm(self.stages(x))).flatten(1))
                return out

        network, (x, _) = Maps(), pictures()
        with attach(network, features="stages", cam="fc") as tap:
            network(x)
            (told,) = warned(lambda: tap.cam)
            assert "between them ran norm (GroupNorm), pool (AdaptiveAvgPool2d)" in told
            assert told.endswith(
                "name 'norm' as features, or pass as cam= a function of the features that does the same at every pixel"
            )
        with attach(network, features="norm", cam="fc") as tap:
            network(x)
            assert not warned(lambda: tap.cam)

    def test_dropout_in_between_is_waited_for(self) -> None:
        network = nn.Sequential(nn.Conv2d(3, D, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5))
        network.append(nn.Linear(D, C))
        x, _ = pictures()
        with attach(network, features="0", cam="4") as tap:
            network(x)
            assert not warned(lambda: tap.cam)
            network.eval()(x)
            assert not warned(lambda: tap.cam)
        # One that drops nothing is not waited for.
        network.insert(3, nn.Dropout(0.0))
        network[4] = nn.Sigmoid()
        network.train()
        with attach(network, features="0", cam="5") as tap:
            network(x)
            assert "3 (Dropout), 4 (Sigmoid)" in warned(lambda: tap.cam)[0]

    def test_a_maximum_is_a_pooling_too(self) -> None:
        network, (x, _) = hosts.PatchClassifier(), pictures()
        with attach(network, features="decoder:input", cam="classifier") as tap:
            network(x)
            assert not warned(lambda: tap.cam)
            torch.testing.assert_close(tap.cam, F.conv2d(tap.features, network.classifier.weight))

    def test_maps_with_channels_last(self) -> None:
        network, (x, y) = hosts.ChannelsLast(), pictures()
        names: dict[str, Any] = {"features": "norm", "cam": "head"}
        with attach(network, reshape=lambda maps: maps.permute(0, 3, 1, 2), bank=(memory := bank()), **names) as tap:
            logits = network(x[..., :32])
            assert tap.features.shape == (4, D, 8, 4)
            torch.testing.assert_close(tap.cam.mean((-2, -1)) + network.head.bias, logits)
            tap.loss(y).backward()
        assert memory.stored.sum() > 0
        assert network.patch_embed.weight.grad.abs().sum() > 0
        with attach(network, features="norm", reshape=lambda maps: maps.flatten(1)) as tap:
            network(x)
            assert message(ValueError, lambda: tap.features) == (
                "attach: reshape must give a map [B, D, h, w], got (4, 512) of features (4, 8, 8, 8)"
            )

    def test_channels_last_without_a_reshape_are_told(self) -> None:
        network, (x, _) = hosts.ChannelsLast(dim=6), pictures()
        with attach(network, features="norm", cam="head") as tap:
            network(x)
            assert message(ValueError, lambda: tap.cam) == (
                "attach: 'head' takes 6 channels and the features have 8; name as features what is pooled before it; "
                "these look like channels-last maps, so pass reshape=lambda x: x.permute(0, 3, 1, 2)"
            )

    def test_tokens_lie_like_the_picture(self) -> None:
        network = Transformer()
        with attach(network, features="norm", cam="head", reshape=1) as tap:
            network(torch.rand(2, 3, 16, 36))
            assert tap.features.shape == (2, D, 4, 9)
            tokens = network.norm(network.blocks(torch.zeros(1, 37, D)))
            assert tokens.shape[1] == 37
            network(torch.rand(2, 3, 36, 36))
            assert tap.features.shape == (2, D, 9, 9)
        with attach(network, features="norm", reshape=3) as tap:
            network(torch.rand(2, 3, 16, 36))
            assert message(ValueError, lambda: tap.features) == (
                "attach: features (2, 37, 8) has no grid like the picture's (16, 36) of patches after 3 tokens; pass "
                "as reshape a function from [B, L, D] to [B, D, h, w]"
            )

    def test_outputs_in_dicts_and_lists(self) -> None:
        network, (x, y) = hosts.HuggingFace(), pictures()
        with attach(network, features="encoder"):
            assert message(TypeError, lambda: network(x)) == (
                "attach: 'encoder' must give a tensor or a tuple with one, got Output of {last_hidden_state: a tensor "
                "(4, 64, 8), pooler_output: a tensor (4, 8), hidden_states: tuple of {0: a tensor (4, 8, 8, 8), 1: a "
                "tensor (4, 64, 8)}}; say which behind a colon, as in 'encoder:last_hidden_state', or pass ('encoder', "
                "a function of it)"
            )
        with attach(network, features="encoder:nothing"):
            assert message(TypeError, lambda: network(x)).startswith(
                "attach: 'encoder:nothing' has no 'nothing', got Output of {last_hidden_state"
            )
        names = ["encoder:last_hidden_state", "encoder:hidden_states:1", "encoder:hidden_states:-1", "encoder:0"]
        found = []
        for name in [*names, ("encoder", lambda out: out.hidden_states[1])]:
            with attach(network, features=name, cam="classifier", reshape=0, bank=(memory := bank())) as tap:
                network(pixel_values=x)
                tap.loss(y)
                found.append(tap.features)
                assert memory.stored.sum() > 0
        for each in found[1:]:
            assert torch.equal(each, found[0])

        mixed = hosts.MixTransformer()
        with attach(mixed, features="encoder:0:3", cam="classifier") as tap:
            mixed(x)
            torch.testing.assert_close(tap.cam, mixed(x, cam_only=True)[0])
        with attach(mixed, features="encoder"):
            assert "as in 'encoder:0:0', or" in message(TypeError, lambda: mixed(x))
        with pytest.raises(TypeError, match="features must be a layer's name, or a pair of a name and a function"):
            attach(network, features=3)  # type: ignore[arg-type]

    def test_second_inputs(self) -> None:
        network, (x, _) = hosts.GroupViT(), pictures()
        assign = "vision_model.encoder.stages.0.downsample"
        names = [f"{assign}:input:1", f"{assign}:input:0"]
        with attach(network, features=names[0], reshape=lambda tokens: tokens[:, :, None].transpose(1, 3)) as tap:
            network(x)
            assert torch.equal(tap.features[0, :, 0].T, network.group_tokens[0])
        with attach(network, features=names[1], reshape=0) as tap:
            network(x)
            assert tap.features.shape == (4, D, 8, 8)
        with attach(network, features=f"{assign}:input:2"):
            assert message(TypeError, lambda: network(x)) == (
                f"attach: '{assign}:input:2' has no '2', got dict of {{0: a tensor (4, 64, 8), 1: a tensor (4, 3, 8)}}"
            )

    def test_what_is_changed_in_place_can_be_meant(self) -> None:
        network, (x, y) = hosts.DenseNet(), pictures()
        with attach(network, features="features", cam="classifier") as tap:
            network(x)
            assert message(RuntimeError, lambda: tap.features) == (
                "attach: what was captured as features has been changed in place since; name the layer that changes "
                "it, make it not inplace, or, where what it has become is what you want, pass changed=True"
            )
        with attach(network, features="features", cam="classifier", changed=True, bank=bank()) as tap:
            logits = network(x)
            torch.testing.assert_close(tap.cam.mean((-2, -1)) + network.classifier.bias, logits)
            (logits.sum() + tap.loss(y)).backward()
        assert network.features[1].weight.grad.abs().sum() > 0


class TestWhichPass:
    def test_a_layer_that_runs_twice(self) -> None:
        network, (x, y) = hosts.Wide(twice=True), pictures()
        names = {"features": "fc8:input", "cam": "fc8"}
        with attach(network, bank=(memory := bank()), **names) as tap:
            network(x)
            assert warned(lambda: tap.loss(y)) == [
                "attach: 'fc8:input' ran 2 times in one forward pass, and the last of them was taken; pass call=0 to 1 "
                "to say which"
            ]
            network(x)
            assert not warned(lambda: tap.loss(y))
            last = tap.features
        assert memory.memory.step == 2  # two passes, not four
        calls = []
        for call in (0, 1):
            with attach(network, call=call, **names) as tap:
                network(x)
                assert not warned(lambda: calls.append(tap.features))
        assert torch.equal(calls[1], last)
        assert torch.equal(calls[0] * (calls[0] < 0.5), calls[1])
        with attach(network, call=2, **names) as tap:
            network(x)
            assert message(RuntimeError, lambda: tap.features) == (
                "attach: 'fc8:input' ran 2 time(s) in the pass, and call=2 asks for another one; pass call=0 to 1"
            )
        with pytest.raises(ValueError, match="call must be at least 0"):
            attach(network, call=-1, **names)

    def test_a_layer_that_is_never_called(self) -> None:
        network, (x, _) = hosts.Wide(), pictures()
        with attach(network, features="b3", cam="fc8") as tap:
            network(x)
            assert message(RuntimeError, lambda: tap.features) == (
                "attach: 'b3' did not run in a pass that other layers did run in; what did run near it: b3.conv, fc8, "
                "b2.conv; name a layer that does, or call clear() after a pass that was broken off"
            )
        with attach(network, features="b3") as tap:
            network(x)
            assert message(RuntimeError, lambda: tap.features) == (
                "attach: the network ran and 'b3' never did; what did run near it: b3.conv, fc8, b2.conv; a layer is "
                "seen where it is called, not where its forward() or another method of it is"
            )

    @pytest.mark.filterwarnings("ignore:.*the bank is empty")
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_a_pass_without_gradients_does_not_take_the_place_of_the_training_pass(self, mode: Any) -> None:
        network, (x, y) = hosts.MixTransformer(), pictures()
        names: dict[str, Any] = {"features": "encoder:0:3", "cam": "classifier"}
        want = []
        for between in (False, True):
            with attach(network, bank=(memory := bank()), **names) as tap:
                network(x)
                if between:
                    with mode():
                        network(x * 0, cam_only=True)
                        assert tap.pacam(y).shape == (4, C + 1, 8, 8)  # of that one
                loss = tap.loss(y)
                loss.backward()
                want.append((loss, memory.memory.instances.clone()))
                with mode():
                    network(x)
                assert message(ValueError, lambda: tap.loss(y)).startswith(
                    "attach: the CAM must be connected to the graph, got a detached one"
                )
        torch.testing.assert_close(want[0], want[1], rtol=0, atol=0)

    def test_methods_of_a_network_are_passes_too(self) -> None:
        network, (x, y) = AMNFirst(), pictures()
        with attach(network, features="stage4", cam="classifier", bank=(memory := bank())) as tap:
            for _ in range(2):
                network.forward(x)
                tap.loss(y)
        assert memory.memory.step == 2
        assert memory.stored.sum() > 0

    def test_passes_of_threads_stay_apart(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        network, (x, _) = AMNFirst(), pictures()
        with attach(network, features="stage4", cam="classifier", forwards=8) as tap:
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(network, [x * scale for scale in range(8)]))
            assert len(tap._read()) == 8


class TestNothingIsLeft:
    def test_a_network_is_saved_and_copied_without_hooks(self, tmp_path: Path) -> None:
        network, (x, y) = AMNFirst(), pictures()
        with attach(network, features="stage4", cam="classifier", bank=bank()) as tap:
            network(x)
            torch.save(network, tmp_path / "network.pt")
            copied = copy.deepcopy(network)
            before = tap.features
            saved = (tmp_path / "network.pt").read_bytes()
            assert b"protoseg" not in saved  # it loads where this library is not
            loaded = torch.load(tmp_path / "network.pt", weights_only=False)
            for other in (copied, loaded):
                torch.testing.assert_close(other(x), network(x))
                other(x * 0)
            assert torch.equal(tap.features, before)
            tap.loss(y)

    def test_a_tap_that_is_forgotten_takes_its_hooks_along(self) -> None:
        network, (x, y) = AMNFirst(), pictures()
        tap = attach(network, features="stage4", cam="classifier", bank=bank())
        network(x)
        tap.loss(y)
        kept = weakref.ref(tap.features)
        assert leftovers(network)
        del tap
        gc.collect()
        assert not leftovers(network)
        assert kept() is None

    def test_a_copy_of_a_tap_is_released(self) -> None:
        network = AMNFirst()
        with attach(network, features="stage4", bank=bank()) as tap:
            copied = copy.deepcopy(tap)
            assert isinstance(copied.bank, ContextPrototypeBank)
            assert message(RuntimeError, lambda: copied.features) == (
                "attach: this tap has been released; attach again"
            )
            stream = io.BytesIO()
            torch.save(tap, stream)
            network(torch.rand(1, 3, 64, 64))
            assert tap.features.shape == (1, D, 4, 4)

    def test_memory_stays_flat_over_filling_maps_and_candidates(self) -> None:
        network, (x, y) = AMNFirst(), pictures(2, 32)
        memory = bank()

        def rounds(count: int) -> tuple[int, int]:
            for _ in range(count):
                tap = attach(network, features="stage4", cam="classifier", bank=memory)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tap.fill([(x, y)], rounds=1)
                tap.maps(x, y)
                candidates(network, x)
                with torch.no_grad():
                    network(x)
                    tap.store(y)
                del tap
            gc.collect()
            every = gc.get_objects()
            return len(every), sum(issubclass(type(each), Tensor) for each in every)

        rounds(5)
        before = rounds(1)
        after = rounds(100)
        assert after[1] == before[1]
        assert after[0] - before[0] < 50
        assert not leftovers(network)


def unused_main(rank: int) -> Any:
    """A head that the network never calls, in a wrapper that gives up unused parameters; and in one that does not."""
    x, y = pictures()
    found: dict[str, Any] = {}
    for name, options in {"unused": {"find_unused_parameters": True}, "static": {"static_graph": True}}.items():
        torch.manual_seed(0)
        network = DistributedDataParallel(Headless(), **options)
        with attach(network, features="stage4", cam="classifier", bank=bank()) as tap:
            for _ in range(2):
                network.zero_grad()
                out = network(x)
                try:
                    (out.mean() + tap.loss(y)).backward()
                except RuntimeError as error:
                    found[name] = str(error)
                    break
            else:
                found[name] = float(network.module.classifier.weight.grad.abs().sum())
    return found


class Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage4, self.classifier = nn.Conv2d(3, D, 8, stride=8), nn.Conv2d(D, C, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.stage4(x)
        return out


def test_a_head_that_a_wrapper_has_given_up(two_processes: Any) -> None:
    for found in two_processes(unused_main):
        assert found["unused"] == (
            "attach: classifier.weight are reached by the bank's loss and not by what the network returns, and "
            "DistributedDataParallel(find_unused_parameters=True) has given them up by then ('mark a variable ready "
            "only once'); wrap with static_graph=True instead, or return what the loss needs from forward()"
        )
        assert found["static"] > 0


class TestFillAndMaps:
    @staticmethod
    def network() -> nn.Module:
        torch.manual_seed(0)
        return AMNFirst().requires_grad_(False)

    @pytest.mark.parametrize("keep", [0, 2**30])
    def test_fill_is_the_banks_own(self, keep: int) -> None:
        network = self.network()
        x, y = pictures(8)
        batches = [(x[:4], y[:4]), (x[4:], y[4:])]
        views = []
        with attach(network, features="stage4", cam="classifier", bank=(filled := bank())) as tap:
            modes = [module.training for module in network.modules()]
            contrast = tap.fill(batches, keep=keep)
            assert [module.training for module in network.modules()] == modes
            for images, labels in batches:
                network(images)
                views.append((tap.features, tap.cam, labels))
        want = bank()
        assert want.fill(views) == contrast
        torch.testing.assert_close(dict(filled.state_dict()), dict(want.state_dict()), rtol=0, atol=0)
        assert filled.training

    def test_dropout_is_off_even_where_train_is_overridden(self) -> None:
        network = AMN()
        nn.init.constant_(network.classifier[1].bias, 0.5)
        x, y = pictures()
        channels = range(1, C + 1)
        with attach(network, features="stage4", cam="classifier", channels=channels, bank=(memory := bank())) as tap:
            tap.fill([(x, y)], run=network)
            maps = [tap.maps(x, y, run=network) for _ in range(2)]
        assert torch.equal(maps[0].cam, maps[1].cam)
        assert memory.stored.sum() > 0
        assert network.classifier[0].training

    def test_batches_of_other_forms(self) -> None:
        network = self.network()
        x, y = pictures()
        with attach(network, features="stage4", cam="classifier", bank=bank()) as tap:
            assert message(TypeError, lambda: tap.fill([{"name": "a", "img": x, "label": y}])) == (
                "attach: a batch must be a tuple of images and labels, got dict with 'name', 'img', 'label'; pass as "
                "unpack= a function that takes both out of it"
            )
            tap.fill([{"img": x, "label": y}], unpack=lambda pack: (pack["img"], pack["label"]))
            assert tap.bank is not None
            assert tap.bank.stored.sum() > 0
            assert message(TypeError, lambda: tap.fill(iter([(x, y)]))) == (
                "attach: fill reads the loader once a round, got a list_iterator; pass a list or a loader"
            )

    def test_maps_of_scales_and_mirror_images(self) -> None:
        network = self.network()
        x, y = pictures()
        with attach(network, features="stage4", cam="classifier", bank=bank()) as tap:
            tap.fill([(x, y)])
            found = tap.maps(x, y, scales=(1.0, 1.5), multiple=16)
            plain = tap.maps(x, y, flip=False)
            network(x)
            want = tap.pacam(y)[:, 1:]
            mirrored = tap.maps(x.flip(-1), y, scales=(1.0, 1.5), multiple=16)
        assert found.pacam.shape == found.cam.shape == (4, C, 64, 64)
        torch.testing.assert_close(plain.pacam, F.interpolate(want, (64, 64), mode="bilinear"))
        assert found.pacam[y == 0].abs().sum() == 0
        torch.testing.assert_close(mirrored.pacam.flip(-1), found.pacam, rtol=1e-4, atol=1e-5)

    def test_a_map_behind_the_trained_bank_is_the_same_after_loading(self, tmp_path: Path) -> None:
        network = self.network()
        x, y = pictures()
        with attach(network, features="stage4", cam="classifier", bank=(first := bank())) as tap:
            tap.fill([(x, y)])
            want = tap.maps(x, y)
        torch.save(first.state_dict(), tmp_path / "bank.pt")
        second = bank()
        second.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
        with attach(network, features="stage4", cam="classifier", bank=second) as tap:
            got = tap.maps(x, y)
        torch.testing.assert_close(got, want, rtol=0, atol=0)

    def test_store_without_a_loss(self) -> None:
        network = self.network()
        x, y = pictures()
        with attach(network, features="stage4", cam="classifier", bank=(memory := bank().eval())) as tap:
            with torch.no_grad():
                network(x)
                tap.store(y)
            assert message(RuntimeError, lambda: tap.store(y)) == (
                "attach: the pictures of this pass have been stored already; run the network first"
            )
        assert memory.stored.sum() > 0
        assert not memory.training

    def test_padding_is_left_out(self) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, D, 4, stride=4), nn.ReLU(), nn.Conv2d(D, C, 1, bias=False))
        x, y = pictures()
        valid = torch.ones(4, 64, 64, dtype=torch.bool)
        valid[:, :, 48:] = False
        banks = []
        for noise in (0, 5):
            padded = torch.where(valid[:, None], x, noise)
            with attach(network, features="1", cam="2", bank=bank()) as tap:
                network(padded)
                loss = tap.loss(y, valid)
                banks.append((loss, dict(tap.bank.state_dict()), tap.pacam(y, valid)))  # type: ignore[union-attr]
        torch.testing.assert_close(banks[0], banks[1], rtol=0, atol=1e-6)

    def test_what_became_of_the_classes(self) -> None:
        network = self.network()
        x, y = pictures()
        with attach(network, features="stage4", cam="classifier", bank=bank()) as tap:
            assert tap.last is None
            network(x)
            with torch.no_grad():
                tap.store(y)
            first = tap.last
            tap.pacam(y)
            second = tap.last
        assert first is not None
        assert first == LastStep(present=4, valid=first.valid, stored=first.valid, accepted=0)
        assert first.valid > 0
        assert second == LastStep(present=4, valid=first.valid, stored=0, accepted=first.valid)

    def test_a_bank_that_stores_nothing_for_long(self) -> None:
        network = AMNFirst()
        x, y = pictures(1)
        with attach(network, features="stage4", cam="classifier", bank=bank()) as tap:
            told = []
            for _ in range(100):
                network(x)
                told += warned(lambda: tap.loss(y * 0))
        assert told == [
            "attach: nothing has been stored in the last 100 steps; see tap.last: where no class is present look at "
            "the labels, where none is valid at the CAM (raw scores, the channels in the order of the labels)"
        ]


class TestFiles:
    def test_the_dictionary(self, tmp_path: Path) -> None:
        maps, labels = torch.rand(C, 37, 50), torch.tensor([0, 1, 0, 1])
        save_maps(tmp_path / "a.npy", maps, labels)
        read = np.load(tmp_path / "a.npy", allow_pickle=True).item()
        assert set(read) == {"keys", "cam", "high_res"}
        assert read["keys"].tolist() == [1, 3]
        assert torch.is_tensor(read["cam"])
        assert read["cam"].shape == (2, 10, 13)
        assert torch.equal(torch.from_numpy(read["high_res"]), maps[[1, 3]])
        # As the next stages read it.
        keys = np.pad(read["keys"] + 1, (1, 0), mode="constant")
        scores = np.pad(read["high_res"], ((1, 0), (0, 0), (0, 0)), mode="constant", constant_values=0.5)
        assert set(np.unique(keys[scores.argmax(0)])) <= {0, 2, 4}
        assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]

    @pytest.mark.parametrize("labels", [[0, 1, 0, 1], [0, 0, 0, 0]])
    def test_the_other_dictionaries(self, tmp_path: Path, labels: list[int]) -> None:
        maps, present = torch.rand(C, 9, 13), [index for index, each in enumerate(labels) if each]
        read = {}
        for form in ("psa", "puzzle", "sipe", "clip-es"):
            save_maps(tmp_path / f"{form}.npy", maps, torch.tensor(labels), form=form)
            read[form] = np.load(tmp_path / f"{form}.npy", allow_pickle=True).item()
        want = maps[present].numpy()
        assert list(read["psa"]) == present
        assert all((read["psa"][key] == maps[key].numpy()).all() for key in present)
        background = [0, *(key + 1 for key in present)]
        assert read["puzzle"]["keys"].tolist() == read["sipe"]["keys"].tolist() == background
        assert (read["puzzle"]["hr_cam"] == want).all()
        assert read["puzzle"]["cam"].shape == (len(present), 3, 4)
        assert (read["sipe"]["IS_CAM"][1:] == want).all()
        assert (read["sipe"]["IS_CAM"][0] == 1 - want.max(0, initial=0)).all()
        assert (read["clip-es"]["attn_highres"] == want).all()
        assert read["clip-es"]["keys"].tolist() == present

    def test_a_picture_without_a_class(self, tmp_path: Path) -> None:
        save_maps(tmp_path / "a.npy", torch.rand(C, 8, 8), torch.zeros(C))
        read = np.load(tmp_path / "a.npy", allow_pickle=True).item()
        assert read["high_res"].shape == (0, 8, 8)
        assert read["cam"].shape == (0, 2, 2)

    def test_what_is_refused(self, tmp_path: Path) -> None:
        maps, labels = torch.rand(C, 8, 8), torch.ones(C)
        for arguments, problem in (
            ((tmp_path / "a.npz", maps, labels), "path must end in .npy, got 'a.npz'"),
            ((tmp_path / "a.npy", maps[None], labels), "maps must have shape"),
            ((tmp_path / "a.npy", maps, labels[1:]), "labels must have shape"),
            ((tmp_path / "a.npy", maps * 3, labels), "maps must lie between 0 and 1"),
        ):
            with pytest.raises(ValueError, match=problem):
                save_maps(*arguments)
        with pytest.raises(ValueError, match="form must be one of 'irn', 'psa'"):
            save_maps(tmp_path / "a.npy", maps, labels, form="voc")  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())


PAIRS: dict[str, tuple[Callable[[], nn.Module], str, str, Any, Any]] = {
    "amn first": (AMNFirst, "stage4", "classifier", None, None),
    "amn": (AMN, "classifier.1:input", "classifier.1", None, lambda network, x: network(x, torch.ones(len(x), C))),
    "sipe": (SIPE, "classifier:input", "classifier", None, lambda network, x: network(x, torch.ones(len(x), 1, 8, 6))),
    "mct": (MCTformer, "head:input", "head", None, None),
    "transformer": (Transformer, "norm", "head", 1, None),
    "wide": (hosts.Wide, "fc8:input", "fc8", None, None),
    "norm head": (hosts.NormHead, "stages", "fc", None, None),
    "channels last": (hosts.ChannelsLast, "norm", "head", "channels_last", None),
    "hugging face": (hosts.HuggingFace, "encoder:last_hidden_state", "classifier", 0, None),
    "segformer": (hosts.Segformer, "decode_head.classifier:input", "decode_head.classifier", None, None),
    "densenet": (hosts.DenseNet, "features", "classifier", None, None),
    "mix": (hosts.MixTransformer, "encoder:0:3", "classifier", None, None),
}


@pytest.mark.parametrize("name", PAIRS)
def test_candidates_have_the_right_pair_first_or_second(name: str) -> None:
    torch.manual_seed(0)
    make, features, cam, reshape, run = PAIRS[name]
    network = make()
    before, modes = list(network.state_dict()), [module.training for module in network.modules()]
    images = torch.rand(2, 3, 128, 96)
    found = candidates(network, images, run=None if run is None else lambda x: run(network, x))
    assert [module.training for module in network.modules()] == modes
    seen = []
    for module in network.modules():
        module.training = False  # AMN's eval() does nothing
    for names in ((features, cam), *((each.features, each.cam) for each in found[:2])):
        with torch.no_grad(), attach(network, features=names[0], cam=names[1], changed=True) as tap:
            run(network, images) if run else network(images)
            seen.append(tap._read()[-1].seen["features"])
    same = [each.shape == seen[0].shape and torch.equal(each, seen[0]) for each in seen[1:]]
    right = [(each.cam, each.reshape, ok) for each, ok in zip(found, same, strict=False)]
    assert (cam, reshape, True) in right, found
    assert list(network.state_dict()) == before
    assert not leftovers(network)


def test_nothing_that_looks_like_a_cam() -> None:
    assert candidates(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.rand(1, 3, 16, 16)) == []
    with pytest.raises(ValueError, match="count must be above 0"):
        candidates(nn.Identity(), torch.rand(1, 3, 16, 16), count=0)
