"""Measures a draft on several benchmarks at several settings."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from lkspec.benchmarks.base import Benchmark
from lkspec.drafts.base import Draft
from lkspec.measure.benchmark import Engine, Measurement, Progress, Setting, gathered, measure, rank_and_world
from lkspec.targets.base import Target

ShowProgress = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class EvaluationOptions:
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

    def before_training(self) -> EvaluationOptions:
        """One number to compare with is enough: the largest K."""
        return replace(self, num_draft_tokens=max(listed(self.num_draft_tokens)), sharpness=listed(self.sharpness)[0])

    def check(self, draft: Draft) -> None:
        """Refuses what the draft cannot decode: to be called before hours of training.

        Raises:
            ValueError: settings out of range.
        """
        for setting in self.settings():
            draft.check_num_draft_tokens(setting.num_draft_tokens)

    def settings(self) -> list[Setting]:
        """Every combination, but for sharpness at T = 0, where it changes nothing.

        Raises:
            ValueError: values out of range.
        """
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {self.batch_size}")
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


def evaluate(
    target: Target,
    draft: Draft,
    benchmarks: Sequence[Benchmark],
    options: EvaluationOptions,
    *,
    show: ShowProgress,
    num_prompts: int | None = None,
    engine: Engine | None = None,
) -> Iterator[Measurement]:
    """Every benchmark at every setting, over all ranks; each is yielded as soon as it is measured.

    Args:
        target, draft, benchmarks: what is measured, and on what.
        options: how.
        show: takes the label of a measurement and gives what is told of its progress, on the first rank.
        num_prompts: of each benchmark, evenly spaced; all by default.
        engine: decodes in place of lkspec.

    Raises:
        ValueError: settings out of range; as ``measure``.
    """
    options.check(draft)
    rank, num_replicas = rank_and_world()
    for benchmark, setting in itertools.product(benchmarks, options.settings()):
        label = f"{benchmark.name} T={setting.temperature:g} K={setting.num_draft_tokens}"
        with show(label if setting.sharpness == 1 else f"{label} s={setting.sharpness:g}") as progress:
            measured = measure(
                target,
                draft,
                benchmark,
                setting,
                batch_size=options.batch_size,
                num_prompts=num_prompts,
                rank=rank,
                num_replicas=num_replicas,
                progress=progress if rank == 0 else None,
                engine=engine,
            )
        yield gathered(measured)
