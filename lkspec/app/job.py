"""A job: one training as it was asked for, its configuration resolved once, and where it stands."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lkspec.app.application import resolved
from lkspec.app.build import expanded_draft, target_and_data
from lkspec.app.sweeps import Sweep, typed_overrides
from lkspec.runs.find import find_run, list_runs
from lkspec.runs.folder import RunFolder, run_name
from lkspec.runs.identity import Identity, measured_by, trained_by
from lkspec.runs.keys import outcome
from lkspec.runs.lock import is_held

SECONDS = "run/seconds"  # metric: wall time of a run that was not interrupted
_RESUMABLE = ("resume=", "run_root=", "logger=", "logger.", "journal=")  # overrides that a resumed run may have


class State(StrEnum):
    """Where a job stands."""

    DONE = "done"
    STALE = "stale"  # there is a run of this configuration, but target, data or training code have changed since
    RUNNING = "running"  # in use by another process
    FAILED = "failed"
    UNFINISHED = "unfinished"
    TO_DO = "to do"


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        config: resolved and read-only.
        folder: where it trains.
        overrides: what was typed.
        checkpoint: to continue from; None begins.
    """

    config: DictConfig
    folder: RunFolder
    overrides: tuple[str, ...]
    checkpoint: Path | None = None

    @classmethod
    def of(cls, given: DictConfig) -> Job:
        """The job of a composed configuration.

        Raises:
            ValueError: an unknown ``on_existing``; ``resume`` with other overrides or without a checkpoint.
        """
        overrides, root = typed_overrides(), Path(given.run_root)
        if given.resume is not None:
            return cls._resumed(find_run(given.resume, root), given, overrides)
        if given.on_existing not in ("error", "replace", "skip", "continue"):
            raise ValueError(f"on_existing: expected error, replace, skip or continue, got {given.on_existing!r}")
        draft = expanded_draft(given.draft)
        if draft is not given.draft:
            given.draft, given.names.draft = draft, Path(draft.init_from).name
        plain = {**resolved(given), "journal": None}
        names = plain["names"]
        name = run_name(names["draft"], names["loss"], names["target"], seed=plain["seed"], outcome=outcome(plain))
        return cls(_frozen(plain), RunFolder(root / name), tuple(overrides))

    @classmethod
    def _resumed(cls, folder: RunFolder, given: DictConfig, overrides: list[str]) -> Job:
        if refused := [override for override in overrides if not override.startswith(_RESUMABLE)]:
            raise ValueError(
                f"resume continues {folder.name} exactly as it was configured; leave out {', '.join(refused)} "
                "or start a new run (draft.init_from is not needed to resume)"
            )
        if folder.last_checkpoint is None:
            raise ValueError(f"{folder.path}: there is no checkpoint to resume from; start the run again")
        job = cls(_frozen(folder.config), folder, tuple(folder.overrides)).continued()
        if any(override.startswith("logger") for override in overrides):
            return replace(job, config=_frozen({**resolved(job.config), "logger": resolved(given.logger)}))
        return job

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as plain data."""
        return resolved(self.config)

    def continued(self) -> Job:
        """The job as its folder has configured it, from the newest checkpoint."""
        return replace(self, config=_frozen(self.folder.config), checkpoint=self.folder.last_checkpoint)

    def identity(self, sweep: Sweep) -> Identity:
        """What its results would depend on now; reads the target and the data."""
        target, data = target_and_data(self.config, sweep)
        return Identity(target.fingerprint, data.fingerprint, trained_by(self.settings), measured_by(self.settings))

    def state(self, sweep: Sweep) -> tuple[State, list[str]]:
        """Where it stands, and what has changed since: of a stale run in training, of a finished one in measuring."""
        folder = self.folder
        if not folder.has_results:
            return (State.FAILED if folder.has_failed else State.TO_DO), []
        now, recorded = self.identity(sweep), folder.read_identity()
        if changes := now.training_changes(recorded):
            return State.STALE, changes
        if folder.has_failed:
            return State.FAILED, []
        if not folder.is_finished:
            return State.UNFINISHED, []
        assert recorded is not None, "a folder without an identity is stale"
        return State.DONE, now.measuring_changes(recorded)

    def listed(self, sweep: Sweep) -> dict[str, Any]:
        """One line of ``list_jobs=true``: its folder, its state, what has changed, the seconds it would take."""
        state, changes = self.state(sweep)
        if is_held(self.folder.path):
            state = State.RUNNING
        seconds = None if state in (State.DONE, State.RUNNING) else self._estimated_seconds(sweep)
        return {"folder": str(self.folder.path), "state": state, "changes": changes, "seconds": seconds}

    def _estimated_seconds(self, sweep: Sweep) -> float | None:
        """Its tokens times the median time per token of finished runs that do the same work.

        Those are the runs with its draft and target in all settings, or where there are none, by name. None where its
        root holds neither, or nothing bounds its tokens.
        """
        root = self.folder.path.parent
        known = sweep.once("seconds per token", str(root), lambda: _seconds_per_token(root))
        alike = next((known[work] for work in _work(self.settings) if work in known), None)
        _, data = target_and_data(self.config, sweep)
        epochs, steps = self.config.trainer.max_epochs, self.config.trainer.max_steps
        bounds = [epochs] if epochs is not None and epochs >= 0 else []
        bounds += [steps / len(data.train_dataloader())] if steps is not None and steps >= 0 else []
        return data.num_supervised_tokens * min(bounds) * statistics.median(alike) if alike and bounds else None


def _frozen(plain: dict[str, Any]) -> DictConfig:
    config = OmegaConf.create(plain)
    OmegaConf.set_readonly(config, True)
    return config


def _work(config: dict[str, Any]) -> tuple[str, str]:
    """What the time per token depends on besides the machine: exactly, and roughly."""
    settings = [config["draft"], config["vocab"], config["target"], config["states_dir"] is None]
    return json.dumps(settings, sort_keys=True), f"{config['names']['draft']} {config['names']['target']}"


def _seconds_per_token(root: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for run in list_runs(root):
        metrics = run.read_metrics()
        seconds, tokens = metrics.get(SECONDS), metrics.get("train/supervised_tokens")
        if isinstance(seconds, float) and isinstance(tokens, float) and tokens > 0:
            for work in _work(run.config):
                found.setdefault(work, []).append(seconds / tokens)
    return found
