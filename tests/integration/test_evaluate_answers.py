"""``lkspec evaluate answers=...``: a finished run walked along answers that are there."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from command_line import NO_EVALUATION, TINY_RUN, Run

from lkspec.results import RunFolder, list_runs

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
    return table.to_pandas().sort_values(["key", "temperature", "depth"], ignore_index=True)


def test_the_walk_is_that_of_a_run_validated_on_the_same_answers(lkspec_cli, tmp_path):
    some, more = write(tmp_path / "some.jsonl", [0.0, 1.0, 1.0]), write(tmp_path / "more.jsonl", [0.5, 0.5])
    seen = trained(lkspec_cli, "seen", f"data.validation=[{some},{more}]")
    blind = trained(lkspec_cli, "blind", f"data.validation=[{some}]")
    assert len(walk_of(blind)) < len(walk_of(seen))
    outcome = lkspec_cli("evaluate", "run_root=blind", "run=latest", f"answers=[{more},{some}]")
    assert outcome.code == 0, outcome.err
    pd.testing.assert_frame_equal(walk_of(blind), walk_of(seen), check_exact=False, rtol=1e-5)
    assert "walk" in outcome.out
    assert "T = 0.5" in outcome.out
    assert not blind.read_results(), "nothing was decoded"


def test_the_walk_by_sharpness_is_that_of_sharpened_exports(lkspec_cli, tmp_path):
    answers = write(tmp_path / "answers.jsonl", [0.0, 1.0, 1.0])
    run = trained(lkspec_cli, "runs", "data.validation=null", "optimizer.lr=3e-2")
    outcome = lkspec_cli("evaluate", "run=latest", f"answers={answers}", "sharpness=[1,3]")
    assert outcome.code == 0, outcome.err
    assert run.read_walk_table() is None, "nothing is stored"
    shown = {line.split("│")[1].strip(): line.split("│")[2:4] for line in outcome.out.splitlines() if "│" in line}
    assert lkspec_cli("export", "run=latest", "out=sharp", "sharpness=3").code == 0
    exported = ("draft=pretrained", "draft.path=sharp", "target=tiny", "target.device=cpu", "run_root=exported")
    assert lkspec_cli("evaluate", *exported, f"answers={answers}").code == 0
    (sharp,) = list_runs(Path("exported"))
    rows = walk_of(sharp)
    for temperature, told in zip((0.0, 1.0), shown["3"], strict=True):
        whole = rows[(rows.temperature == temperature) & (rows.depth == 2)]
        assert float(told) == pytest.approx(1 + whole.accepted.sum() / whole.rounds.sum(), abs=6e-4)
    assert shown["3"][0] == shown["1"][0], "at T = 0 sharpness changes nothing"
    assert shown["3"][1] != shown["1"][1]


def test_what_cannot_be_walked_is_refused(lkspec_cli, tmp_path):
    trained(lkspec_cli, "runs", "data.validation=null")
    unknown = write(tmp_path / "unknown.jsonl", [1.0, None])
    for overrides, told in (
        ([f"answers={unknown}"], "answers=unknown.jsonl: 'unknown-1' does not say at which temperature"),
        ([f"answers={unknown}", "engine=vllm"], "leave out engine and throughput"),
        (["sharpness=2"], "sharpness goes with answers="),
        ([f"answers={unknown}", "sharpness=[1,0]"], "sharpness: expected positive numbers, got [1, 0]"),
        (["answers=nowhere.jsonl"], "nowhere.jsonl"),
    ):
        outcome = lkspec_cli("evaluate", "run=latest", *overrides)
        assert outcome.code == 2
        assert told in outcome.err
