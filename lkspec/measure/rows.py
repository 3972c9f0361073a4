"""A measurement as rows of its run's tables."""

from __future__ import annotations

import json
import math

from lkspec.measure.benchmark import Measurement
from lkspec.measure.metrics import acceptance_metrics
from lkspec.runs.facts import RunFacts
from lkspec.runs.rows import ResultRow, RoundRow


def result_row(
    measurement: Measurement, facts: RunFacts, *, steps: int, supervised_tokens: int, batch_size: int
) -> ResultRow:
    """Its row of results.csv; ``steps`` and ``supervised_tokens`` say how far training was."""
    setting = measurement.setting
    metrics = acceptance_metrics(measurement.prompt_rounds(), num_draft_tokens=setting.num_draft_tokens)
    whole = acceptance_metrics(
        measurement.prompt_rounds(), num_draft_tokens=setting.num_draft_tokens, exclude_past_end=True
    )
    walked = measurement.walk_acceptance_lengths()
    origin = facts.folder.origin
    protocol = {
        **measurement.protocol,
        **facts.target_settings,
        "top_k": setting.top_k,
        "top_p": setting.top_p,
        "draft_filter": setting.draft_filter,
        "seed": setting.seed,
        "batch_size": batch_size,
    }
    return ResultRow(
        run=facts.folder.name,
        commit=origin.get("commit", ""),
        code_hash=facts.folder.code_hash,
        draft=facts.draft,
        loss=facts.loss,
        loss_args=json.dumps(facts.loss_arguments, sort_keys=True),
        target=facts.target,
        data_fingerprint=facts.data_fingerprint,
        seed=facts.seed,
        supervised_tokens=supervised_tokens,
        steps=steps,
        benchmark=measurement.benchmark,
        temperature=setting.temperature,
        num_draft_tokens=setting.num_draft_tokens,
        engine=measurement.engine,
        sharpness=setting.sharpness,
        tau=metrics.tau,
        low=metrics.low,
        high=metrics.high,
        alpha=metrics.acceptance_per_position,
        tau_whole_rounds=whole.tau if measurement.engine == "lkspec" else None,  # others do not say where rounds were
        walk_tau=walked[-1],
        walk_over_k=json.dumps([None if math.isnan(tau) else round(tau, 6) for tau in walked]),
        tokens_per_second=measurement.tokens_per_second,
        speedup=measurement.speedup,
        num_prompts=metrics.num_prompts,
        eta=facts.eta,
        eta_source=facts.eta_source,
        protocol=json.dumps(protocol, sort_keys=True),
    )


def round_rows(measurement: Measurement) -> list[RoundRow]:
    """Its rows of rounds.parquet."""
    setting = measurement.setting
    return [
        RoundRow(
            benchmark=measurement.benchmark,
            prompt_id=answer.prompt.id,
            turn=answer.completion.request.turn,
            temperature=setting.temperature,
            num_draft_tokens=setting.num_draft_tokens,
            engine=measurement.engine,
            sharpness=setting.sharpness,
            round=number,
            **vars(decoded),
        )
        for answer in measurement.answers
        for number, decoded in enumerate(answer.completion.rounds)
    ]
