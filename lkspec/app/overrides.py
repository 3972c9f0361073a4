"""What was typed on the command line, checked before anything is built: choices, keys, values.

Hydra says most of it too, but in several lines, without a suggestion, and of a sweep only when its jobs are composed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigSource
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf

from lkspec.app.values import fits, in_words

_MOST_LISTED = 16  # choices or keys that fit into a line
_FIXED_BY_RUN = ("draft", "target", "vocab", "data", "loss")


class Composition:
    """The configuration groups of a verb, and its configuration with the groups that were chosen.

    Args:
        application: Hydra's, of this verb.
        verb: name of the primary configuration.
        typed: overrides.

    Attributes:
        config: with the chosen groups; of a sweep, with the first choice of each. Other overrides are not in it.

    Raises:
        ValueError: a choice or a key that there is not, or a value of the wrong type.
        HydraException: what else Hydra refuses.
    """

    def __init__(self, application: Any, verb: str, typed: Sequence[str]) -> None:
        self._verb = verb
        self._sources: list[ConfigSource] = application.config_loader.get_sources()
        parsed = OverridesParser.create(application.config_loader).parse_overrides(list(typed))
        values = [override for override in parsed if not self._is_choice(override)]
        chosen = [override for override in parsed if override not in values]
        for override in chosen:
            self._check_choice(override)
        self.config: DictConfig = application.compose_config(verb, list(map(_first, chosen)), RunMode.RUN)
        HydraConfig.instance().set_config(self.config)
        keys = OmegaConf.to_container(self.own, resolve=False)
        for override in values:
            self._check_key(override, keys)
            self._check_value(override)
        given = tuple(f"{override.key_or_group}." for override in values)
        self._missing = [key for key in _missing(keys) if not f"{key}.".startswith(given)]

    def refuse_missing(self) -> None:
        """Refuses a configuration with keys that have no value and are given none.

        Raises:
            ValueError: the first one.
        """
        for key in self._missing:
            raise ValueError(f"{key} has no value yet: give one as {key}=...")

    @property
    def own(self) -> DictConfig:
        """The configuration without Hydra's part."""
        return OmegaConf.masked_copy(self.config, [str(key) for key in self.config if key != "hydra"])

    def groups(self) -> list[str]:
        """Names of the groups at the top, but for Hydra's own."""
        return sorted({name for source in self._sources for name in source.list("", ObjectType.GROUP)} - {"hydra"})

    def options(self, group: str) -> list[str]:
        """The choices of a group; empty for what is not one."""
        sources = [source for source in self._sources if source.is_group(group)]
        return sorted({name for source in sources for name in source.list(group, ObjectType.CONFIG)})

    def _is_choice(self, override: Override) -> bool:
        """Whether an override is one of what the others are compared with: a group's choice, or a word to Hydra."""
        is_group = bool(self.options(override.key_or_group)) and not isinstance(override.value(), dict)
        return is_group or bool(override.is_hydra_override())

    def _check_choice(self, override: Override) -> None:
        group, options = override.key_or_group, self.options(override.key_or_group)
        for value in _values(override):
            for name in value if isinstance(value, list) else [value]:
                if options and isinstance(name, str) and name not in options and "/" not in name:
                    raise ValueError(f"{group}={name}: {self._told(name, options, f'{group} is one of')}")

    def _check_key(self, override: Override, node: Any) -> None:
        if override.is_add() or override.is_force_add():
            return
        above: list[str] = []
        for part in re.findall(r"[^.\[\]]+", override.key_or_group):
            if not isinstance(node, dict):  # inside a list or of an empty value: Hydra knows
                return
            if part not in node:
                known = [str(name) for name in node if name not in ("_target_", "_partial_")]
                where = f"{'.'.join(above)} has the keys" if above else "expected one of"
                told = self._told(part, sorted({*known, *([] if above else self.groups())}), where)
                raise ValueError(f"{override.input_line}: there is no {'.'.join([*above, part])}; {told}")
            node = node[part]
            above.append(part)

    def _check_value(self, override: Override) -> None:
        """Compares a plain key's value with the type of its default; classes say themselves what they take."""
        key = override.key_or_group
        parent = OmegaConf.select(self.config, key.rpartition(".")[0]) if "." in key else self.config
        if override.is_delete() or (isinstance(parent, DictConfig) and "_target_" in parent):
            return
        expected = _expected(OmegaConf.select(self.config, key, throw_on_missing=False))
        for value in _values(override):
            if value is not None and not fits(value, expected):
                raise ValueError(f"{key}={value}: expected {in_words(expected)}, got {value!r}")

    def _told(self, name: str, known: Sequence[str], where: str) -> str:
        close = difflib.get_close_matches(name, known, n=1)
        listed = f"{where} {', '.join(known)}"
        if len(known) > _MOST_LISTED:
            listed = f"lkspec {self._verb} --help lists all"
        return f"did you mean {close[0]}? ({listed})" if close else listed


def refuse_fixed(typed: Sequence[str]) -> None:
    """Refuses overrides of what a finished run has fixed; a checkpoint (``draft=pretrained``) is told its target.

    Raises:
        ValueError: such an override.
    """
    if "draft=pretrained" in typed:
        return
    for argument in typed:
        key, equals, _ = argument.partition("=")
        if equals and (part := re.split(r"[.@]", key.lstrip("+~"))[0]) in _FIXED_BY_RUN:
            raise ValueError(
                f"{argument}: the {part} of a finished run is the one it was trained with and cannot be "
                "overridden; train another run, or leave it out (device=... and dtype=... may be set)"
            )


def _missing(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if value == MISSING:
            yield f"{prefix}{key}"
        elif isinstance(value, dict):
            yield from _missing(value, f"{prefix}{key}.")


def _values(override: Override) -> list[Any]:
    """The value, or all those of a sweep that can be listed."""
    if not override.is_sweep_override():
        return [override.value()]
    if not override.is_discrete_sweep():
        return []
    return [Override._convert_value(value) for value in override.sweep_iterator()]


def _first(override: Override) -> str:
    if not override.is_discrete_sweep():
        return str(override.input_line)
    return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"


def _expected(default: Any) -> Any:
    """The type of what may stand in place of a default; ``Any`` where that does not tell, as null and text do not."""
    if isinstance(default, bool):
        return bool
    if isinstance(default, int | float):  # temperatures: [0, 1] does not mean whole ones
        return float
    if OmegaConf.is_list(default) and default and all(isinstance(entry, int | float) for entry in default):
        return float | list[float]
    return Any
