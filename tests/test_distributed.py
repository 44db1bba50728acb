from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from protoseg import ContextPrototypeBank
from protoseg._distributed import all_gather, world_size
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


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    gathered = all_gather(torch.tensor([[rank, 10.0]], requires_grad=True).T)
    network = DistributedDataParallel(Network(), broadcast_buffers=False)
    half = SIZE // 2
    record = train(network, slice(rank * half, (rank + 1) * half))
    torch.save({**record, "gathered": gathered, "world": world_size()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    spawn(rank_main, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
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
    assert alone["state"][-1]["bank.count"].tolist() == [4, 4, 4]


def test_one_process_gathers_nothing() -> None:
    value = torch.rand(3, 2)
    assert all_gather(value) is value
    assert world_size() == 1
