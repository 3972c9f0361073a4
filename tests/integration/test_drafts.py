"""Every draft from the command line: trained, resumed, evaluated, continued by another run, partly frozen."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from command_line import (
    BRIEF_EVALUATION,
    NO_EVALUATION,
    SAVED,
    STEPS,
    TINY_RUN,
    TRAINED_RUN,
    Run,
    assert_same_training,
    logged,
    only_run,
    weights,
)

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class DraftCase:
    """One draft.

    Attributes:
        frozen: a pattern of ``draft.freeze`` (as its yaml file shows it) and what begins the names that it matches.
        independent_depths: whether it has a head for each of the trained depths and no more.
    """

    name: str
    frozen: tuple[str, str]
    independent_depths: bool


CASES = [
    DraftCase("eagle3", ("lm_head*", "lm_head."), False),
    DraftCase("medusa", ("lm_heads.0*", "lm_heads.0."), True),
    DraftCase("mlp", ("heads.0*", "heads.0."), True),
    DraftCase("mtp", ("layer*mlp*", "layer.layer.mlp."), False),
]
NAMES = [case.name for case in CASES]


@pytest.fixture(scope="module", params=CASES, ids=NAMES)
def case(request: pytest.FixtureRequest) -> DraftCase:
    return request.param


@pytest.fixture(scope="module")
def trained(case: DraftCase, trained_run: Callable[[str], Path]) -> Path:
    return trained_run(case.name)


def taus(run: Path) -> list[tuple[str, str, float]]:
    """(temperature, num_draft_tokens, tau) of each row."""
    with (run / "results.csv").open() as file:
        return [(row["temperature"], row["num_draft_tokens"], float(row["tau"])) for row in csv.DictReader(file)]


def test_it_trains_and_is_measured(trained: Path) -> None:
    losses = logged(trained, "train/loss")
    assert list(losses) == list(range(STEPS))
    assert losses[STEPS - 1] < losses[0]
    rows = taus(trained)
    assert sorted((float(t), int(k)) for t, k, _ in rows) == [(0.0, 1), (0.0, 2), (1.0, 1), (1.0, 2)]
    assert all(1 <= tau <= 1 + int(k) for _, k, tau in rows)


def test_it_resumes_exactly(lkspec_cli: Run, trained: Path, tmp_path: Path) -> None:
    """A copy that has lost what came after a checkpoint in mid-training is trained to the same end."""
    copy = tmp_path / "runs" / trained.name
    shutil.copytree(trained, copy)
    (copy / "checkpoints" / f"step={STEPS}.ckpt").unlink()
    (copy / "metrics.json").unlink()
    shutil.rmtree(copy / "csv")
    outcome = lkspec_cli("train", f"resume={copy}")
    assert outcome.code == 0, outcome.err
    assert_same_training(trained, copy, atol=1e-6, from_step=SAVED)
    assert len(weights(copy)) == len(weights(trained))


def test_it_is_evaluated(lkspec_cli: Run, case: DraftCase, trained: Path, tmp_path: Path) -> None:
    """Again the same numbers; more depths than were trained only where weights are shared over depths."""
    copy = tmp_path / "runs" / trained.name
    shutil.copytree(trained, copy)
    (copy / "results.csv").unlink()
    evaluate = ("evaluate", f"run={copy}", *BRIEF_EVALUATION)
    outcome = lkspec_cli(*evaluate, "num_draft_tokens=[1,2]")
    assert outcome.code == 0, outcome.err
    assert sorted(taus(copy)) == sorted(taus(trained))
    seven = lkspec_cli(*evaluate, "num_draft_tokens=[7]", "temperatures=1")
    if case.independent_depths:
        assert "num_draft_tokens=7" in seven.error_line
        assert "2 heads" in seven.error_line
    else:
        assert seven.code == 0, seven.err
        assert ("1.0", "7") in {(t, k) for t, k, _ in taus(copy)}


def test_another_run_starts_from_its_weights(lkspec_cli: Run, case: DraftCase, trained: Path) -> None:
    bare = (f"draft={case.name}", *TRAINED_RUN, *NO_EVALUATION)
    outcome = lkspec_cli("train", *bare, f"draft.init_from={trained}", "trainer.max_steps=2")
    assert outcome.code == 0, outcome.err
    assert logged(only_run(), "train/loss")[0] < 0.98 * logged(trained, "train/loss")[0]


def test_weights_of_another_shape_are_refused(lkspec_cli: Run, case: DraftCase, trained: Path) -> None:
    """A draft vocabulary of another size: the tensor and both shapes are named."""
    arguments = (f"draft={case.name}", *TINY_RUN, *NO_EVALUATION, f"draft.init_from={trained}")
    line = lkspec_cli("train", *arguments, "vocab.size=150").error_line
    assert re.search(r"[a-z_.0-9]+ is \[(264|200)\b.* there, \[150\b.* in this draft", line)


def test_other_numbers_of_depths(lkspec_cli: Run, case: DraftCase, trained: Path) -> None:
    """Heads that a run does not have are missing; shared weights serve any number."""
    fixed = [override for override in TINY_RUN if not override.startswith("draft.num_depths")]
    arguments = (f"draft={case.name}", *fixed, *NO_EVALUATION, f"draft.init_from={trained}", "trainer.max_steps=1")
    for depths, found in (
        (3, r"is missing there, \[.*\] in this draft"),
        (1, r"is \[.*\] there, missing in this draft"),
    ):
        outcome = lkspec_cli("train", *arguments, f"draft.num_depths={depths}", f"run_root=depths{depths}")
        if case.independent_depths:
            assert re.search(found, outcome.error_line)
        else:
            assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_another_draft_are_refused(lkspec_cli: Run, trained_run: Callable[[str], Path], name: str) -> None:
    other = trained_run("medusa" if name == "mlp" else "mlp")  # whose tensors have other names
    line = lkspec_cli("train", f"draft={name}", *TINY_RUN, *NO_EVALUATION, f"draft.init_from={other}").error_line
    found = re.search(r": ([a-z_.0-9]+) is missing there, \[.*\] in this draft", line)
    assert found
    assert f"draft.{found[1]}" not in weights(other)


def test_a_vocabulary_is_taken_over_and_frozen_parameters_do_not_change(
    lkspec_cli: Run, case: DraftCase, trained: Path
) -> None:
    pattern, prefix = case.frozen
    start = (f"draft={case.name}", f"draft.init_from={trained}", f"draft.freeze=[{pattern}]")
    outcome = lkspec_cli("train", *start, *TRAINED_RUN, *NO_EVALUATION)
    assert outcome.code == 0, outcome.err
    assert torch.equal(*(weights(run)["draft.vocab.ids"] for run in (only_run(), trained)))
    checkpoints = only_run() / "checkpoints"
    early, late = (
        torch.load(checkpoints / f"step={step}.ckpt", weights_only=True)["state_dict"] for step in (SAVED, STEPS)
    )
    kept = {name.removeprefix("draft.") for name, value in early.items() if torch.equal(value, late[name])}
    expected = {name for name in (full.removeprefix("draft.") for full in early) if name.startswith(prefix)}
    assert expected
    assert kept == {*expected, "vocab.ids"}
    resumed = lkspec_cli("train", "resume=latest")  # optimiser states fit the same parameters
    assert resumed.code == 0, resumed.err


def test_freezing_what_is_not_there_or_everything(lkspec_cli: Run) -> None:
    bare = ("train", "draft=mlp", *TINY_RUN, *NO_EVALUATION)
    assert "nonsense" in lkspec_cli(*bare, "draft.freeze=[nonsense]").error_line
    assert "leaves nothing to train" in lkspec_cli(*bare, "draft.freeze=['*']").error_line
