"""Where a training happens: in a new run folder, in one to go on with, or nowhere, because it is done already."""

from __future__ import annotations

import functools
import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lkspec.app import sweeps
from lkspec.app.application import instantiate, resolved
from lkspec.app.build import expanded_draft, open_data
from lkspec.app.job import Identity, State, code_of, estimated_seconds, held, is_held, job_state, outcome_config
from lkspec.reporting.terminal import console
from lkspec.runs.folder import RunFolder, find_run, run_name
from lkspec.targets.base import Target

_RESUMABLE_OVERRIDES = ("resume=", "run_root=", "logger=", "logger.")


@dataclass(frozen=True)
class Opened:
    """A folder to train in.

    Attributes:
        config: everything resolved, the folder's path in it.
        checkpoint: to go on from; None begins.
    """

    folder: RunFolder
    config: DictConfig
    checkpoint: Path | None


@contextmanager
def opened_run(config: DictConfig) -> Iterator[Opened | None]:
    """Opens a run's folder, holds it against other processes, and writes failure.txt when training ends in an error.

    None where there is nothing to do, or another process is at it.

    Raises:
        ValueError: the folder holds an earlier run (``on_existing=error``), ``resume`` with other overrides or without
            a checkpoint, or an unknown ``on_existing``.
    """
    if rank_zero_only.rank != 0:
        yield _open(config)
        return
    root, name = _place(config)
    with held(root, name) as free:
        if not free:
            _say(root / name, State.RUNNING, "another process is at it")
            yield None
            return
        opened = _open(config)
        if opened is not None:
            sweeps.note(folder=str(opened.folder.path))
            opened.folder.write_failure(None)
        try:
            yield opened
        except Exception:
            if opened is not None:
                opened.folder.write_failure(traceback.format_exc())
            raise


def _place(config: DictConfig) -> tuple[Path, str]:
    """The root and the name of a run's folder."""
    root = Path(config.run_root)
    if config.resume is not None:
        path = find_run(config.resume, root).path
        return path.parent, path.name
    if "path" in config.draft and "_target_" not in config.draft:
        config.draft = expanded_draft(config.draft)
        config.names.draft = Path(config.draft.init_from).name
    names = config.names
    hashed = outcome_config(resolved(config))
    return root, run_name(names.draft, names.loss, names.target, seed=config.seed, config=hashed)


def _open(config: DictConfig) -> Opened | None:
    overrides = list(HydraConfig.get().overrides.task)
    if config.resume is not None:
        return _resumed(find_run(config.resume, Path(config.run_root)), config, overrides)
    if config.on_existing not in ("error", "replace", "skip", "continue"):
        raise ValueError(f"on_existing: expected error, replace, skip or continue, got {config.on_existing!r}")
    root, name = _place(config)
    folder = RunFolder(root / name)
    config.eta_source = _eta_source(config)
    config.run_dir = str(folder.path)
    config = OmegaConf.create(resolved(config))
    if rank_zero_only.rank != 0:
        return Opened(folder, config, None)
    if config.on_existing == "continue":
        return _continued(folder, config, overrides)
    if folder.is_finished and config.on_existing == "skip":
        _say(folder.path, State.DONE, "there already (on_existing=skip)")
        return None
    if folder.has_results and config.on_existing == "replace":
        folder.remove()
    return Opened(RunFolder.create(root, name, config=resolved(config), overrides=overrides), config, None)


def _continued(folder: RunFolder, config: DictConfig, overrides: list[str]) -> Opened | None:
    """``on_existing=continue``: keeps what is done, goes on with the unfinished, begins the stale ones anew."""
    if config.trainer.devices not in (1, "1", "auto", [0]):
        raise ValueError(
            "on_existing=continue is for jobs of one device: the other processes would not know what the first one "
            "decided; continue a run of several devices with resume=..."
        )
    state, changes = job_state(folder, functools.partial(identity_of, config))
    if state == State.DONE:
        _say(folder.path, state, "kept")
        return None
    if state == State.STALE:
        _say(folder.path, state, f"{', '.join(changes)}; the old run is {folder.set_aside()}")
    elif (checkpoint := folder.last_checkpoint) is not None:
        _say(folder.path, state, f"goes on from {checkpoint.name}")
        return _restored(folder, checkpoint)
    fresh = RunFolder.create(folder.path.parent, folder.name, config=resolved(config), overrides=overrides)
    return Opened(fresh, config, None)


def _say(folder: Path, state: State, text: str) -> None:
    sweeps.note(folder=str(folder), state=state)
    console.print(f"{folder} {state}: {text}", soft_wrap=True, highlight=False)


def _resumed(folder: RunFolder, given: DictConfig, overrides: list[str]) -> Opened:
    refused = [override for override in overrides if not override.startswith(_RESUMABLE_OVERRIDES)]
    if refused:
        raise ValueError(
            f"resume continues {folder.name} exactly as it was configured; leave out {', '.join(refused)} "
            "or start a new run (draft.init_from is not needed to resume)"
        )
    checkpoint = folder.last_checkpoint
    if checkpoint is None:
        raise ValueError(f"{folder.path}: there is no checkpoint to resume from; start the run again")
    opened = _restored(folder, checkpoint)
    if any(override.startswith("logger") for override in overrides):
        opened.config.logger = given.logger
    return opened


def _restored(folder: RunFolder, checkpoint: Path) -> Opened:
    """A run as it was configured, wherever it lies now."""
    saved = folder.config
    config = OmegaConf.create(_moved(saved, saved["run_dir"], str(folder.path)))
    assert isinstance(config, DictConfig)
    return Opened(folder, config, checkpoint)


def _moved(value: Any, old: str, new: str) -> Any:
    """Saved settings with a run folder's old path, relative to another working directory perhaps, made its new one."""
    if isinstance(value, dict):
        return {key: _moved(entry, old, new) for key, entry in value.items()}
    if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
        return new + value[len(old) :]
    return value


def _eta_source(config: DictConfig) -> str | None:
    """Who chose the adaptive objective's eta; None for objectives without one."""
    if "eta" not in config.loss:
        return None
    if OmegaConf.is_interpolation(config.loss, "eta"):
        return f"the paper's for {config.names.draft}"
    return "set by the configuration"


@dataclass(frozen=True)
class _Facts:
    """What a job's target and data are, found without training."""

    target: str
    data: str
    supervised_tokens: int
    steps_per_epoch: int


def identity_of(config: DictConfig) -> Identity:
    """The identity that a run of a configuration would have now; reads the target and the data, once a process."""
    facts = _facts(config)
    return Identity(facts.target, facts.data, code_of(resolved(config)))


def _facts(config: DictConfig) -> _Facts:
    # The seed orders the training conversations and changes nothing of what is asked for here.
    data = {**resolved(config.data), "seed": 0}
    return _read_facts(json.dumps(resolved(config.target)), json.dumps(data))


@functools.cache
def _read_facts(target_config: str, data_config: str) -> _Facts:
    target: Target = instantiate(OmegaConf.create(json.loads(target_config)))
    data = open_data(OmegaConf.create({"data": json.loads(data_config)}), target)
    return _Facts(target.fingerprint, data.fingerprint, data.num_supervised_tokens, len(data.train_dataloader()))


def planned(config: DictConfig) -> dict[str, Any]:
    """One line of ``plan=true``: the run's folder, its state, what has changed, and the seconds it would take."""
    root, name = _place(config)
    folder = RunFolder(root / name)
    state, changes = job_state(folder, functools.partial(identity_of, config))
    if is_held(root, name):
        state = State.RUNNING
    seconds = None
    if state not in (State.DONE, State.RUNNING):
        tokens = _supervised_tokens(config, _facts(config))
        seconds = estimated_seconds(root, resolved(config), supervised_tokens=tokens)
    return {"folder": str(folder.path), "state": state, "changes": changes, "seconds": seconds}


def _supervised_tokens(config: DictConfig, facts: _Facts) -> int | None:
    """Tokens that a run of this configuration sees; None where nothing bounds it."""
    epochs, steps = config.trainer.max_epochs, config.trainer.max_steps
    bounds = [epochs] if epochs is not None and epochs >= 0 else []
    bounds += [steps / facts.steps_per_epoch] if steps is not None and steps >= 0 else []
    return round(facts.supervised_tokens * min(bounds)) if bounds else None
