"""Tables of where a draft fails, from tokens.parquet: by kind of token, domain, position and the target's entropy."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Sequence

import pandas as pd

from lkspec.reporting.display import Html
from lkspec.runs.folder import RunFolder

_KINDS = (
    ("line break", r"\s*\n\s*"),
    ("space", r"\s+"),
    ("number", r"\s?\d+"),
    ("beginning of a word", r"\s[^\W\d_]+"),
    ("word or its inside", r"[^\W\d_]+"),
    ("punctuation", r"\s*[^\w\s]+\s*"),
)


def token_frame(run: RunFolder) -> pd.DataFrame:
    """tokens.parquet of a run with ``kind``, ``domain``, ``place`` in the answer and ``uncertainty`` of the target.

    Raises:
        ValueError: nobody has measured it yet.
    """
    table = run.read_token_table()
    if table is None:
        raise ValueError(
            f"{run.name} has no tokens.parquet: `lkspec walk run={run.path}` writes it, of answers sampled at T = 1"
        )
    found = table.to_pandas()
    found["kind"] = [token_kind(text) for text in found["text"]]
    found["domain"] = [domain_of(name) for name in found["conversation"]]
    found["place"] = _in_bins(found["position"], (0, 8, 32, 128))
    found["uncertainty"] = _in_bins(found["entropy"], (0, 0.1, 0.5, 1, 2, 4))
    return found


def acceptance_by(tokens: pd.DataFrame, key: str) -> pd.DataFrame:
    """Mean alpha at each depth by a key of ``token_frame``, and the share of the tokens (at depth 1) of each row."""
    found = tokens.pivot_table(index=key, columns="depth", values="alpha", aggfunc="mean", observed=True)
    found.columns = [f"alpha at depth {depth}" for depth in found.columns]
    first = tokens[tokens["depth"] == 1]
    found.insert(0, "share of tokens", first.groupby(key, observed=True).size() / len(first))
    return found


def token_kind(text: str) -> str:
    """What kind of text a token is."""
    return next((kind for kind, pattern in _KINDS if re.fullmatch(pattern, text)), "mixed or special")


def domain_of(conversation: str) -> str:
    """The beginning of a conversation's name, up to its number: ``chat-train-012`` is ``chat-train``."""
    return re.sub(r"[-_.:/]*\d.*$", "", conversation) or "unnamed"


def coloured_text(tokens: pd.DataFrame, conversation: str, *, depth: int = 1) -> Html:
    """An answer with each token coloured by alpha at a depth: white is surely accepted, dark red surely rejected.

    The answer's first ``depth`` tokens are not there: no proposal of that depth falls on them.
    """
    chosen = tokens[(tokens["conversation"] == conversation) & (tokens["depth"] == depth)].sort_values("position")
    spans = [
        f'<span style="background:rgba(178,24,43,{1 - row.alpha:.2f});color:{"#fff" if row.alpha < 0.35 else "#000"}" '
        f'title="alpha {row.alpha:.2f}, entropy {row.entropy:.2f}">{html.escape(row.text)}</span>'
        for row in chosen.itertuples()
    ]
    return Html(f'<div style="white-space:pre-wrap;font-family:monospace;line-height:1.6">{"".join(spans)}</div>')


def _in_bins(values: pd.Series, edges: Sequence[float]) -> pd.Series:
    names = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)] + [f"{edges[-1]:g} and more"]
    return pd.cut(values, [*edges, float("inf")], right=False, labels=names)
