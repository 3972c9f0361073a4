"""Counts of one run at one setting: the numerators and denominators that every measure is the ratio of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from lkspec.reporting.labels import objective_label
from lkspec.runs.folder import RunFolder


@dataclass(frozen=True)
class Series:
    """Counts of one run at one setting.

    Attributes:
        run: where they were read.
        settings: what they were measured at, by name.
        config: the run's configuration, flat (``optimizer.lr``).
        groups: prompts (decoding) or conversations (walk); empty where only the whole is known.
        numerator, denominator: of each group; of the whole where groups are not known.
        offset: added to the ratio.
    """

    run: RunFolder
    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    groups: tuple[str, ...]
    numerator: Float[np.ndarray, " P"]
    denominator: Float[np.ndarray, " P"]
    offset: float

    @property
    def value(self) -> float:
        """``offset + sum numerator / sum denominator``."""
        total = float(self.denominator.sum())
        return self.offset + float(self.numerator.sum()) / total if total > 0 else math.nan

    def get(self, key: str) -> Any:
        """A setting, or else a key of the configuration; None where the run has no such key."""
        return self.settings[key] if key in self.settings else self.config.get(key)


@dataclass(frozen=True)
class About:
    """What all series of a run share: who it is, and its configuration, flat."""

    settings: dict[str, Any]
    config: dict[str, Any]


def about_run(run: RunFolder) -> About:
    """Read off the run's configuration."""
    config = run.config
    arguments = {key: value for key, value in (config.get("loss") or {}).items() if key != "_target_"}
    names, path = config["names"], config["target"].get("path")
    settings = {
        "run": run.name,
        "draft": names["draft"],
        "loss": names["loss"],
        "objective": objective_label(names["loss"], arguments),
        "target": Path(path).name if path else names["target"],  # one choice of the group, many models
        "seed": config["seed"],
    }
    return About(settings, flat(config))


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as ``a.b``."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def make_series(
    run: RunFolder,
    settings: Mapping[str, Any],
    about: About,
    groups: Any,
    numerator: Any,
    denominator: Any,
    offset: float,
) -> Series:
    """A series with its sums as arrays."""
    sums = [np.asarray(values, dtype=np.float64) for values in (numerator, denominator)]
    return Series(run, settings, about.config, tuple(str(group) for group in groups), sums[0], sums[1], offset)


def sums_by(groups: pd.Series[str], numerator: Any, denominator: Any) -> tuple[Any, Any, Any]:
    """The different groups, and numerator and denominator summed within them."""
    codes, names = pd.factorize(groups, sort=True)
    sums = [np.bincount(codes, np.asarray(c, dtype=np.float64), len(names)) for c in (numerator, denominator)]
    return names, sums[0], sums[1]
