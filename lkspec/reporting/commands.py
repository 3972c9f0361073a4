"""The commands that fill the missing cells of a table, each once."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

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
_BY_ITSELF: tuple[tuple[str, list[str]], ...] = (("sharpness", ["1"]), ("benchmark", []))  # what need not be said
_GROUPS = ("draft", "target", "loss")


class Commands:
    """Collects what is missing; ``texts`` are the commands, numbered from 1 in the order of ``add``."""

    def __init__(self, series: Sequence[Series]) -> None:
        self._series = series
        self._options: dict[tuple[str, ...], dict[str, list[str]]] = {}  # of each command, its lists of values

    def add(self, place: Mapping[str, str], measure: str) -> tuple[int, ...]:
        """Numbers of the commands that fill a place, given as key -> label; none when no command can."""
        recipe = {key: value for key, value in place.items() if key not in (*_MEASURED, "depth", "engine", "value")}
        fitting = (one for one in self._series if all(label(one.get(key)) == value for key, value in recipe.items()))
        trained = {one.run.name: one for one in fitting}
        if not trained:
            return (self._number(self._training(recipe), {}),)
        if place.get("temperature") == "0" and place.get("sharpness", "1") != "1":
            return ()  # nothing that differs from sharpness 1
        if {place.get("benchmark") or one.get("benchmark") for one in trained.values()} != {HELD_OUT}:
            return tuple(self._evaluation(one, place, measure) for one in trained.values())
        if (sharpness := place.get("sharpness", "1")) == "1":
            return ()  # this walk belongs to training
        paths = dict.fromkeys(str(one.run.path) for one in self._series if one.run.name in trained)
        walks = (("lkspec", "walk", f"run={path}") for path in paths)
        return tuple(self._number(walk, {"sharpness": [sharpness]}) for walk in walks)

    @property
    def texts(self) -> tuple[str, ...]:
        """The commands, in the order of their numbers."""
        return tuple(
            shlex.join([*command, *(_option(*option) for option in options.items() if option not in _BY_ITSELF)])
            for command, options in self._options.items()
        )

    def _number(self, command: tuple[str, ...], values: Mapping[str, Sequence[str]]) -> int:
        """The number of a command, which from now on also asks for these values."""
        options = self._options.setdefault(command, {})
        for name, wanted in values.items():
            options[name] = list(dict.fromkeys([*options.get(name, []), *wanted]))
        return list(self._options).index(command) + 1

    def _evaluation(self, series: Series, place: Mapping[str, str], measure: str) -> int:
        values = {option: [place.get(key) or label(series.get(key))] for key, option in _MEASURED.items()}
        values["benchmark"] = [name for name in values["benchmark"] if name != HELD_OUT]
        if measure == "speedup":
            values["batch_size"] = ["1"]  # the target is only timed beside single requests
        return self._number(("lkspec", "evaluate", f"run={series.run.path}"), values)

    def _training(self, recipe: Mapping[str, str]) -> tuple[str, ...]:
        """What trains a recipe: the overrides of the run nearest to it, changed."""
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
        return ("lkspec", "train", *sweep, *overrides)

    def _objective(self, objective: str) -> list[str]:
        """The overrides that train an objective: what a run with it was given, which a name alone may not tell."""
        known = next((one for one in self._series if one.get("objective") == objective), None)
        if known is None:
            return published_overrides(objective)
        given = {key: value for key, value in known.config.items() if key.startswith("loss.") and value is not None}
        given.pop("loss._target_")
        return [f"loss={known.get('loss')}", *(f"{key}={label(value)}" for key, value in given.items())]


def _option(name: str, values: Sequence[str]) -> str:
    return f"{name}={values[0]}" if name == "batch_size" else f"{name}=[{','.join(values)}]"


def _overridden(overrides: Sequence[str], changes: Sequence[str]) -> list[str]:
    """Overrides with some keys set anew; a new choice of a group drops what was set inside the old one."""
    keys = [change.partition("=")[0] for change in changes]
    dropped = tuple(f"{key}." for key in keys if key in _GROUPS)
    kept = [
        text
        for text in overrides
        if (key := text.partition("=")[0].lstrip("+~")) not in keys and not key.startswith(dropped)
    ]
    return [*kept, *changes]
