"""The commands that fill the missing cells of a table, each once."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lkspec.reporting.counts import HELD_OUT
from lkspec.reporting.labels import label, published_overrides
from lkspec.reporting.series import Series

# Settings of a measurement: what `lkspec evaluate` (or the end of training) can be asked for.
_MEASURED = {
    "benchmark": "benchmark",
    "temperature": "temperatures",
    "num_draft_tokens": "num_draft_tokens",
    "sharpness": "sharpness",
}
_GROUPS = ("draft", "target", "loss", "objective")


class Commands:
    """Collects what is missing; ``texts`` are the commands, numbered from 1 in the order of ``add``."""

    def __init__(self, series: Sequence[Series]) -> None:
        self._series = series
        self._evaluations: dict[str, dict[str, list[str]]] = {}
        self._alone: set[str] = set()
        self._sharpened: dict[str, dict[str, None]] = {}  # the walks of a command
        self._numbers: dict[str, int] = {}
        self._trainings: dict[str, str] = {}

    def add(self, place: Mapping[str, str], measure: str) -> tuple[int, ...]:
        """Numbers of the commands that fill a place, given as key -> label; none when no command can."""
        recipe = {key: value for key, value in place.items() if key not in (*_MEASURED, "depth", "engine", "value")}
        trained = {one.run.name: one for one in self._series if _agrees(one, recipe)}
        if not trained:
            return (self._train(recipe),)
        benchmarks = {place.get("benchmark") or one.get("benchmark") for one in trained.values()}
        if place.get("temperature") == "0" and place.get("sharpness", "1") != "1":
            return ()  # nothing that differs from sharpness 1
        if benchmarks == {HELD_OUT}:
            return self._walks(trained, place.get("sharpness", "1"))
        return tuple(self._evaluate(one, place, measure) for one in trained.values())

    @property
    def texts(self) -> tuple[str, ...]:
        """The commands, in the order of their numbers."""
        return tuple(self._trainings.get(key) or self._walk(key) or self._evaluation(key) for key in self._numbers)

    def _number(self, key: str) -> int:
        return self._numbers.setdefault(key, len(self._numbers) + 1)

    def _walks(self, runs: Iterable[str], sharpness: str) -> tuple[int, ...]:
        """Walks of finished runs with another sharpness; all others belong to training."""
        if sharpness == "1":
            return ()
        paths = dict.fromkeys(str(one.run.path) for one in self._series if one.run.name in runs)
        keys = [shlex.join(["lkspec", "walk", f"run={path}"]) for path in paths]
        for key in keys:
            self._sharpened.setdefault(key, {})[sharpness] = None
        return tuple(map(self._number, keys))

    def _evaluate(self, series: Series, place: Mapping[str, str], measure: str) -> int:
        path = str(series.run.path)
        asked = self._evaluations.setdefault(path, {key: [] for key in _MEASURED})
        if measure == "speedup":
            self._alone.add(path)
        for key, values in asked.items():
            value = place.get(key) or label(series.get(key))
            if value not in values and value != HELD_OUT:
                values.append(value)
        return self._number(path)

    def _walk(self, key: str) -> str | None:
        powers = self._sharpened.get(key)
        return None if powers is None else " ".join([key, shlex.quote(f"sharpness=[{','.join(powers)}]")])

    def _evaluation(self, path: str) -> str:
        asked = {key: values for key, values in self._evaluations[path].items() if values}
        if asked.get("sharpness") == ["1"]:
            del asked["sharpness"]  # what it is by itself
        lists = [f"{_MEASURED[key]}=[{','.join(values)}]" for key, values in asked.items()]
        alone = ["batch_size=1"] if path in self._alone else []  # the target is only timed beside single requests
        return shlex.join(["lkspec", "evaluate", f"run={path}", *lists, *alone])

    def _train(self, recipe: Mapping[str, str]) -> int:
        key = " ".join(f"{name}={value}" for name, value in sorted(recipe.items()))
        number = self._number(key)
        model = max(self._series, key=lambda one: sum(label(one.get(name)) == recipe[name] for name in recipe))
        overrides = [text for text in model.run.overrides if not text.startswith(("on_existing=", "resume="))]
        for name, value in recipe.items():
            if name == "objective":  # even the model's own: a setting of it may follow the draft, which changes
                overrides = _overridden(overrides, self._objective(value))
            elif label(model.get(name)) != value:
                overrides = _overridden(overrides, [f"{name}={value}"])
        seeds = sorted({label(one.get("seed")) for one in self._series})
        if "seed" not in recipe:
            overrides = _overridden(overrides, [f"seed={','.join(seeds)}"])
        sweep = ["-m"] if len(seeds) > 1 and "seed" not in recipe else []
        self._trainings[key] = shlex.join(["lkspec", "train", *sweep, *overrides])
        return number

    def _objective(self, objective: str) -> list[str]:
        """The overrides that train an objective: what a run with it was given, which a name alone may not tell."""
        known = next((one for one in self._series if one.get("objective") == objective), None)
        if known is None:
            return published_overrides(objective)
        given = {key: value for key, value in known.config.items() if key.startswith("loss.") and value is not None}
        given.pop("loss._target_")
        return [f"loss={known.get('loss')}", *(f"{key}={label(value)}" for key, value in given.items())]


def _overridden(overrides: Sequence[str], changes: Sequence[str]) -> list[str]:
    """Overrides with some keys set anew; a new choice of a group drops what was set inside the old one."""
    keys = [change.partition("=")[0] for change in changes]
    dropped = tuple(f"{key}." for key in keys if key in _GROUPS)
    kept = [
        text
        for text in overrides
        if (key := text.partition("=")[0].lstrip("+~")) not in keys and not (dropped and key.startswith(dropped))
    ]
    return [*kept, *changes]


def _agrees(series: Series, wanted: Mapping[str, Any]) -> bool:
    return all(label(series.get(key)) == value for key, value in wanted.items())
