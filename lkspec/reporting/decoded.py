"""Reads what decoding measured: results.csv says what there is, rounds.parquet tells the prompts apart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd

from lkspec.reporting.series import About, Series, about_run, make_series, sums_by
from lkspec.runs.folder import RunFolder
from lkspec.runs.rows import SETTING, ResultRow, content_hash

#: Splits rounds of a setting with K drafted tokens into (depth, numerator, denominator), one of each a round.
Count = Callable[[pd.DataFrame, int], Iterator[tuple[int, Any, Any]]]


def decoded(run: RunFolder, count: Count) -> Iterator[Series]:
    """Series of every setting that was decoded; ``count`` makes (depth, numerator, denominator) of a round each."""
    rounds = _rounds_by_setting(run)
    about = about_run(run)

    def listed(row: ResultRow) -> pd.DataFrame | None:
        """The rounds behind a row; None for an engine that lists none, or where later ones took their place."""
        found = rounds.get(row.setting)
        fits = found is not None and math.isclose(1 + found["accepted"].mean(), row.tau, rel_tol=1e-9)
        return found if fits else None

    rows = sorted(_most_trained(run.read_results()), key=lambda row: listed(row) is not None)
    for row in _last_of_each(rows, lambda row: _settings(row, about)):
        settings, chosen = _settings(row, about), listed(row)
        if chosen is None:
            yield from _whole(run, settings, about, count, row)
            continue
        for depth, numerator, denominator in count(chosen, row.num_draft_tokens):
            sums = sums_by(chosen["prompt_id"], numerator, denominator)
            yield make_series(run, {**settings, "depth": depth}, about, *sums, _offset(depth))


def _whole(run: RunFolder, settings: dict[str, Any], about: About, count: Count, row: ResultRow) -> Iterator[Series]:
    """A decoded setting whose rounds are not known: one number."""
    if count is all_rounds:
        yield make_series(run, {**settings, "depth": 0}, about, (), [row.tau - 1], [1.0], 1.0)
    elif count is per_depth:
        for depth, share in enumerate(row.alpha, start=1):
            yield make_series(run, {**settings, "depth": depth}, about, (), [share], [1.0], 0.0)
    elif row.tau_whole_rounds is not None:
        yield make_series(run, {**settings, "depth": 0}, about, (), [row.tau_whole_rounds - 1], [1.0], 1.0)


def all_rounds(rounds: pd.DataFrame, num_draft_tokens: int) -> Iterator[tuple[int, Any, Any]]:
    """Accepted tokens over rounds."""
    yield 0, rounds["accepted"], rounds["accepted"] >= 0


def whole_rounds(rounds: pd.DataFrame, num_draft_tokens: int) -> Iterator[tuple[int, Any, Any]]:
    """The same over rounds whose K proposals lie inside the text."""
    inside = ~rounds["past_end"]
    yield 0, rounds["accepted"] * inside, inside


def per_depth(rounds: pd.DataFrame, num_draft_tokens: int) -> Iterator[tuple[int, Any, Any]]:
    """Rounds with at least k accepted tokens over all."""
    for depth in range(1, num_draft_tokens + 1):
        yield depth, rounds["accepted"] >= depth, rounds["accepted"] >= 0


def _offset(depth: int) -> float:
    return 1.0 if depth == 0 else 0.0


def measured_speed(run: RunFolder, column: str) -> Iterator[Series]:
    """A speed of results.csv; of the whole, since wall time is not split by prompt."""
    about = about_run(run)
    for row in _last_of_each(
        _most_trained(run.read_results()), lambda row: _settings(row, about, with_batch_size=True)
    ):
        value = getattr(row, column)
        if value is not None:
            settings = {**_settings(row, about, with_batch_size=True), "depth": 0}
            yield make_series(run, settings, about, (), [value], [1.0], 0.0)


def _rounds_by_setting(run: RunFolder) -> dict[tuple[Any, ...], pd.DataFrame]:
    table = run.read_round_table()
    if table is None:
        return {}
    return {tuple(key): part for key, part in table.to_pandas().groupby(list(SETTING), sort=False)}


def _most_trained(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Of each setting the rows after the most training; before it fewer prompts may have been measured."""
    most: dict[tuple[Any, ...], int] = {}
    for row in rows:
        most[row.setting] = max(most.get(row.setting, 0), row.steps)
    return [row for row in rows if row.steps == most[row.setting]]


def _last_of_each(rows: Sequence[ResultRow], settings: Callable[[ResultRow], dict[str, Any]]) -> list[ResultRow]:
    """Of the rows of one setting and protocol the last in their order."""
    return list({content_hash(settings(row)): row for row in rows}.values())


def _settings(row: ResultRow, about: About, *, with_batch_size: bool = False) -> dict[str, Any]:
    protocol = json.loads(row.protocol)
    if not with_batch_size:  # of speed only: what is sampled for a prompt does not depend on the others of its batch
        protocol.pop("batch_size", None)
    return {
        **about.settings,
        "engine": row.engine,
        "benchmark": row.benchmark,
        "temperature": row.temperature,
        "num_draft_tokens": row.num_draft_tokens,
        "sharpness": row.sharpness,
        "steps": row.steps,
        "protocol": protocol,
    }
