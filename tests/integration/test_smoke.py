"""The README's first command that trains, as it is written there."""

import pytest
from command_line import only_run


@pytest.mark.slow
def test_the_smoke_command_trains_and_measures(lkspec_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = lkspec_cli("train", "draft=eagle3", "target=tiny", "data=tiny", "debug=smoke")
    assert outcome.code == 0, outcome.err
    run = only_run(tmp_path / "runs")
    assert (run / "results.csv").read_text().count("\n") == 1 + 3 * 2  # header, suites x temperatures
    assert {path.name for path in (run / "figures").iterdir()} >= {"tau_over_k.png", "alpha_over_time.png"}
