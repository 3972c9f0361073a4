"""One cell of a table: which series belong together, what must not be mixed, the estimate and the paired gain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lkspec.reporting.intervals import Counts
from lkspec.reporting.labels import label
from lkspec.reporting.series import Series

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
# Keys of the configuration that change nothing about the trained draft, and those that differ between seeds.
_NOT_RECIPE = (
    "seed", "data.seed", "names.", "run_root", "run_dir", "on_existing", "eta_source", "resume", "plan",
    "unroll.", "logger.", "callbacks.",
    "benchmark.", "evaluation.", "states_dir", "states_memory_gb", "data.num_workers", "data.val", "target.device",
    "loss_options.chunk_size", "loss_options.recompute", "trainer.accelerator", "trainer.devices", "trainer.strategy",
    "trainer.num_nodes", "trainer.val_check_interval", "trainer.check_val_every_n_epoch", "trainer.limit_val_batches",
    "trainer.num_sanity_val_steps", "trainer.log_every_n_steps", "trainer.enable_",
)  # fmt: skip


def recipe(series: Series) -> dict[str, str]:
    """What decides the draft that a run ends with, but for the seed: its configuration without machine and output."""
    return {key: label(value) for key, value in series.config.items() if not key.startswith(_NOT_RECIPE)}


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Keys in which two recipes (or protocols) differ, with both values."""
    keys = sorted({*one, *other})
    found = {key: (one.get(key, "absent"), other.get(key, "absent")) for key in keys}
    return {key: pair for key, pair in found.items() if pair[0] != pair[1]}


def check_cell(series: Sequence[Series], place: str, *, averaged: str | None = None) -> None:
    """Refuses a cell that would average over anything but seeds (and the key ``averaged``).

    Raises:
        ValueError: series of different settings or recipes, or two runs of one seed; says which key tells them apart
            and how to separate or choose.
    """
    free = {"seed", "run", "steps", averaged, *(("protocol",) if averaged == "benchmark" else ())}
    for key in SETTINGS:
        values = sorted({label(one.get(key)) for one in series})
        if key in free or len(values) == 1:
            continue
        if key == "protocol":
            one, other = series[0], next(s for s in series if s.get("protocol") != series[0].get("protocol"))
            pairs = differences(_labels(one.get(key)), _labels(other.get(key)))
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
    first: dict[tuple[str, ...], Series] = {}
    for one in series:
        pairs = differences(recipe(series[0]), recipe(one))
        if pairs:
            raise ValueError(
                f"{place}: runs {series[0].run.name} and {one.run.name} differ in {_listing(pairs)}; add "
                f"{next(iter(pairs))} to rows or columns, choose with '+where.{_choice(pairs)}', or narrow runs="
            )
        key = (label(one.get("seed")), label(one.get(averaged)) if averaged else "")
        if other := first.get(key):
            raise ValueError(
                f"{place}: two results of seed {key[0]} with the same recipe, {other.run.name} and {one.run.name}: "
                "made by different code or measured twice; narrow runs= to one of them"
            )
        first[key] = one


def aligned(sides: Sequence[Sequence[Series]], *, averaged: str | None = None) -> list[list[Counts]]:
    """Counts of each side by stratum, over the seeds that all sides have and the same prompts in the same order.

    A prompt without any round is not in a run's rounds; it counts 0 there.
    """
    seeds = common_seeds(sides)
    strata = sorted({label(one.get(averaged)) if averaged else "" for one in sides[0]})
    result: list[list[Counts]] = [[] for _ in sides]
    for stratum in strata:
        chosen = [
            {one.get("seed"): one for one in side if (label(one.get(averaged)) if averaged else "") == stratum}
            for side in sides
        ]
        everyone = [by_seed[seed] for by_seed in chosen for seed in seeds]
        grouped = all(one.groups for one in everyone)
        groups = list(dict.fromkeys(group for one in everyone for group in one.groups)) if grouped else []
        for counts, by_seed in zip(result, chosen, strict=True):
            counts.append(_counts([by_seed[seed] for seed in seeds], groups, grouped))
    return result


def common_seeds(sides: Sequence[Sequence[Series]]) -> list[Any]:
    """Seeds that every side has, in order."""
    return sorted(set.intersection(*({one.get("seed") for one in side} for side in sides)))


def _counts(series: Sequence[Series], groups: Sequence[str], grouped: bool) -> Counts:
    if not grouped:
        sums = [(one.numerator.sum(keepdims=True), one.denominator.sum(keepdims=True)) for one in series]
        return Counts(np.array([n for n, _ in sums]), np.array([d for _, d in sums]), grouped=False)
    numerator, denominator = np.zeros((2, len(series), len(groups)))
    place = {group: index for index, group in enumerate(groups)}
    for row, one in enumerate(series):
        columns = [place[group] for group in one.groups]
        numerator[row, columns], denominator[row, columns] = one.numerator, one.denominator
    return Counts(numerator, denominator)


def protocols_differ(first: Iterable[Series], second: Iterable[Series]) -> str | None:
    """How the protocols of two sides differ, in words; None where they are equal."""
    theirs = {label(one.get("benchmark")): one for one in second}
    for one in first:
        other = theirs.get(label(one.get("benchmark")))
        if other is not None and (pairs := differences(_labels(one.get("protocol")), _labels(other.get("protocol")))):
            return _listing(pairs)
    return None


def _labels(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: label(value) for key, value in values.items()}


def _listing(pairs: Mapping[str, tuple[str, str]]) -> str:
    shown = [f"{key} ({one} and {other})" for key, (one, other) in list(pairs.items())[:4]]
    return ", ".join(shown) + (", ..." if len(pairs) > 4 else "")


def _choice(pairs: Mapping[str, tuple[str, str]]) -> str:
    key, (_, other) = next(iter(pairs.items()))
    return f"{key}={other}"
