from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from protoseg import ContextPrototypeBank, attach
from protoseg.utils.distributed import all_gather, world_size
from tests import stand_ins
from tests.cases import OPTIONS, C, D, batch

STEPS, SIZE = 5, 6


class Network(nn.Module):
    """A small network with the bank behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.classifier = nn.Conv2d(D, D, 1, bias=False), nn.Conv2d(D, C, 1, bias=False)
        self.bank = ContextPrototypeBank(C, D, **OPTIONS)

    def forward(self, image: Tensor, labels: Tensor) -> Tensor:
        features = self.encoder(image)
        loss: Tensor = self.bank(features, self.classifier(features), labels).loss
        return loss


def train(network: nn.Module, half: slice) -> dict[str, Any]:
    """Loss, gradients and state of every step of a short training on a part of each batch."""
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    record: dict[str, Any] = {"loss": [], "gradients": [], "state": []}
    for step in range(STEPS):
        image, _, labels = batch(step, SIZE, torch.float32)
        optimizer.zero_grad()
        loss = network(image[half] - 0.5, labels[half])
        torch.autograd.backward(loss)
        record["gradients"].append([p.grad.clone() for p in network.parameters() if p.grad is not None])
        optimizer.step()
        record["loss"].append(loss.detach())
        record["state"].append({name: value.clone() for name, value in network.named_buffers()})
    return record


def rank_main(rank: int) -> Any:
    gathered = all_gather(torch.tensor([[rank, 10.0]], requires_grad=True).T)
    network = DistributedDataParallel(Network(), broadcast_buffers=False)
    half = SIZE // 2
    record = train(network, slice(rank * half, (rank + 1) * half))
    return {**record, "gathered": gathered, "world": world_size()}


@pytest.mark.slow
def test_two_processes_equal_one(two_processes: Any) -> None:
    first, second = two_processes(rank_main)
    alone = train(Network(), slice(None))

    assert first["world"] == second["world"] == 2
    assert first["gathered"].tolist() == second["gathered"].tolist() == [[0], [10], [1], [10]]
    for step in range(STEPS):
        want = {f"module.{name}": value for name, value in alone["state"][step].items()}
        torch.testing.assert_close(first["state"][step], second["state"][step], rtol=0, atol=0)
        torch.testing.assert_close(first["state"][step], want, rtol=0, atol=1e-6)
        mean = (first["loss"][step] + second["loss"][step]) / 2
        torch.testing.assert_close(mean, alone["loss"][step], rtol=0, atol=1e-6)
        assert first["loss"][step] != second["loss"][step]
        for rank in (first, second):
            torch.testing.assert_close(rank["gradients"][step], alone["gradients"][step], rtol=1e-4, atol=1e-6)
    assert alone["state"][-1]["bank.memory.stored"].tolist() == [4, 4, 4]


def test_one_process_gathers_nothing() -> None:
    value = torch.rand(3, 2)
    assert all_gather(value) is value
    assert world_size() == 1


def attached(network: nn.Module, part: slice) -> dict[str, Any]:
    """Losses, gradients and bank of steps of a network that knows nothing of its bank."""
    x, y = stand_ins.pictures(SIZE)
    bank = ContextPrototypeBank(stand_ins.C, stand_ins.D, capacity=8, num_contexts=2, top_k=1, background_contexts=2)
    record: dict[str, Any] = {"loss": [], "gradients": []}
    with attach(network, features="stage4", cam="classifier", bank=bank) as tap:
        for _ in range(3):
            network.zero_grad()
            logits = network(x[part])
            loss = nn.functional.multilabel_soft_margin_loss(logits, y[part]) + tap.loss(y[part])
            torch.autograd.backward(loss)
            record["loss"].append(loss.detach())
            record["gradients"].append([each.grad.clone() for each in network.parameters() if each.grad is not None])
    return {**record, "bank": bank.state_dict()}


def network_to_attach() -> nn.Module:
    torch.manual_seed(0)
    network = stand_ins.AMNFirst()
    network.stage1.requires_grad_(False)
    network.stage2.requires_grad_(False)  # behind it the stand-in detaches, as AMN does
    return network


def attached_main(rank: int) -> Any:
    half = SIZE // 2
    record = attached(DistributedDataParallel(network_to_attach()), slice(rank * half, (rank + 1) * half))
    return record


@pytest.mark.slow
def test_a_tap_on_a_wrapped_network_equals_one_process(two_processes: Any) -> None:
    first, second = two_processes(attached_main)
    alone = attached(network_to_attach(), slice(None))
    torch.testing.assert_close(first["bank"], second["bank"], rtol=0, atol=0)
    torch.testing.assert_close(first["bank"], dict(alone["bank"]), rtol=0, atol=1e-6)
    assert alone["bank"]["memory.stored"].sum() > 0
    for step in range(3):
        mean = (first["loss"][step] + second["loss"][step]) / 2
        torch.testing.assert_close(mean, alone["loss"][step], rtol=0, atol=1e-6)
        torch.testing.assert_close(first["gradients"][step], alone["gradients"][step], rtol=1e-4, atol=1e-6)
