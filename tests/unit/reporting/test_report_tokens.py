"""Tables of where a draft fails, on made-up tokens."""

from __future__ import annotations

import pytest
from helpers.report_runs import make_run, store_tokens

from lkspec.reporting.tokens import acceptance_by, coloured_text, domain_of, token_frame, token_kind


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("\n\n", "line break"), ("  ", "space"), ("7", "number"), (" 12", "number"), (" the", "beginning of a word"),
        ("ing", "word or its inside"), (".", "punctuation"), (' "', "punctuation"), ("ü", "word or its inside"),
        ("<|im_end|>", "mixed or special"), ("x1", "mixed or special"), ("", "mixed or special"),
    ],
)  # fmt: skip
def test_kinds_of_tokens(text, kind):
    assert token_kind(text) == kind


@pytest.mark.parametrize(
    ("name", "domain"), [("chat-validation-012", "chat-validation"), ("tiny-00003", "tiny"), ("17", "unnamed")]
)
def test_domains(name, domain):
    assert domain_of(name) == domain


def test_alpha_by_kind_is_the_mean_over_its_tokens(tmp_path):
    run = make_run(tmp_path)
    rows = store_tokens(run)
    table = acceptance_by(token_frame(run), "kind")
    for kind in ("number", "punctuation"):
        for depth in (1, 2):
            chosen = [row.alpha for row in rows if row.depth == depth and token_kind(row.text) == kind]
            assert table.loc[kind, f"alpha at depth {depth}"] == pytest.approx(sum(chosen) / len(chosen))
    assert table["share of tokens"].sum() == pytest.approx(1)


def test_bins_hold_their_lower_edge(tmp_path):
    run = make_run(tmp_path)
    store_tokens(run)
    tokens = token_frame(run)
    assert set(tokens[tokens["position"] == 8]["place"]) == {"8 to 32"}
    assert set(tokens[tokens["position"] == 7]["place"]) == {"0 to 8"}
    assert not tokens["uncertainty"].isna().any()


def test_a_coloured_text_is_the_answer(tmp_path):
    run = make_run(tmp_path)
    rows = store_tokens(run)
    name = rows[0].conversation
    text = coloured_text(token_frame(run), name, depth=2)._repr_html_()
    assert text.count("<span") == sum(row.conversation == name and row.depth == 2 for row in rows)
    assert "&lt;" in text
