"""Values of a configuration against the types that Python knows: of a default, of a constructor's argument."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import hydra
from omegaconf import DictConfig, OmegaConf

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
_SEQUENCES = (list, tuple, set, frozenset, Sequence, Collection, Iterable)
_MAPPINGS = (dict, Mapping)


def check_arguments(config: DictConfig) -> None:
    """Compares what a configuration gives to classes and functions (``_target_``) with their annotations.

    Raises:
        ValueError: the first value of another type, with its key.
    """
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    assert isinstance(plain, dict)
    _check(plain, "")


def _check(node: Mapping[Any, Any], prefix: str) -> None:
    hints = _hints(node["_target_"]) if "_target_" in node else {}
    for key, value in node.items():
        expected = hints.get(key, Any)
        if value is not None and not fits(value, expected):  # null may still be filled in, as a checkpoint's settings
            raise ValueError(f"{prefix}{key}: expected {in_words(expected)}, got {value!r}")
        if isinstance(value, dict):
            _check(value, f"{prefix}{key}.")


@functools.cache
def _hints(target: str) -> dict[str, Any]:
    """Annotations of a class's or function's arguments; none where there is no such class or they cannot be read."""
    try:
        called = hydra.utils.get_object(target)
        return get_type_hints(called.__init__ if inspect.isclass(called) else called)
    except Exception:  # importing a user's module may raise anything: building the class reports it
        return {}


def fits(value: Any, expected: Any) -> bool:
    """Whether a plain value is of an annotated type; a value made of a configuration, or of another type, may be."""
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, UnionType):
        # A number or text is no tensor: beside plain types, only these can be meant by it.
        plain = [one for one in arguments if one in (bool, int, float, str) or get_origin(one) is Literal]
        return any(fits(value, one) for one in (plain if plain and isinstance(value, str | int | float) else arguments))
    if origin is Literal:
        return value in arguments
    if (origin or expected) in _SEQUENCES:
        return isinstance(value, list) and all(fits(entry, argument) for entry in value for argument in arguments[:1])
    if (origin or expected) in _MAPPINGS:
        return isinstance(value, dict)
    if expected is bool:
        return isinstance(value, bool)
    if expected is str:
        return isinstance(value, str)
    if expected in (int, float):
        return isinstance(value, int if expected is int else int | float) and not isinstance(value, bool)
    return value is None if expected in (None, NoneType) else True


def in_words(expected: Any) -> str:
    """A type as a user would say it."""
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(in_words, arguments)))
    if origin is Literal:
        return ", ".join(map(repr, arguments))
    if (origin or expected) in _SEQUENCES:
        return f"a list ({in_words(arguments[0])} each)" if arguments else "a list"
    if (origin or expected) in _MAPPINGS:
        return "keys with values"
    return _WORDS.get(expected, getattr(expected, "__name__", str(expected)))
