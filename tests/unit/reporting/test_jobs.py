"""What a sweep prints of its jobs, and the table that it ends in."""

from __future__ import annotations

import shlex

import pytest
from helpers.report_runs import make_run, make_study, walk_held_out

from lkspec.reporting.counts import find_runs
from lkspec.reporting.jobs import _rows, print_list, print_summary, sweep_table
from lkspec.reporting.layout import Layout
from lkspec.reporting.renderers.text import show
from lkspec.reporting.tables import build_table


def test_a_summary_counts_and_says_what_to_do(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    jobs = [
        {"overrides": ["x=1"], "state": "started", "ended": True, "folder": str(tmp_path / "a")},
        {"overrides": ["x=2"], "state": "done", "ended": True, "folder": str(tmp_path / "b")},
        {"overrides": ["x=3"], "state": "failed", "error": "too large", "folder": str(tmp_path / "refused")},
        {"overrides": ["x=4"], "state": "started", "folder": str(tmp_path / "a")},
    ]
    print_summary(jobs, interrupted=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "4 jobs: 1 trained, 1 kept, 1 failed, 1 not finished",
        f"stopped in {tmp_path / 'a'}: the same command continues there (on_existing=continue)",
        "1 of 4 failed:",
        "  x=3: too large",  # it was refused before it had a folder
    ]


def job(state: str, seconds: float | None, *changes: str) -> dict:
    return {"folder": f"runs/{state}", "state": state, "changes": list(changes), "seconds": seconds}


@pytest.mark.parametrize(
    ("jobs", "last"),
    [
        ([job("done", None)], "1 done; none left"),
        ([job("to do", None)], "1 to do; hours unknown"),
        ([job("to do", 3600.0), job("stale", 1800.0)], "1 to do, 1 stale; 1.50 hours one after another"),
        (
            [job("to do", 3600.0), job("failed", None), job("running", None)],
            "1 to do, 1 failed, 1 running; 1.00 hours one after another, without 1 of unknown length",
        ),
    ],
)
def test_a_list_sums_the_hours_that_are_left(jobs, last, capsys):
    print_list(jobs)
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_a_list_names_what_has_changed(capsys):
    print_list([job("stale", 36.0, "data", "code lkspec/losses/objectives.py")])
    out = capsys.readouterr().out
    assert "data, code lkspec/losses/objectives.py" in out
    assert "0.01" in out


@pytest.mark.parametrize(
    ("jobs", "rows"),
    [
        (["seed=0 draft=mlp loss=kl", "seed=1 draft=mlp loss=tv"], ["objective"]),
        (["loss=kl draft=mlp", "loss=tv draft=medusa"], ["draft", "objective"]),
        (["loss=lk_lambda loss.eta=1", "loss=lk_lambda loss.eta=3"], ["objective"]),
        (["loss=kl +vocab.size=8", "loss=kl vocab.size=null"], ["vocab.size"]),
        (["loss=kl draft.num_depths=2", "loss=tv draft.num_depths=4"], ["draft.num_depths", "objective"]),
        (["seed=0 run_root=a", "seed=1 run_root=b"], ["draft", "objective"]),
    ],
)  # fmt: skip
def test_rows_are_what_jobs_differ_in_but_for_the_seed(jobs: list[str], rows: list[str]):
    assert _rows([job.split() for job in jobs]) == rows


def test_it_is_the_table_that_its_command_makes(tmp_path, monkeypatch):
    root = make_study(tmp_path / "study")
    runs = find_runs(str(root / "*"))
    names = [run.config["names"] for run in runs]
    found = sweep_table([run.path for run in runs], [[f"draft={n['draft']}", f"loss={n['loss']}"] for n in names])
    assert found is not None
    table, command = found
    verb, *options = shlex.split(command)[1:]
    assert verb == "report"
    given = dict(option.split("=", 1) for option in options)
    assert given.pop("runs") == str(root / "*")
    named = {key: value[1:-1].split(",") if value[0] == "[" else value for key, value in given.items()}
    assert table == build_table(find_runs(str(root / "*")), Layout(**named))
    some = sweep_table([runs[0].path, runs[1].path], [["seed=0"], ["seed=1"]])
    assert some is not None
    assert f"runs=[{runs[0].path},{runs[1].path}]" in some[1]


def test_the_walk_comes_before_decoding_and_nothing_makes_no_table(tmp_path):
    runs = [make_run(tmp_path, seed=seed) for seed in (0, 1)]
    folders, overrides = [run.path for run in runs], [["seed=0"], ["seed=1"]]
    assert sweep_table(folders, overrides) is None
    for run in runs:
        walk_held_out(run)
    assert sweep_table(folders, overrides) is None, "neither is finished"
    for run in runs:
        run.write_metrics({"loss": 1.0})
    found = sweep_table(folders, overrides)
    assert found is not None
    assert "value=walk" in found[1]
    assert sweep_table(folders[:1], overrides[:1]) is None


def test_a_terminal_shows_gains_below_and_resolved_ones_as_bold(tmp_path, capsys):
    runs = find_runs(str(make_study(tmp_path / "study") / "*"))
    table = build_table(runs, Layout(rows=["draft", "loss"], columns=["temperature"], value="walk", baseline="kl"))
    show(table)
    shown = capsys.readouterr().out
    resolved = [cell for row in table.rows for cell in row.cells if cell.is_resolved]
    assert shown.count("**+") + shown.count("**-") == len(resolved)
    assert all(f"{cell.estimate.value:.3f}" in shown for row in table.rows for cell in row.cells if cell.estimate)
