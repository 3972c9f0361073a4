"""What a duel says of two objectives' runs."""

from __future__ import annotations

import pytest
from helpers.report_runs import make_run, walk_held_out

from lkspec.commands.duel import print_duel


def sides(root, gain: float, seeds=(0, 1)):
    base = [make_run(root, loss="kl", seed=seed) for seed in (0, 1)]
    challenger = [make_run(root, loss="lk_alpha", seed=seed) for seed in seeds]
    for run in base:
        walk_held_out(run)
    for run in challenger:
        walk_held_out(run, gain=gain)
    return base, challenger


@pytest.mark.parametrize(("gain", "verdict"), [(0.1, "better"), (-0.1, "worse"), (0.0, "not resolved")])
def test_a_verdict_for_every_measure(tmp_path, capsys, gain, verdict):
    print_duel(*sides(tmp_path, gain), names=("kl", "lk_alpha"))
    out = capsys.readouterr().out
    assert "lk_alpha against kl: 2 seeds, 16 held-out answers per temperature" in out
    lines = [line for line in out.splitlines() if "walk, " in line or "alpha, depth" in line]
    assert len(lines) == 5, "tau at T = 0 and 1, alpha at three depths"
    assert all(verdict in line for line in lines)


def test_sides_without_a_common_seed(tmp_path):
    with pytest.raises(ValueError, match="cannot be paired"):
        print_duel(*sides(tmp_path, 0.1, seeds=(5, 6)), names=("kl", "lk_alpha"))
