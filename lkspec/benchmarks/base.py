"""A benchmark is prompts only: how they are decoded belongs to the evaluation, answers are never graded."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

_PLACEHOLDER = "{prompt}"


@dataclass(frozen=True)
class BenchmarkPrompt:
    """One conversation to be answered.

    Attributes:
        id: unique in its benchmark; together with the turn it fixes the random numbers of decoding.
        turns: what the user says; the target's own answers come in between.
        category: the file's own division, when it has one.
        group: what an interval resamples: prompts of one group (both turns of a question) are not independent.
        system_prompt: None leaves it to the chat template.
    """

    id: str
    turns: tuple[str, ...]
    category: str | None
    group: str
    system_prompt: str | None = None


class Asking(TypedDict, total=False):
    """How prompts are asked, whatever they are: arguments that every ``Benchmark`` takes."""

    num_prompts: int | None
    template: str
    system_prompt: str | None
    max_new_tokens: int


class Benchmark:
    """Prompts under a name.

    Args:
        rows: every prompt of the benchmark, as its file has it.
        name: what results call it.
        num_prompts: use at most so many, evenly spaced over the file; None uses all.
        template: the text of each turn, with ``{prompt}`` where the file's text goes.
        system_prompt: of every prompt that does not bring its own.
        max_new_tokens: an answer's limit.

    Raises:
        ValueError: a count or a limit below 1, a template without ``{prompt}``, ids that are not unique.
    """

    def __init__(
        self,
        rows: Sequence[BenchmarkPrompt],
        *,
        name: str,
        num_prompts: int | None = None,
        template: str = _PLACEHOLDER,
        system_prompt: str | None = None,
        max_new_tokens: int = 512,
    ) -> None:
        if _PLACEHOLDER not in template:
            raise ValueError(f"benchmark {name}: template must contain {_PLACEHOLDER}, got {template!r}")
        if max_new_tokens < 1:
            raise ValueError(f"benchmark {name}: max_new_tokens must be at least 1, got {max_new_tokens}")
        repeated = [prompt_id for prompt_id, count in Counter(row.id for row in rows).items() if count > 1]
        if repeated:
            raise ValueError(f"benchmark {name}: every prompt needs its own id, {repeated[0]!r} is repeated")
        self.name = name
        self.template = template
        self.system_prompt = system_prompt
        self.max_new_tokens = max_new_tokens
        self._prompts = tuple(self._as_asked(row) for row in _evenly_spaced(rows, num_prompts, name))

    def prompts(self, at_most: int | None = None) -> tuple[BenchmarkPrompt, ...]:
        """The prompts to answer, in the file's order; ``at_most`` so many of them, evenly spaced."""
        return tuple(_evenly_spaced(self._prompts, at_most, self.name))

    def protocol(self, at_most: int | None = None) -> dict[str, object]:
        """Everything that identifies the prompts: two results may only be compared where this is equal."""
        prompts = self.prompts(at_most)
        texts = json.dumps([[prompt.system_prompt, *prompt.turns] for prompt in prompts])
        return {
            "name": self.name,
            "num_prompts": len(prompts),
            "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest()[:16],
            "template": self.template,
            "system_prompt": self.system_prompt,
            "max_new_tokens": self.max_new_tokens,
        }

    def _as_asked(self, row: BenchmarkPrompt) -> BenchmarkPrompt:
        # replace, not format: a template may contain other braces (\boxed{}).
        turns = tuple(self.template.replace(_PLACEHOLDER, turn) for turn in row.turns)
        return replace(row, turns=turns, system_prompt=row.system_prompt or self.system_prompt)


def _evenly_spaced(rows: Sequence[BenchmarkPrompt], count: int | None, name: str) -> Sequence[BenchmarkPrompt]:
    """At most ``count`` rows spread over the whole file.

    Files are sorted by category (MT-bench) or difficulty (HumanEval): the first rows would measure one kind of text,
    and a random choice would depend on a library's generator.
    """
    if count is None:
        return rows
    if count < 1:
        raise ValueError(f"benchmark {name}: num_prompts must be at least 1, got {count}; null uses all {len(rows)}")
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]
