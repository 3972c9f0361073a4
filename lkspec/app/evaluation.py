"""Decodes a run's benchmarks, writes the rows and shows them: for ``train`` and ``evaluate``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from lkspec.benchmarks.base import Benchmark
from lkspec.drafts.base import Draft
from lkspec.measure.benchmark import Engine, Measurement, Progress
from lkspec.measure.engine_checks import doubts
from lkspec.measure.evaluation import EvaluationOptions, evaluate
from lkspec.measure.rows import result_row, round_rows
from lkspec.reporting import terminal
from lkspec.reporting.measured import print_results
from lkspec.runs.facts import RunFacts
from lkspec.runs.rows import ResultRow
from lkspec.targets.base import Target
from lkspec.training.run import is_first_rank


@dataclass
class Evaluation:
    """Measures a draft on benchmarks; ``engine`` decodes in place of lkspec, and its rows stand beside ours."""

    target: Target
    benchmarks: Sequence[Benchmark]
    options: EvaluationOptions
    facts: RunFacts
    engine: Engine | None = None
    last_rows: list[ResultRow] = field(default_factory=list)

    def run(self, draft: Draft, *, stage: str, step: int, supervised_tokens: int) -> list[Measurement]:
        """All measurements ``before``, ``during``, ``after`` or ``without`` training; every rank takes part."""
        is_before, folder, rows = stage == "before", self.facts.folder, []
        measurements = []
        for measured in evaluate(
            self.target,
            draft,
            self.benchmarks,
            self.options.before_training() if is_before else self.options,
            show=_shown,
            num_prompts=self.options.num_prompts_before if is_before else None,
            engine=self.engine,
        ):
            measurements.append(measured)
            if is_first_rank():  # at once: what comes later may fail
                size = self.options.batch_size
                row = result_row(measured, self.facts, steps=step, supervised_tokens=supervised_tokens, batch_size=size)
                rows.append(row)
                folder.write_results([row])
        if is_first_rank():
            self.last_rows = rows
            if not is_before and self.engine is None:
                folder.write_rounds(row for measured in measurements for row in round_rows(measured))
            by = "" if self.engine is None else f", decoded by {self.engine.name}"
            print_results(rows, title=f"acceptance length {stage} training (step {step}){by}")
            for doubt in doubts(rows) if self.engine is not None else ():
                terminal.say(doubt)
        return measurements


@contextmanager
def _shown(label: str) -> Iterator[Progress]:
    with terminal.progress(label, None, "turns", transient=True, visible=is_first_rank()) as advance:
        yield lambda _, total: advance(total=total)
