"""The rows of a run's tables: results.csv, rounds.parquet, walk.parquet, tokens.parquet, throughput.csv."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

#: What tells measurements of a run apart, and columns by these names.
SETTING = ("benchmark", "temperature", "num_draft_tokens", "engine", "sharpness")
SettingKey = tuple[str, float, int, str, float]


@dataclass(frozen=True)
class RoundRow:
    """One verification of ``num_draft_tokens`` drafted tokens; the last three fields are those of ``types.Round``."""

    benchmark: str
    prompt_id: str
    turn: int
    temperature: float
    num_draft_tokens: int
    engine: str
    sharpness: float
    round: int
    position: int
    accepted: int
    past_end: bool


@dataclass(frozen=True)
class ResultRow:
    """One measurement of a run.

    Attributes:
        loss_args: the objective's arguments, JSON.
        data_fingerprint: of the training data.
        supervised_tokens: training tokens seen that were supervised, over all epochs.
        steps: optimiser steps taken.
        engine: what decoded (``lkspec``, or the name of a serving engine).
        sharpness: s of the q^s, renormalised, that was served in place of q; 1 at T = 0, where it changes nothing.
        tau, low, high: acceptance length and its interval.
        alpha: [K], the share of the rounds with at least k accepted tokens; columns alpha_1 .. alpha_K, and
            ``tau = 1 + sum``.
        tau_whole_rounds: tau over the rounds whose K proposals lie inside the text, as the walk counts them.
        walk_tau: the acceptance length estimated without decoding, along the same text.
        walk_over_k: the same with rounds of 1, 2, .. num_draft_tokens drafted tokens, a JSON list.
        speedup: tokens_per_second over those of the target alone.
        eta, eta_source: the adaptive weight's eta and who chose it.
        protocol: everything else that tau depends on (filters, limits, templates, number of prompts), JSON.
    """

    run: str
    commit: str
    code_hash: str
    draft: str
    loss: str
    loss_args: str
    target: str
    data_fingerprint: str
    seed: int
    supervised_tokens: int
    steps: int
    benchmark: str
    temperature: float
    num_draft_tokens: int
    engine: str
    sharpness: float
    tau: float
    low: float
    high: float
    alpha: tuple[float, ...]
    tau_whole_rounds: float | None
    walk_tau: float | None
    walk_over_k: str
    tokens_per_second: float | None
    speedup: float | None
    num_prompts: int
    eta: float | None
    eta_source: str | None
    protocol: str

    @property
    def setting(self) -> SettingKey:
        """What its rounds are known by."""
        return self.benchmark, self.temperature, self.num_draft_tokens, self.engine, self.sharpness

    @property
    def name(self) -> str:
        """Of the measurement among those of a run, in logs."""
        return measurement_name(self.benchmark, self.temperature, self.num_draft_tokens, self.sharpness)

    @property
    def row_key(self) -> tuple[SettingKey, str, int]:
        """A run holds one row a key; the protocol counts by its content, not by its spelling.

        The steps are part of it: measurements before and after training stand side by side.
        """
        return self.setting, content_hash(json.loads(self.protocol)), self.steps


@dataclass(frozen=True)
class ThroughputRow:
    """Speed of a serving engine at one K (0: without drafting) and one number of requests at a time.

    Attributes:
        hardware: what the engine runs on; ``CPU``, or ``unknown hardware`` where a server does not tell.
        tokens_per_second: output tokens of all requests over the wall time.
        median_ms_per_token, p95_ms_per_token: over requests, of the time per output token after the first.
        protocol: everything else that it depends on, JSON.
    """

    run: str
    draft: str
    loss: str
    target: str
    steps: int
    engine: str
    hardware: str
    temperature: float
    num_draft_tokens: int
    concurrency: int
    num_requests: int
    num_tokens: int
    tokens_per_second: float
    median_ms_per_token: float
    p95_ms_per_token: float
    protocol: str

    @property
    def setting(self) -> tuple[str | float, ...]:
        """Rows of one setting can be compared over K and concurrency."""
        protocol = content_hash(json.loads(self.protocol))
        return self.engine, self.hardware, self.temperature, self.num_requests, protocol, self.steps

    @property
    def row_key(self) -> tuple[str | float, ...]:
        """A run holds one row a key."""
        return (*self.setting, self.num_draft_tokens, self.concurrency)


@dataclass(frozen=True)
class WalkRow:
    """One held-out conversation at depth k, along the text: what validation or `lkspec walk` saw of it.

    Sums of a conversation are kept, not only those of the set, so that two runs can be compared conversation by
    conversation: most of the spread between texts is shared and cancels.

    Attributes:
        conversation: its name.
        key: 32 hex digits of its tokens (``types.text_key``): what runs are paired by.
        temperature: at which the target wrote it.
        steps: optimiser steps taken before.
        depth: k.
        sharpness: s of the q^s that was walked with, renormalised, in place of q; 1 at T = 0, where it changes nothing.
        num_tokens: tokens supervised at depth k.
        alpha: sum of the acceptance rate over them, at that temperature (T = 0: at 1).
        rounds, accepted: expected ones of the walk with rounds of k drafted tokens; 0 where the answer is too short.
        at_least: expected rounds, of the walk with the largest k, that accept at least k tokens.
    """

    conversation: str
    key: str
    temperature: float
    steps: int
    depth: int
    sharpness: float
    num_tokens: int
    alpha: float
    rounds: float
    accepted: float
    at_least: float

    @property
    def row_key(self) -> tuple[str, float, int, float]:
        """A run holds one row a key."""
        return self.key, self.temperature, self.depth, self.sharpness


@dataclass(frozen=True)
class TokenRow:
    """One token x of a held-out answer as a proposal at depth k.

    Attributes:
        conversation: whose answer.
        position: of the token in its answer, from 0.
        text: the token.
        depth: k.
        alpha: the acceptance rate there.
        accept_prob: min(1, q(x) / p(x)).
        entropy: of the target's distribution there, in nats.
        coverage: target mass inside the draft vocabulary there.
    """

    conversation: str
    position: int
    text: str
    depth: int
    alpha: float
    accept_prob: float
    entropy: float
    coverage: float


def measurement_name(benchmark: str, temperature: float, num_draft_tokens: int, sharpness: float) -> str:
    """``<benchmark>/T<temperature>/K<num_draft_tokens>``, and ``/s<sharpness>`` where q is not as trained."""
    sharpened = "" if sharpness == 1 else f"/s{sharpness:g}"
    return f"{benchmark}/T{temperature:g}/K{num_draft_tokens}{sharpened}"


def content_hash(content: Any) -> str:
    """First 8 hex digits of the sha256 of plain data in canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]
