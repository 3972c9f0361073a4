"""A suite of benchmarks measured at several settings, with its results rows, rounds, table and figures."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lkspec.benchmarks.base import Benchmark
from lkspec.drafts.base import Draft
from lkspec.measure.benchmark import Engine, Measurement, Setting, gathered, measure
from lkspec.measure.engine_checks import doubts
from lkspec.measure.metrics import acceptance_metrics
from lkspec.reporting.terminal import console, progress, table
from lkspec.runs.folder import ResultRow, RoundRow, RunFolder
from lkspec.targets.base import Target


@dataclass(frozen=True)
class SuiteOptions:
    """How benchmarks are decoded; every list is crossed with every other, a number stands for a list of one."""

    temperatures: Sequence[float] | float = (0.0, 1.0)
    num_draft_tokens: Sequence[int] | int = (4,)
    top_k: int = 0
    top_p: float = 1.0
    draft_filter: str = "none"
    sharpness: Sequence[float] | float = 1.0
    batch_size: int = 16
    seed: int = 0
    num_prompts_before: int | None = None  # of each benchmark, where training has not begun

    def settings(self) -> list[Setting]:
        """Every combination, but for sharpness at T = 0, where it changes nothing.

        Raises:
            ValueError: values out of range.
        """
        if self.batch_size < 1:
            raise ValueError(f"evaluation.batch_size: expected at least 1, got {self.batch_size}")
        lists = (listed(self.temperatures), listed(self.num_draft_tokens), listed(self.sharpness))
        settings = [
            Setting(
                temperature=float(temperature),
                num_draft_tokens=int(depths),
                top_k=self.top_k,
                top_p=self.top_p,
                draft_filter=self.draft_filter,
                seed=self.seed,
                sharpness=float(sharpness) if temperature else 1.0,
            )
            for temperature, depths, sharpness in itertools.product(*lists)
        ]
        for setting in settings:
            assert setting.sampling is not None  # refuses values out of range before anything is decoded
        return list(dict.fromkeys(settings))


def listed(value: Any) -> list[Any]:
    """The values of a key that takes one or several."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


@dataclass(frozen=True)
class RunFacts:
    """What a results row says of the run."""

    folder: RunFolder
    draft: str
    loss: str
    loss_arguments: dict[str, Any]
    target: str
    target_settings: dict[str, str]
    data_fingerprint: str
    seed: int
    eta: float | None
    eta_source: str | None


@dataclass
class Suite:
    """Measures a draft on all benchmarks and writes what it finds into the run folder.

    ``engine`` decodes in place of lkspec; its rows stand beside ours.
    """

    target: Target
    benchmarks: list[Benchmark]
    options: SuiteOptions
    facts: RunFacts
    engine: Engine | None = None
    last_rows: list[ResultRow] = field(default_factory=list)

    def check(self, draft: Draft) -> None:
        """Refuses what the draft cannot decode: to be called before hours of training.

        Raises:
            ValueError: settings out of range.
        """
        for setting in self.options.settings():
            draft.check_num_draft_tokens(setting.num_draft_tokens)

    def run(self, draft: Draft, *, stage: str, step: int, supervised_tokens: int) -> list[Measurement]:
        """All measurements ``before``, ``during``, ``after`` or ``without`` training; every rank takes part."""
        self.check(draft)
        options = self.options
        if stage == "before":  # one number to compare with is enough
            largest = max(listed(options.num_draft_tokens))
            options = replace(options, num_draft_tokens=largest, sharpness=listed(options.sharpness)[0])
        rank, num_replicas = _rank_and_world()
        measurements = []
        rows: list[ResultRow] = []
        for benchmark, setting in itertools.product(self.benchmarks, options.settings()):
            label = f"{benchmark.name} T={setting.temperature:g} K={setting.num_draft_tokens}"
            label += "" if setting.sharpness == 1 else f" s={setting.sharpness:g}"
            with progress(label, None, "turns", transient=True, visible=rank == 0) as advance:
                measured = measure(
                    self.target,
                    draft,
                    benchmark,
                    setting,
                    batch_size=self.options.batch_size,
                    num_prompts=self.options.num_prompts_before if stage == "before" else None,
                    rank=rank,
                    num_replicas=num_replicas,
                    progress=lambda _, total: advance(total=total),
                    engine=self.engine,
                )
            measurements.append(gathered(measured))
            if rank == 0:  # at once: what comes later may fail
                rows.append(self._row(measurements[-1], step, supervised_tokens))
                self.facts.folder.write_results(rows[-1:])
        if rank == 0:
            self.last_rows = rows
            if stage != "before" and self.engine is None:
                self.facts.folder.write_rounds(row for measured in measurements for row in _round_rows(measured))
            by = "" if self.engine is None else f", decoded by {self.engine.name}"
            print_rows(rows, title=f"acceptance length {stage} training (step {step}){by}")
            for doubt in doubts(rows) if self.engine is not None else ():
                console.print(doubt, soft_wrap=True)
        return measurements

    def _row(self, measurement: Measurement, step: int, supervised_tokens: int) -> ResultRow:
        setting, facts = measurement.setting, self.facts
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
            "batch_size": self.options.batch_size,
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
            steps=step,
            benchmark=measurement.benchmark,
            temperature=setting.temperature,
            num_draft_tokens=setting.num_draft_tokens,
            engine=measurement.engine,
            sharpness=setting.sharpness,
            tau=metrics.tau,
            low=metrics.low,
            high=metrics.high,
            alpha=metrics.acceptance_per_position,
            tau_whole_rounds=whole.tau if self.engine is None else None,  # others do not say where rounds were
            walk_tau=walked[-1],
            walk_over_k=json.dumps([None if math.isnan(tau) else round(tau, 6) for tau in walked]),
            tokens_per_second=measurement.tokens_per_second,
            speedup=measurement.speedup,
            num_prompts=metrics.num_prompts,
            eta=facts.eta,
            eta_source=facts.eta_source,
            protocol=json.dumps(protocol, sort_keys=True),
        )


def _round_rows(measurement: Measurement) -> list[RoundRow]:
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
            position=decoded.position,
            accepted=decoded.accepted,
            past_end=decoded.past_end,
        )
        for answer in measurement.answers
        for number, decoded in enumerate(answer.completion.rounds)
    ]


def print_rows(rows: Sequence[ResultRow], *, title: str) -> None:
    """A table of measurements: tau with its 95 % interval, acceptance per position, speed.

    ``s`` is the sharpness of q, where any is not as trained; ``whole rounds`` is tau over the rounds whose K proposals
    lie inside the text, the rule that the walk follows.
    """
    sharpened = any(row.sharpness != 1 for row in rows)
    setting = ("T", "K", *(["s"] if sharpened else []))
    measured = ("tau", "95 % interval", "whole rounds", "walk", "accepted at 1..K", "prompts", "tokens/s")
    with_speedup = any(row.speedup is not None for row in rows)
    cells = [
        [
            row.benchmark,
            f"{row.temperature:g}",
            str(row.num_draft_tokens),
            *([f"{row.sharpness:g}"] if sharpened else []),
            f"{row.tau:.3f}",
            f"{row.low:.3f} - {row.high:.3f}",
            _shown(row.tau_whole_rounds, ".3f"),
            _shown(row.walk_tau, ".3f"),
            " ".join(f"{share:.2f}" for share in row.alpha),
            str(row.num_prompts),
            _shown(row.tokens_per_second, ".1f"),
            *([f"{row.speedup:.2f}x" if row.speedup else "-"] if with_speedup else []),
        ]
        for row in rows
    ]
    names = ("benchmark", *setting, *measured, *(["speed-up"] if with_speedup else []))
    table(title, names, cells, left=["benchmark"])


def _shown(value: float | None, form: str) -> str:
    """A dash where nothing was measured: filtered sampling, for one, has no walk."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def _rank_and_world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
