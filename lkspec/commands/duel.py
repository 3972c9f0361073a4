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

import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lkspec.app.application import entry_point, resolved
from lkspec.app.sweeps import read_journal
from lkspec.reporting.counts import Series, read_series
from lkspec.reporting.intervals import Counts, Estimate, estimate, paired_gain
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


@dataclass(frozen=True)
class Verdict:
    """What one measure says of the challenger and the base."""

    measure: str
    base: Estimate
    challenger: Estimate
    gain: Estimate

    @property
    def text(self) -> str:
        """better, worse, or not resolved with the smallest effect that would have been."""
        if self.gain.excludes_zero:
            return "better" if self.gain.value > 0 else "worse"
        return f"not resolved (smallest visible effect {self.gain.half_width:.4f})"


@entry_point("duel")
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
    print_verdicts(verdicts(base, other), base=config.base, challenger=" ".join([challenger, *arguments]))


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
    command = [sys.executable, "-m", "lkspec.commands.train", "-m", *side.overrides, f"journal={journal}"]
    console.print(f"{side.name}: training, {side.log} tells how far", highlight=False, soft_wrap=True)
    with side.log.open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def verdicts(base: Sequence[RunFolder], challenger: Sequence[RunFolder]) -> list[Verdict]:
    """Walk tau on each held-out temperature and alpha at every depth of the T = 1 answers, paired by seed and answer.

    Args:
        base, challenger: runs of the same seeds, with the same held-out answers.

    Raises:
        ValueError: seeds or held-out answers of the two sides differ.
    """
    found = []
    for measure, offset in (("walk", 1.0), ("alpha", 0.0)):
        ours, theirs = (_by_setting(read_series(runs, measure)) for runs in (challenger, base))
        num_depths = max(depth for _, depth in ours)
        for temperature, depth in sorted(ours, key=lambda key: (-key[0], key[1])):
            if measure == "walk" and depth == num_depths:
                label = f"walk tau, T = {temperature:g}, K = {depth}"
            elif measure == "alpha" and temperature == 1:
                label = f"alpha at depth {depth}"
            else:
                continue
            one, other = _paired(ours[temperature, depth], theirs.get((temperature, depth), []))
            estimates = {"base": estimate([other], offset=offset), "challenger": estimate([one], offset=offset)}
            found.append(Verdict(label, **estimates, gain=paired_gain([one], [other])))
    return found


def _by_setting(series: Sequence[Series]) -> dict[tuple[float, int], list[Series]]:
    """Series by temperature and depth (of the walk: the number of drafted tokens)."""
    found: dict[tuple[float, int], list[Series]] = {}
    for one in series:
        depth = one.get("depth") or one.get("num_draft_tokens")
        found.setdefault((one.get("temperature"), depth), []).append(one)
    return found


def _paired(first: Sequence[Series], second: Sequence[Series]) -> tuple[Counts, Counts]:
    both = [sorted(side, key=lambda series: series.get("seed")) for side in (first, second)]
    seeds = [[series.get("seed") for series in side] for side in both]
    texts = {series.groups for side in both for series in side}
    if seeds[0] != seeds[1] or len(texts) != 1:
        raise ValueError(
            f"the two sides cannot be paired: seeds {seeds[0]} and {seeds[1]}, {len(texts)} sets of held-out answers"
        )
    one, other = (
        Counts(np.stack([series.numerator for series in side]), np.stack([series.denominator for series in side]))
        for side in both
    )
    return one, other


def print_verdicts(found: Sequence[Verdict], *, base: str, challenger: str) -> None:
    """The comparison as a table, with what it rests on."""
    gain = found[0].gain
    title = f"{challenger} against {base}: {gain.num_seeds} seeds, {gain.num_groups} held-out answers a temperature"
    names = ("measure", base, challenger, "difference", "95 % interval", "verdict")
    cells = [
        [
            one.measure,
            f"{one.base.value:.4f}",
            f"{one.challenger.value:.4f}",
            f"{one.gain.value:+.4f}",
            f"{one.gain.low:+.4f} to {one.gain.high:+.4f}",
            one.text,
        ]
        for one in found
    ]
    table(title, names, cells, left=("measure", "verdict"))


if __name__ == "__main__":
    main()
