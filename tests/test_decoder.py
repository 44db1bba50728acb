"""The decoder on frozen features, and its losses."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("timm", reason="the extra timm is not installed")

from protoseg.models.decoder import FrozenDecoder, affinity_loss, balanced_cross_entropy


def make() -> FrozenDecoder:
    torch.manual_seed(0)
    return FrozenDecoder([12, 12], classes=3, embed_dim=8, dim=16, depth=2, heads=2)


def test_shapes_gradients_and_symmetry() -> None:
    decoder, maps = make(), [torch.randn(2, 12, 3, 5) for _ in range(2)]
    out = decoder(maps)
    assert out.logits.shape == (2, 4, 3, 5)
    assert out.features.shape == (2, 8, 3, 5)
    torch.testing.assert_close(out.affinity, out.affinity.transpose(1, 2))
    torch.autograd.backward(out.logits.sum() + out.features.square().sum() + out.affinity.sum())
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_patches_keep_their_places() -> None:
    decoder, maps = make().eval(), [torch.randn(1, 12, 3, 5) for _ in range(2)]
    turned = decoder([each.flip(-1) for each in maps])
    torch.testing.assert_close(turned.logits.flip(-1), decoder(maps).logits)  # it knows no positions


def test_layers_of_other_widths_and_sizes_come_to_the_size_of_the_first() -> None:
    torch.manual_seed(0)
    decoder = FrozenDecoder([6, 12], classes=3, embed_dim=8, dim=16, depth=1, heads=2).eval()
    fine, coarse = torch.randn(1, 6, 4, 6), torch.randn(1, 12, 2, 3)
    out = decoder([fine, coarse])
    assert out.logits.shape == (1, 4, 4, 6)
    grown = torch.nn.functional.interpolate(coarse, (4, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(out.logits, decoder([fine, grown]).logits)


def test_balanced_cross_entropy_by_hand() -> None:
    logits = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    target = torch.tensor([[[0, 0], [1, 255]], [[0, 2], [0, 0]]])
    parts: dict[bool, list[float]] = {False: [], True: []}
    for b in range(2):
        for y in range(2):
            for x in range(2):
                if (true := int(target[b, y, x])) != 255:
                    scores = logits[b, :, y, x]
                    total = sum(math.exp(float(score)) for score in scores)
                    parts[true > 0].append(math.log(total) - float(scores[true]))
    wanted = sum(sum(values) / len(values) for values in parts.values()) / 2
    assert balanced_cross_entropy(logits, target).item() == pytest.approx(wanted)
    only = balanced_cross_entropy(logits, torch.zeros_like(target))
    assert only.item() == pytest.approx(-logits.log_softmax(1)[:, 0].mean().item())
    logits.requires_grad_()
    nothing = balanced_cross_entropy(logits, torch.full_like(target, 255))
    torch.autograd.backward(nothing)
    assert nothing.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_affinity_loss_by_hand() -> None:
    affinity, target = torch.randn(1, 4, 4, dtype=torch.float64), torch.tensor([[1, 1, 0, 255]])
    same, other = list[float](), list[float]()
    for i in range(3):
        for j in range(3):
            if i != j:
                p = 1 / (1 + math.exp(-float(affinity[0, i, j])))
                (same if target[0, i] == target[0, j] else other).append(
                    -math.log(p if target[0, i] == target[0, j] else 1 - p)
                )
    wanted = (sum(same) / len(same) + sum(other) / len(other)) / 2
    assert affinity_loss(affinity, target).item() == pytest.approx(wanted)
    assert affinity_loss(affinity, target.reshape(1, 2, 2)).item() == pytest.approx(wanted)
    assert affinity_loss(affinity[:, :1, :1], target[:, :1]).item() == 0
    assert affinity_loss(affinity, torch.full_like(target, 255)).item() == 0


def test_bad_input() -> None:
    decoder = make()
    with pytest.raises(ValueError, match="expected the features of 2 layers, got 1"):
        decoder([torch.zeros(1, 12, 2, 2)])
    with pytest.raises(ValueError, match=r"maps\[1\] must have shape \(B, 12, h, w\), got \(1, 11, 2, 2\)"):
        decoder([torch.zeros(1, 12, 2, 2), torch.zeros(1, 11, 2, 2)])
    with pytest.raises(ValueError, match=r"target must have shape \(1, 2, 2\), got \(1, 3, 3\)"):
        balanced_cross_entropy(torch.zeros(1, 2, 2, 2), torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match=r"target must have shape \(1, 4\), got \(1, 3\)"):
        affinity_loss(torch.zeros(1, 4, 4), torch.zeros(1, 3))
