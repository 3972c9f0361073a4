"""Conversations written by the target: answers to prompts, and prompts from the bare chat header (Magpie)."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lkspec.data.chat import encode_conversation
from lkspec.data.conversations import parse_row
from lkspec.files import read_jsonl, write_text

_SENTINEL = "\u2063prompt\u2063"  # stands for the user's text when the bare chat header is cut out of a rendering


@dataclass(frozen=True)
class Prompt:
    """One thing to answer: the messages so far, the last one the user's."""

    id: str
    messages: tuple[dict[str, str], ...]


def read_prompts(paths: str | list[str], *, field_name: str = "prompt", limit: int | None = None) -> list[Prompt]:
    """Prompts from one or more JSONL files: rows with ``messages`` or a text field.

    Raises:
        ValueError: a missing file, a bad row (file, line and reason), a repeated id, no prompt at all, limit < 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"num_prompts: expected at least 1, or null for all, got {limit}")
    prompts: list[Prompt] = []
    for name in [paths] if isinstance(paths, str) else paths:
        file = Path(name).expanduser()
        if not file.is_file():
            raise ValueError(f"prompts: expected a JSONL file, found nothing at {file}")
        for number, row in read_jsonl(file):
            prompts.append(_parse_prompt(row, f"{file}:{number}", f"{file.stem}-{number:05d}", field_name))
    repeated = [name for name, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if repeated:
        raise ValueError(f"prompts: ids must be unique, but {repeated[0]!r} stands more than once")
    if not prompts:
        raise ValueError(f"prompts: {paths} holds no prompt")
    return prompts[:limit]


def _parse_prompt(row: dict[str, Any], where: str, default_id: str, field_name: str) -> Prompt:
    name = default_id if row.get("id") is None else str(row["id"])
    if "messages" in row:
        return Prompt(name, _parse_messages(row["messages"], where))
    text = row.get(field_name)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: expected a non-empty text in {field_name!r}, the row has {sorted(row)}")
    return Prompt(name, ({"role": "user", "content": text},))


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """16 hex digits of sha256 over ids and messages."""
    content = json.dumps([[prompt.id, prompt.messages] for prompt in prompts])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _parse_messages(rows: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(rows, list) or not all(isinstance(m, dict) for m in rows):
        raise ValueError(f"{where}: expected 'messages' to be a list of objects, got {rows!r:.60}")
    messages = tuple({key: m[key] for key in ("role", "content") if isinstance(m.get(key), str)} for m in rows)
    if any(len(message) < 2 for message in messages):
        raise ValueError(f"{where}: every message needs the texts 'role' and 'content', got {rows!r:.60}")
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"{where}: messages must end with the user's")
    return messages


def bare_user_header(tokenizer: PreTrainedTokenizerBase, system: str | None) -> tuple[int, ...]:
    """The chat template up to where the user's text begins: what Magpie (arXiv 2406.08464) lets the target continue.

    Raises:
        ValueError: a template that does not print the user's text as it is.
    """
    messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": _SENTINEL}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    header, found, _ = text.partition(_SENTINEL)
    if not found:
        raise ValueError("the chat template does not print the user's text unchanged; the bare chat header is unknown")
    return tuple(tokenizer(header, add_special_tokens=False)["input_ids"])


@dataclass
class AnswerFilter:
    """Drops answers that training could not read back: empty ones, and, where the target's tokenizer is known, special
    tokens or merged tokens in the text."""

    tokenizer: PreTrainedTokenizerBase | None = None
    eos_ids: tuple[int, ...] = ()
    dropped: Counter[str] = field(default_factory=Counter)

    def __call__(self, row: dict[str, Any]) -> bool:
        reason = "empty"
        try:
            conversation = parse_row(row, default_id=row["id"])
            reason = "that cannot be told from the chat template once written as text"
            if self.tokenizer is not None:
                encode_conversation(self.tokenizer, conversation, max_length=1 << 20, eos_ids=self.eos_ids)
        except ValueError:
            self.dropped[reason] += 1
            return False
        return True


@dataclass
class PromptFilter:
    """Drops prompts that are empty, cut off, loops, or repeat an earlier one; counts each reason."""

    min_words: int = 3
    dropped: Counter[str] = field(default_factory=Counter)
    _seen: set[str] = field(default_factory=set)

    def __call__(self, text: str, finish_reason: str) -> bool:
        reason = self._reason(text, finish_reason)
        if reason is None:
            self._seen.add(_normalised(text))
            return True
        self.dropped[reason] += 1
        return False

    def _reason(self, text: str, finish_reason: str) -> str | None:
        if len(text.split()) < self.min_words:
            return "empty"
        if finish_reason == "length":
            return "cut"
        if is_loop(text):
            return "loop"
        return "duplicate" if _normalised(text) in self._seen else None


def is_loop(text: str, *, size: int = 4, share: float = 0.5) -> bool:
    """Whether more than ``share`` of the text's word n-grams are repetitions."""
    words = text.split()
    grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return len(grams) > size and 1 - len(set(grams)) / len(grams) > share


def _normalised(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


class ResumableJsonl:
    """An output file that survives a kill: rows are appended to ``<path>.partial``, a torn last one is dropped.

    ``finish`` writes all rows in the given order to ``path`` at once and removes the partial file. The settings stand
    in ``<path>.settings.json``; a partial file made with others is refused.

    Raises:
        ValueError: ``path`` exists already, or the partial file was made with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self._settings_path = path.with_name(path.name + ".settings.json")
        self.settings = settings
        if path.exists():
            raise ValueError(f"out: {path} exists already; name another file or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        if self.partial.exists():
            self.rows = self._recover()
        if self.rows:
            self._check_settings()
        write_text(self._settings_path, json.dumps(settings, indent=1, sort_keys=True) + "\n")
        self._file = self.partial.open("a", encoding="utf-8")

    def _check_settings(self) -> None:
        before = json.loads(self._settings_path.read_text()) if self._settings_path.exists() else {}
        changed = sorted(k for k in before.keys() | self.settings.keys() if before.get(k) != self.settings.get(k))
        if changed:
            raise ValueError(
                f"{self.partial} was made with another {', '.join(changed)}; repeat those settings to resume, "
                "or remove the file to start again"
            )

    def _recover(self) -> list[dict[str, Any]]:
        whole, newline, torn = self.partial.read_bytes().rpartition(b"\n")
        if torn:
            os.truncate(self.partial, len(whole) + len(newline))
        return [json.loads(line) for line in whole.splitlines()]

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row; once this returns, a killed process loses nothing."""
        self.rows.append(row)
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def finish(self, order: Callable[[dict[str, Any]], Any], keep: Callable[[dict[str, Any]], bool]) -> None:
        """Writes the final file: the rows to ``keep``, sorted by ``order``."""
        os.fsync(self._file.fileno())
        self._file.close()
        self.rows = sorted(filter(keep, self.rows), key=order)
        write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
        self.partial.unlink()
