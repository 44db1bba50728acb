"""The heads of AMN and MCTformer, against their equations."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg import ContextPrototypeBank
from protoseg.models.amn import AMNNetwork, activation_loss
from protoseg.models.backbones import SmallResNet, TimmBackbone

timm = pytest.importorskip("timm", reason="the extra timm is not installed")

from protoseg.models.mct import (  # noqa: E402
    Hybrid,
    MCTNetwork,
    TimmTransformer,
    class_token_contrast,
    is_plain_transformer,
)

LABELS = torch.tensor([[1, 0, 1], [0, 1, 0]])


class TestAMN:
    def network(self) -> AMNNetwork:
        torch.manual_seed(0)
        return AMNNetwork(SmallResNet(4), 3, rates=(1, 2, 30))

    def test_maps_are_log_odds_of_the_pictures_own_classes_against_background(self) -> None:
        out = self.network()(torch.rand(2, 3, 32, 48), LABELS)
        assert out.logits.shape == (2, 4, 4, 6)
        assert (out.cam[0, 1] == 0).all()
        shares = out.logits[0, [0, 1, 3]].double().softmax(0)
        torch.testing.assert_close(out.cam[0, [0, 2]], (shares[1:] / shares[0]).log().float())

    def test_against_the_equation(self) -> None:
        network, x = self.network().eval(), torch.rand(2, 3, 32, 48)
        out = network(x, LABELS)
        torch.testing.assert_close(out.features, network.backbone(x))
        conditioned = out.features * network.label_encoder(LABELS.float())[:, :, None, None]
        want = sum(
            F.conv2d(conditioned, conv.weight, conv.bias, padding=rate, dilation=rate)
            for conv, rate in zip(network.atrous, (1, 2, 30), strict=True)
        )
        torch.testing.assert_close(out.logits, want)

    def test_a_picture_without_tags_is_background(self) -> None:
        out = self.network()(torch.rand(1, 3, 32, 32), torch.zeros(1, 3))
        assert (out.cam == 0).all()
        out.cam.sum().backward()

    def test_a_bank_finds_its_way_in(self) -> None:
        network, bank = self.network(), ContextPrototypeBank(3, 16)
        out = network(torch.rand(2, 3, 32, 32), LABELS)
        bank(out.features, out.cam, LABELS).loss.backward()
        assert network.label_encoder.weight.grad is not None
        assert bank.stored[:3].tolist() == [1, 1, 1]

    def test_a_bank_can_be_given_the_map_before_the_last(self) -> None:
        network = AMNNetwork(TimmBackbone("mobilenetv3_small_050"), 3, rates=(1, 2), bank_features="penultimate").eval()
        images = torch.rand(2, 3, 64, 64)
        out = network(images, LABELS)
        assert torch.equal(out.features, network.backbone.last_two(images)[0])
        assert network.channels == out.features.shape[1] == 48
        usual = AMNNetwork(network.backbone, 3, rates=(1, 2)).eval()
        usual.load_state_dict(network.state_dict())
        assert torch.equal(usual(images, LABELS).cam, out.cam)
        assert usual.channels == usual(images, LABELS).features.shape[1] == 288

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match=r"labels must have shape \(2, 3\), got \(2, 4\); pass the pictures' tags"):
            self.network()(torch.rand(2, 3, 32, 32), torch.zeros(2, 4))
        with pytest.raises(ValueError, match="rates must be one or more numbers of at least 1"):
            AMNNetwork(SmallResNet(4), 3, rates=(0, 1))


class TestActivationLoss:
    @pytest.mark.parametrize("smoothing", [0.0, 0.4, 1.0])
    def test_against_a_loop(self, smoothing: float) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
        masks = torch.randint(4, (2, 3, 5), generator=generator)
        masks[0, 0] = 255
        sums, counts = [0.0, 0.0], [0, 0]
        for image in range(2):
            for y in range(3):
                for x in range(5):
                    own = int(masks[image, y, x])
                    if own == 255:
                        continue
                    shares = logits[image, :, y, x].softmax(0)
                    for each in range(4):
                        q = 1 - smoothing if each == own else smoothing / 3
                        sums[own > 0] -= q * math.log(shares[each])
                    counts[own > 0] += 1
        want = sum(part / count for part, count in zip(sums, counts, strict=True)) / 2
        assert activation_loss(logits, masks, smoothing).item() == pytest.approx(want, rel=1e-12)

    def test_gradcheck(self) -> None:
        masks = torch.tensor([[[0, 1], [255, 2]]])
        logits = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: activation_loss(x, masks), logits)

    def test_a_side_that_is_missing_is_left_out(self) -> None:
        logits = torch.randn(1, 3, 4, 4, requires_grad=True)
        for value in (0, 1):
            masks = torch.full((1, 4, 4), value)
            want = F.cross_entropy(logits, masks)
            torch.testing.assert_close(activation_loss(logits, masks, 0.0), want)
        nothing = activation_loss(logits, torch.full((1, 4, 4), 255))
        nothing.backward()
        assert nothing == 0

    def test_masks_of_the_pictures_size(self) -> None:
        logits = torch.randn(1, 3, 2, 2)
        masks = torch.tensor([[[0, 1], [2, 255]]])
        large = masks.repeat_interleave(8, 1).repeat_interleave(8, 2)
        torch.testing.assert_close(activation_loss(logits, large), activation_loss(logits, masks))


@pytest.fixture(params=["v2", "plus"])
def fusion(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestMCT:
    def network(self, fusion: str = "v2") -> MCTNetwork:
        torch.manual_seed(0)
        return MCTNetwork(Hybrid(SmallResNet(4), depth=2, heads=2), 3, fusion=fusion, attentions=1)  # type: ignore[arg-type]

    def test_shapes(self, fusion: str) -> None:
        out = self.network(fusion)(torch.rand(2, 3, 32, 48))
        assert out.features.shape == (2, 16, 4, 6)
        assert out.cam.shape == out.patch_cam.shape == out.attention.shape == (2, 3, 4, 6)
        assert out.affinity.shape == (2, 24, 24)
        assert out.tokens.shape == (2, 2, 3, 16)
        assert out.refined().shape == (2, 3, 4, 6)

    def test_against_the_equation(self, fusion: str) -> None:
        """With attention taken from timm's own unfused form."""
        network, x = self.network(fusion).eval(), torch.rand(2, 3, 32, 32)
        weights: list[Tensor] = []
        for block in network.backbone.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_hook(lambda m, args, out: weights.append(args[0]))
        out = network(x)
        last = weights[-1].mean(1)[:, :3, 3:].reshape(2, 3, 4, 4)
        torch.testing.assert_close(out.attention, last)
        both = torch.stack([each.mean(1)[:, 3:, 3:] for each in weights]).mean(0)
        torch.testing.assert_close(out.affinity, both)
        product = last * out.patch_cam.relu()
        if fusion == "v2":
            torch.testing.assert_close(out.cam, product)
            torch.testing.assert_close(out.logits, out.patch_cam.mean((-2, -1)))
        else:
            assert (out.cam.square() - product).abs().max() < 1e-4
            scores = sorted(out.patch_cam[1, 2].flatten().tolist(), reverse=True)
            ranks = [0.996**rank for rank in range(16)]
            want = sum(s * r for s, r in zip(scores, ranks, strict=True)) / sum(ranks)
            assert out.logits[1, 2].item() == pytest.approx(want, rel=1e-5)
        spread = torch.einsum("bjk,bck->bcj", out.affinity, out.cam.flatten(2)).reshape(2, 3, 4, 4)
        torch.testing.assert_close(out.refined(), spread)

    def test_the_cam_trains_both_of_its_factors(self, fusion: str) -> None:
        network = self.network(fusion)
        network(torch.rand(2, 3, 32, 32)).cam.sum().backward()
        assert network.head.weight.grad is not None
        assert network.class_tokens.grad is not None
        assert network.class_tokens.grad.abs().sum() > 0
        assert all(each.grad is None or each.grad.isfinite().all() for each in network.parameters())

    @pytest.mark.parametrize("features", ["last", "penultimate"])
    def test_blocks_on_convolutions_of_timm(self, features: str) -> None:
        backbone = TimmBackbone("mobilenetv3_small_050")
        hybrid = Hybrid(backbone, 16, depth=2, heads=2)
        network = MCTNetwork(hybrid, 3, bank_features=features).eval()  # type: ignore[arg-type]
        images = torch.rand(2, 3, 64, 96)
        out = network(images)
        assert out.cam.shape == (2, 3, 4, 6)
        assert out.tokens.shape == (2, 2, 3, 16)
        assert network.channels == out.features.shape[1] == (16 if features == "last" else 48)
        assert torch.equal(hybrid(images), hybrid.project(backbone(images)))
        if features == "penultimate":
            assert torch.equal(out.features, backbone.last_two(images)[0])
        assert (hybrid.mean, hybrid.std, hybrid.multiple) == (backbone.mean, backbone.std, 16)

    def test_plain_transformers_are_known_by_name(self) -> None:
        names = ("vit_tiny_patch16_224", "deit_small_patch16_224.fb_in1k", "resnet18", "swin_tiny_patch4_window7_224")
        assert [is_plain_transformer(each) for each in names] == [True, True, False, False]

    def test_a_transformer_s_weights_from_files_of_timm_and_of_ours(self, tmp_path: Path) -> None:
        whole = timm.create_model("vit_tiny_patch16_224")
        torch.save({"model": whole.state_dict()}, tmp_path / "timm.pth")
        backbone = TimmTransformer("vit_tiny_patch16_224", weights=tmp_path / "timm.pth")
        assert torch.equal(backbone.position, whole.pos_embed[:, 1:])
        assert torch.equal(backbone.project.weight, whole.patch_embed.proj.weight)
        assert torch.equal(backbone.blocks[-1].attn.qkv.weight, whole.blocks[-1].attn.qkv.weight)
        torch.save({"model": MCTNetwork(backbone, 3).state_dict()}, tmp_path / "ours.pt")
        again = TimmTransformer("vit_tiny_patch16_224", weights=tmp_path / "ours.pt")
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in backbone.state_dict().items())
        with pytest.raises(ValueError, match="tensors of deit_small_patch16_224 do not fit: position must have shape"):
            TimmTransformer("deit_small_patch16_224", weights=tmp_path / "ours.pt")

    def test_a_transformer_of_timm_at_another_size(self) -> None:
        backbone = TimmTransformer("vit_tiny_patch16_224")
        assert backbone(torch.rand(1, 3, 64, 96)).shape == (1, 192, 4, 6)
        out = MCTNetwork(backbone, 3)(torch.rand(1, 3, 64, 96))
        assert out.cam.shape == (1, 3, 4, 6)

    def test_the_patches_are_timms_own(self) -> None:
        torch.manual_seed(0)
        whole = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
        backbone = TimmTransformer("vit_tiny_patch16_224")
        backbone.load_state_dict(
            {
                "position": whole.pos_embed[:, 1:],
                **{f"project.{key}": value for key, value in whole.patch_embed.proj.state_dict().items()},
                **{f"blocks.{key}": value for key, value in whole.blocks.state_dict().items()},
            }
        )
        x, seen = torch.rand(1, 3, 224, 224), []
        whole.blocks.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        whole(x)
        torch.testing.assert_close(backbone(x).flatten(2).transpose(1, 2), seen[0][:, 1:])

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="name must be a timm model, got 'deit_smal'; near names: "):
            TimmTransformer("deit_smal")
        with pytest.raises(ValueError, match="resnet18 is no plain vision transformer"):
            TimmTransformer("resnet18")
        with pytest.raises(ValueError, match="16 channels must be a multiple of heads, got 3"):
            Hybrid(SmallResNet(4), heads=3)
        with pytest.raises(ValueError, match="30 channels must be a multiple of heads, got 4"):
            Hybrid(SmallResNet(4), 30)
        with pytest.raises(ValueError, match="bank_features must be 'last' for the transformer vit_tiny_patch16_224"):
            MCTNetwork(TimmTransformer("vit_tiny_patch16_224"), 3, bank_features="penultimate")
        with pytest.raises(ValueError, match="fusion must be one of 'v2', 'plus', got 'v3'"):
            self.network("v3")


class TestClassTokenContrast:
    def test_against_a_loop(self) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(2, 3, 3, 4, generator=generator, dtype=torch.float64)
        labels = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
        total = 0.0
        for block in range(2):
            for image in (0, 2):
                unit = F.normalize(tokens[block, image].float(), dim=-1)
                losses = []
                for c in range(3):
                    if labels[image, c]:
                        row = [math.exp(float(unit[c] @ unit[k])) for k in range(3)]
                        losses.append(-math.log(row[c] / sum(row)))
                total += sum(losses) / len(losses)
        assert class_token_contrast(tokens, labels).item() == pytest.approx(total / 4, rel=1e-6)

    def test_no_class_at_all(self) -> None:
        tokens = torch.randn(1, 2, 3, 4, requires_grad=True)
        loss = class_token_contrast(tokens, torch.zeros(2, 3))
        loss.backward()
        assert loss == 0
