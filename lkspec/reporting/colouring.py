"""Generated text coloured by who wrote each token: in the terminal and as one HTML file."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lkspec.decoding.chain import BONUS, PREFILL, Completion

# Light to dark green with depth; grey for tokens that cost a forward pass of the target each.
_DEPTH_COLOURS = ("#d9f0d3", "#b2dfa5", "#8bcd7c", "#5db560", "#35994d", "#1b7c3d", "#0a5f2e", "#00441b")
_TARGET_COLOUR = "#dddddd"
_MAX_CHARACTER_TOKENS = 4  # bytes of the longest UTF-8 character


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens by one writer that decode to whole characters."""

    text: str
    writer: int


def pieces(tokenizer: PreTrainedTokenizerBase, completion: Completion) -> list[Piece]:
    """The completion's text, token by token; tokens that only together make a character form one piece."""
    found: list[Piece] = []
    start = 0
    for stop in range(1, len(completion.tokens) + 1):
        text = str(tokenizer.decode(completion.tokens[start:stop]))
        # Half a character: wait for its other tokens, but not without end: a model can write bytes that are none.
        if text.endswith("\ufffd") and stop - start < _MAX_CHARACTER_TOKENS and stop < len(completion.tokens):
            continue
        found.append(Piece(text, completion.writers[stop - 1]))
        start = stop
    return found


def colours(writer: int) -> tuple[str, str]:
    """Background and text colour of a writer."""
    if writer in (PREFILL, BONUS):
        return _TARGET_COLOUR, "#000000"
    depth = min(writer, len(_DEPTH_COLOURS))
    return _DEPTH_COLOURS[depth - 1], "#000000" if depth <= 5 else "#ffffff"


def writer_name(writer: int) -> str:
    """How tooltips call a writer."""
    if writer == PREFILL:
        return "the target (prefill)"
    return "the target (bonus)" if writer == BONUS else f"the draft, accepted at depth {writer}"


def as_terminal_text(parts: Sequence[Piece]) -> Text:
    """Coloured text for rich."""
    return Text.assemble(*((part.text, "{1} on {0}".format(*colours(part.writer))) for part in parts))


def legend(num_draft_tokens: int) -> list[Piece]:
    """A piece for each colour, which says what it means."""
    return [Piece(" the target ", BONUS), *(Piece(f" draft depth {k} ", k) for k in range(1, num_draft_tokens + 1))]


def acceptance_line(completion: Completion) -> str:
    """Tokens, rounds and acceptance length of one completion."""
    rounds = len(completion.rounds)
    accepted = sum(decoded.accepted for decoded in completion.rounds)
    tau = f"{1 + accepted / rounds:.2f}" if rounds else "-"
    end = completion.finish_reason
    return f"{len(completion.tokens)} tokens in {rounds} rounds, acceptance length {tau}, ended by {end}"


def as_html(
    tokenizer: PreTrainedTokenizerBase, entries: Sequence[tuple[str, Completion]], *, title: str, num_draft_tokens: int
) -> str:
    """One self-contained page: each prompt with its coloured answer; a tooltip names each token's writer."""
    marks = " ".join(_span(mark) for mark in legend(num_draft_tokens))
    sections = "\n".join(
        f'<section><div class="prompt">{html.escape(prompt)}</div>'
        f'<div class="answer">{"".join(map(_span, pieces(tokenizer, completion)))}</div>'
        f'<div class="count">{html.escape(acceptance_line(completion))}</div></section>'
        for prompt, completion in entries
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.7 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.2rem; }}
section {{ border-top: 1px solid #ccc; padding: 1rem 0; }}
.prompt {{ white-space: pre-wrap; color: #555; margin-bottom: .6rem; }}
.answer {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
.answer span, .legend span {{ border-radius: 2px; padding: 1px 0; white-space: pre-wrap; }}
.count {{ color: #777; font-size: .85rem; margin-top: .5rem; }}
</style></head><body>
<h1>{html.escape(title)}</h1>
<p class="legend">Who wrote each token: {marks}. Every token of the draft was verified by the target: the text is
distributed exactly as the target's own.</p>
{sections}
</body></html>
"""


def _span(piece: Piece) -> str:
    background, foreground = colours(piece.writer)
    return (
        f'<span style="background:{background};color:{foreground}" title="{writer_name(piece.writer)}">'
        f"{html.escape(piece.text)}</span>"
    )
