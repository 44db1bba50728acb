"""The recipe of docs/plug-in.md in Lightning: fit, checkpoint, resume, load, an exception in between, two processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from protoseg import ContextPrototypeBank, attach
from tests.stand_ins import AMNFirst, C, D, pictures
from tests.test_attach import leftovers

lightning: Any = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")
pytestmark = pytest.mark.filterwarnings("default")


def module() -> Any:
    class WithBank(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model: nn.Module = AMNFirst()
            self.bank = ContextPrototypeBank(C, D, capacity=16, background_contexts=2)
            self.fail_at = -1

        def on_fit_start(self) -> None:
            self.tap = attach(self.model, features="stage4", cam="classifier", bank=self.bank)

        def training_step(self, batch: Any, index: int) -> Tensor:
            if self.global_step == self.fail_at:
                raise OSError("the disk is gone")
            loss: Tensor = F.multilabel_soft_margin_loss(self.model(batch[0]), batch[1]) + self.tap.loss(batch[1])
            return loss

        def on_fit_end(self) -> None:
            self.tap.release()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.parameters(), 0.01)

    return WithBank()


def loader(batch: int = 4) -> Any:
    return DataLoader(TensorDataset(*pictures(8)), batch_size=batch)


def trainer(folder: Path, epochs: int, **more: Any) -> Any:
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, **more}
    return lightning.Trainer(max_epochs=epochs, default_root_dir=folder, enable_model_summary=False, **options)


def test_fit_checkpoint_resume_and_load(tmp_path: Path) -> None:
    whole = module()
    trainer(tmp_path / "whole", 2).fit(whole, loader())

    first = module()
    one = trainer(tmp_path / "parts", 1)
    one.fit(first, loader())
    one.save_checkpoint(tmp_path / "first.ckpt")
    assert not leftovers(first.model)

    second = module()
    trainer(tmp_path / "parts", 2).fit(second, loader(), ckpt_path=tmp_path / "first.ckpt")
    torch.testing.assert_close(dict(second.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)
    assert second.bank.stored.sum() > 0

    loaded = module()
    loaded.load_state_dict(torch.load(tmp_path / "first.ckpt", weights_only=False)["state_dict"])
    assert torch.equal(loaded.bank.stored, first.bank.stored)


def test_after_an_exception_the_next_fit_has_one_tap(tmp_path: Path) -> None:
    whole, broken = module(), module()
    trainer(tmp_path, 1).fit(whole, loader())
    broken.fail_at = 1
    with pytest.raises(OSError, match="the disk is gone"):
        trainer(tmp_path, 1).fit(broken, loader())
    broken.fail_at = -1
    broken.load_state_dict(module().state_dict())
    trainer(tmp_path, 1).fit(broken, loader())
    torch.testing.assert_close(dict(broken.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)
    assert not leftovers(broken.model)


def fit_on_rank(rank: int) -> dict[str, Tensor]:
    """Fit as one of two processes that somebody else has started, each with half of the pictures and of the batch."""
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")  # so that Lightning starts no process of its own
    fitted = module()
    torch.manual_seed(rank)
    options: dict[str, Any] = {"broadcast_buffers": False, "find_unused_parameters": True}
    strategy = lightning.strategies.DDPStrategy(process_group_backend="gloo", **options)
    trainer(Path(), 2, devices=2, strategy=strategy, enable_checkpointing=False).fit(fitted, loader(2))
    assert not leftovers(fitted.model)
    state = {name: value.detach().clone() for name, value in fitted.state_dict().items()}
    return {**state, "stored": fitted.bank.stored.clone()}


def test_two_processes_hold_the_same_bank(two_processes: Callable[[Any], tuple[Any, Any]]) -> None:
    first, second = two_processes(fit_on_rank)

    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first["stored"].sum() > 0
