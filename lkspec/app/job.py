"""Jobs: what identifies a training, whether it was done already, and how long it would take.

A job is identified by its configuration (the hash in its folder's name), by fingerprints of the target and of the
training data, and by the code of the objective, draft, training step and decoding that it used (``used_code``). The
last three stand in the folder's ``identity.json``. A finished run whose identity is no longer that of the same
configuration is *stale*: it is listed as such and trained again, never reused silently.
"""

from __future__ import annotations

import fcntl
import functools
import json
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from lkspec.runs.folder import RunFolder, list_runs
from lkspec.runs.used_code import used_code

SECONDS = "run/seconds"  # metric: wall time of a run that was not interrupted

# What says where, how, on which device and with what log a run happens, not what comes out of it.
_NOT_OUTCOME: dict[str, Collection[str]] = {
    "": ("run_root", "run_dir", "resume", "on_existing", "plan", "logger", "states_dir", "unroll"),
    "target": ("device",),
    "trainer": ("accelerator", "devices", "enable_progress_bar"),
    "data": ("num_workers",),
    "callbacks": ("checkpoint", "progress"),
}
# Code behind every run. Reading data and the target's own code are not followed: their fingerprints stand for them.
_ALWAYS_USED = (
    "lkspec.training.module.SpeculatorModule",
    "lkspec.data.dataset.StepLoader",
    "lkspec.decoding.chain.ChainDecoder",
    "lkspec.measure.walk.walk_texts",
)
_STAND_FOR_THEMSELVES = ("lkspec.targets", "lkspec.benchmarks", "lkspec.data.chat")
_CHOSEN = ("loss", "draft", "optimizer", "scheduler")


class State(StrEnum):
    """Where a job stands."""

    DONE = "done"
    STALE = "stale"  # there is a run of this configuration, but data, target or code have changed since
    RUNNING = "running"  # another process is at it
    FAILED = "failed"
    UNFINISHED = "unfinished"
    TO_DO = "to do"


@dataclass(frozen=True)
class Identity:
    """What besides its configuration a run's numbers depend on.

    Attributes:
        target, data: fingerprints.
        code: module -> hash of what the run used of it.
    """

    target: str
    data: str
    code: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as identity.json holds it."""
        return asdict(self)

    def changes_since(self, recorded: Mapping[str, Any] | None) -> list[str]:
        """What differs from a recorded identity, in words; nothing where it is the same."""
        if recorded is None:
            return ["no identity was recorded"]
        changed = [name for name in ("target", "data") if getattr(self, name) != recorded[name]]
        modules = sorted(set(self.code) | set(recorded["code"]))
        return changed + [module for module in modules if self.code.get(module) != recorded["code"].get(module)]


def outcome_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that decides the outcome of a run, for its hash.

    Devices count by their number, states read from a capture (rounded to bfloat16) by being captured, whole floats as
    integers: eta=3 and eta=3.0 are the same job.
    """
    kept = {key: value for key, value in config.items() if key not in _NOT_OUTCOME[""]}
    for section in _NOT_OUTCOME.keys() & kept.keys() - {""}:
        kept[section] = {key: value for key, value in kept[section].items() if key not in _NOT_OUTCOME[section]}
    devices = config["trainer"]["devices"]
    if not _is_one(devices):
        kept["trainer"]["devices"] = len(devices) if isinstance(devices, list) else devices
    if config["states_dir"] is not None:
        kept["captured_states"] = True
    return _plain_numbers(kept)


def _is_one(devices: Any) -> bool:
    return devices in (1, "1", "auto") or (isinstance(devices, list) and len(devices) == 1)


def _plain_numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain_numbers(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def code_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The code that a run of a resolved configuration uses, as in ``used_code``."""
    chosen = [config[group]["_target_"] for group in _CHOSEN if "_target_" in config[group]]
    return used_code([*chosen, *_ALWAYS_USED], without=_STAND_FOR_THEMSELVES)


def job_state(folder: RunFolder, identity: Callable[[], Identity]) -> tuple[State, list[str]]:
    """Where the job of a run folder stands, and for a stale one what has changed.

    ``identity`` is only asked where there is something to compare it with: it may have to read the data.
    """
    if not folder.has_results:
        return (State.FAILED if folder.has_failed else State.TO_DO), []
    if changes := identity().changes_since(folder.read_identity()):
        return State.STALE, changes
    if folder.has_failed:
        return State.FAILED, []
    return (State.DONE if folder.is_finished else State.UNFINISHED), []


@contextmanager
def held(root: Path, name: str) -> Iterator[bool]:
    """Holds a run's name against other processes; False where one of them has it. A kill lets go of it."""
    folder = root / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:  # closing would not let go while a data loader's worker has inherited the file
            fcntl.flock(file, fcntl.LOCK_UN)


def is_held(root: Path, name: str) -> bool:
    """Whether a process is at a run; looking leaves nothing behind."""
    file = root / ".locks" / name
    if not file.exists():
        return False
    with held(root, name) as free:
        return not free


def estimated_seconds(root: Path, config: Mapping[str, Any], *, supervised_tokens: int | None) -> float | None:
    """Wall time of a job: its tokens times the median time a token of finished runs that do the same work.

    Those are the runs with its draft and target in all settings, or where there are none, by name. None where ``root``
    holds neither, or the number of tokens is not known.
    """
    known = _seconds_per_token(root)
    alike = next((known[work] for work in _work(config) if work in known), None)
    return None if alike is None or supervised_tokens is None else supervised_tokens * statistics.median(alike)


def _work(config: Mapping[str, Any]) -> tuple[str, str]:
    """What the time a token depends on besides the machine: exactly, and roughly."""
    settings = [config["draft"], config["vocab"], config["target"], config["states_dir"] is None]
    return json.dumps(settings, sort_keys=True), f"{config['names']['draft']} {config['names']['target']}"


@functools.cache
def _seconds_per_token(root: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for run in list_runs(root):
        metrics = run.read_metrics()
        seconds, tokens = metrics.get(SECONDS), metrics.get("train/supervised_tokens")
        if isinstance(seconds, float) and isinstance(tokens, float) and tokens > 0:
            for work in _work(run.config):
                found.setdefault(work, []).append(seconds / tokens)
    return found
