"""``lkspec report`` on small stored results, and what a real training leaves for it."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
from command_line import NO_EVALUATION, TINY_RUN
from helpers.report_runs import make_study

from lkspec.data.sources import tiny_rows
from lkspec.reporting.counts import read_series
from lkspec.reporting.tokens import token_frame
from lkspec.runs.find import list_runs


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    return make_study(tmp_path_factory.mktemp("study") / "runs", seeds=(0, 1))


def test_a_table_of_runs_is_printed(lkspec_cli, study):
    outcome = lkspec_cli("report", f"runs={study}/*", "baseline=kl", "mean=benchmark")
    assert outcome.code == 0, outcome.err
    rows = [line for line in outcome.out.splitlines() if line.startswith("| m")]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| medusa", "kl"],
        ["| medusa", "lk_lambda"],
        ["| mlp", "kl"],
        ["| mlp", "lk_lambda"],
    ]
    assert "**+" in rows[1]
    assert "T = 1<br>mean" in outcome.out


@pytest.mark.parametrize("kind", ["markdown", "csv", "latex", "html"])
def test_every_format_is_written(lkspec_cli, study, tmp_path, kind):
    outcome = lkspec_cli(
        "report", f"runs=[{study}/mlp-*]", "value=walk", "columns=[temperature]", f"format={kind}", "out=t"
    )
    assert outcome.code == 0, outcome.err
    assert outcome.out == ""
    assert "lk_lambda" in (tmp_path / "t").read_text().replace("\\_", "_")


def test_csv_can_be_read_by_other_programs(lkspec_cli, study):
    outcome = lkspec_cli("report", f"runs={study}/*", "format=csv", "+where.temperature=1", "baseline={loss:kl}")
    rows = list(csv.DictReader(outcome.out.splitlines()))
    assert len(rows) == 4 * 2
    assert {row["temperature"] for row in rows} == {"1"}
    assert sum(bool(row["gain"]) for row in rows) == 4


def test_a_figure(lkspec_cli, study, tmp_path):
    options = ["value=walk", "columns=[temperature,num_draft_tokens]", "format=png", "out=tau.png"]
    assert lkspec_cli("report", f"runs={study}/*", *options).code == 0
    assert (tmp_path / "tau.png").read_bytes().startswith(b"\x89PNG")
    assert "out=figure.png" in lkspec_cli("report", f"runs={study}/*", *options[:3]).error_line


@pytest.mark.parametrize("preset", ["paper_table1", "paper_table2", "paper_table4"])
def test_the_layouts_of_the_paper(lkspec_cli, study, preset):
    where = "where.benchmark=[mini_chat]"
    outcome = lkspec_cli("report", f"runs={study}/mlp-*", f"preset={preset}", where)
    assert outcome.code == 0, outcome.err
    assert "arXiv 2602.23881" in outcome.out
    assert "| paper |" in outcome.out
    assert "lkspec evaluate" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["runs=nowhere/*"], "runs=nowhere/*: expected folders of runs"),
        (["rows=[loss]"], "mixes draft medusa, mlp"),
        (["format=pdf"], "format: expected one of markdown"),
        (["value=walks"], "value: expected one of tau"),
        (["+where.optimizer.lr=3"], "where.optimizer.lr=3 leaves nothing; the runs have 0.001"),
    ],
)
def test_mistakes_are_told_in_one_line(lkspec_cli, study, arguments, told):
    runs = [] if arguments[0].startswith("runs=") else [f"runs={study}/*"]
    assert told in lkspec_cli("report", *runs, *arguments).error_line


@pytest.mark.slow
def test_a_training_leaves_the_walk_of_each_conversation(lkspec_cli, tmp_path):
    rows = [{**row, "temperature": 1.0} for row in tiny_rows("tiny:6")]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = ["data.val_fraction=0", f"data.validation={tmp_path / 'validation.jsonl'}"]
    outcome = lkspec_cli("train", *TINY_RUN, *NO_EVALUATION, *held_out, "loss=kl")
    assert outcome.code == 0, outcome.err
    (run,) = list_runs(tmp_path / "runs")
    metrics = run.read_metrics()
    walks = {series.get("num_draft_tokens"): series for series in read_series([run], "walk")}
    assert walks[2].value == pytest.approx(metrics["val/T1/walk_acceptance_length"], rel=1e-6)
    assert len(walks[2].groups) == 6
    assert 1 <= walks[1].value <= walks[2].value
    for series in read_series([run], "alpha"):
        assert series.value == pytest.approx(metrics[f"val/T1/alpha/depth_{series.get('depth')}"], rel=1e-5)
    with pytest.raises(ValueError, match=r"has no tokens\.parquet"):
        token_frame(run)
    outcome = lkspec_cli("walk", f"run={run.path}")
    assert outcome.code == 0, outcome.err
    tokens = token_frame(run)
    for depth in (1, 2):
        chosen = tokens[tokens["depth"] == depth]
        assert chosen["alpha"].mean() == pytest.approx(metrics[f"val/T1/alpha/depth_{depth}"], rel=1e-4)
        assert chosen["entropy"].between(0, math.log(264)).all()
        texts = {(row.conversation, row.position): row.text for row in chosen.itertuples()}
        answer = rows[1]["messages"][1]["content"]
        assert "".join(texts[rows[1]["id"], place] for place in range(depth, 30)) == answer[depth:30]
