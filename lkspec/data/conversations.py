"""Conversations, read from wherever ``sources`` finds their rows.

Rows come in three formats, told apart row by row: OpenAI's ``messages``, ShareGPT's ``conversations``, and the fields
of the data published with the LK paper (``conversation[0].content`` = prompt, ``generated_message.content`` = answer).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lkspec.data.sources import rows_of

OnBadRow = Literal["error", "skip"]
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_FINISH_REASONS = (None, "stop", "length")
_NUM_REASONS_KEPT = 5


@dataclass(frozen=True)
class Message:
    """One message. ``finish_reason`` "length" says that the target was cut off before it ended the turn itself."""

    role: str
    content: str
    finish_reason: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Messages that alternate user/assistant after an optional system message.

    Attributes:
        id: unique within a data set.
        temperature: at which the target wrote the answers; None when unknown.
        answer_ids: the tokens that the target wrote the last answer in; None when only the text is known. At T > 0 a
            target now and then spells a text in other tokens than its tokenizer would.
    """

    id: str
    messages: tuple[Message, ...]
    temperature: float | None = None
    answer_ids: tuple[int, ...] | None = None


@dataclass
class BadRows:
    """What happens to rows that cannot be used: an error at the first one, or a count and the first reasons."""

    on_bad_row: OnBadRow = "error"
    count: int = 0
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.on_bad_row not in ("error", "skip"):
            raise ValueError(f"data.on_bad_row: expected 'error' or 'skip', got {self.on_bad_row!r}")

    def add(self, place: str, reason: str) -> None:
        """Notes one bad row.

        Raises:
            ValueError: ``on_bad_row`` is "error".
        """
        if self.on_bad_row == "error":
            raise ValueError(f"{place}: {reason} (data.on_bad_row=skip leaves such rows out)")
        self.count += 1
        if len(self.reasons) < _NUM_REASONS_KEPT:
            self.reasons.append(f"{place}: {reason}")

    def summary(self) -> str:
        """The count and the first reasons, one per line."""
        return "\n  ".join([f"{self.count} bad rows left out", *self.reasons])


def read_conversations(path: str, bad_rows: BadRows | None = None) -> list[Conversation]:
    """The usable conversations of a path, in file order; what is left out goes to ``bad_rows``.

    ``path`` is a .jsonl file, a folder of them (read in the order of their names), ``embedded:<file>`` (packaged with
    lkspec), ``tiny:<N>`` (made up), or else the id of a hub data set, of which the split "train" is read.

    Raises:
        ValueError: nothing found at the path; a bad row (file, 1-based line and reason) unless those are skipped;
            no usable conversation.
    """
    bad_rows = bad_rows or BadRows()
    conversations: list[Conversation] = []
    places: dict[str, str] = {}
    for place, default_id, raw in rows_of(path):
        try:
            conversation = parse_row(_decoded(raw), default_id=default_id)
            if conversation.id in places:
                raise ValueError(f"the id {conversation.id!r} was already used at {places[conversation.id]}")
        except ValueError as error:
            bad_rows.add(place, str(error))
            continue
        places[conversation.id] = place
        conversations.append(conversation)
    if not conversations:
        raise ValueError(f"{path}: expected at least one conversation, found none\n  {bad_rows.summary()}")
    return conversations


def parse_row(row: object, *, default_id: str) -> Conversation:
    """One row as a conversation; ``default_id`` names it when the row has neither ``id`` nor ``question_id``.

    Raises:
        ValueError: the reason why the row cannot be used.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    messages = _with_row_finish_reason(_messages(row), row.get("finish_reason"))
    _check_order(messages)
    return Conversation(
        _id(row, default_id), messages, _temperature(row.get("temperature")), _answer_ids(row.get("token_ids"))
    )


def _messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    if row.get("messages") is not None:
        return _parse_messages(row["messages"], field_name="messages", role_key="role", content_key="content")
    if row.get("conversations") is not None:
        return _parse_messages(row["conversations"], field_name="conversations", role_key="from", content_key="value")
    if row.get("conversation") is not None and row.get("generated_message") is not None:
        return _parse_generated(row["conversation"], row["generated_message"])
    raise ValueError(
        "expected one of the fields 'messages', 'conversations' or 'conversation' with 'generated_message', "
        f"the row has {sorted(row)}"
    )


def _parse_messages(rows: Any, *, field_name: str, role_key: str, content_key: str) -> tuple[Message, ...]:
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"expected {field_name!r} to be a non-empty list of messages, got {rows!r:.60}")
    messages = []
    for index, row in enumerate(rows):
        where = f"{field_name}[{index}]"
        if not isinstance(row, Mapping) or role_key not in row or content_key not in row:
            raise ValueError(f"{where}: expected an object with {role_key!r} and {content_key!r}, got {row!r:.60}")
        role = row[role_key]
        if role not in _ROLES:
            raise ValueError(f"{where}: unknown role {role!r}, expected one of {', '.join(_ROLES)}")
        messages.append(Message(_ROLES[role], _content(row[content_key], where), row.get("finish_reason")))
    return tuple(messages)


def _parse_generated(prompt: Any, answer: Any) -> tuple[Message, ...]:
    """A prompt and the target's answer. A second message of the prompt can only be the answer that was replaced."""
    if not isinstance(prompt, list) or len(prompt) not in (1, 2) or not isinstance(prompt[0], Mapping):
        raise ValueError(f"expected 'conversation' to hold one prompt (a single turn), got {prompt!r:.60}")
    if not isinstance(answer, Mapping):
        raise ValueError(f"expected 'generated_message' to be an object with 'content', got {answer!r:.60}")
    role = prompt[0].get("role", "user")
    if _ROLES.get(role) != "user":
        raise ValueError(f"conversation[0]: expected the user's prompt, got the role {role!r}")
    return (
        Message("user", _content(prompt[0].get("content"), "conversation[0]")),
        Message("assistant", _content(answer.get("content"), "generated_message"), answer.get("finish_reason")),
    )


def _content(value: Any, where: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: expected the content to be text, got {type(value).__name__}")
    if value is None or not value.strip():
        raise ValueError(f"{where}: empty content")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{where}: a lone surrogate, which is not text and cannot be tokenised")
    return value


def _with_row_finish_reason(messages: tuple[Message, ...], finish_reason: Any) -> tuple[Message, ...]:
    """Puts the row's own finish reason on its last message and checks all of them."""
    *earlier, last = messages
    last = last if finish_reason is None else replace(last, finish_reason=finish_reason)
    for message in (*earlier, last):
        if message.finish_reason not in _FINISH_REASONS:
            raise ValueError(f"unknown finish_reason {message.finish_reason!r}, expected 'stop', 'length' or none")
    if any(message.finish_reason == "length" for message in earlier):
        raise ValueError("finish_reason 'length' is only possible for the last message: a cut answer ends the text")
    return (*earlier, last)


def _check_order(messages: tuple[Message, ...]) -> None:
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise ValueError("no assistant message")
    turns = roles[1:] if roles[0] == "system" else roles
    if any(role != ("user", "assistant")[index % 2] for index, role in enumerate(turns)):
        raise ValueError(
            f"roles must alternate user, assistant after an optional system message, got {', '.join(roles)}"
        )


def _id(row: Mapping[str, Any], default_id: str) -> str:
    value = row.get("question_id") if row.get("id") is None else row["id"]
    if value is None:
        return default_id
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"expected the id to be a text or a whole number, got {value!r}")
    return str(value)


def _temperature(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"expected the temperature to be a number >= 0, got {value!r}")
    return float(value)


def _answer_ids(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(type(token) is int and token >= 0 for token in value):
        raise ValueError("token_ids: expected a non-empty list of token ids (the last answer's own tokens)")
    return tuple(value)


def _decoded(raw: object) -> object:
    if not isinstance(raw, bytes):
        return raw
    try:
        return json.loads(raw)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"invalid JSON ({error})") from error
