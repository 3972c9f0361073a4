"""How settings are written in tables, and how the name of a published objective leads back to what trains it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def label(value: Any) -> str:
    """A setting as a table shows it; equal numbers look equal (1 and 1.0)."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={label(entry)}" for key, entry in sorted(value.items()))
    if isinstance(value, list | tuple):
        return "[" + ",".join(label(entry) for entry in value) + "]"
    return str(value)


def sort_key(text: str) -> tuple[Any, ...]:
    """Numbers inside a label count as numbers: eta_3 before eta_10."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return tuple((0, float(part), "") if i % 2 else (1, 0.0, part) for i, part in enumerate(parts))


def objective_label(loss: str, arguments: Mapping[str, Any]) -> str:
    """The loss with what its arguments set: ``lk_lambda_eta_3``, ``lk_lambda_fixed_0.5``.

    Of an objective that wraps another, the other's class: ``greedy_mixed_LKAlpha_share_0.2``.
    """
    text = loss
    for key, value in arguments.items():
        if value is None or isinstance(value, bool):
            continue
        if isinstance(value, Mapping) and "_target_" in value:
            inner = {name: setting for name, setting in value.items() if name != "_target_"}
            text += f"_{objective_label(value['_target_'].rpartition('.')[2], inner)}"
        else:
            text += f"_{label(value)}" if key == "fixed_lambda" else f"_{key}_{label(value)}"
    return text


def published_overrides(objective: str) -> list[str]:
    """The overrides of ``lkspec train`` behind the label of an objective of the paper, which no run need have."""
    if match := re.fullmatch(r"(lk_lambda_fixed)_([\d.]+)", objective):
        return [f"loss={match[1]}", f"loss.fixed_lambda={match[2]}"]
    if match := re.fullmatch(r"(\w+?)_eta_([\d.]+)", objective):
        return [f"loss={match[1]}", f"loss.eta={match[2]}"]
    return [f"loss={objective}"]
