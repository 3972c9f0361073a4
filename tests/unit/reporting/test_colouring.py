from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lkspec.decoding.chain import BONUS, PREFILL, Completion, Request
from lkspec.reporting.colouring import (
    Piece,
    acceptance_line,
    as_html,
    as_terminal_text,
    colours,
    legend,
    pieces,
    writer_name,
)
from lkspec.targets.tiny import byte_tokenizer
from lkspec.types import Round

TOKENIZER = byte_tokenizer()
GREY = "#dddddd"


def completion_of(text: str | bytes, writers: list[int] | None = None, rounds: tuple[Round, ...] = ()) -> Completion:
    """A completion over bytes; without writers, each token's writer is its own place."""
    tokens = tuple(text.encode() if isinstance(text, str) else text)
    return Completion(
        request=Request("p", 0, (1,), 100),
        tokens=tokens,
        writers=tuple(range(len(tokens)) if writers is None else writers),
        finish_reason="length",
        rounds=rounds,
    )


class Page(HTMLParser):
    """The page's tags and texts by class, as a browser would read them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.texts: dict[str, str] = {}
        self.titles: list[str] = []
        self.in_span = False
        self.spans: list[tuple[str, str]] = []  # style, text
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        values = dict(attrs)
        if tag == "span":
            self.in_span = True
            self.titles.append(values["title"])
            self.spans.append((values["style"], ""))
        elif tag != "meta":
            self.open.append(values.get("class", tag))

    def handle_endtag(self, tag):
        if tag == "span":
            self.in_span = False
        else:
            self.open.pop()

    def handle_data(self, data):
        if not self.open:
            return
        self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data
        if self.in_span:
            style, text = self.spans[-1]
            self.spans[-1] = (style, text + data)


def test_tokens_that_make_one_character_form_one_piece():
    found = pieces(TOKENIZER, completion_of("aé€😀!"))
    # Bytes 0 | 1 2 | 3 4 5 | 6 7 8 9 | 10; a character counts as its last token's writer's.
    assert found == [Piece("a", 0), Piece("é", 2), Piece("€", 5), Piece("😀", 9), Piece("!", 10)]


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_every_character_is_a_piece_of_its_own(text):
    found = pieces(TOKENIZER, completion_of(text))
    assert [piece.text for piece in found] == list(text)


def test_special_tokens_are_shown():
    completion = Completion(Request("p", 0, (1,), 9), (72, 105, 257), (PREFILL, 1, BONUS), "stop", ())
    assert pieces(TOKENIZER, completion) == [Piece("H", PREFILL), Piece("i", 1), Piece("<|im_end|>", BONUS)]


@pytest.mark.parametrize(
    ("written", "rest"), [(b"\xff", "abcdefgh"), (b"\xc3", "abcdefgh"), (b"\xff" * 7, "abcdefgh")], ids=repr
)
def test_bytes_that_are_no_character_spoil_their_neighbours_only(written, rest):
    found = pieces(TOKENIZER, completion_of(written + rest.encode()))
    assert [piece.text for piece in found][-5:] == list(rest[-5:])
    assert [piece.writer for piece in found][-5:] == list(range(len(written) + 3, len(written) + 8))


def test_a_written_replacement_character_does_not_swallow_the_rest():
    found = pieces(TOKENIZER, completion_of("a\ufffdbcd"))
    assert "".join(piece.text for piece in found) == "a\ufffdbcd"
    assert [piece.text for piece in found][-2:] == ["c", "d"]


def test_half_a_character_at_the_end_is_shown():
    found = pieces(TOKENIZER, completion_of(b"ab\xe2\x82"))
    assert [piece.text for piece in found[:2]] == ["a", "b"]
    assert set(found[2].text) == {"\ufffd"}
    assert len(found) == 3


def test_nothing_written_is_no_piece():
    assert pieces(TOKENIZER, completion_of("")) == []


def test_the_target_is_grey_and_depths_differ():
    assert colours(PREFILL) == colours(BONUS) == (GREY, "#000000")
    depths = [colours(depth) for depth in range(1, 9)]
    assert len({background for background, _ in depths}) == 8
    assert GREY not in {background for background, _ in depths}
    assert colours(9) == colours(20) == depths[-1]


@pytest.mark.parametrize("writer", [PREFILL, BONUS, *range(1, 10)])
def test_text_can_be_read_on_its_colour(writer):
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(luminance(colour) for colour in colours(writer))
    assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG AA


def test_names_of_writers():
    assert writer_name(PREFILL) == "the target (prefill)"
    assert writer_name(BONUS) == "the target (bonus)"
    assert writer_name(3) == "the draft, accepted at depth 3"


def test_terminal_text_is_coloured_piece_by_piece():
    parts = [Piece("é", PREFILL), Piece("[b]", 1), Piece("c", BONUS)]
    text = as_terminal_text(parts)
    assert text.plain == "é[b]c"  # brackets are text, not rich's markup
    styles = [(span.start, span.end, str(span.style)) for span in text.spans]
    assert styles == [(0, 1, f"#000000 on {GREY}"), (1, 4, f"#000000 on {colours(1)[0]}"), (4, 5, f"#000000 on {GREY}")]


def test_the_legend_names_each_depth():
    assert {mark.writer: mark.text.strip() for mark in legend(3)} == {
        BONUS: "the target", 1: "draft depth 1", 2: "draft depth 2", 3: "draft depth 3",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("accepted", "line"),
    [
        ((2, 0, 3), "8 tokens in 3 rounds, acceptance length 2.67, ended by length"),
        ((), "8 tokens in 0 rounds, acceptance length -, ended by length"),
    ],
)
def test_acceptance_line(accepted, line):
    rounds = tuple(Round(position=i, accepted=a, past_end=False) for i, a in enumerate(accepted))
    assert acceptance_line(completion_of("abcdefgh", rounds=rounds)) == line


class TestHtml:
    TEXT = '<b>&amp; "it\'s" é</b>\n<script>'
    PROMPT = "1 < 2 && <i>'why'</i>?"
    TITLE = "run <x> & </title>"

    @pytest.fixture(scope="class")
    def page(self) -> str:
        completion = completion_of(self.TEXT, [PREFILL, *([1, 2, BONUS] * 20)][: len(self.TEXT.encode())])
        return as_html(TOKENIZER, [(self.PROMPT, completion)], title=self.TITLE, num_draft_tokens=2)

    def test_texts_are_escaped_and_read_back(self, page):
        read = Page(page)
        assert read.texts["answer"] == self.TEXT
        assert read.texts["prompt"] == self.PROMPT
        assert read.texts["title"] == read.texts["h1"] == self.TITLE
        assert read.open == []
        assert read.tags == {
            "html", "head", "meta", "title", "style", "body", "h1", "p", "section", "div", "span"
        }  # fmt: skip

    def test_each_piece_has_its_colour_and_tooltip(self, page):
        read = Page(page)
        assert [text.strip() for _, text in read.spans[:3]] == ["the target", "draft depth 1", "draft depth 2"]
        answer = list(zip(read.titles[3:], read.spans[3:], strict=True))
        expected = pieces(TOKENIZER, completion_of(self.TEXT, [PREFILL, *([1, 2, BONUS] * 20)][: len(self.TEXT) + 1]))
        assert len(answer) == len(expected) == len(self.TEXT)
        for (title, (style, text)), piece in zip(answer, expected, strict=True):
            background, foreground = colours(piece.writer)
            assert (title, text) == (writer_name(piece.writer), piece.text)
            assert style == f"background:{background};color:{foreground}"

    def test_one_section_an_entry_and_nothing_from_elsewhere(self):
        entries = [(f"prompt {i}", completion_of(f"answer {i}")) for i in range(3)]
        page = as_html(TOKENIZER, entries, title="t", num_draft_tokens=1)
        assert page.count("<section>") == 3
        assert Page(page).texts["prompt"] == "prompt 0prompt 1prompt 2"
        assert not any(word in page for word in ("src=", "href=", "url(", "@import"))
