"""Tokens of a conversation under the target's chat template, and which of them the target generated itself.

A wrong mask trains quietly on template text. Every conversation's spans are therefore found twice, by token prefixes
and by text offsets, and a conversation on which the two differ is refused.
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lkspec.data.conversations import Conversation, Message

Span = tuple[int, int]  # [start, stop) in tokens

_TURN_STYLES = ("bold green", "bold cyan")  # neighbouring turns differ


@dataclass(frozen=True)
class Encoded:
    """A tokenised conversation.

    Attributes:
        tokens: token ids of the whole rendering, or of its beginning.
        turns: assistant turn number of each token, from 1; 0 is text that the target did not generate.
        temperature: at which the answers were written; None when unknown.
    """

    id: str
    tokens: list[int]
    turns: list[int]
    temperature: float | None = None

    @property
    def num_supervised(self) -> int:
        """Tokens inside assistant turns."""
        return sum(turn > 0 for turn in self.turns)


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, *, max_length: int, eos_ids: tuple[int, ...]
) -> Encoded:
    """Tokenises a conversation and marks its assistant turns (contract 1).

    A turn runs from its first generated token, right after the generation prompt, to the end-of-turn token (the first
    of ``eos_ids`` after the answer) inclusive; an answer cut off (finish_reason "length") ends with its own text.
    The result keeps the first ``max_length`` tokens.

    Raises:
        ValueError: special tokens inside a message; a template that fails, alters an answer, prints earlier messages
            differently later, or does not end an answer with one of ``eos_ids``; tokens that merge across the border
            of an answer. Names the conversation and the first differing token.
    """
    try:
        _refuse_special_text(tokenizer, conversation, eos_ids)
        rendering = _Rendering(tokenizer, conversation.messages, frozenset(eos_ids))
        spans = rendering.spans_by_tokens()
        rendering.check_agreement(spans, rendering.spans_by_text())
        if conversation.answer_ids is not None:
            spans = rendering.respell(spans, conversation.answer_ids)
    except (ValueError, TemplateError) as error:
        raise ValueError(f"conversation {conversation.id!r}: {error}") from error
    turns = [0] * len(rendering.tokens)
    for turn, (start, stop) in enumerate(spans, start=1):
        turns[start:stop] = [turn] * (stop - start)
    return Encoded(conversation.id, rendering.tokens[:max_length], turns[:max_length], conversation.temperature)


def colour_spans(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> Text:
    """The conversation's text with supervised tokens coloured (neighbouring turns differ) and the rest dim."""
    text = Text()
    start = 0
    for stop in range(1, len(encoded.tokens) + 1):
        if stop == len(encoded.tokens) or encoded.turns[stop] != encoded.turns[start]:
            turn = encoded.turns[start]
            style = _TURN_STYLES[turn % len(_TURN_STYLES)] if turn else "dim"
            # A run is decoded at once: a character may be spread over several tokens.
            text.append(str(tokenizer.decode(encoded.tokens[start:stop])), style=style)
            start = stop
    return text


class _Rendering:
    """One conversation under the chat template, and the two ways to find its answers."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, messages: tuple[Message, ...], eos_ids: frozenset[int]
    ) -> None:
        self.tokenizer = tokenizer
        self.messages = messages
        self.eos_ids = eos_ids
        self.tokens = self._ids(len(messages))
        self._answers = [index for index, message in enumerate(messages) if message.role == "assistant"]

    def _ids(self, count: int, **options: bool) -> list[int]:
        """Token ids of the first ``count`` messages."""
        return list(self.tokenizer.apply_chat_template(self._chat(count), tokenize=True, return_dict=False, **options))

    def _text(self, count: int, **options: bool) -> str:
        return str(self.tokenizer.apply_chat_template(self._chat(count), tokenize=False, **options))

    def _chat(self, count: int) -> list[dict[str, str]]:
        return [{"role": message.role, "content": message.content} for message in self.messages[:count]]

    def spans_by_tokens(self) -> list[Span]:
        """Method A: the ids of the messages before an answer must begin the whole; it ends at the first eos id."""
        spans = []
        for index in self._answers:
            prompt = self._ids(index, add_generation_prompt=True)
            start = len(prompt)
            if self.tokens[:start] != prompt:
                raise ValueError(self._prefix_difference(prompt, index))
            if self.messages[index].finish_reason == "length":
                stop = _common_length(self.tokens, self._ids(index + 1, continue_final_message=True))
            else:
                ends = (at for at in range(start, len(self.tokens)) if self.tokens[at] in self.eos_ids)
                stop = next(ends, -1) + 1
                if stop == 0:
                    raise ValueError(self._no_end(index))
            spans.append((start, stop))
        return spans

    def spans_by_text(self) -> list[Span]:
        """Method B: the same borders as characters of the whole text, mapped to tokens by the tokenizer's offsets."""
        text = self._text(len(self.messages))
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets: list[tuple[int, int]] = encoding["offset_mapping"]
        ends = [end for _, end in offsets]
        eos_texts = _eos_texts(self.tokenizer, self.eos_ids)
        spans = []
        for index in self._answers:
            prompt = self._text(index, add_generation_prompt=True)
            if not text.startswith(prompt):
                raise ValueError(f"message {index}: the text before the answer is not how the whole text begins")
            first, last = self._answer_characters(text, len(prompt), index, eos_texts)
            # A token belongs to the characters in which it ends: offsets may leave out its leading whitespace.
            start, stop = bisect_right(ends, first), bisect_right(ends, last)
            if start < stop and offsets[start][0] < first:
                raise ValueError(f"message {index}: token {self._piece(start)} reaches over the start of the answer")
            spans.append((start, stop))
        return spans

    def _answer_characters(self, text: str, begin: int, index: int, eos_texts: tuple[str, ...]) -> Span:
        """Where the supervised text of an answer begins and ends; templates may add or strip whitespace around it."""
        message = self.messages[index]
        core = message.content.strip()
        at = text.find(core, begin)
        if at < 0 or text[begin:at].strip():
            shown = text[begin : begin + 60]
            raise ValueError(
                f"message {index}: the chat template alters the answer or has no generation prompt: expected "
                f"{core[:60]!r} right after the generation prompt, got {shown!r}"
            )
        end = at + len(core)
        trailing = message.content[len(message.content.rstrip()) :]
        end += _common_length(text[end : end + len(trailing)], trailing)
        if message.finish_reason == "length":
            return begin, end
        found = [(place, len(eos)) for eos in eos_texts if (place := text.find(eos, end)) >= 0]
        if not found or text[end : min(found)[0]].strip():
            raise ValueError(self._no_end(index))
        place, length = min(found)
        return begin, place + length

    def check_agreement(self, by_tokens: list[Span], by_text: list[Span]) -> None:
        """Refuses spans on which the two methods differ."""
        if by_tokens == by_text:
            return
        for index, first, second in zip(self._answers, by_tokens, by_text, strict=True):
            if first != second:
                border = 0 if first[0] != second[0] else 1
                raise ValueError(
                    f"message {index}: by token prefixes the answer is tokens[{first[0]}:{first[1]}], by text offsets "
                    f"tokens[{second[0]}:{second[1]}]; first differing token: "
                    f"{self._piece(min(first[border], second[border]))}. The mask cannot be trusted"
                )

    def respell(self, spans: list[Span], answer_ids: tuple[int, ...]) -> list[Span]:
        """Puts the tokens that the target wrote in place of the last answer's, and drops the template's rest."""
        message = self.messages[-1]
        text_ids = answer_ids[:-1] if answer_ids[-1] in self.eos_ids else answer_ids
        if str(self.tokenizer.decode(text_ids)) != message.content:
            raise ValueError("token_ids are not the tokens of the last answer: they decode to another text")
        start = spans[-1][0]
        self.tokens = [*self.tokens[:start], *answer_ids]
        return [*spans[:-1], (start, len(self.tokens))]

    def _prefix_difference(self, prompt: list[int], index: int) -> str:
        at = _common_length(self.tokens, prompt)
        expected = repr(self.tokenizer.decode(prompt[at])) if at < len(prompt) else "its end"
        return (
            f"message {index}: the tokens before the answer are not how the whole conversation begins; first differing "
            f"token: {self._piece(at)}, alone it is {expected}. Tokens merge over the start of the answer, or the chat "
            "template prints earlier messages differently later"
        )

    def _no_end(self, index: int) -> str:
        names = ", ".join(_eos_texts(self.tokenizer, self.eos_ids))
        return f"message {index}: expected an end-of-turn token ({names}) right after the answer, found none"

    def _piece(self, at: int) -> str:
        return f"{at} {self.tokenizer.decode(self.tokens[at])!r}" if at < len(self.tokens) else f"{at} (past the end)"


def _common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """Length of the common prefix."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _refuse_special_text(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, eos_ids: tuple[int, ...]
) -> None:
    """Special tokens inside a message would end or open turns that no one took."""
    pattern = _special_pattern(tokenizer, eos_ids)
    for index, message in enumerate(conversation.messages):
        if found := pattern.search(message.content):
            raise ValueError(f"message {index}: the content holds the special token {found.group()!r}")


@functools.lru_cache(maxsize=4)
def _special_pattern(tokenizer: PreTrainedTokenizerBase, eos_ids: tuple[int, ...]) -> re.Pattern[str]:
    if not tokenizer.is_fast:
        raise ValueError(f"expected a fast tokenizer (with text offsets), got {type(tokenizer).__name__}")
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special} | set(_eos_texts(tokenizer, frozenset(eos_ids)))
    # Some tokenizers add runs of newlines or spaces as tokens; those are ordinary text.
    texts = sorted((text for text in special if text.strip()), key=len, reverse=True)
    return re.compile("|".join(re.escape(text) for text in texts))


def _eos_texts(tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int]) -> tuple[str, ...]:
    return tuple(tokenizer.convert_ids_to_tokens(sorted(eos_ids)))
