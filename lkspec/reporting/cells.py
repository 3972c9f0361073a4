"""One cell of a table: which series belong together, what must not be mixed, and their counts side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lkspec.reporting.intervals import Counts
from lkspec.reporting.labels import label
from lkspec.reporting.series import Series
from lkspec.runs.keys import Kind, kind

#: What a number depends on besides the recipe and the seed: a cell holds one value of each.
SETTINGS = (
    "draft",
    "objective",
    "target",
    "benchmark",
    "temperature",
    "num_draft_tokens",
    "depth",
    "sharpness",
    "engine",
    "protocol",
)


def recipe(series: Series) -> dict[str, Any]:
    """What decides the draft that a run ends with, but for the seed: its configuration without machine and output."""
    config = series.config.items()
    return {key: value for key, value in config if kind(key) == Kind.TRAINED and key not in ("seed", "data.seed")}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Keys in which two recipes (or protocols) differ, with the labels of both values."""
    keys = sorted({*one, *other})
    found = {key: (label(one.get(key, "absent")), label(other.get(key, "absent"))) for key in keys}
    return {key: pair for key, pair in found.items() if pair[0] != pair[1]}


def check_cell(series: Sequence[Series], place: str, *, averaged: str | None = None) -> None:
    """Refuses a cell that would average over anything but seeds (and the key ``averaged``).

    Raises:
        ValueError: series of different settings or recipes, or two runs of one seed; says which key tells them apart
            and how to separate or choose.
    """
    for key in SETTINGS:
        values = sorted({label(one.get(key)) for one in series})
        if len(values) == 1 or key == averaged or (key, averaged) == ("protocol", "benchmark"):
            continue
        if key == "protocol":
            one, other = series[0], next(s for s in series if s.get("protocol") != series[0].get("protocol"))
            pairs = differences(one.get(key), other.get(key))
            raise ValueError(
                f"{place}: measured under different protocols, which cannot be averaged: {_listing(pairs)} (runs "
                f"{one.run.name} and {other.run.name}); narrow runs=, measure again with `lkspec evaluate`, or choose "
                f"with '+where.{_choice(pairs)}'"
            )
        raise ValueError(
            f"{place}: mixes {key} {', '.join(values)}; add {key} to rows or columns, or choose one with "
            f"'+where.{key}={values[-1]}'"
        )
    _check_seeds(series, place, averaged)


def _check_seeds(series: Sequence[Series], place: str, averaged: str | None) -> None:
    first: dict[tuple[str, str], Series] = {}
    for one in series:
        pairs = differences(recipe(series[0]), recipe(one))
        if pairs:
            raise ValueError(
                f"{place}: runs {series[0].run.name} and {one.run.name} differ in {_listing(pairs)}; add "
                f"{next(iter(pairs))} to rows or columns, choose with '+where.{_choice(pairs)}', or narrow runs="
            )
        key = (label(one.get("seed")), _stratum(one, averaged))
        if other := first.get(key):
            raise ValueError(
                f"{place}: two results of seed {key[0]} with the same recipe, {other.run.name} and {one.run.name}: "
                "made by different code or measured twice; narrow runs= to one of them"
            )
        first[key] = one


def _stratum(series: Series, averaged: str | None) -> str:
    return label(series.get(averaged)) if averaged else ""


def aligned(sides: Sequence[Sequence[Series]], *, averaged: str | None = None) -> list[list[Counts]]:
    """Counts of each side by stratum, over the seeds that all sides have and the same prompts in the same order.

    A prompt without any round is not in a run's rounds; it counts 0 there.
    """
    seeds = common_seeds(sides)
    result: list[list[Counts]] = [[] for _ in sides]
    for stratum in sorted({_stratum(one, averaged) for one in sides[0]}):
        by_seed = [{one.get("seed"): one for one in side if _stratum(one, averaged) == stratum} for side in sides]
        chosen = [[side[seed] for seed in seeds] for side in by_seed]
        everyone = [one for side in chosen for one in side]
        grouped = all(one.groups for one in everyone)
        groups = list(dict.fromkeys(group for one in everyone for group in one.groups)) if grouped else []
        for counts, side in zip(result, chosen, strict=True):
            counts.append(_counts(side, groups))
    return result


def common_seeds(sides: Sequence[Sequence[Series]]) -> list[Any]:
    """Seeds that every side has, in order."""
    return sorted(set.intersection(*({one.get("seed") for one in side} for side in sides)))


def _counts(series: Sequence[Series], groups: Sequence[str]) -> Counts:
    """Counts over some groups; of the whole when there are none."""
    numerator, denominator = np.zeros((2, len(series), len(groups) or 1))
    place = {group: index for index, group in enumerate(groups)}
    for row, one in enumerate(series):
        columns = [place[group] for group in one.groups] if groups else 0
        numerator[row, columns] = one.numerator if groups else one.numerator.sum()
        denominator[row, columns] = one.denominator if groups else one.denominator.sum()
    return Counts(numerator, denominator, grouped=bool(groups))


def protocols_differ(first: Iterable[Series], second: Iterable[Series]) -> str | None:
    """How the protocols of two sides differ, in words; None where they are equal."""
    theirs = {label(one.get("benchmark")): one for one in second}
    for one in first:
        other = theirs.get(label(one.get("benchmark")))
        if other is not None and (pairs := differences(one.get("protocol"), other.get("protocol"))):
            return _listing(pairs)
    return None


def recipes_differ(series: Series, baseline: Series) -> str | None:
    """What sets a series apart from its baseline besides the objective, in words; None where nothing does."""
    pairs = differences(recipe(baseline), recipe(series))
    others = [f"{key} {theirs} -> {ours}" for key, (theirs, ours) in pairs.items() if not key.startswith("loss.")]
    return ", ".join(others[:6]) or None


def _listing(pairs: Mapping[str, tuple[str, str]]) -> str:
    shown = [f"{key} ({one} and {other})" for key, (one, other) in list(pairs.items())[:4]]
    return ", ".join(shown) + (", ..." if len(pairs) > 4 else "")


def _choice(pairs: Mapping[str, tuple[str, str]]) -> str:
    key, (_, other) = next(iter(pairs.items()))
    return f"{key}={other}"
