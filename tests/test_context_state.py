from __future__ import annotations

import copy
import io
import pickle
import shutil
from typing import Any

import pytest
import torch
from torch import nn

from protoseg import ContextPrototypeBank
from tests.cases import BACKGROUNDS, OPTIONS, C, D, assert_same, assert_same_output, batch, gradients, make


class TestState:
    def test_eval_changes_nothing_and_train_computes_before_it_updates(self) -> None:
        bank = make(steps=4)
        before = copy.deepcopy(bank.state_dict())
        quiet = bank.eval()(*batch(5))
        assert_same(bank.state_dict(), before)
        assert_same_output(bank.train()(*batch(5)), quiet)
        assert not torch.equal(bank.memory.instances, before["memory.instances"])
        assert bank.memory.step == before["memory.step"] + 1

    def test_checkpoint_in_mid_epoch_resumes_bit_for_bit(self) -> None:
        bank, file = make(torch.float32, steps=3), io.BytesIO()
        torch.save(bank.state_dict(), file)
        file.seek(0)
        resumed = make(torch.float32)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        for step in range(3, 8):
            data = batch(step, dtype=torch.float32)
            assert_same_output(resumed(*data), bank(*data))
        assert_same(resumed.state_dict(), bank.state_dict())

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))])
    def test_copies_are_equal_and_independent(self, clone: Any) -> None:
        bank = make(steps=3)
        other = clone(bank)
        want = copy.deepcopy(bank.state_dict())
        assert_same_output(other(*batch(4)), copy.deepcopy(bank)(*batch(4)))
        assert_same(bank.state_dict(), want)
        assert other.memory.step == 4

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_to_dtype(self, dtype: torch.dtype) -> None:
        bank = make(torch.float32, steps=3)
        want = bank.eval()(*batch(4, dtype=torch.float32))
        bank = bank.to(dtype).train()
        got = bank(*batch(4, dtype=torch.float32))
        assert got.loss.dtype == torch.float32
        assert (bank.memory.instances.dtype, bank.memory.pointer.dtype, bank.memory.context_valid.dtype) == (
            dtype,
            torch.int64,
            torch.bool,
        )
        assert_same(got.loss, want.loss, 0.01)
        assert bank.memory.contexts.isfinite().all()

    def test_what_a_half_precision_bank_cannot_hold_stays_out(self) -> None:
        bank = make(torch.float16)
        features, cam, labels = batch(0, dtype=torch.float32)
        features[0] *= 1e6
        bank(features, cam, torch.ones_like(labels))
        assert bank.memory.instances.isfinite().all()
        assert (bank.stored <= 1).all()
        assert bank.stored[:C].any()

    def test_device_and_reset(self) -> None:
        bank = ContextPrototypeBank(C, D, **OPTIONS, device="meta")
        assert {buffer.device.type for buffer in bank.buffers()} == {"meta"}
        bank = bank.to_empty(device="cpu")
        bank.reset_parameters()
        assert_same(bank.state_dict(), ContextPrototypeBank(C, D, **OPTIONS).state_dict())

    def test_refresh_on_demand(self) -> None:
        bank = make(steps=4, refresh_every=1000)
        early = bank.memory.contexts.clone()
        with torch.autocast("cpu"):
            bank.refresh()
        assert not torch.equal(bank.memory.contexts, early)
        other = make(steps=3, refresh_every=1000)
        other.memory.step.zero_()
        other(*batch(3))
        assert_same(bank.memory.contexts, other.memory.contexts)
        assert_same(bank.memory.shift, other.memory.shift)
        assert_same(bank.memory.midpoint, other.memory.midpoint)

    def test_two_calls_before_one_backward(self) -> None:
        bank = make(steps=3)
        features, cam, labels = batch(4)
        inputs = (features.requires_grad_(), cam.requires_grad_())
        want = gradients(copy.deepcopy(bank)(*inputs, labels), *inputs)
        first = bank(*inputs, labels)
        bank(*inputs, labels)
        assert_same(gradients(first, *inputs), want)

    def test_repr(self) -> None:
        assert "num_classes=2, dim=5, capacity=4, num_contexts=3, background_contexts=4, top_k=2" in repr(make())


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        encoder = nn.Conv2d(D, D, 1)
        plain, mixed = make(torch.float32), make(torch.float32)
        for step in range(5):
            image, cam, labels = batch(step, dtype=torch.float32)
            want = plain(encoder(image).relu(), cam, labels)
            with torch.autocast("cpu", dtype=dtype):
                features = encoder(image).relu()
                assert features.dtype == dtype
                out = mixed(features, cam.to(dtype), labels)
            assert out.loss.dtype == torch.float32
            for name in ("pacam", "cam", "instances", "positiveness", "shift"):
                value = getattr(out, name)
                assert value.dtype == dtype, name
                assert value.isfinite().all(), name
            assert_same(out.loss, want.loss, 0.02)
        assert mixed.memory.instances.dtype == torch.float32
        assert_same(mixed.memory.instances, plain.memory.instances, 0.02)

    def test_autocast_leaves_float32_as_it_is(self) -> None:
        want = make(torch.float32, steps=3)(*batch(4, dtype=torch.float32))
        with torch.autocast("cpu"):
            assert_same_output(make(torch.float32, steps=3)(*batch(4, dtype=torch.float32)), want)

    def test_zero_pixels_have_no_huge_gradient(self) -> None:
        features, cam, labels = batch(0, dtype=torch.float32)
        features[..., 0, 0] = 0
        (gradient, _) = gradients(
            make(torch.float32)(features.requires_grad_(), cam.requires_grad_(), labels), features, cam
        )
        assert gradient is not None
        assert gradient.abs().max() < 10


class TestCompile:
    @pytest.mark.slow
    @pytest.mark.parametrize("background", BACKGROUNDS)
    def test_fullgraph_equals_eager(self, background: str) -> None:
        self.compare("aot_eager", make(torch.float32, background=background), modes=[True, True, True, False])

    @pytest.mark.slow
    @pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
    def test_inductor(self) -> None:
        # What the backward pass reads must be what was before the update, which a compiler may overlook.
        self.compare("inductor", make(torch.float32), modes=[True, True, True])

    def compare(self, backend: str, bank: ContextPrototypeBank, modes: list[bool]) -> None:
        torch._dynamo.reset()
        eager = copy.deepcopy(bank)
        compiled = torch.compile(bank, fullgraph=True, backend=backend)
        for step, training in enumerate(modes):
            bank.train(training)
            eager.train(training)
            features, cam, labels = batch(step, dtype=torch.float32)
            inputs = (features.requires_grad_(), cam.requires_grad_())
            got, want = compiled(*inputs, labels), eager(*inputs, labels)
            assert_same_output(got, want, 1e-5)
            assert_same(gradients(got, *inputs), gradients(want, *inputs), 1e-5)
            assert_same(bank.state_dict(), eager.state_dict(), 1e-5)
