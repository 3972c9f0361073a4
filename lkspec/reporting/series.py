"""Counts of one run at one setting: the numerators and denominators that every measure is the ratio of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
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
        """A setting, or else a key of the configuration or of the protocol; None where there is no such key."""
        places = (self.settings, self.config, self.settings["protocol"])
        return next((place[key] for place in places if key in place), None)


class Source:
    """A run whose configuration is read once for all of its series.

    Attributes:
        settings: who the run is; part of the settings of every series.
        config: its configuration, flat.
    """

    def __init__(self, run: RunFolder) -> None:
        config = run.config
        names = config["names"]
        arguments = {key: value for key, value in (config.get("loss") or {}).items() if key != "_target_"}
        self.run, self.config = run, flat(config)
        self.settings: dict[str, Any] = {
            "run": run.name,
            "draft": names["draft"],
            "loss": names["loss"],
            "objective": objective_label(names["loss"], arguments),
            "target": names["target"],
            "seed": config["seed"],
        }

    def series(
        self,
        settings: Mapping[str, Any],
        numerator: Any,
        denominator: Any,
        *,
        groups: pd.Series[str] | None = None,
        offset: float = 0.0,
    ) -> Series:
        """A series of numbers with the group of each, summed within groups; of one number where there are none."""
        codes, names = ([0], ()) if groups is None else pd.factorize(groups, sort=True)
        weights = (np.broadcast_to(np.asarray(part, dtype=np.float64), len(codes)) for part in (numerator, denominator))
        sums = [np.bincount(codes, weight, len(names)) for weight in weights]
        return Series(
            self.run, {**self.settings, **settings}, self.config, tuple(map(str, names)), sums[0], sums[1], offset
        )


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as ``a.b``."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
