"""The bookkeeping of recipes: which stages have run, and what they found."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from protoseg.recipes.files import leftovers, peak_memory_mb, to_replace, versions, write_json
from protoseg.recipes.options import RunOptions, plain
from protoseg.recipes.session import duration, start_trackers

PAGES = ("config.json", "metrics.json", "report.html")  # which every run writes
# Flags that may change between a run and its resumption.
FREE = ("config", "output", "resume", "overwrite", "stages", "device", "workers", "skip_broken", "log_with")


class Plan(NamedTuple):
    """What a recipe's stages are.

    Attributes:
        files: By stage, in their order: patterns of what it leaves in the folder.
        results: By stage: names of what it finds.
        free: Flags that may change between a run and its resumption, besides those that every recipe has.
        own: By stage: flags that no earlier stage looks at, so that it can be run again with others.
        epochs: By stage that trains: the flag of its epochs, of which a resumed run may have more.
    """

    files: Mapping[str, Sequence[str]]
    results: Mapping[str, Sequence[str]]
    free: Sequence[str]
    own: Mapping[str, Sequence[str]]
    epochs: Mapping[str, str]

    @property
    def stages(self) -> tuple[str, ...]:
        """Their names in order."""
        return tuple(self.files)


class Progress:
    """What the stages have found so far, kept in ``checkpoint/progress.json``, so that a resumed run skips them.

    Without ``--resume`` the stages from the first one asked for start anew. Where they left something in the folder
    before, that takes ``--overwrite``, which removes it. With ``--resume`` and more epochs than before, the training
    goes on where it ended, and the stages behind it start anew.

    Args:
        plan: The stages.
        args: The flags.
        accelerator: The engine; its main process writes.
        began: ``time.monotonic()`` when this process began.

    Attributes:
        found: Results by name.
    """

    def __init__(self, plan: Plan, args: RunOptions, accelerator: Accelerator, began: float) -> None:
        self.plan = plan
        self.args = args
        self.accelerator = accelerator
        self.began = began
        self.path = args.output / "checkpoint" / "progress.json"
        self.found: dict[str, Any] = {"stages": {}}

        config = plain(args)
        first = min(map(plan.stages.index, args.stages))
        anew = () if args.resume else plan.stages[first:]
        longer: str | None = None
        known = self.path.exists() and (args.output / "config.json").exists()
        accelerator.wait_for_everyone()

        # 1. What an earlier run found counts where its flags are the same.
        if known and (args.resume or first > 0):
            before = json.loads((args.output / "config.json").read_text(encoding="utf-8"))
            longer = self._longer(before, config)
            if longer is not None:
                anew = plan.stages[plan.stages.index(longer) + 1 :]
            self._same(before, config, anew, longer)
            self.found = json.loads(self.path.read_text(encoding="utf-8"))
        for stage in plan.stages[:first]:
            if stage not in self.found["stages"]:
                raise SystemExit(f"--stages: {args.stages} need what {stage!r} leaves in {args.output}; run it first")

        # 2. What starts anew takes the place of what it left before. In a folder that is not known to be a run's,
        # files of the same names are not ours to delete.
        patterns = [pattern for stage in anew for pattern in plan.files[stage] if pattern not in PAGES]
        overwrite = known and (args.overwrite or longer is not None)
        replaced = to_replace(args.output, patterns if known else PAGES, overwrite=overwrite)
        if longer is not None:
            self._tell_longer(longer, anew)
            self.found["stages"].pop(longer, None)
            replaced.append(args.output / "checkpoint" / "fork.pt")  # of a run of fewer epochs
        for stage in anew:
            for name in plan.results[stage]:
                self.found.pop(name, None)
            self.found["stages"].pop(stage, None)
        self.before = self.found.get("seconds", 0.0)
        accelerator.wait_for_everyone()

        if accelerator.is_main_process:
            # Killed at any moment, a run can be resumed: no stage counts any more whose files go, and the flags are
            # the new ones only when nothing of the old ones is left.
            write_json(self.path, self.found)
            # The pages tell of what there is after each stage, so that the next one may write them anew.
            stale = [args.output / page for page in PAGES] if anew else []
            for file in (*replaced, *stale) if known else ():
                file.unlink(missing_ok=True)
            for file in leftovers(args.output):
                if known or file.name.startswith((".progress.json.", ".config.json.")):
                    file.unlink(missing_ok=True)
            write_json(args.output / "config.json", config)
        accelerator.wait_for_everyone()
        start_trackers(args, accelerator)

    def _longer(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
        """The first stage that is to train for more epochs than it did."""
        if not self.args.resume:
            return None
        asked = [(stage, flag) for stage, flag in self.plan.epochs.items() if stage in self.args.stages]
        return next((stage for stage, flag in asked if before.get(flag, now[flag]) < now[flag]), None)

    def _tell_longer(self, stage: str, anew: Sequence[str]) -> None:
        redone = f"; {', '.join(anew)} will be done anew" if anew else ""
        epochs = getattr(self.args, self.plan.epochs[stage])
        self.accelerator.print(f"--resume: {stage} goes on to {epochs} epochs{redone}")

    def _same(self, before: Mapping[str, Any], now: Mapping[str, Any], anew: Sequence[str], longer: str | None) -> None:
        """Stop where a flag differs that what is kept depends on."""
        free = {*FREE, *self.plan.free, *(name for stage in anew for name in self.plan.own.get(stage, ()))}
        if longer is not None:
            free.add(self.plan.epochs[longer])
        changed = [key for key in now if key not in free and before.get(key) != now[key]]
        if changed:
            differences = ", ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in changed)
            raise SystemExit(
                f"--output: {self.args.output} holds a run with other flags: {differences}; give the same flags, take "
                "another --output, or start anew with all --stages and without --resume"
            )

    def wants(self, stage: str, complete: bool = True) -> bool:
        """Whether to run a stage now: it was asked for and has not run, or what it found is not ``complete``."""
        return stage in self.args.stages and not (self.args.resume and stage in self.found["stages"] and complete)

    def done(self, stage: str, results: dict[str, Any]) -> None:
        """Note a stage's results, and the seconds of this run with all that it resumed."""
        self.found["stages"][stage] = {"history": results.pop("history", [])}
        self.found["seconds"] = self.before + time.monotonic() - self.began
        self.found.update(results)
        if self.accelerator.is_main_process:
            write_json(self.path, self.found)
        self.accelerator.wait_for_everyone()

    def metrics(self, method: str, packages: Sequence[str], **more: Any) -> dict[str, Any]:
        """Put together ``metrics.json``: what every run says, and more."""
        return {
            "method": method,
            "seed": self.args.seed,
            "seconds": round(self.found.get("seconds", 0.0), 1),
            "peak_memory_mb": round(peak_memory_mb(self.accelerator.device), 1),
            "versions": versions(*packages),
            "counted": self.found.get("counted", {}),
            "maps": self.found.get("maps", {}),
            "trivial": self.found.get("trivial", {}),
            "pseudo_masks": {"train": self.found.get("pseudo_masks", {})},
            "segmentation": self.found.get("segmentation", {}),
            **more,
        }


def conclude(metrics: Mapping[str, Any], output: Path, accelerator: Accelerator) -> None:
    """Say how a run ended: what it took, what was left out, and where everything is."""
    lines = [f"done in {duration(metrics['seconds'])}, with at most {metrics['peak_memory_mb']:.0f} MB"]
    for what, broken in metrics["broken"].items():
        if count := broken if isinstance(broken, int) else len(broken):
            lines.append(f"left out, {what}: {count}, see {output / 'metrics.json'}")
    for folder in ("pseudo_masks", "masks"):
        if count := sum(1 for _ in output.glob(f"{folder}/**/*.png")):
            empty = metrics["pseudo_masks"]["train"].get("empty", 0) if folder == "pseudo_masks" else 0
            lines.append(f"{folder}: {count} in {output / folder}" + f" ({empty} of background alone)" * (empty > 0))
    lines.append(f"report: {output / 'report.html'}")
    accelerator.print("\n".join(lines))
    accelerator.end_training()
