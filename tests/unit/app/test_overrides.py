"""Overrides are checked before a configuration is used: choices, keys, values, and what is missing."""

from __future__ import annotations

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton

from lkspec.app.overrides import Composition, refuse_fixed

MAIN = """
defaults:
  - draft: eagle
  - extra: null
  - _self_
seed: 0
share: 0.5
quick: false
sizes: [1, 2]
size: auto
none: null
nested:
  depth: 3
  other: ???
hydra: {output_subdir: null}
"""
EXTRA = [f"extra/{name}.yaml" for name in "abcdefghijklmnopqrst"]


@pytest.fixture
def composition(tmp_path):
    """``composition(*overrides)`` of a small configuration."""
    (tmp_path / "main.yaml").write_text(MAIN)
    for name in ("draft/eagle.yaml", "draft/medusa.yaml", *EXTRA):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("_target_: builtins.print\nheads: 2\n" if "draft" in name else "x: 1\n")

    def compose(*overrides: str) -> Composition:
        return Composition(GlobalHydra.instance().hydra, "main", overrides)

    state = Singleton.get_state()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        yield compose
    Singleton.set_state(state)


GIVEN = "nested.other=1"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        *(["draft=medusa"], ["extra=a"], ["draft=eagle,medusa"], ["~draft"], ["+draft@second=medusa"]),
        *(
            ["seed=1"],
            ["seed=1.5"],
            ["seed=1,2"],
            ["seed=range(3)"],
            ["share=1"],
            ["share=null"],
            ["quick=true"],
            ["size=3"],
        ),
        *(["sizes=3"], ["sizes=[0.5]"], ["sizes=[],[1]"], ["none=abc"], ["none=3"], ["nested={depth: 1}"], ["~nested"]),
        *(["+new=abc"], ["++new.deep=1"], ["draft.heads=abc"], ["+draft.more=1"], ["hydra.mode=MULTIRUN"]),
    ],
)
def test_what_is_meant_well_passes(composition, overrides):
    composition(GIVEN, *overrides)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("draft=eagel", "draft=eagel: did you mean eagle? (draft is one of eagle, medusa)"),
        ("draft=eagle,mdusa", "draft=mdusa: did you mean medusa? (draft is one of eagle, medusa)"),
        ("draft=xyz", "draft=xyz: draft is one of eagle, medusa"),
        ("extra=zz", "extra=zz: lkspec main --help lists all"),
        ("drafft=eagle", "drafft=eagle: there is no drafft; did you mean draft? (expected one of "),
        ("extr=a", "extr=a: there is no extr; did you mean extra? "),
        (
            "nested.dept=1",
            "nested.dept=1: there is no nested.dept; did you mean depth? (nested has the keys depth, other)",
        ),
        ("~nested.dept", "~nested.dept: there is no nested.dept; did you mean depth?"),
        ("neste.depth=1", "neste.depth=1: there is no neste; did you mean nested?"),
        ("draft.head=1", "draft.head=1: there is no draft.head; did you mean heads? (draft has the keys heads)"),
        ("seed=abc", "seed=abc: expected a number, got 'abc'"),
        ("seed=1,abc", "seed=abc: expected a number, got 'abc'"),
        ("seed=true", "seed=True: expected a number, got True"),
        ("++share=abc", "share=abc: expected a number, got 'abc'"),
        ("quick=perhaps", "quick=perhaps: expected true or false, got 'perhaps'"),
        ("sizes=[a]", "sizes=['a']: expected a number or a list (a number each), got ['a']"),
        ("nested.depth=[1]", "nested.depth=[1]: expected a number, got [1]"),
    ],
)
def test_what_cannot_be_meant_is_told_in_a_line(composition, override, line):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        composition(GIVEN, override)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_a_key_without_a_value(composition):
    made = composition("seed=1")
    with pytest.raises(ValueError, match=r"^nested\.other has no value yet: give one as nested\.other=\.\.\.$"):
        made.refuse_missing()
    composition("nested={other: 2}").refuse_missing()


def test_the_groups_that_were_chosen_are_composed_and_listed(composition):
    made = composition(GIVEN, "draft=medusa,eagle", "extra=b")
    assert made.config.hydra.runtime.choices.draft == "medusa"
    assert made.own.extra.x == 1
    assert "hydra" not in made.own
    assert made.groups() == ["draft", "extra"]
    assert made.options("draft") == ["eagle", "medusa"]
    assert made.options("seed") == []


@pytest.mark.parametrize(
    "override", ["draft=eagle3", "+data.seed=1", "vocab.size=8", "loss=kl", "~target=tiny", "draft.x=1"]
)
def test_what_a_finished_run_has_fixed(override):
    with pytest.raises(ValueError, match="cannot be overridden"):
        refuse_fixed(["run=latest", override])
    refuse_fixed(["draft=pretrained", "draft.path=x", "target=tiny"])
    refuse_fixed(["run=latest", "target_id=x", "num_draft_tokens=3"])
