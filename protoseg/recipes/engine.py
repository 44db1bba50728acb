"""The training loop of all recipes: epochs that a stopped run takes up bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from protoseg.recipes.files import load_checkpoint, save_checkpoint
from protoseg.recipes.options import RunOptions
from protoseg.recipes.pictures import Crops, Shuffle
from protoseg.recipes.session import duration, quiet

Losses = Callable[[nn.Module, Any, int], dict[str, Tensor]]


class Batches(NamedTuple):
    """What to train on.

    Attributes:
        loader: The loader of one process.
        set_epoch: Told the number of each epoch before it begins.
        shared: Whether the loader shares itself out over the processes; else the engine does it.
    """

    loader: DataLoader[Any]
    set_epoch: Callable[[int], None]
    shared: bool = False


class Schedule(NamedTuple):
    """How the learning rate goes: a rise over a share ``warmup`` of the steps, then half a cosine to ``final``."""

    warmup: float = 0.1
    final: float = 0.0

    def factor(self, step: int, total: int) -> float:
        """Factor of the base rate."""
        factor = learning_rate(step, total, self.warmup)
        if step < self.warmup * total:
            return factor
        return self.final + (1 - self.final) * factor


def crop_batches(crops: Crops, batch: int, args: RunOptions, accelerator: Accelerator) -> Batches:
    """Crops in a new order each epoch; the last few that fill no batch are left out."""
    shuffle = Shuffle(len(crops), args.seed)
    drop = len(crops) >= batch * accelerator.num_processes
    loader = DataLoader(crops, batch, sampler=shuffle, drop_last=drop, num_workers=args.workers)

    def set_epoch(epoch: int) -> None:
        shuffle.epoch = crops.epoch = epoch

    return Batches(loader, set_epoch)


def train(
    name: str,
    model: nn.Module,
    batches: Batches,
    loss_of: Losses,
    epochs: int,
    args: RunOptions,
    accelerator: Accelerator,
    modules: Mapping[str, nn.Module],
    *,
    lr: float,
    head_lr: float = 1.0,
    schedule: Schedule | None = None,
    clip_grad: float | None = None,
    end_epoch: Callable[[int, dict[str, float]], dict[str, Any]] | None = None,
    keep: int = 0,
    fork: Path | None = None,
) -> list[dict[str, Any]]:
    """Train ``model`` by AdamW and save everything after each epoch; returns the history, an entry per epoch.

    Args:
        name: Of the checkpoint.
        model: The network.
        batches: What to train on.
        loss_of: Takes the network, a batch and the epoch to the named parts of the loss, which are summed.
        epochs: Their number.
        args: The options.
        accelerator: The engine.
        modules: What else is saved.
        lr: Base rate.
        head_lr: Factor on the rate of what lies outside ``model.backbone`` and ``model.encoder``.
        schedule: Of the rate; :class:`Schedule`'s defaults where not given.
        clip_grad: Largest norm of the gradient.
        end_epoch: Makes the entry of an epoch from the means of its losses; these are the entry where not given.
        keep: Also keep the state after so many epochs, in ``checkpoint/fork.pt``; 0: of none.
        fork: Such a file of another run, whose training this one takes up there.
    """
    loader = batches.loader if batches.shared else accelerator.prepare(batches.loader)
    steps = len(loader)
    rate = schedule or Schedule()
    groups = [{**group, "lr": lr * group["factor"]} for group in parameter_groups(model, head_lr)]
    optimizer = torch.optim.AdamW(groups, lr, weight_decay=0.05)
    scheduler = LambdaLR(optimizer, lambda step: rate.factor(step, epochs * steps))
    saved: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, **modules}
    if accelerator.scaler is not None:
        saved["scaler"] = accelerator.scaler

    # Take up a stopped run, or another one where it was forked.
    path = args.output / "checkpoint" / f"{name}.pt"
    history: list[dict[str, Any]] = []
    first = 0
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
        history = state["history"]
        first = state["epoch"]

    network, stepper = accelerator.prepare(model, optimizer)
    began = time.monotonic()
    for epoch in range(first, epochs):
        batches.set_epoch(epoch)
        set_seed(args.seed + epoch, device_specific=True)  # an epoch's dropout is the same in a resumed run
        network.train()
        sums: dict[str, Tensor] = {}
        for batch in tqdm(loader, f"{name} {epoch + 1}/{epochs}", steps, disable=quiet(accelerator), leave=False):
            with accelerator.autocast():
                parts = loss_of(network, batch, epoch)
            stepper.zero_grad()
            accelerator.backward(torch.stack(list(parts.values())).sum())
            if clip_grad is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(network.parameters(), clip_grad)
            stepper.step()
            scheduler.step()

            # Read at the end only: reading waits for a GPU.
            for key, value in parts.items():
                sums[key] = sums.get(key, 0.0) + value.detach().double()

        losses = {key: value.item() / steps for key, value in sums.items()}
        left = (epochs - epoch - 1) * (time.monotonic() - began) / (epoch + 1 - first)
        remaining = f"; about {duration(left)} left" if left else ""
        accelerator.print(f"{name} {epoch + 1}/{epochs}: {describe(losses)}{remaining}")
        accelerator.log({f"{name}/{key}": value for key, value in losses.items()}, step=epoch + 1)
        history.append(losses if end_epoch is None else end_epoch(epoch, losses))
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


def describe(losses: Mapping[str, float]) -> str:
    """The loss and, where it is a sum, the parts that count."""
    parts = [f"{name} {value:.4f}" for name, value in losses.items() if value]
    total = f"loss {sum(losses.values()):.4f}"
    return f"{total} ({', '.join(parts)})" if len(parts) > 1 else total


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
