"""A training step of CPAL on EfficientNet-Lite0: channels last or first in memory, with the bank and without.

    python benchmarks/speed_pretrained.py [--batch N] [--side N] [--repeats N] [--device cpu|cuda] [--output FOLDER]

Writes ``speed-pretrained.json`` and ``speed-pretrained.md``. The four steps run in turn, and a ratio is the median of
the ratios of neighbors. The weights are random: they do not change the time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _measure import Call, environment, ratios, row, spread, table, timed
from torch import Tensor, nn

from protoseg import ContextPrototypeBank
from protoseg.models.backbones import TimmBackbone
from protoseg.models.cam import CAMNetwork

MODEL, CLASSES = "tf_efficientnet_lite0", 20


def step_of(images: Tensor, labels: Tensor, *, channels_last: bool, with_bank: bool) -> Call:
    """Forward, backward, AdamW and, with the bank, its loss and what it stores."""
    backbone = TimmBackbone(MODEL, channels_last=channels_last)
    network = CAMNetwork(backbone, CLASSES, bank_features="penultimate").to(images.device).train()
    bank = ContextPrototypeBank(CLASSES, network.channels, device=images.device)
    optimizer = torch.optim.AdamW(network.parameters())

    def call() -> None:
        out = network(images)
        loss = nn.functional.multilabel_soft_margin_loss(out.logits, labels)
        if with_bank:
            loss = loss + bank(out.features, out.cam, labels).loss
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

    return call


def measure(batch: int, side: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Time the four steps."""
    images = torch.randn(batch, 3, side, side, device=device)
    labels = (torch.rand(batch, CLASSES, device=device).argsort(1) < 2).float()
    calls = {
        f"{layout}, {bank}": step_of(
            images, labels, channels_last=layout == "channels last", with_bank=bank == "with the bank"
        )
        for layout in ("channels first", "channels last")
        for bank in ("without", "with the bank")
    }
    times = timed(calls, device, repeats)

    without, plain = times["channels last, without"], times["channels first, without"]
    share = [100 * (1 - 1 / ratio) for ratio in ratios(times["channels last, with the bank"], without)]
    return {
        "sizes": {"model": MODEL, "batch": batch, "side": side, "classes": CLASSES},
        "rows": [
            *(row(name, values) for name, values in times.items()),
            row("channels first / channels last, without", ratios(plain, without), "x"),
            row("bank's share of a step, channels last", share, "%"),
        ],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=224, help="of the crops in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)

    device = torch.device(args.device)
    found = {"environment": environment(device), **measure(args.batch, args.side, args.repeats, device)}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "speed-pretrained.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    rows = table(("what", "median", "quartiles", "repeats"), [[each["what"], *spread(each)] for each in found["rows"]])
    sizes = ", ".join(f"{name} {value}" for name, value in found["sizes"].items())
    where = found["environment"]
    text = (
        f"# A training step on pretrained features\n\n`python benchmarks/speed_pretrained.py`; {sizes}; "
        f"{where['device']}, {where['torch_threads']} threads, torch {where['versions']['torch']}.\n\n{rows}\n"
    )
    (args.output / "speed-pretrained.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
