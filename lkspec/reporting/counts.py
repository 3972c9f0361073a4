"""Reads run folders into counts a prompt: what every table, figure and notebook starts from.

A ``Series`` is one run at one setting (benchmark, temperature, K, engine, depth): a numerator and a denominator for
every prompt, of which a measure is the ratio of sums. ``frame`` shows series as a DataFrame.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd

from lkspec.reporting.decoded import all_rounds, decoded, measured_speed, per_depth, whole_rounds
from lkspec.reporting.held_out import alpha, walk
from lkspec.reporting.labels import objective_label
from lkspec.reporting.series import Series
from lkspec.runs.folder import RunFolder

#: What a table may show, by name.
MEASURES: dict[str, Callable[[RunFolder], Iterator[Series]]] = {
    "tau": lambda run: decoded(run, all_rounds),  # acceptance length by decoding
    "whole_rounds": lambda run: decoded(run, whole_rounds),  # over rounds whose K proposals lie inside the text
    "accepted": lambda run: decoded(run, per_depth),  # share of rounds that accept at least `depth` tokens
    "walk": walk,  # acceptance length of the walk along held-out conversations
    "alpha": alpha,  # mean acceptance rate at `depth` on them
    "speedup": lambda run: measured_speed(run, "speedup"),
    "tokens_per_second": lambda run: measured_speed(run, "tokens_per_second"),
}


def find_runs(patterns: str | Sequence[str]) -> list[RunFolder]:
    """Run folders that match any pattern, by name.

    Raises:
        ValueError: a pattern without any run.
    """
    found: dict[Path, RunFolder] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        paths = [Path(path) for path in glob.glob(str(Path(pattern).expanduser()))]
        runs = [path for path in paths if (path / "config.yaml").is_file()]
        if not runs:
            raise ValueError(
                f"runs={pattern}: expected folders of runs, found {len(paths)} paths and no run among them; "
                "train one first, or name others (runs='runs/mlp-*', runs=['a/*','b/*'])"
            )
        found |= {path.resolve(): RunFolder.open(path) for path in runs}
    return sorted(found.values(), key=lambda run: run.name)


def read_series(runs: Sequence[RunFolder], measure: str) -> list[Series]:
    """A measure (``MEASURES``) of every run that holds it.

    Raises:
        ValueError: an unknown measure.
    """
    if measure not in MEASURES:
        raise ValueError(f"value: expected one of {', '.join(MEASURES)}, got {measure!r}")
    return [one for run in runs for one in MEASURES[measure](run)]


def frame(series: Iterable[Series], keys: Sequence[str] = ()) -> pd.DataFrame:
    """Series as rows: their settings, ``keys`` of the configuration, the value and how many groups it rests on."""
    return pd.DataFrame(
        [
            {**one.settings, **{key: one.get(key) for key in keys}, "value": one.value, "num_groups": len(one.groups)}
            for one in series
        ]
    )


def results_frame(runs: Sequence[RunFolder]) -> pd.DataFrame:
    """Every row of the runs' results.csv, with ``objective`` (the loss and its arguments) and ``alpha_k`` columns."""
    rows = []
    for run in runs:
        for row in run.read_results():
            cells = {key: value for key, value in vars(row).items() if key != "alpha"}
            cells["objective"] = objective_label(row.loss, json.loads(row.loss_args))
            rows.append(cells | {f"alpha_{k}": share for k, share in enumerate(row.alpha, start=1)})
    return pd.DataFrame(rows)
