"""Gains in parts of the held-out answers: what sorts them, what is told, and what is refused."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from helpers.report_runs import make_run, walk_held_out

from lkspec.reporting.counts import find_runs

SCRIPT = Path(__file__).parents[3] / "experiments" / "ablations" / "by_difficulty.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("ablation_by_difficulty", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["by_difficulty.py", *arguments])
        module.main()

    return run


def test_parts_go_up_and_gains_are_those_over_kl_of_the_same_seed(script, tmp_path, capsys):
    taus = {}
    for loss, seed, gain in (("kl", 1, 0.0), ("kl", 2, 0.0), ("tv", 2, 0.1), ("tv", 1, 0.3)):
        rows = walk_held_out(make_run(tmp_path, loss=loss, seed=seed), gain=gain)
        taus[loss, seed] = {row.key: 1 + row.accepted / row.rounds for row in rows if row.depth == 3}
    (sharper,) = find_runs(str(tmp_path / "*-kl-*-s2-*"))
    walk_held_out(sharper, temperatures=(1.0,), gain=0.05, sharpness=1.5)
    script("--runs", str(tmp_path / "*"), "--parts", "2")
    lines = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines()]
    assert [cell.strip() for cell in lines[0]] == ["objective", "s", "part 1: 8 answers", "part 2: 8 answers"]
    table = {(line[0].strip(), line[1].strip()): line[2:] for line in lines[2:]}
    assert set(table) == {("kl", "1"), ("kl", "1.5"), ("tv", "1")}
    order = sorted((key for key in taus["kl", 1] if key.startswith("1-")), key=taus["kl", 1].__getitem__)
    for part, keys in enumerate((order[:8], order[8:])):
        plain = sum(taus["kl", 2][key] for key in keys) / 8  # every answer has as many rounds
        better = sum(taus["tv", 2][key] for key in keys) / 8
        assert float(table["kl", "1"][part]) == pytest.approx(plain, abs=6e-4)
        assert float(re.search(r"[+-][\d.]+", table["tv", "1"][part])[0]) == pytest.approx(better - plain, abs=6e-4)
    assert float(table["kl", "1"][0]) < float(table["kl", "1"][1])


@pytest.mark.parametrize(
    ("options", "told"), [(("--tell", "3"), "none is kl of seed 3"), ((), "two are kl of seed 1")], ids=["none", "two"]
)
def test_what_does_not_belong_together_is_refused(script, tmp_path, capsys, options, told):
    for seed in (1, 2):
        walk_held_out(make_run(tmp_path, seed=seed))
    if not options:
        walk_held_out(make_run(tmp_path, draft="medusa", seed=1))
    with pytest.raises(SystemExit):
        script("--runs", str(tmp_path / "*"), *options)
    assert told in capsys.readouterr().err
