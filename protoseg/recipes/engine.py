"""The training loop of the recipes ``cpal`` and ``vpl``: epochs that a stopped run takes up bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from protoseg.recipes.files import load_checkpoint, save_checkpoint
from protoseg.recipes.options import MaskOptions
from protoseg.recipes.pictures import Crops, Shuffle

Losses = Callable[[nn.Module, dict[str, Tensor], int], dict[str, Tensor]]


def train(
    name: str,
    model: nn.Module,
    crops: Crops,
    loss_of: Losses,
    epochs: int,
    args: MaskOptions,
    accelerator: Accelerator,
    modules: Mapping[str, nn.Module],
    *,
    head_lr: float = 1.0,
    keep: int = 0,
    fork: Path | None = None,
) -> list[dict[str, float]]:
    """Train ``model`` and save everything after each epoch; returns the history of the losses.

    Args:
        name: Of the checkpoint.
        model: The network.
        crops: What to train on.
        loss_of: Takes the network, a batch and the epoch to the named parts of the loss, which are summed.
        epochs: Their number.
        args: The flags.
        accelerator: The engine.
        modules: What else is saved.
        head_lr: Factor on the rate of what lies outside ``model.backbone`` and ``model.encoder``.
        keep: Also keep the state after so many epochs, in ``checkpoint/fork.pt``; 0: of none.
        fork: Such a file of another run, whose training this one takes up there.
    """
    shuffle = Shuffle(len(crops), args.seed)
    drop = len(crops) >= args.batch * accelerator.num_processes
    loader = DataLoader(crops, args.batch, sampler=shuffle, drop_last=drop, num_workers=args.workers)
    optimizer = torch.optim.AdamW(parameter_groups(model, head_lr), args.lr, weight_decay=0.05)
    saved: dict[str, Any] = {"model": model, "optimizer": optimizer, **modules}
    if accelerator.scaler is not None:
        saved["scaler"] = accelerator.scaler
    path, history, first = args.output / "checkpoint" / f"{name}.pt", [], 0
    begin = path if args.resume and path.exists() else fork
    if begin is not None:
        state = load_checkpoint(begin)
        if state["processes"] != accelerator.num_processes:
            flag = "--resume" if begin is path else "--fork"
            raise SystemExit(
                f"{flag}: {begin} is of {state['processes']} processes and these are {accelerator.num_processes}, "
                "which would change the batch; launch as many as before"
            )
        # The run that is taken up has not used its other modules, and those of this run may be of other sizes.
        for key, part in saved.items():
            if begin is path or key not in modules:
                part.load_state_dict(state[key])
        history, first = state["history"], state["epoch"]
    network, stepper, loader = accelerator.prepare(model, optimizer, loader)
    total, step = epochs * len(loader), first * len(loader)
    for epoch in range(first, epochs):
        shuffle.epoch = crops.epoch = epoch
        set_seed(args.seed + epoch, device_specific=True)  # an epoch's dropout is the same in a resumed run
        network.train()
        sums: dict[str, float] = {}
        for batch in tqdm(loader, f"{name} {epoch + 1}/{epochs}", disable=not accelerator.is_main_process, leave=False):
            for group in stepper.param_groups:
                group["lr"] = args.lr * group["factor"] * learning_rate(step, total)
            with accelerator.autocast():
                parts = loss_of(network, batch, epoch)
            stepper.zero_grad()
            accelerator.backward(torch.stack(list(parts.values())).sum())
            stepper.step()
            step += 1
            for key, value in parts.items():
                sums[key] = sums.get(key, 0.0) + value.item()
        history.append({key: value / len(loader) for key, value in sums.items()})
        if accelerator.is_main_process:
            state = {key: part.state_dict() for key, part in saved.items()}
            state |= {"epoch": epoch + 1, "history": history, "processes": accelerator.num_processes}
            save_checkpoint(path, state)
            if epoch + 1 == keep:
                save_checkpoint(path.with_name("fork.pt"), state)
        accelerator.wait_for_everyone()
    if not accelerator.is_main_process:  # each process has its own running means; all go on with those that are saved
        model.load_state_dict(load_checkpoint(path)["model"])
    return history


def learning_rate(step: int, total: int, warmup: float = 0.1) -> float:
    """Factor of the base rate: a linear rise over a share of the steps, then half a cosine to 0."""
    rise = max(1.0, warmup * total)
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1.0, total - rise)
    return 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi))))


def parameter_groups(model: nn.Module, head_lr: float) -> list[dict[str, Any]]:
    """The parameters with a factor on their rate: ``head_lr`` outside of ``backbone`` and ``encoder``.

    The transformer blocks of a hybrid backbone are new but count as backbone; another rate was not tried for them.
    """
    by_factor: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        factor = 1.0 if name.startswith(("backbone.", "encoder.")) else head_lr
        by_factor.setdefault(factor, []).append(parameter)
    return [{"params": parameters, "factor": factor} for factor, parameters in by_factor.items()]
