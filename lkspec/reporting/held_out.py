"""Reads what the validation walk measured along held-out conversations: walk.parquet, or metrics.json as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pandas as pd

from lkspec.reporting.series import About, Series, about_run, make_series, sums_by
from lkspec.runs.folder import RunFolder
from lkspec.runs.rows import content_hash

HELD_OUT = "held_out"  # what the validation conversations are called where benchmarks have names


def walk(run: RunFolder) -> Iterator[Series]:
    """Expected accepted tokens over expected rounds, at every K up to the trained depths."""

    def of_depth(rows: pd.DataFrame) -> tuple[Any, Any]:
        return rows["accepted"], rows["rounds"]

    for series in _held_out(run, of_depth, "walk_acceptance_length"):
        depth = series.settings["depth"]
        yield replace(series, settings={**series.settings, "num_draft_tokens": depth, "depth": 0})


def alpha(run: RunFolder) -> Iterator[Series]:
    """The sum of alpha over tokens, at each depth."""

    def of_depth(rows: pd.DataFrame) -> tuple[Any, Any]:
        return rows["alpha"], rows["num_tokens"]

    yield from _held_out(run, of_depth, None)


def _held_out(
    run: RunFolder, of_depth: Callable[[pd.DataFrame], tuple[Any, Any]], metric: str | None
) -> Iterator[Series]:
    """Series of every validation temperature and depth; ``metric`` is the walk's name in metrics.json, None alpha."""
    about, table = about_run(run), run.read_walk_table()
    if table is None:
        yield from _held_out_metrics(run, about, metric)
        return
    everything = table.to_pandas()
    for (temperature, sharpness), texts in everything.groupby(["temperature", "sharpness"]):
        protocol = {"texts": content_hash(sorted(texts["key"].unique()))}
        settings = _held_out_settings(about, float(temperature), int(texts["steps"].max()), protocol)
        settings["sharpness"] = float(sharpness)
        for depth, rows in texts.groupby("depth"):
            sums = sums_by(rows["key"], *of_depth(rows))
            here = {**settings, "depth": int(depth), "num_draft_tokens": int(texts["depth"].max())}
            yield make_series(run, here, about, *sums, 0.0 if metric is None else 1.0)


def _held_out_metrics(run: RunFolder, about: About, metric: str | None) -> Iterator[Series]:
    """The same from metrics.json, where conversations are not known apart: runs of before walk.parquet."""
    metrics, num_depths = run.read_metrics(), int(about.config.get("draft.num_depths", 0))
    protocol = {"texts": content_hash({k: v for k, v in about.config.items() if k.startswith("data.val")})}
    for name, value in metrics.items():
        parts = name.split("/")
        wanted = len(parts) > 2 and parts[0] == "val" and parts[1].startswith("T") and isinstance(value, float)
        if not wanted or parts[2] != (metric or "alpha"):
            continue
        depth = num_depths if metric else int(parts[3].removeprefix("depth_"))
        settings = _held_out_settings(about, float(parts[1][1:]), None, protocol)
        settings |= {"depth": depth, "num_draft_tokens": num_depths}
        offset = 1.0 if metric else 0.0
        yield make_series(run, settings, about, (), [float(value or 0.0) - offset], [1.0], offset)


def _held_out_settings(about: About, temperature: float, steps: int | None, protocol: dict[str, Any]) -> dict[str, Any]:
    held_out = {"engine": "walk", "benchmark": HELD_OUT, "temperature": temperature, "sharpness": 1.0}
    return {**about.settings, **held_out, "steps": steps, "protocol": protocol}
