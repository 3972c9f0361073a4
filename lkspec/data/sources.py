"""Where conversations lie: JSONL files, folders of them, hub data sets, packaged files, and made-up ones."""

from __future__ import annotations

import importlib.resources
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# What made-up conversations are about.
_ANIMALS = ("cat", "dog", "fox", "owl", "hen", "cow", "bee", "ant")
_COLOURS = ("red", "blue", "green", "grey", "brown", "white")
_PLACES = ("on the hill", "by the lake", "in the barn", "under the tree", "near the gate")
_DEEDS = ("sleeps", "waits", "sings", "hides", "plays")
_MULTI_TURN_EVERY = 4


def rows_of(path: str) -> Iterator[tuple[str, str, object]]:
    """(place for messages, default id, row or undecoded line) of every row of a path."""
    if path.startswith("tiny:"):
        return _numbered(path, tiny_rows(path))
    files = local_files(path)
    return _numbered(f"{path} [train]", _hub_rows(path)) if files is None else _lines(files)


def local_files(path: str) -> list[Path] | None:
    """The files that a path of conversations stands for; None for made-up and for hub data sets.

    Raises:
        ValueError: as ``read_conversations``, of a path that is a local one.
    """
    if path.startswith("tiny:"):
        return None
    if path.startswith("embedded:"):
        return [embedded_path(path.removeprefix("embedded:"))]
    local = Path(path).expanduser()
    if local.is_dir():
        files = sorted(local.glob("*.jsonl"))
        if not files:
            raise ValueError(f"{path}: expected a folder with .jsonl files, found none in it")
        return files
    if local.is_file():
        if local.suffix != ".jsonl":
            raise ValueError(f"{path}: expected a .jsonl file (one JSON object a line)")
        return [local]
    if local.suffix == ".jsonl" or path.startswith(("/", ".", "~")):
        raise ValueError(f"{path}: expected a .jsonl file or a folder of them, found nothing there")
    return None


def _lines(files: list[Path]) -> Iterator[tuple[str, str, object]]:
    for path in files:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", f"{path.stem}:{number}", line


def _numbered(name: str, rows: Iterable[object]) -> Iterator[tuple[str, str, object]]:
    for number, row in enumerate(rows, start=1):
        yield f"{name} row {number}", f"row:{number}", row


def embedded_path(name: str) -> Path:
    """A data file packaged with lkspec.

    Raises:
        ValueError: no such file; lists the existing ones.
    """
    folder = Path(str(importlib.resources.files("lkspec.data") / "embedded"))
    if not (folder / name).is_file():
        there = ", ".join(sorted(file.name for file in folder.glob("*.jsonl"))) or "none"
        raise ValueError(f"embedded:{name}: no such packaged data set; expected one of: {there}")
    return folder / name


def _hub_rows(path: str) -> Iterable[object]:
    from datasets import load_dataset  # slow to import, and only needed here

    try:
        return load_dataset(path, split="train")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a .jsonl file, a folder of them or the id of a hub data set with the split 'train'; "
            f"nothing lies there locally, and the hub says: {f'{type(error).__name__}: {error}'.splitlines()[0]}"
        ) from error


def tiny_rows(path: str) -> Iterator[dict[str, Any]]:
    """``tiny:<N>``: N rows of one or two turns, with answers of about 40 to 80 characters that share few patterns.

    Raises:
        ValueError: N is not a whole number >= 1.
    """
    number = path.removeprefix("tiny:")
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"{path}: expected tiny:<number of conversations>, as in tiny:64")
    return (_tiny_row(index) for index in range(int(number)))


def _tiny_row(index: int) -> dict[str, Any]:
    # Seeded by the index, so that tiny:8 holds the first rows of tiny:64.
    generator = random.Random(index)
    num_turns = 2 if index % _MULTI_TURN_EVERY == 0 else 1
    messages = []
    for _ in range(num_turns):
        animal, colour = generator.choice(_ANIMALS), generator.choice(_COLOURS)
        place, deed = generator.choice(_PLACES), generator.choice(_DEEDS)
        answer = f"The {colour} {animal} {deed} {place}, and the {animal} is {colour} and {deed} there."
        messages += [
            {"role": "user", "content": f"Where is the {colour} {animal}?"},
            {"role": "assistant", "content": answer},
        ]
    return {"id": f"tiny-{index:05d}", "messages": messages}
