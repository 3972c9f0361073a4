"""Commands side by side until a deadline, answers by shards; what they would run is there."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "experiments" / "ablations" / "on_gpu.py"
# Stands for `lkspec generate`: a row of two tokens for each prompt.
GENERATE = """
import json, sys
prompts, out = (argument.partition("=")[2] for argument in sys.argv[1:3])
rows = [json.loads(line) for line in open(prompts, encoding="utf-8", newline="\\n")]
answers = [{"id": row["id"], "text": row["prompt"], "token_ids": [1, 2]} for row in rows]
open(out, "w", encoding="utf-8").writelines(json.dumps(row, ensure_ascii=False) + "\\n" for row in answers)
"""


@pytest.fixture
def on_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("on_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "on_gpu", module)  # where dataclasses look their types up
    spec.loader.exec_module(module)
    return module


def lane(on_gpu, name, code):
    return on_gpu.Lane(name, (sys.executable, "-c", code))


def test_lanes_run_in_their_order_so_many_at_a_time(on_gpu, capsys):
    code = "import time; print(time.time()); time.sleep(0.3); print(time.time())"
    lanes = [lane(on_gpu, name, code) for name in "abc"]
    assert on_gpu.run_lanes(lanes, processes=2, minutes=1)
    times = {name: [float(t) for t in (on_gpu.LOGS / f"{name}.log").read_text().split()] for name in "abc"}
    assert times["c"][0] > min(times["a"][1], times["b"][1])
    assert "a: ended with 0" in capsys.readouterr().out


def test_a_failed_lane_is_told_with_its_last_line(on_gpu, capsys):
    lanes = [lane(on_gpu, "good", ""), lane(on_gpu, "bad", "raise SystemExit('no such data')")]
    assert not on_gpu.run_lanes(lanes, processes=2, minutes=1)
    assert "bad: ended with 1" in (out := capsys.readouterr().out)
    assert "no such data (runs/ablation_gpu-logs/bad.log)" in out


def test_missing_prompts_are_told_with_the_command_that_makes_them(on_gpu):
    with pytest.raises(SystemExit, match=r"expected prompts at answers/prompts/train.jsonl.*prompts.py --out"):
        on_gpu.answers(argparse.Namespace(processes=3, minutes=1.0, rows=8, train=5))


def test_the_deadline_stops_what_runs_and_names_what_has_not_begun(on_gpu, capsys):
    lanes = [lane(on_gpu, name, "import time; time.sleep(60)") for name in ("first", "second")]
    start = time.monotonic()
    assert not on_gpu.run_lanes(lanes, processes=1, minutes=0.01)
    assert time.monotonic() - start < 10
    out = capsys.readouterr().out
    assert "first: stopped" in out
    assert "not begun: second" in out


def test_answers_of_all_shards_to_prompts_evenly_spaced_are_joined_whatever_line_breaks_they_hold(
    on_gpu, monkeypatch, capsys
):
    prompts = Path("answers/prompts")
    prompts.mkdir(parents=True)
    for name, count in (("train", 7), ("heldout_t1", 3), ("heldout_t0", 2)):
        rows = [{"id": f"{name}-{n}", "prompt": f"a\u2028b {n}"} for n in range(count)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (prompts / f"{name}.jsonl").write_text(text, encoding="utf-8")
    monkeypatch.setattr(on_gpu, "lkspec", lambda verb, *overrides: (sys.executable, "-c", GENERATE, *overrides))
    on_gpu.answers(argparse.Namespace(processes=3, minutes=1.0, rows=8, train=5))
    lines = Path("answers/train.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line) for line in lines] == [
        {"id": f"train-{n}", "text": f"a\u2028b {n}", "token_ids": [1, 2]} for n in (0, 1, 2, 4, 5)
    ]
    assert "train: 5 answers, 10 tokens" in capsys.readouterr().out


def test_every_sweep_is_of_drafts_and_objectives_that_are_there(on_gpu):
    losses = {path.stem for path in (ROOT / "conf" / "loss").glob("*.yaml")}
    for draft, seeds, objectives in on_gpu.SWEEPS:
        assert draft in on_gpu.DRAFTS
        assert set(objectives) <= losses
        assert seeds
    assert on_gpu.OTHER_RATES.keys() == on_gpu.OTHER_ETAS.keys() == on_gpu.DRAFTS.keys()
    trained = {(draft, objective) for draft, _, objectives in on_gpu.SWEEPS for objective in objectives}
    assert {(draft, objective) for draft in on_gpu.DRAFTS for objective in on_gpu.MAIN} <= trained


def test_every_lane_of_training_has_a_log_of_its_own(on_gpu):
    lanes = on_gpu.train(argparse.Namespace(only=list(on_gpu.DRAFTS)))
    assert len({lane.name for lane in lanes}) == len(lanes)
    others = next(lane.command for lane in lanes if lane.name == "medusa-eta-s1")
    assert {"draft=medusa", "seed=1", "loss=lk_lambda", "loss.eta=1,3"} <= set(others)


def test_only_the_papers_eta_counts_as_main(on_gpu):
    def config(loss: str, **arguments: float) -> dict:
        return {"names": {"loss": loss}, "draft": {"paper_eta": 3.0}, "loss": arguments}

    assert on_gpu._is_main(config("lk_lambda", eta=3.0))
    assert on_gpu._is_main(config("tv"))
    assert not on_gpu._is_main(config("lk_lambda", eta=10.0))
    assert not on_gpu._is_main(config("expected_length_lambda", eta=3.0))
