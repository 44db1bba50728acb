"""attach: what is refused, and that nothing is left behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg import attach
from protoseg.tap import Tap
from tests import stand_ins
from tests.stand_ins import AMN, SIPE, AMNFirst, C, D, pictures
from tests.test_attach import bank, leftovers


class TestErrors:
    def test_an_unknown_layer_lists_near_names(self) -> None:
        with pytest.raises(ValueError, match=r"features must name a layer .* got 'stage5'; near names: .*stage4"):
            attach(AMNFirst(), features="stage5")
        with pytest.raises(ValueError, match=r"cam must name a layer .* near names: classifier"):
            attach(nn.DataParallel(AMNFirst()), features="stage4", cam="module.classifier")
        with pytest.raises(ValueError, match=r"near names: head\.fc"):
            attach(nn.ModuleDict({"head": nn.ModuleDict({"fc": nn.Linear(1, 1)})}), features="fc")

    def test_a_failed_attach_leaves_no_hook(self) -> None:
        network = AMNFirst()
        with pytest.raises(ValueError, match="cam must name"):
            attach(network, features="stage4", cam="nothing")
        assert not leftovers(network)

    def test_what_is_missing(self) -> None:
        network, (x, y) = AMNFirst(), pictures()
        with attach(network, features="stage4") as tap:
            with pytest.raises(RuntimeError, match="call the network first"):
                _ = tap.features
            network(x)
            with pytest.raises(RuntimeError, match="pass cam="):
                _ = tap.cam
            with pytest.raises(RuntimeError, match="pass bank="):
                tap.loss(y)
        with pytest.raises(RuntimeError, match="released"):
            _ = tap.features
        with pytest.raises(TypeError, match="a layer's name or a callable, got int"):
            attach(network, features="stage4", cam=3)  # type: ignore[arg-type]
        for channels in ([], [-1, 2]):
            with pytest.raises(ValueError, match="channels must be one or more numbers of at least 0"):
                attach(network, features="stage4", channels=channels)
        for channels, background in ((None, 0), ([1, 2], 1), ([1, 2], -1)):
            with pytest.raises(ValueError, match="background must be a channel beside those in channels, got"):
                attach(network, features="stage4", channels=channels, background=background)
        with pytest.raises(ValueError, match="forwards must be above 0"):
            attach(network, features="stage4", forwards=0)

    def test_layers_that_cannot_serve(self) -> None:
        network, (x, _) = AMNFirst(), pictures()
        with attach(network, features="stage3", cam="stage4.0") as tap:
            network(x)
            assert tap.cam.shape == (4, D, 4, 4)
        with attach(network, features="stage4", cam="classifier", channels=range(1, 9)) as tap:
            network(x)
            with pytest.raises(ValueError, match="below the CAM's 4 channels, got 8"):
                _ = tap.cam
        with attach(network, features="stage4", cam="classifier", channels=[1], background=7) as tap:
            network(x)
            with pytest.raises(ValueError, match="below the CAM's 4 channels, got 7"):
                _ = tap.cam
        other = SIPE()
        with attach(other, features="backbone", cam="classifier") as tap:  # a list, that is never called
            other(x, 1)
            with pytest.raises(RuntimeError, match=r"'backbone' did not run .* near it: side4, classifier, stage4"):
                _ = tap.features
        with attach(Holder(), features="inner") as tap, pytest.raises(TypeError, match="a tensor or a tuple with one"):
            Holder.last(x)

    def test_pooled_output_of_an_unfit_layer(self) -> None:
        network, x = nn.Sequential(stand_ins.trunk(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.rand(2, 3, 8, 8)
        with attach(network, features="0", cam="2") as tap:
            network(x)
            with pytest.raises(ValueError, match="got Flatten with pooled output"):
                _ = tap.cam
        network.append(nn.Linear(D, 6)).append(nn.Linear(6, C))
        with attach(network, features="0", cam="4") as tap:
            network(x)
            with pytest.raises(ValueError, match="takes 6 channels and the features have 8"):
                _ = tap.cam

    def test_a_change_in_place_is_noticed(self) -> None:
        network = nn.Sequential(nn.Conv2d(3, D, 3), nn.ReLU(inplace=True))
        with attach(network, features="0") as tap:
            network(torch.rand(1, 3, 8, 8))
            with pytest.raises(RuntimeError, match="changed in place since"):
                _ = tap.features
        with attach(network, features="1") as tap:
            network(torch.rand(1, 3, 8, 8))
            assert tap.features.shape == (1, D, 6, 6)

    def test_a_broken_off_forward_pass(self) -> None:
        network, (x, y) = AMN(), pictures()
        names = {"features": "stage4", "cam": "classifier", "channels": range(1, C + 1)}
        with attach(network, bank=bank(), forwards=2, **names) as tap:
            with pytest.raises(RuntimeError):
                network(x, y[:, :2])
            network(x, y)
            with pytest.raises(ValueError, match="no output"):
                tap.loss(y)
            tap.clear()
            network(x, y)
            assert tap.loss(y).isfinite()


class Holder(nn.Module):
    """Whose inner layer returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = SIPE()
        Holder.last = lambda x: self.inner(x, 1)  # type: ignore[attr-defined]


class TestRelease:
    def test_an_error_in_the_block_releases(self) -> None:
        network = AMNFirst()
        with pytest.raises(KeyError), attach(network, features="stage4"):
            raise KeyError
        assert not leftovers(network)

    def test_the_network_is_forgotten(self) -> None:
        network, (x, y) = AMNFirst(), pictures()
        tap = attach(network, features="stage4", cam="classifier", bank=bank())
        network(x)
        tap.loss(y)
        tap.release()
        tap.release()
        gone = weakref.ref(network)
        del network
        gc.collect()
        assert gone() is None
        assert isinstance(tap, Tap)

    @pytest.mark.slow
    def test_memory_stays_flat_over_a_thousand_rounds(self) -> None:
        """Nothing of a round is left: neither tensors nor hooks nor objects of Python."""
        network, (x, y) = AMNFirst(), pictures(2, 32)
        memory = bank()

        def rounds(count: int) -> tuple[int, int]:
            for _ in range(count):
                with attach(network, features="stage4", cam="classifier", bank=memory) as tap:
                    network.zero_grad()
                    (F.multilabel_soft_margin_loss(network(x), y) + tap.loss(y)).backward()
            del tap
            gc.collect()
            every = gc.get_objects()
            return len(every), sum(issubclass(type(each), Tensor) for each in every)

        rounds(20)
        before = rounds(1)
        after = rounds(1000)
        assert after[1] == before[1]
        assert after[0] - before[0] < 200  # a thousand rounds would leave a thousand
        assert not leftovers(network)
