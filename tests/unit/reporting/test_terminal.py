"""What the command line prints with: what goes to stdout, as it is, at any width."""

from __future__ import annotations

import re

import pytest

from lkspec.reporting import terminal


def test_a_line_is_printed_as_it_is(capsys):
    text = "runs/[a]/" + "x" * 300
    terminal.say(text)
    assert capsys.readouterr().out == f"{text}\n"


def test_facts_stand_one_below_another(capsys):
    terminal.facts({"run": "[a]", "vocabulary": "b"})
    assert capsys.readouterr().out == "run        [a]\nvocabulary b\n"


def test_a_table_aligns_to_the_right_but_for_some_columns(capsys):
    terminal.table("of [b]", ["name", "number"], [["a", "1"], ["longer", "[2]"]], left=["name"])
    title, _, head, _, *rows, _ = capsys.readouterr().out.splitlines()
    assert title.strip() == "of [b]"
    assert re.split(" *[┃│] *", head)[1:3] == ["name", "number"]
    assert rows == ["│ a      │      1 │", "│ longer │    [2] │"]


@pytest.mark.parametrize(
    ("tokens", "shown"), [(None, r"5/5 rows \S+ rows/s"), (300, r"5/5 rows \d{1,3}(,\d{3})* tokens/s")]
)
def test_progress_counts_from_what_was_done_and_rates_tokens_where_they_are_told(capsys, tokens, shown):
    with terminal.progress("generating", 5, "rows", done=2) as advance:
        for _ in range(3):
            advance(tokens=tokens)
    assert re.search(shown, capsys.readouterr().out)


def test_progress_may_learn_its_total_later_and_leave_nothing(capsys):
    with terminal.progress("measuring", None, "turns", transient=True) as advance:
        advance(total=2)
        advance(total=2)
    assert capsys.readouterr().out.strip() == ""
    with terminal.progress("measuring", None, "turns") as advance:
        advance(2, total=3)
    assert "2/3 turns" in capsys.readouterr().out


def test_progress_of_other_ranks_is_not_shown(capsys):
    with terminal.progress("measuring", 2, "turns", visible=False) as advance:
        advance()
    assert capsys.readouterr().out == ""
