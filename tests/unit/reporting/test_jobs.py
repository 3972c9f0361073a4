"""What a sweep prints of its jobs."""

from __future__ import annotations

import pytest

from lkspec.reporting.jobs import print_list, print_summary


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
