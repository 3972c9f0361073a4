"""Your own traffic as a benchmark: the acceptance length that counts is the one on the texts you serve."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from lkspec.benchmarks.base import Asking, Benchmark, BenchmarkPrompt
from lkspec.benchmarks.sources import FileRow, read_rows

_FORMS = ("prompt", "turns", "messages")
_ROLES = ("system", "user", "assistant")


class Jsonl(Benchmark):
    """A JSONL file (or .jsonl.gz), one conversation a row in one of three forms.

    ``prompt``: a text. ``turns``: a list of the user's texts. ``messages``: ``role`` and ``content`` as chat APIs log
    them; the user's messages become the turns, a leading system message is kept, and recorded answers are left out,
    since the target writes its own. Optional fields: ``id``, ``category``, and ``group`` for rows that are not
    independent (one customer's, say), which an interval then resamples together.

    Raises:
        ValueError: no such file, or a row in none of these forms (file:line: reason).
    """

    def __init__(self, *, path: str, name: str | None = None, **asking: Unpack[Asking]) -> None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise ValueError(f"benchmark jsonl: path must name a JSONL file of prompts, found none at {file}")
        stem = file.name.removesuffix(".gz").removesuffix(".jsonl")
        prompts = [_prompt(row, f"{stem}-{i}") for i, row in enumerate(read_rows(file))]
        super().__init__(prompts, name=name or stem, **asking)


def _prompt(row: FileRow, default_id: str) -> BenchmarkPrompt:
    forms = [form for form in _FORMS if form in row.values]
    if len(forms) != 1:
        raise ValueError(f"{row.where}: expected one of the fields {', '.join(_FORMS)}, got {sorted(row.values)}")
    system_prompt = None
    if forms == ["prompt"]:
        turns: tuple[str, ...] = (row.text("prompt"),)
    elif forms == ["turns"]:
        turns = row.texts("turns")
    else:
        system_prompt, turns = _from_messages(row)
    prompt_id = str(row.values.get("id", default_id))
    group = str(row.values.get("group", prompt_id))
    return BenchmarkPrompt(prompt_id, turns, row.values.get("category"), group, system_prompt)


def _from_messages(row: FileRow) -> tuple[str | None, tuple[str, ...]]:
    messages = row.values["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{row.where}: 'messages' must be a list of objects with role and content")
    system_prompt, turns = None, []
    for i, message in enumerate(messages):
        role = message.get("role")
        if role not in _ROLES or (role == "system" and i > 0):
            raise ValueError(
                f"{row.where}: messages[{i}] has role {role!r}; expected user or assistant, and system only first"
            )
        content = FileRow(message, f"{row.where}: messages[{i}]").text("content")
        if role == "system":
            system_prompt = content
        elif role == "user":
            turns.append(content)
    if not turns:
        raise ValueError(f"{row.where}: 'messages' has no message of the user")
    return system_prompt, tuple(turns)
