"""Prompts for the ablations' answers from public prompt files, none of which shares text with the benchmarks.

python experiments/ablations/prompts.py --out prompts

Only what a user would ask is read, never a reference answer: the target writes its own (lkspec generate). Writes
train.jsonl, heldout_t1.jsonl and heldout_t0.jsonl, which share no prompt; overlap.md, what was dropped by source; and
overlaps.jsonl, every prompt that a benchmark holds too, with the words that they share.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lkspec.benchmarks.base import Benchmark
from lkspec.benchmarks.gsm8k import GSM8K
from lkspec.benchmarks.humaneval import HumanEval
from lkspec.benchmarks.mt_bench import MTBench
from lkspec.benchmarks.sources import FileRow, read_rows
from lkspec.files import write_text

NGRAM = 13  # words; the length that GPT-3's and later contamination checks use
#: Why a prompt is dropped, in the order of the checks: it counts under the first that applies.
REASONS = TOO_LONG, DUPLICATE, BY_TEXT, BY_NGRAM = "too long", "duplicate", "(a) whole text", f"(b) {NGRAM}-gram"


@dataclass(frozen=True)
class Source:
    """A public file: where it lies in the prompts folder, and what of a row is the prompt."""

    name: str
    domain: str
    file: str
    licence: str
    text: Callable[[dict[str, Any]], str]


def _instruction(row: dict[str, Any], given: str) -> str:
    return f"{row['instruction'].strip()}\n\n{given.strip()}"


def _instance(row: dict[str, Any]) -> str:
    return _instruction(row, row["instances"][0]["input"])


SOURCES = (
    Source("gsm8k_train", "math", "gsm8k_train.jsonl", "MIT", lambda row: row["question"]),
    Source("mbpp", "code", "mbpp.jsonl", "CC BY 4.0", lambda row: row["text"]),
    Source("gpteacher", "code", "gpteacher_codegen.json", "MIT", lambda row: _instruction(row, row["input"])),
    Source(
        "arena_hard", "chat", "arena_hard_v0.1_question.jsonl", "Apache-2.0", lambda row: row["turns"][0]["content"]
    ),
    Source("self_instruct_seed", "chat", "self_instruct_seed_tasks.jsonl", "Apache-2.0", _instance),
    Source("self_instruct_user", "chat", "self_instruct_user_oriented.jsonl", "Apache-2.0", _instance),
    Source("vicuna", "chat", "vicuna_bench_question.jsonl", "Apache-2.0", lambda row: row["turns"][0]),
)


@dataclass(frozen=True)
class Prompt:
    """A prompt and its normalised words, whose hash decides the split."""

    id: str
    source: str
    text: str
    words: str


def normalised(text: str) -> str:
    """Words in lower case with one space between; signs and punctuation are dropped."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in folded).split())


def read_source(source: Source, folder: Path) -> list[Prompt]:
    """Every prompt of a file, numbered by its row from 1.

    Raises:
        ValueError: the file is missing, or a row is not of its format.
    """
    path = folder / source.file
    if not path.is_file():
        raise ValueError(f"expected {source.file} ({source.licence}) in the prompts folder, found nothing at {path}")
    prompts = []
    for number, row in enumerate(_rows(path), start=1):
        try:
            text = source.text(row.values).strip()
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{row.where}: expected a row of {source.name}, got one with {sorted(row.values)}"
            ) from error
        if not text:
            raise ValueError(f"{row.where}: expected a row of {source.name}, its prompt is empty")
        name = f"{source.domain}-{source.name}-{number:05d}"
        prompts.append(Prompt(name, source.name, text, normalised(text)))
    return prompts


def _rows(path: Path) -> list[FileRow]:
    if path.suffix != ".json":
        return read_rows(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of JSON objects")
    return [FileRow(row, f"{path}[{i}]") for i, row in enumerate(rows)]


class BenchmarkTexts:
    """What must not be trained on: every turn of the benchmarks."""

    def __init__(self, benchmarks: Iterable[Benchmark]) -> None:
        prompts = [prompt for benchmark in benchmarks for prompt in benchmark.prompts()]
        self._whole = {normalised(turn): prompt.id for prompt in prompts for turn in prompt.turns}
        self._grams = {gram: name for words, name in self._whole.items() for gram in _grams(words)}
        self._short = [words for words in self._whole if not _grams(words)]

    def overlap(self, words: str) -> dict[str, str] | None:
        """Why a text must not be used, the benchmark's prompt and the shared words; of a short text, all its words."""
        if words in self._whole:
            return {"by": BY_TEXT, "benchmark_id": self._whole[words], "shared": words}
        grams = _grams(words)
        shared = [gram for gram in grams if gram in self._grams][:1]
        if shared:
            return {"by": BY_NGRAM, "benchmark_id": self._grams[shared[0]], "shared": shared[0]}
        inside = [turn for turn in self._short if f" {turn} " in f" {words} "]
        around = [] if grams else [turn for turn in self._whole if f" {words} " in f" {turn} "]
        for turn in (*inside, *around):
            return {"by": BY_NGRAM, "benchmark_id": self._whole[turn], "shared": min(turn, words, key=len)}
        return None


def _grams(words: str) -> list[str]:
    split = words.split()
    return [" ".join(split[i : i + NGRAM]) for i in range(len(split) - NGRAM + 1)]


@dataclass
class Screen:
    """Drops prompts that are too long, repeat an earlier one, or stand in a benchmark; remembers what and why."""

    benchmarks: BenchmarkTexts
    max_chars: int
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    overlaps: list[dict[str, str]] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)

    def __call__(self, prompt: Prompt) -> bool:
        reason = self._reason(prompt)
        if reason is not None:
            self.dropped[prompt.source, reason] += 1
        return reason is None

    def _reason(self, prompt: Prompt) -> str | None:
        if len(prompt.text) > self.max_chars:
            return TOO_LONG
        if prompt.words in self._seen:
            return DUPLICATE
        self._seen.add(prompt.words)
        overlap = self.benchmarks.overlap(prompt.words)
        if overlap is None:
            return None
        self.overlaps.append({"id": prompt.id, **overlap, "prompt": prompt.text})
        return overlap["by"]


def split(prompts: Sequence[Prompt], *, heldout_t1: int, heldout_t0: int, limit: int | None) -> dict[str, list[Prompt]]:
    """Held-out and training prompts, every source in its share, chosen by the hash of their words.

    The prompts of a source are ordered by hash and spread evenly over (0, 1); of all sources together the lowest are
    heldout_t1, the highest heldout_t0. So a file's first rows are a sample of it, and another size of one held-out file
    moves nothing into or out of the other.

    Raises:
        ValueError: a size below 1, or nothing left for training.
    """
    for option, size in (("--heldout-t1", heldout_t1), ("--heldout-t0", heldout_t0), ("--limit", limit)):
        if size is not None and size < 1:
            raise ValueError(f"{option}: expected at least 1, got {size}")
    if heldout_t1 + heldout_t0 >= len(prompts):
        raise ValueError(f"--heldout-t1 and --heldout-t0 take all of the {len(prompts)} prompts; ask for fewer")
    totals = Counter(prompt.source for prompt in prompts)
    before: Counter[str] = Counter()
    places = {}
    for prompt in sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.words.encode()).digest()):
        places[prompt] = (before[prompt.source] + 0.5) / totals[prompt.source]
        before[prompt.source] += 1
    ordered = sorted(places, key=lambda prompt: (places[prompt], prompt.id))
    end = len(ordered) - heldout_t0
    return {
        "train": ordered[heldout_t1:end][:limit],
        "heldout_t1": ordered[:heldout_t1],
        "heldout_t0": ordered[end:],
    }


def table(read: Sequence[Prompt], dropped: Counter[tuple[str, str]], parts: dict[str, list[Prompt]]) -> str:
    """Markdown: a row a source, what was dropped (under the first reason that applies) and what is left."""
    counts = []
    for source in SOURCES:
        num_read = sum(prompt.source == source.name for prompt in read)
        left = [sum(prompt.source == source.name for prompt in part) for part in parts.values()]
        counts.append([num_read, *(dropped[source.name, reason] for reason in REASONS), *left])
    lines = [f"| source | licence | prompts | {' | '.join([*REASONS, *parts])} |"]
    lines.append(f"| --- | --- {'| --: ' * len(counts[0])}|")
    for source, row in zip(SOURCES, counts, strict=True):
        lines.append(f"| {source.name} | {source.licence} | {' | '.join(map(str, row))} |")
    lines.append(f"| all | | {' | '.join(str(sum(column)) for column in zip(*counts, strict=True))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=os.environ.get("LKSPEC_DATA"), help="default: $LKSPEC_DATA")
    parser.add_argument("--heldout-t1", type=int, default=1200, metavar="N")
    parser.add_argument("--heldout-t0", type=int, default=400, metavar="N")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N training prompts")
    parser.add_argument("--max-chars", type=int, default=2000, metavar="N", help="longer prompts are dropped")
    options = parser.parse_args()
    if options.data is None:
        parser.error("expected a folder with prompts/ and benchmarks/: give --data or set LKSPEC_DATA")
    try:
        write(options)
    except ValueError as error:
        parser.error(str(error))


def write(options: argparse.Namespace) -> None:
    """Reads, screens, splits and writes; prints the table."""
    read = [prompt for source in SOURCES for prompt in read_source(source, options.data / "prompts")]
    benchmarks = BenchmarkTexts(make(data_dir=str(options.data)) for make in (MTBench, HumanEval, GSM8K))
    screen = Screen(benchmarks, options.max_chars)
    kept = [prompt for prompt in read if screen(prompt)]
    parts = split(kept, heldout_t1=options.heldout_t1, heldout_t0=options.heldout_t0, limit=options.limit)
    for name, part in parts.items():
        write_jsonl(options.out / f"{name}.jsonl", [{"id": prompt.id, "prompt": prompt.text} for prompt in part])
    write_jsonl(options.out / "overlaps.jsonl", screen.overlaps)
    text = table(read, screen.dropped, parts)
    write_text(options.out / "overlap.md", text)
    print(text, end="")


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    main()
