"""``lkspec walk``: a finished run walked along answers that are there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from command_line import BRIEF_EVALUATION, NO_EVALUATION, TINY_RUN, Run

from lkspec.runs.find import list_runs
from lkspec.runs.folder import RunFolder

WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "looked", "at", "the", "moon", "for", "a", "long", "time"]


def write(path: Path, temperatures: list[float | None]) -> str:
    rows = [
        {
            "id": f"{path.stem}-{number}",
            "messages": [
                {"role": "user", "content": "and then"},
                {"role": "assistant", "content": " ".join(WORDS[number:])},
            ],
            **({} if temperature is None else {"temperature": temperature}),
        }
        for number, temperature in enumerate(temperatures)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def trained(cli: Run, root: str, *overrides: str) -> RunFolder:
    outcome = cli("train", *TINY_RUN, *NO_EVALUATION, "draft=mlp", f"run_root={root}", *overrides)
    assert outcome.code == 0, outcome.err
    (run,) = list_runs(Path(root))
    return run


def walk_of(run: RunFolder) -> pd.DataFrame:
    table = run.read_walk_table()
    assert table is not None
    return table.to_pandas().sort_values(["key", "temperature", "sharpness", "depth"], ignore_index=True)


def test_the_walk_is_that_of_a_run_validated_on_the_same_answers(lkspec_cli, tmp_path):
    some, more = write(tmp_path / "some.jsonl", [0.0, 1.0, 1.0]), write(tmp_path / "more.jsonl", [0.5, 0.5])
    seen = trained(lkspec_cli, "seen", f"data.validation=[{some},{more}]")
    blind = trained(lkspec_cli, "blind", f"data.validation=[{some}]")
    assert len(walk_of(blind)) < len(walk_of(seen))
    outcome = lkspec_cli("walk", "run_root=blind", "run=latest", f"answers=[{more},{some}]")
    assert outcome.code == 0, outcome.err
    pd.testing.assert_frame_equal(walk_of(blind), walk_of(seen), check_exact=False, rtol=1e-5)
    assert "walk" in outcome.out
    assert "T = 0.5" in outcome.out
    assert not blind.read_results(), "nothing was decoded"


def test_the_walk_by_sharpness_is_that_of_sharpened_exports(lkspec_cli, tmp_path):
    answers = write(tmp_path / "answers.jsonl", [0.0, 1.0, 1.0])
    run = trained(lkspec_cli, "runs", "data.validation=null", "optimizer.lr=3e-2")
    outcome = lkspec_cli("walk", "run=latest", f"answers={answers}", "sharpness=[1,3]")
    assert outcome.code == 0, outcome.err
    walked = walk_of(run)
    assert lkspec_cli("export", "run=latest", "out=sharp", "sharpness=3").code == 0
    exported = ("draft=pretrained", "draft.path=sharp", "target=tiny", "target.device=cpu", "run_root=exported")
    assert lkspec_cli("walk", *exported, f"answers={answers}").code == 0
    (sharp,) = list_runs(Path("exported"))
    expected = walk_of(sharp)
    for temperature, sharpness in ((0.0, 1.0), (1.0, 3.0)):
        ours = walked[(walked.temperature == temperature) & (walked.sharpness == sharpness)]
        theirs = expected[expected.temperature == temperature]
        assert len(ours)
        assert ours[["rounds", "accepted"]].to_numpy() == pytest.approx(theirs[["rounds", "accepted"]].to_numpy(), 1e-4)
    assert set(zip(walked.temperature, walked.sharpness, strict=True)) == {(0.0, 1.0), (1.0, 1.0), (1.0, 3.0)}
    shown = {line.split("│")[1].strip(): line.split("│")[2:4] for line in outcome.out.splitlines() if "│" in line}
    for (temperature, sharpness), rows in walked[walked.depth == 2].groupby(["temperature", "sharpness"]):
        told = shown[f"{sharpness:g}"][int(temperature)].split()[0]
        assert float(told) == pytest.approx(1 + rows.accepted.sum() / rows.rounds.sum(), abs=6e-4)
    assert shown["3"][0].strip() == "as 1"
    assert "rows=[draft,objective,sharpness]" in outcome.out
    sharper = lkspec_cli("walk", "run=latest", f"answers={answers}", "sharpness=2")
    assert re.search(r"│ +2 │ +as 1 │ \d\.\d{3} [+-]\d\.\d{3}", sharper.out), "the gain over what was walked before"


def test_the_held_out_answers_of_a_run_are_walked_with_its_captured_states(lkspec_cli, tmp_path):
    answers = write(tmp_path / "answers.jsonl", [0.0, 1.0, 1.0])
    data = ("target=tiny", "target.device=cpu", "data=tiny", "data.train=tiny:10", f"data.validation={answers}")
    assert lkspec_cli("capture", *data, "out=captured").code == 0
    run = trained(lkspec_cli, "runs", f"data.validation={answers}", "states_dir=captured")
    validated = walk_of(run)
    more = write(tmp_path / "more.jsonl", [0.5])
    outcome = lkspec_cli("walk", "run=latest", f"answers=[held_out,{more}]", "sharpness=[1,2]")
    assert outcome.code == 0, outcome.err
    walked = walk_of(run)
    assert set(walked[walked.temperature == 0.5].sharpness) == {1.0, 2.0}
    walked = walked[walked.temperature != 0.5]
    again = walked[walked.sharpness == 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, validated, check_exact=False, rtol=1e-5)
    assert len(walked) == len(validated) + (validated.temperature == 1).sum()
    report = lkspec_cli(
        "report", "runs=runs/*", "value=walk", "rows=[draft,sharpness]", "columns=[temperature]",
        "baseline={sharpness:1}",
    )  # fmt: skip
    assert report.code == 0, report.err
    assert re.search(r"\| mlp \| 2 \| \S* ?\| .*[+-]\d\.\d{3}", report.out), report.out
    shutil.rmtree("captured")
    outcome = lkspec_cli("walk", "run=latest", "answers=held_out")
    assert outcome.code == 0, outcome.err
    assert "captured is not there: the target reads the answers again" in outcome.out


def test_a_draft_that_shares_its_weights_is_walked_deeper_than_trained(lkspec_cli, tmp_path):
    answers = write(tmp_path / "answers.jsonl", [1.0, 1.0])
    for draft, deepest in (("eagle3", 5), ("medusa", 2)):
        run = trained(lkspec_cli, draft, f"data.validation={answers}", f"draft={draft}")
        validated = walk_of(run)
        overrides = (f"run_root={draft}", "run=latest", f"answers={answers}", "num_draft_tokens=5")
        assert lkspec_cli("walk", *overrides).code == 0
        walked = walk_of(run)
        assert sorted(set(walked.depth)) == list(range(1, deepest + 1))
        assert all((walked[walked.depth == 1].rounds.to_numpy() > 0).tolist())
        shallow = walked[walked.depth <= 2].drop(columns="at_least").reset_index(drop=True)
        pd.testing.assert_frame_equal(shallow, validated.drop(columns="at_least"), check_exact=False, rtol=1e-5)


def test_decoding_with_sharpness_is_that_of_a_sharpened_export(lkspec_cli, tmp_path):
    run = trained(lkspec_cli, "runs", "optimizer.lr=3e-2")
    measured = (*BRIEF_EVALUATION, "temperatures=[0,1]", "num_draft_tokens=2")
    outcome = lkspec_cli("evaluate", "run=latest", *measured, "sharpness=[1,3]")
    assert outcome.code == 0, outcome.err
    rows = {(row.temperature, row.sharpness): row for row in run.read_results()}
    assert set(rows) == {(0.0, 1.0), (1.0, 1.0), (1.0, 3.0)}
    assert lkspec_cli("export", "run=latest", "out=sharp", "sharpness=3").code == 0
    exported = ("draft=pretrained", "draft.path=sharp", "target=tiny", "target.device=cpu", "run_root=exported")
    assert lkspec_cli("evaluate", *exported, *measured).code == 0
    (sharp,) = list_runs(Path("exported"))
    theirs = {row.temperature: row for row in sharp.read_results()}
    assert theirs[1.0].tau == rows[1.0, 3.0].tau
    assert theirs[1.0].walk_tau == pytest.approx(rows[1.0, 3.0].walk_tau, rel=1e-4)
    assert theirs[0.0].tau == rows[0.0, 1.0].tau
    assert rows[1.0, 1.0].tau != rows[1.0, 3.0].tau
    report = lkspec_cli("report", "runs=runs/*", "rows=[draft,sharpness]", "columns=[temperature]")
    assert report.code == 0, report.err
    assert f"{rows[1.0, 3.0].tau:.3f}" in report.out


def test_what_cannot_be_walked_is_refused(lkspec_cli, tmp_path):
    trained(lkspec_cli, "runs", "data.validation=null")
    unknown = write(tmp_path / "unknown.jsonl", [1.0, None])
    for overrides, told in (
        ([f"answers={unknown}"], "answers=unknown.jsonl: 'unknown-1' does not say at which temperature"),
        (["answers=held_out"], "answers=held_out: "),
        (["sharpness=-1"], "sharpness: expected a positive number (1 changes nothing), got -1"),
        ([f"answers={unknown}", "sharpness=[1,0]"], "sharpness: expected a positive number (1 changes nothing), got 0"),
        (["answers=nowhere.jsonl"], "nowhere.jsonl"),
    ):
        outcome = lkspec_cli("walk", "run=latest", *overrides)
        assert outcome.code == 2
        assert told in outcome.err
    outcome = lkspec_cli("evaluate", "run=latest", "engine=vllm", "sharpness=2")
    assert "sharpness: an engine serves q as it is exported" in outcome.error_line


@pytest.mark.parametrize(
    "limits", [("trainer.max_steps=3",), ("trainer.max_epochs=1",)], ids=["in-an-epoch", "at-an-end"]
)
def test_a_run_is_validated_where_it_ends(lkspec_cli, tmp_path, limits):
    answers = write(tmp_path / "answers.jsonl", [0.0, 1.0])
    run = trained(lkspec_cli, "runs", f"data.validation={answers}", *limits)
    metrics, walked = run.read_metrics(), walk_of(run)
    steps = 3 if "trainer.max_steps=3" in limits else 4
    assert set(walked.steps) == {steps}
    assert {"val/T1/walk_acceptance_length", "val/T0/alpha/depth_2", "train/loss", "train/alpha/depth_2"} <= set(
        metrics
    )
    assert lkspec_cli("walk", "run=latest", "answers=held_out").code == 0
    pd.testing.assert_frame_equal(walk_of(run), walked, check_exact=False, rtol=1e-5)
