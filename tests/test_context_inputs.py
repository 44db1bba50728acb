from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from protoseg import ContextPrototypeBank
from tests.cases import BACKGROUNDS, OPTIONS, C, D, assert_same, assert_same_output, batch, gradients, make


class TestEdges:
    @pytest.mark.parametrize("detach", ["pacam", "cam", "none"])
    @pytest.mark.parametrize("background", BACKGROUNDS)
    @pytest.mark.parametrize("steps", [0, 4])
    def test_no_class_present(self, detach: str, background: str, steps: int) -> None:
        bank = make(steps=steps, detach=detach, background=background)
        before = copy.deepcopy(bank.state_dict())
        features, cam, labels = batch(5)
        inputs = (features.requires_grad_(), cam.requires_grad_())
        out = bank(*inputs, torch.zeros_like(labels))
        assert out.loss == 0
        for name, gradient in zip(("pacam", "cam"), gradients(out, *inputs), strict=True):
            if detach == name:
                assert gradient is None or not gradient.any()
            else:
                assert gradient is not None
                assert not gradient.any()
        assert (out.pacam[:, 0] == 1).all()
        assert not out.pacam[:, 1:].any()
        assert not out.valid.any()
        assert not out.positiveness.any()
        assert (out.selected == -1).all()
        for name in ("instances", "pointer", "stored"):
            assert_same(bank.state_dict()[f"memory.{name}"], before[f"memory.{name}"])

    @pytest.mark.parametrize("background", BACKGROUNDS)
    @pytest.mark.parametrize("score", [0.0, -1.0])
    def test_class_with_no_positive_score_counts_as_absent(self, background: str, score: float) -> None:
        bank, other = make(steps=4, background=background), make(steps=4, background=background)
        features, cam, _ = batch(5)
        cam[:, 1] = score
        before = copy.deepcopy(bank.state_dict())
        got, want = bank(features, cam, torch.ones(2, C)), other(features, cam, torch.tensor([[1, 0], [1, 0]]))
        assert_same_output(got, want)
        assert got.loss > 0
        assert got.valid.tolist() == [[True, False], [True, False]]
        # Of the state only background differs: there it could be the class that was not found.
        for name in ("memory.instances", "memory.pointer", "memory.stored"):
            assert_same(bank.state_dict()[name][:C], other.state_dict()[name][:C])
            assert_same(bank.state_dict()[name][C:], before[name][C:])

    def test_features_that_are_all_zero(self) -> None:
        for center in (True, False):
            out = make(center=center)(torch.zeros(2, D, 4, 5), *batch(0)[1:])
            assert out.loss == 0
            assert not out.pacam[:, 1:].any()

    @pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("where", ["features", "cam"])
    def test_what_is_not_finite_never_enters_the_bank(self, where: str, rubbish: float) -> None:
        bank = make(steps=1, check_values=False, capacity=20)
        count = bank.stored.clone()
        features, cam, _ = batch(5)
        (features if where == "features" else cam)[0].fill_(rubbish)
        for _ in range(2):
            bank(features, cam, torch.ones(2, C))
        if where == "features":
            assert_same(bank.stored, count + 2)
        assert (bank.stored >= count + 2).all()
        for name, buffer in bank.named_buffers():
            assert buffer.isfinite().all(), name

    @pytest.mark.parametrize("background", BACKGROUNDS)
    def test_one_pixel(self, background: str) -> None:
        bank = make(background=background)
        for _ in range(3):
            out = bank(torch.rand(2, D, 1, 1).double(), torch.ones(2, C, 1, 1), torch.ones(2, C))
            assert out.loss.isfinite()
            assert out.valid.all()
            assert out.pacam.shape == (2, C + 1, 1, 1)
        assert bank.stored[:C].tolist() == [4, 4]

    @pytest.mark.parametrize("background", BACKGROUNDS)
    def test_one_class(self, background: str) -> None:
        bank = ContextPrototypeBank(1, D, **{**OPTIONS, "background": background})
        for step in range(3):
            features, cam, labels = batch(step, dtype=torch.float32)
            assert bank(features, cam[:, :1], torch.ones_like(labels[:, :1])).loss > 0
        assert bank.stored[0] == 4

    def test_other_memory_layouts(self) -> None:
        features, cam, labels = batch(5)
        want = make(steps=3)(features, cam, labels)
        strided = torch.empty(2, D, 8, 5, dtype=torch.float64)[:, :, ::2].copy_(features)
        assert not strided.is_contiguous()
        assert_same_output(make(steps=3)(strided, cam.mT.contiguous().mT, labels.T.contiguous().T), want, 1e-12)
        channels_last = features.to(memory_format=torch.channels_last)
        assert_same_output(make(steps=3)(channels_last, cam, labels), want, 1e-12)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
    def test_dtype_of_labels(self, dtype: torch.dtype) -> None:
        features, cam, labels = batch(5)
        assert_same_output(make()(features, cam, labels.to(dtype)), make()(features, cam, labels))


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"num_classes": 0}, "num_classes must be above 0, got 0"),
            ({"dim": -1}, "dim must be above 0, got -1"),
            ({"num_contexts": 0}, "num_contexts must be above 0, got 0"),
            ({"background_contexts": 0}, "background_contexts must be above 0, got 0"),
            ({"refresh_every": 0}, "refresh_every must be above 0, got 0"),
            ({"temperature": 0.0}, r"temperature must be above 0, got 0\.0"),
            ({"sharpness": math.nan}, "sharpness must be above 0, got nan"),
            ({"cam_threshold": 1.0}, r"cam_threshold must be at least 0 and below 1, got 1\.0"),
            ({"cam_threshold": -0.1}, r"cam_threshold must be at least 0 and below 1, got -0\.1"),
            ({"background_threshold": 0.0}, r"background_threshold must be above 0 and at most 1, got 0\.0"),
            ({"background_threshold": 1.1}, r"background_threshold must be above 0 and at most 1, got 1\.1"),
            ({"metric": "l3"}, r"metric must be one of 'dot', .*, got 'l3'"),
            ({"background": "none"}, r"background must be one of 'contexts', .*, got 'none'"),
            ({"detach": "all"}, r"detach must be one of 'pacam', .*, got 'all'"),
            ({"top_k": 0}, "top_k must lie between 1 and num_contexts=3, got 0"),
            ({"top_k": 4}, "top_k must lie between 1 and num_contexts=3, got 4; lower top_k or raise num_contexts"),
            (
                {"capacity": 2, "background": "image"},
                "capacity must be at least 3, .* got 2; raise it, or lower num_con",
            ),
            ({"capacity": 3}, "capacity must be at least 4, .* got 3; raise it, or lower num_con.* or background_con"),
        ],
    )
    def test_constructor(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=rf"^ContextPrototypeBank: {match}"):
            ContextPrototypeBank(**{"num_classes": C, "dim": D, **OPTIONS, **options})

    x, m, y = torch.rand(2, D, 4, 5), torch.rand(2, C, 3, 2), torch.ones(2, C)

    @pytest.mark.parametrize(
        ("features", "cam", "labels", "match"),
        [
            (x[0], m, y, r"features must have shape \(B, 5, H, W\), got \(5, 4, 5\); construct the bank with dim"),
            (
                x[:, 1:],
                m,
                y,
                r"features must have shape \(B, 5, H, W\), got \(2, 4, 4, 5\); construct the bank with dim",
            ),
            (x, m[:, 0], y, r"cam must have shape \(2, 2, h, w\), got \(2, 3, 2\)"),
            (
                x,
                m.repeat(1, 2, 1, 1),
                y,
                r"cam must have shape \(2, 2, h, w\), got \(2, 4, 3, 2\); pass the foreground",
            ),
            (x, m[:1], y, r"cam must have shape \(2, 2, h, w\), got \(1, 2, 3, 2\)"),
            (x, m, y[:, :1], r"labels must have shape \(2, 2\), got \(2, 1\); pass the multi-hot labels"),
            (x, m, torch.tensor([0, 1]), r"labels must have shape \(2, 2\), got \(2,\)"),
            (x[:0], m[:0], y[:0], r"features must not be empty, got shape \(0, 5, 4, 5\)"),
            (x, m[..., :0], y, r"cam must not be empty, got shape \(2, 2, 3, 0\)"),
            (x.to("meta"), m, y, r"features must be on the module's device cpu, got meta; move the module or features"),
            (x, m.to("meta"), y, "cam must be on the module's device cpu, got meta"),
            (x, m, y.to("meta"), "labels must be on the module's device cpu, got meta"),
            (x * math.nan, m, y, "features must be finite, got 200 NaN or infinite of 200 values"),
            (x, m.where(m != m.max(), math.inf), y, "cam must be finite, got 1 NaN or infinite of 24 values"),
            (x, m, 2 * y, "labels must hold only 0 and 1 .* got values from 2 to 2"),
            (x, m, y - 0.5, r"labels must hold only 0 and 1 .* got values from 0\.5 to 0\.5"),
        ],
    )
    @pytest.mark.parametrize("training", [True, False])
    def test_values(self, features: Tensor, cam: Tensor, labels: Tensor, match: str, training: bool) -> None:
        bank = make(torch.float32).train(training)
        with pytest.raises(ValueError, match=f"^ContextPrototypeBank: {match}"):
            bank(features, cam, labels)
        assert_same(dict(bank.state_dict()), dict(make(torch.float32).state_dict()))

    @pytest.mark.parametrize(
        ("features", "cam", "labels", "match"),
        [
            (x.long(), m, y, "features must be floating point, got torch.int64; call features.float"),
            (x, m.long(), y, "cam must be floating point, got torch.int64; call cam.float"),
            (x.numpy(), m, y, "features must be a torch.Tensor, got ndarray"),
            (x, None, y, "cam must be a torch.Tensor, got NoneType"),
            (x, m, [[1, 0], [0, 1]], "labels must be a torch.Tensor, got list"),
        ],
    )
    def test_types(self, features: Any, cam: Any, labels: Any, match: str) -> None:
        with pytest.raises(TypeError, match=f"^ContextPrototypeBank: {match}"):
            make(torch.float32)(features, cam, labels)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"capacity": 9}, r"state_dict's instances is \(3, 9, 5\) and this module's is \(3, 4, 5\).*sizes"),
            (
                {"background": "image"},
                r"state_dict's instances is \(2, 4, 5\) and this module's is \(3, 4, 5\).*background",
            ),
            ({"background_contexts": 3}, r"state_dict's contexts is \(3, 3, 5\) and this module's is \(3, 4, 5\)"),
            ({"score": "dot"}, r"state_dict's covariance is \(0,\) and this module's is \(5, 5\).*score"),
        ],
    )
    def test_state_of_another_size(self, options: dict[str, Any], match: str) -> None:
        model, other = nn.Sequential(make()), nn.Sequential(make(**options))
        with pytest.raises(RuntimeError, match=match):
            model.load_state_dict(other.state_dict())

    @pytest.mark.parametrize(("mine", "theirs", "kept"), [("dot", "cosine", "no "), ("cosine", "dot", "")])
    def test_state_of_another_score_that_has_the_same_sizes(self, mine: str, theirs: str, kept: str) -> None:
        model, other = nn.Sequential(make(score=mine)), nn.Sequential(make(score=theirs, steps=3))
        with pytest.raises(RuntimeError, match=f"has {kept}statistics of pixels; construct .* score"):
            model.load_state_dict(other.state_dict())

    def test_state_with_a_missing_entry(self) -> None:
        state = make().state_dict()
        del state["memory.pointer"]
        with pytest.raises(RuntimeError, match=r"Missing key.*pointer"):
            make().load_state_dict(state)

    def test_state_of_another_layout_that_has_the_same_sizes(self) -> None:
        theirs = ContextPrototypeBank(C, D, capacity=4, num_contexts=4, background_contexts=4)
        mine = ContextPrototypeBank(C + 1, D, capacity=4, num_contexts=4, background="image")
        assert theirs.memory.instances.shape == mine.memory.instances.shape
        with pytest.raises(RuntimeError, match=r"is of \(classes, background's contexts\) \(2, 4\) .* has \(3, 0\)"):
            mine.load_state_dict(theirs.state_dict())

    @pytest.mark.parametrize("name", ["num_classes", "dim", "num_contexts", "background_contexts", "capacity", "score"])
    def test_what_the_memory_is_made_for_cannot_be_changed(self, name: str) -> None:
        with pytest.raises(AttributeError, match=name):
            setattr(make(), name, 5)

    def test_height_and_width_exchanged(self) -> None:
        features, cam, labels = torch.rand(2, D, 8, 16), torch.rand(2, C, 16, 8), torch.ones(2, C)
        with pytest.raises(ValueError, match=r"cam and features must show the same picture, got maps of \(16, 8\) and"):
            make(torch.float32)(features, cam, labels)
        make(torch.float32)(features, torch.rand(2, C, 33, 65), labels)  # rounding is not
        make(torch.float32)(features, torch.rand(2, C, 3, 7), labels)


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_labels_that_are_not_above_zero_are_absent_where_values_are_not_looked_at(value: float) -> None:
    features, cam, _ = batch(0)
    odd = torch.tensor([[1.0, value], [value, 1.0]])
    got = make(check_values=False)(features, cam, odd)
    assert_same_output(got, make()(features, cam, (odd > 0).long()))


def test_an_empty_bank_in_eval_is_told_once() -> None:
    bank = make().eval()
    with pytest.warns(UserWarning, match=r"the bank is empty, .* train it, fill\(\) it, or load a state_dict"):
        bank(*batch(0))
    bank(*batch(1))


class TestPadding:
    """``valid`` says where a picture is: padding gives no instance, no statistics and no loss."""

    def padded(self, step: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        features, _, labels = batch(step)
        cam = torch.rand(2, C, 4, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64) - 0.2
        wide, scores = torch.zeros(2, D, 4, 9).double(), torch.zeros(2, C, 4, 9).double()
        wide[..., :5], scores[..., :5] = features, cam
        wide[..., 5:], scores[..., 5:] = 7.0, 9.0  # whatever the network makes of padding
        valid = torch.zeros(2, 4, 9, dtype=torch.bool)
        valid[..., :5] = True
        return (features, cam, labels), (wide, scores, labels, valid)

    @pytest.mark.parametrize("score", ["diagonal", "whitened", "cosine"])
    def test_it_is_as_if_the_padding_were_not_there(self, score: str) -> None:
        plain, padded = make(score=score), make(score=score)
        for step in range(5):
            without, with_padding = self.padded(step)
            want, got = plain(*without), padded(*with_padding)
            assert_same(got.loss, want.loss, 1e-10)
            assert_same(got.pacam[..., :5], want.pacam, 1e-10)
            assert not got.pacam[:, 1:, :, 5:].any()
        assert_same(dict(padded.state_dict()), dict(plain.state_dict()), 1e-10)

    def test_a_mask_of_another_size_counts_where_all_of_a_place_is_picture(self) -> None:
        _, (features, cam, labels, valid) = self.padded(0)
        large = valid.repeat_interleave(4, 1).repeat_interleave(4, 2)
        assert_same_output(make()(features, cam, labels, large), make()(features, cam, labels, valid))

    def test_errors(self) -> None:
        _, (features, cam, labels, valid) = self.padded(0)
        with pytest.raises(TypeError, match=r"valid must be bool, got torch.float32; call valid.bool\(\)"):
            make()(features, cam, labels, valid.float())
        with pytest.raises(ValueError, match=r"valid must have shape \(2, H, W\), got \(4, 9\); True where"):
            make()(features, cam, labels, valid[0])


def test_a_second_view_need_not_be_stored() -> None:
    bank = make(steps=3)
    before = copy.deepcopy(bank.state_dict())
    out = bank(*batch(5), store=False)
    assert_same(dict(bank.state_dict()), dict(before))
    assert_same_output(bank(*batch(5)), out)
