"""``lkspec duel``: trains two objectives on the same batches and seeds and says which one gets more accepted.

The rung between a smoke test and an ablation. Both sides are sweeps of ``lkspec train`` over the seeds, side by side in
a process each; their runs are kept, so that the next challenger of the same base costs half the time. The order of the
training texts, the first weights and the held-out answers of a seed are the same for both, and the difference is taken
seed by seed and answer by answer.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lkspec.app.application import resolved
from lkspec.app.sweeps import read_journal
from lkspec.reporting.counts import read_series
from lkspec.reporting.intervals import Estimate
from lkspec.reporting.layout import Layout
from lkspec.reporting.tables import build_table
from lkspec.reporting.terminal import console, table
from lkspec.runs.folder import RunFolder

_SHARED_GROUPS = re.compile(r"[+~]*(draft|target)\b(?!_)")
_LOSS_ARGUMENT = re.compile(r"[+~]*loss\.")
_SHOWN_LOG_LINES = 15


@dataclass(frozen=True)
class Side:
    """One of the two: its name, the overrides that make it, and where its training writes what it says."""

    name: str
    overrides: tuple[str, ...]
    log: Path


def main(config: DictConfig) -> None:
    """Trains what is missing and prints the comparison."""
    typed = list(HydraConfig.get().overrides.task)
    challenger = HydraConfig.get().runtime.choices["loss"]
    arguments = tuple(override for override in typed if _LOSS_ARGUMENT.match(override))
    if challenger == config.base and not arguments:
        raise ValueError(f"loss={challenger} and base={config.base} are the same: name two objectives")
    root = Path(config.run_root)
    root.mkdir(parents=True, exist_ok=True)
    shared = [
        f"experiment={config.experiment}",
        f"draft={HydraConfig.get().runtime.choices['draft']}",
        f"target={HydraConfig.get().runtime.choices['target']}",
        *(override for override in typed if _SHARED_GROUPS.match(override)),
        *resolved(config)["overrides"],
        f"run_root={root}",
        f"seed={','.join(str(seed) for seed in config.seeds)}",
        "on_existing=continue",
    ]
    sides = [
        Side(name, (*dict.fromkeys(shared), f"loss={name}", *own), root / f"{role}.log")
        for role, name, own in (("base", config.base, ()), ("challenger", challenger, arguments))
    ]
    base, other = _trained(sides)
    print_duel(base, other, names=(config.base, " ".join([challenger, *arguments])))


def _trained(sides: Sequence[Side]) -> list[list[RunFolder]]:
    """The runs of each side, trained side by side.

    Raises:
        ValueError: a run failed; with the end of its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        journals = [Path(folder) / f"{number}.jsonl" for number in range(len(sides))]
        processes = [_started(side, journal) for side, journal in zip(sides, journals, strict=True)]
        try:
            statuses = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.terminate()
        for side, status in zip(sides, statuses, strict=True):
            if status != 0:
                lines = side.log.read_text(errors="replace").splitlines()[-_SHOWN_LOG_LINES:]
                raise ValueError("\n".join([f"training with {side.name} failed ({side.log}):", *lines]))
        return [[RunFolder.open(Path(job["folder"])) for job in read_journal(journal)] for journal in journals]


def _started(side: Side, journal: Path) -> subprocess.Popen[bytes]:
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    command = [sys.executable, "-m", "lkspec.cli", "train", "-m", *side.overrides, f"journal={journal}"]
    console.print(f"{side.name}: training, {side.log} tells how far", highlight=False, soft_wrap=True)
    with side.log.open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def print_duel(base: Sequence[RunFolder], challenger: Sequence[RunFolder], *, names: tuple[str, str]) -> None:
    """Walk tau at each held-out temperature and alpha at every depth of the T = 1 answers, paired by seed and answer.

    Raises:
        ValueError: the two sides have no seed or no held-out answer in common; as ``build_table``.
    """
    labels = [read_series(side, "walk")[0].get("objective") for side in (base, challenger)]
    rows, gain = [], None
    for value, columns, where in (
        ("walk", ["temperature", "num_draft_tokens"], {"num_draft_tokens": "max"}),
        ("alpha", ["depth"], {"temperature": 1}),
    ):
        found = build_table(
            [*base, *challenger],
            Layout(rows=["objective"], columns=columns, value=value, where=where, baseline=labels[0]),
        )
        sides = {row.labels[0]: row.cells for row in found.rows}
        for column, ours, theirs in zip(found.columns, sides[labels[1]], sides[labels[0]], strict=True):
            gain = ours.gain
            if gain is None or ours.estimate is None or theirs.estimate is None:
                raise ValueError("the two sides cannot be paired: they have no seed with the same held-out answers")
            place = ", ".join(f"{key} {text}" for key, text in zip(columns, column, strict=True))
            numbers = (f"{theirs.estimate.value:.4f}", f"{ours.estimate.value:.4f}", f"{gain.value:+.4f}")
            rows.append((f"{value}, {place}", *numbers, f"{gain.low:+.4f} to {gain.high:+.4f}", _verdict(gain)))
    assert gain is not None, "every trained draft has a depth"
    title = f"{names[1]} against {names[0]}: {gain.num_seeds} seeds, {gain.num_groups} held-out answers per temperature"
    table(title, ("measure", *names, "difference", "95 % interval", "verdict"), rows, left=("measure", "verdict"))


def _verdict(gain: Estimate) -> str:
    """Better, worse, or not resolved with the smallest effect that would have been."""
    if gain.excludes_zero:
        return "better" if gain.value > 0 else "worse"
    return f"not resolved (smallest visible effect {gain.half_width:.4f})"
