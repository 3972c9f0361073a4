"""Reads run folders into counts per prompt: what every table, figure and notebook starts from.

Of decoding results.csv says what there is, and rounds.parquet tells the prompts apart; of the walk along held-out
answers walk.parquet does both.
"""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from lkspec.reporting.series import Series, Source
from lkspec.runs.folder import RunFolder
from lkspec.runs.rows import SETTING, ResultRow, content_hash

HELD_OUT = "held_out"  # what the validation conversations are called where benchmarks have names
#: Of a decoded setting (depth, numerator, denominator), of each of its rounds, or of the whole where those are None.
Count = Callable[[ResultRow, pd.DataFrame | None], Iterator[tuple[int, Any, Any]]]


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


def _decoded(count: Count, run: RunFolder) -> Iterator[Series]:
    """Series of every setting that was decoded."""
    source, table = Source(run), run.read_round_table()
    groups_of = [] if table is None else table.to_pandas().groupby(list(SETTING), sort=False)
    by_setting = {tuple(key): part for key, part in groups_of}

    def listed(row: ResultRow) -> pd.DataFrame | None:
        """The rounds behind a row; None for an engine that lists none, or where later ones took their place."""
        found = by_setting.get(row.setting)
        fits = found is not None and math.isclose(1 + found["accepted"].mean(), row.tau, rel_tol=1e-9)
        return found if fits else None

    # What is sampled for a prompt does not depend on the others of its batch: of two sizes, the one with rounds.
    rows = sorted(_most_trained(run), key=lambda row: listed(row) is not None)
    for row in {content_hash(_settings(row, batch_size=False)): row for row in rows}.values():
        rounds = listed(row)
        groups = None if rounds is None else rounds["prompt_id"]
        for depth, numerator, denominator in count(row, rounds):
            settings = {**_settings(row, batch_size=False), "depth": depth}
            yield source.series(settings, numerator, denominator, groups=groups, offset=float(depth == 0))


def _all_rounds(row: ResultRow, rounds: pd.DataFrame | None) -> Iterator[tuple[int, Any, Any]]:
    """Accepted tokens over rounds."""
    yield 0, row.tau - 1 if rounds is None else rounds["accepted"], 1


def _whole_rounds(row: ResultRow, rounds: pd.DataFrame | None) -> Iterator[tuple[int, Any, Any]]:
    """The same over rounds whose K proposals lie inside the text."""
    if rounds is not None:
        inside = ~rounds["past_end"]
        yield 0, rounds["accepted"] * inside, inside
    elif row.tau_whole_rounds is not None:
        yield 0, row.tau_whole_rounds - 1, 1


def _per_depth(row: ResultRow, rounds: pd.DataFrame | None) -> Iterator[tuple[int, Any, Any]]:
    """Rounds with at least k accepted tokens over all."""
    for depth, share in enumerate(row.alpha, start=1):
        yield depth, share if rounds is None else rounds["accepted"] >= depth, 1


def _speed(column: str, run: RunFolder) -> Iterator[Series]:
    """A speed of results.csv; of the whole, since wall time is not split by prompt."""
    source = Source(run)
    for row in _most_trained(run):
        if (value := getattr(row, column)) is not None:
            yield source.series({**_settings(row), "depth": 0}, value, 1)


def _most_trained(run: RunFolder) -> list[ResultRow]:
    """Of each setting the rows after the most training; before it fewer prompts may have been measured."""
    rows, most = run.read_results(), dict[tuple[Any, ...], int]()
    for row in rows:
        most[row.setting] = max(most.get(row.setting, 0), row.steps)
    return [row for row in rows if row.steps == most[row.setting]]


def _settings(row: ResultRow, *, batch_size: bool = True) -> dict[str, Any]:
    protocol = json.loads(row.protocol)
    if not batch_size:
        protocol.pop("batch_size", None)
    names = ("engine", "benchmark", "temperature", "num_draft_tokens", "sharpness", "steps")
    return {**{name: getattr(row, name) for name in names}, "protocol": protocol}


def _walk(run: RunFolder) -> Iterator[Series]:
    """Expected accepted tokens over expected rounds, at every K up to the trained depths."""
    for series in _held_out(run, "accepted", "rounds"):
        settings = {**series.settings, "num_draft_tokens": series.settings["depth"], "depth": 0}
        yield replace(series, settings=settings, offset=1.0)


def _held_out(run: RunFolder, numerator: str, denominator: str) -> Iterator[Series]:
    """A ratio of columns of walk.parquet at every temperature, sharpness and depth."""
    table = run.read_walk_table()
    if table is None:
        return
    source = Source(run)
    for (temperature, sharpness), texts in table.to_pandas().groupby(["temperature", "sharpness"]):
        settings = {
            "engine": "walk",
            "benchmark": HELD_OUT,
            "temperature": float(temperature),
            "num_draft_tokens": int(texts["depth"].max()),
            "sharpness": float(sharpness),
            "steps": int(texts["steps"].max()),
            "protocol": {"texts": content_hash(sorted(texts["key"].unique()))},
        }
        for depth, rows in texts.groupby("depth"):
            here = {**settings, "depth": int(depth)}
            yield source.series(here, rows[numerator], rows[denominator], groups=rows["key"])


#: What a table may show, by name.
MEASURES: dict[str, Callable[[RunFolder], Iterator[Series]]] = {
    "tau": partial(_decoded, _all_rounds),  # acceptance length by decoding
    "whole_rounds": partial(_decoded, _whole_rounds),  # over rounds whose K proposals lie inside the text
    "accepted": partial(_decoded, _per_depth),  # share of rounds that accept at least `depth` tokens
    "walk": _walk,  # acceptance length of the walk along held-out conversations
    "alpha": partial(_held_out, numerator="alpha", denominator="num_tokens"),  # mean acceptance rate at `depth` on them
    "speedup": partial(_speed, "speedup"),
    "tokens_per_second": partial(_speed, "tokens_per_second"),
}
