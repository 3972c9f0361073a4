"""Values against annotations: which fit, and how one that does not is reported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
from omegaconf import OmegaConf
from torch import Tensor

from lkspec.app.values import check_arguments, fits, in_words


class Part:
    """Something that a configuration builds."""

    def __init__(
        self,
        size: int,
        share: float | Tensor = 0.5,
        *,
        name: str | None = None,
        mode: Literal["fast", "slow"] = "fast",
        layers: Sequence[int] = (),
        frozen: bool = False,
        path: Path | None = None,
        part: Part | None = None,
    ) -> None: ...


@pytest.mark.parametrize(
    ("value", "expected", "does"),
    [
        *((3, int, True), (3.0, int, False), (True, int, False), ("3", int, False), (None, int, False)),
        *((3, float, True), (3.5, float, True), (True, float, False), ("abc", float, False)),
        *((True, bool, True), (1, bool, False), ("true", bool, False)),
        *(("a", str, True), (3, str, False), (True, str, False), ([], str, False)),
        *((None, int | None, True), ("abc", float | Tensor, False), ([1], float | Tensor, True)),
        *(
            ("a", Path | None, True),
            ("a", Tensor, True),
            ("slow", Literal["slow"], True),
            ("s", Literal["slow"], False),
        ),
        *(([1, 2], list[int], True), ([1, "a"], Sequence[int], False), ([0.9, 1], tuple[float, float], True)),
        *((1, list[int], False), ({}, dict[str, int], True), ([], dict[str, int], False), (1, list[int] | int, True)),
    ],
)
def test_what_fits(value, expected, does):
    assert fits(value, expected) is does


def test_types_in_words():
    assert in_words(int | list[int] | None) == "a whole number or a list (a whole number each) or null"
    assert in_words(Literal["fast", "slow"]) == "'fast', 'slow'"
    assert in_words(Part) == "Part"


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"size": "abc"}, "top.size: expected a whole number, got 'abc'"),
        ({"share": "abc"}, "top.share: expected a number or Tensor, got 'abc'"),
        ({"mode": "quick"}, "top.mode: expected 'fast', 'slow', got 'quick'"),
        ({"frozen": 1}, "top.frozen: expected true or false, got 1"),
        ({"layers": [1, "two"]}, "top.layers: expected a list (a whole number each), got [1, 'two']"),
        ({"part": {"_target_": f"{__name__}.Part", "size": 0.5}}, "top.part.size: expected a whole number, got 0.5"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_key_and_what_was_expected(changed, line):
    config = OmegaConf.create({"top": {"_target_": f"{__name__}.Part", "size": 3, "path": "a", **changed}})
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        check_arguments(config)


def test_what_is_no_class_or_has_no_annotations_is_left_to_whoever_builds_it():
    parts = [{"_target_": "nowhere.Part", "size": "abc"}, {"_target_": "builtins.print", "sep": 3}]
    check_arguments(OmegaConf.create({"a": parts[0], "b": parts[1], "plain": {"size": "abc"}, "none": None}))
    check_arguments(OmegaConf.create({"part": {"_target_": f"{__name__}.Part", "size": None}}))
