"""Filling a bank for a network that is trained already."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from protoseg import ContextPrototypeBank
from protoseg.metrics import RegionContrast
from tests.cases import OPTIONS, C, D, assert_same, assert_same_output, batch, make

BATCHES = [batch(step) for step in range(7)]
LARGE = {"capacity": 40, "half_life": 1e9}


def reference(rounds: int, **options: Any) -> Any:
    """The rounds by hand: one bank makes the maps, another one that has nothing yet stores by them."""
    bank = make(**{**LARGE, "refresh_every": 10**6, "locate": "cam", **options})
    for index in range(rounds):
        located = make(**{**LARGE, "refresh_every": 10**6, "locate": "cam", **options})
        for features, cam, labels in BATCHES:
            known = bank.memory.context_valid[:C].any(1)
            out = copy.deepcopy(bank).eval()(features, cam, labels)
            # The map takes the CAM's place where there is one; below 0 the CAM shows nothing, as for absent classes.
            found = out.pacam[:, 1:] ** (1 / bank.exponent)
            maps = torch.where((known & out.valid)[:, :, None, None], found, out.cam[:, 1:])
            located(features, maps if index else cam, labels)
        located.refresh()
        bank = located
    return bank


@pytest.mark.filterwarnings("ignore:.*the bank is empty")
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_every_round_stores_where_the_map_of_the_one_before_is(rounds: int) -> None:
    bank = make(**LARGE, steps=3)
    bank.fill(BATCHES, rounds=rounds)
    want = reference(rounds)
    for name in ("instances", "stored", "contexts", "context_valid", "mean", "covariance", "factor"):
        assert_same(getattr(bank.memory, name), getattr(want.memory, name), 1e-9)


def test_what_was_stored_before_is_forgotten_and_the_mode_stays() -> None:
    fresh, used = make().eval(), make(steps=5)
    for bank in (fresh, used):
        bank.fill(BATCHES)
    assert not fresh.training
    assert used.training
    assert_same(dict(fresh.state_dict()), dict(used.state_dict()))


def test_with_instances_where_the_cam_is_further_rounds_change_nothing() -> None:
    once, often = make(locate="cam"), make(locate="cam")
    once.fill(BATCHES, rounds=1)
    often.fill(BATCHES, rounds=4)
    features, cam, labels = batch(9)
    assert_same_output(once.eval()(features, cam, labels), often.eval()(features, cam, labels), 1e-12)


def test_a_class_that_no_picture_shows_has_no_contexts() -> None:
    bank = make()
    bank.fill([(features, cam, labels * torch.tensor([1, 0])) for features, cam, labels in BATCHES])
    assert bank.memory.context_valid.any(1).tolist() == [True, False, True]
    out = bank.eval()(*batch(9)[:2], torch.ones(2, C))
    assert all(each.isfinite().all() for each in out if isinstance(each, Tensor) and each.is_floating_point())


def test_what_cannot_be_read_again_is_refused() -> None:
    bank = make(steps=2)
    before = copy.deepcopy(dict(bank.state_dict()))
    with pytest.raises(TypeError, match=r"ContextPrototypeBank.fill: batches must be readable once a round, got a gen"):
        bank.fill(each for each in BATCHES)
    with pytest.raises(ValueError, match=r"ContextPrototypeBank.fill: rounds must be .* got 0"):
        bank.fill(BATCHES, rounds=0)
    assert_same(dict(bank.state_dict()), before)


def test_its_map_is_compared_with_the_cam() -> None:
    bank = make()
    found = bank.fill(BATCHES)
    cam, pacam = RegionContrast(C), RegionContrast(C)
    for features, scores, labels in BATCHES:
        out = copy.deepcopy(bank).eval()(features, scores, labels)
        for index in range(len(features)):
            cam.update(features[index], out.cam[index, 1:], labels[index])
            pacam.update(features[index], out.pacam[index, 1:], labels[index])
    assert found == (cam.result().best[0], pacam.result().best[0])


@pytest.mark.filterwarnings("error")
def test_a_map_that_is_probably_worse_than_the_cam_is_told() -> None:
    # An object that differs in the length of its features alone, which a cosine throws away.
    generator = torch.Generator().manual_seed(0)
    inside = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    inside[:, :, 2:6, 2:6] = 1
    batches = []
    for _ in range(20):
        noise = torch.randn(2, D, 8, 8, generator=generator, dtype=torch.float64)
        batches.append((1 + 2 * inside + 0.1 * noise, inside.expand(2, C, 8, 8), torch.eye(C)[:2]))

    found = make(**LARGE).fill(batches)
    assert found.pacam == pytest.approx(found.cam)
    paper = ContextPrototypeBank.paper(C, D, capacity=40)
    with pytest.warns(UserWarning, match=r"fill: the bank's map parts .* less well than .* \(0\.\d+ < 0\.\d+\)"):
        paper.fill(batches)


class Failing:
    """A loader that breaks off in the middle of its second round."""

    def __init__(self) -> None:
        self.round = 0

    def __iter__(self) -> Any:
        self.round += 1
        yield from BATCHES[:4]
        if self.round == 2:
            raise OSError("the disk is gone")
        yield from BATCHES[4:]


def test_after_an_error_the_bank_is_as_it_was() -> None:
    bank = make(steps=5)
    before = copy.deepcopy(dict(bank.state_dict()))
    with pytest.raises(OSError, match="the disk is gone"):
        bank.fill(Failing())
    with pytest.raises(ValueError, match="fill: batches must hold at least one, got none"):
        bank.fill([])
    with pytest.raises(ValueError, match="features must have shape"):
        bank.fill([BATCHES[0], (torch.zeros(2, 3, 4, 4), *BATCHES[0][1:])])
    assert_same(dict(bank.state_dict()), before)


def test_training_after_a_fill_begins_its_schedule_anew() -> None:
    bank = make(**LARGE, refresh_every=100)
    bank.fill(BATCHES)
    before = bank.memory.contexts.clone()
    bank(*batch(9))
    assert not torch.equal(bank.memory.contexts, before)


def test_a_picture_without_a_class_changes_nothing() -> None:
    bank, other = make(), make()
    nothing = (torch.rand(2, D, 4, 5, dtype=torch.float64), BATCHES[0][1], torch.zeros(2, C))
    bank.fill(BATCHES)
    other.fill([BATCHES[0], nothing, *BATCHES[1:]])
    assert_same(dict(bank.state_dict()), dict(other.state_dict()), 1e-12)


def test_options_of_the_tests_are_all_there_are() -> None:
    assert set(OPTIONS) == {
        *(name for name in make().__init__.__kwdefaults__ if name not in ("check_values", "device")),  # type: ignore[misc]
    }


def test_a_bank_that_found_nothing_to_store_says_so_and_why() -> None:
    bank = ContextPrototypeBank(num_classes=2, dim=4)
    nowhere = (torch.rand(3, 4, 5, 5), -torch.rand(3, 2, 5, 5), torch.ones(3, 2))
    untagged = (*batch(0)[:2], torch.zeros_like(batch(0)[2]))
    for pictures, filled in ((nowhere, bank), (untagged, ContextPrototypeBank(C, D))):
        with pytest.warns(
            UserWarning, match="nothing was stored of these pictures, as they have no tags or a CAM that"
        ):
            filled.fill([pictures])
        assert not filled.stored.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bank.eval()(*nowhere)  # nobody is told to fill it who just did
