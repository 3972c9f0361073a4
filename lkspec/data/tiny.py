"""Made-up conversations for tests and dry runs: nothing is read, the same rows every time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

_ANIMALS = ("cat", "dog", "fox", "owl", "hen", "cow", "bee", "ant")
_COLOURS = ("red", "blue", "green", "grey", "brown", "white")
_PLACES = ("on the hill", "by the lake", "in the barn", "under the tree", "near the gate")
_DEEDS = ("sleeps", "waits", "sings", "hides", "plays")
_MULTI_TURN_EVERY = 4


def tiny_rows(path: str) -> Iterator[dict[str, Any]]:
    """``tiny:<N>``: N rows of one or two turns, with answers of about 40 to 80 characters that share few patterns.

    Raises:
        ValueError: N is not a whole number >= 1.
    """
    number = path.removeprefix("tiny:")
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"{path}: expected tiny:<number of conversations>, as in tiny:64")
    return (_row(index) for index in range(int(number)))


def _row(index: int) -> dict[str, Any]:
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
