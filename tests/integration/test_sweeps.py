"""Sweeps: failures, kept, stale and unfinished jobs, interrupts, plans, parallel jobs on fake devices."""

from __future__ import annotations

import json
import shlex
import signal
from collections import Counter
from pathlib import Path

import pytest
from command_line import (
    BRIEF_EVALUATION,
    NO_EVALUATION,
    TINY_RUN,
    assert_same_training,
    subprocess_cli,
)
from test_resume import KILL_ONCE

from lkspec.app.sweeps import read_journal
from lkspec.data.datamodule import SpeculatorDataModule
from lkspec.runs.folder import RunFolder
from lkspec.runs.lock import held
from lkspec.targets.tiny import TinyTarget

SWEEP = (*TINY_RUN, *NO_EVALUATION, "draft=mlp", "trainer.max_steps=2", "on_existing=continue")
INTERRUPT = """
from lightning import Callback

class Interrupt(Callback):
    def on_train_batch_end(self, trainer, *arguments):
        raise KeyboardInterrupt  # what Ctrl-C does
"""


def folders(root: str = "runs") -> dict[str, Path]:
    """Run folders by their name without the hash."""
    return {path.parent.name.rpartition("-")[0]: path.parent for path in Path(root).glob("*/config.yaml")}


def test_a_failed_job_does_not_stop_the_others_and_is_named_at_the_end(lkspec_cli):
    command = ("train", "-m", *SWEEP, "optimizer.lr=-1,1e-3")
    outcome = lkspec_cli(*command)
    assert outcome.code == 1
    assert "2 jobs: 1 trained, 1 failed" in outcome.out
    assert "Traceback" not in outcome.err, "a user's mistake has one line"
    (finished,) = [RunFolder(path.parent) for path in Path("runs").glob("*/config.yaml")]  # the refused one left none
    assert finished.is_finished
    assert "1 of 2 failed:\n  " in outcome.out
    assert "optimizer.lr=-1: " in outcome.out
    before = (finished.path / "metrics.json").stat().st_mtime_ns
    again = lkspec_cli(*command)
    assert again.code == 1
    assert "2 jobs: 1 kept, 1 failed" in again.out
    assert (finished.path / "metrics.json").stat().st_mtime_ns == before
    assert not list(Path("runs").glob(".sweep*"))


def test_a_stale_run_is_listed_with_the_reason_and_trained_again_beside_the_old_one(lkspec_cli):
    command = ("train", "-m", *SWEEP, "loss=kl,lk_alpha")
    assert lkspec_cli(*command).code == 0
    stale = RunFolder(folders()["mlp-kl-tiny-s0"])
    identity = stale.read_identity()
    identity["trained_by"]["lkspec/losses/objectives.py"] = "00000000"
    stale.write_identity(identity)
    before = sorted(Path("runs").rglob("*"))
    finished = RunFolder(folders()["mlp-lk_alpha-tiny-s0"])
    plan = lkspec_cli(*command, "seed=0,1", "list_jobs=true")
    assert plan.code == 0, plan.err
    assert sorted(Path("runs").rglob("*")) == before, "a plan wrote something"
    rows = {line.split("│")[1].strip(): line for line in plan.out.splitlines() if line.count("│") > 3}
    assert "stale" in rows[stale.name]
    assert "code lkspec/losses/objectives.py" in rows[stale.name]
    assert "0.00" in rows[stale.name], "hours are known from the runs that are there"
    assert "done" in rows[finished.name]
    assert "1 stale, 2 to do, 1 done; " in plan.out
    again = lkspec_cli(*command)
    assert again.code == 0, again.err
    assert "2 jobs: 1 trained, 1 kept" in again.out
    (old,) = Path("runs/stale").iterdir()
    assert old.name == f"{stale.name}-1"
    assert RunFolder(old).read_identity() == identity
    assert RunFolder(folders()["mlp-kl-tiny-s0"]).read_identity() != identity


def test_a_sweep_ends_in_a_table_and_the_command_that_makes_it(lkspec_cli, tmp_path):
    words = ["the", "cat", "sat", "on", "the", "mat", "and", "looked", "at", "the", "moon", "for", "a", "long", "time"]
    rows = [
        {"id": f"h{i}", "messages": [{"role": "user", "content": "and then"},
         {"role": "assistant", "content": " ".join(words[i:])}], "temperature": 1}
        for i in range(4)
    ]  # fmt: skip
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("train", "-m", *TINY_RUN, *NO_EVALUATION, "draft=mlp", "data.validation=held_out.jsonl")
    outcome = lkspec_cli(*command, "on_existing=continue", "loss=kl,lk_alpha", "seed=0,1")
    assert outcome.code == 0, outcome
    assert "walk by objective" in outcome.out
    printed = outcome.out[outcome.out.index("walk by objective") :]
    assert printed.count("│ lk_alpha ") == 1
    assert "Held-out answers: held_out 4." in printed
    (report,) = [line for line in printed.splitlines() if line.startswith("lkspec report ")]
    _, _, *options = shlex.split(report)
    again = lkspec_cli("report", *options)
    assert again.code == 0, again
    assert "| lk_alpha | " in again.out
    planned = lkspec_cli(*command, "on_existing=continue", "loss=kl,lk_alpha", "seed=0,1", "list_jobs=true")
    assert "nothing was run" in planned.out
    assert printed in planned.out, "a plan shows what is measured already"


def test_jobs_share_the_target_and_the_tokenised_data_and_train_as_if_alone(lkspec_cli, monkeypatch):
    made = Counter()

    def counted(owner, name):
        original = getattr(owner, name)

        def call(*arguments, **options):
            made[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    counted(TinyTarget, "_init_from")
    counted(SpeculatorDataModule, "read")
    command = (*SWEEP, "states_memory_gb=1", "logger=csv", "loss=lk_alpha")
    assert lkspec_cli("train", *command, "seed=1", "run_root=alone").code == 0
    made.clear()
    assert lkspec_cli("train", "-m", *command, "seed=0,1").code == 0
    assert made == {"_init_from": 1, "read": 1}
    assert lkspec_cli("train", "-m", *command, "seed=2,3").code == 0
    assert made == {"_init_from": 2, "read": 2}, "another sweep reads them anew"
    alone, shared = folders("alone")["mlp-lk_alpha-tiny-s1"], folders()["mlp-lk_alpha-tiny-s1"]
    assert_same_training(alone, shared, atol=0)


def test_a_plan_without_any_run_knows_no_hours(lkspec_cli):
    outcome = lkspec_cli("train", *SWEEP, "list_jobs=true")
    assert outcome.code == 0, outcome.err
    assert "unknown" in outcome.out
    assert "1 to do; hours unknown" in outcome.out
    assert not folders()


@pytest.mark.slow
def test_an_unfinished_job_goes_on_exactly(lkspec_cli, tmp_path):
    (tmp_path / "killer.py").write_text(KILL_ONCE)
    command = (
        *("train", "-m", *SWEEP, "trainer.max_steps=8", "logger=csv", "loss=kl,lk_alpha"),
        *("+callbacks.killer._target_=killer.KillOnce", "+callbacks.killer.step=5"),
        "callbacks.checkpoint.every_n_train_steps=2",
    )
    killed = subprocess_cli(*command, cwd=tmp_path)
    assert killed.code == -signal.SIGKILL, killed
    assert list(folders()) == ["mlp-kl-tiny-s0"]
    resumed = lkspec_cli(*command)
    assert resumed.code == 0, resumed.err
    assert "continues from step=4.ckpt" in resumed.out
    assert "2 jobs: 2 trained" in resumed.out
    whole = lkspec_cli(*command, "run_root=whole")
    assert whole.code == 0, whole.err
    for name in ("mlp-kl-tiny-s0", "mlp-lk_alpha-tiny-s0"):
        first = 4 if "kl-tiny" in name and "lk_" not in name else 0
        assert_same_training(folders("whole")[name], folders()[name], atol=1e-6, from_step=first)


@pytest.mark.slow
def test_an_interrupt_ends_the_sweep_and_says_how_to_go_on(tmp_path):
    (tmp_path / "interrupter.py").write_text(INTERRUPT)
    callback = "+callbacks.interrupt._target_=interrupter.Interrupt"
    outcome = subprocess_cli("train", "-m", *SWEEP, "loss=kl,lk_alpha", callback, cwd=tmp_path)
    assert outcome.code == 1, outcome
    (name,) = [path.parent.name for path in (tmp_path / "runs").glob("*/config.yaml")]
    assert name.startswith("mlp-kl-tiny-s0"), "the second job did not begin"
    assert f"stopped in runs/{name}: the same command continues there" in outcome.out


@pytest.mark.slow
def test_parallel_jobs_take_a_device_each(lkspec_cli, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "fake0,fake1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    kept = f"journal={tmp_path / 'journal.jsonl'}"
    outcome = lkspec_cli("train", "-m", *SWEEP, "loss=kl,lk_alpha", "seed=0,1", "hydra/launcher=joblib", kept)
    assert outcome.code == 0, outcome
    lines = read_journal(tmp_path / "journal.jsonl")
    assert {job["device"] for job in lines} == {"fake0", "fake1"}
    assert len(folders()) == 4
    refused = lkspec_cli("train", "-m", *SWEEP, "seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=3")
    assert "between 1 and 2" in refused.error_line


def test_a_launcher_whose_plugin_is_not_installed(lkspec_cli, monkeypatch):
    monkeypatch.setattr("lkspec.app.sweeps.find_spec", lambda name: None)
    line = lkspec_cli("train", "-m", *SWEEP, "seed=0,1", "hydra/launcher=joblib").error_line
    assert "lkspec[sweeps]" in line


def test_a_job_that_another_process_is_at_is_left_to_it(lkspec_cli):
    assert lkspec_cli("train", *SWEEP, "trainer.max_steps=1").code == 0
    (run,) = folders().values()
    (run / "metrics.json").unlink()
    with held(run):
        outcome = lkspec_cli("train", *SWEEP, "trainer.max_steps=1")
    assert outcome.code == 0, outcome.err
    assert "running: in use by another process" in outcome.out
    assert not (run / "metrics.json").exists()


@pytest.mark.slow
def test_a_duel_says_what_it_can_and_keeps_the_base(lkspec_cli, tmp_path):
    for name, size, first in (("train", 12, 0), ("held_out", 6, 12)):
        rows = [
            {
                "id": f"c{number}",
                "temperature": 1,
                "messages": [
                    {"role": "user", "content": f"Say {number}."},
                    {"role": "assistant", "content": " ".join(f"{number} {word}" for word in range(30))},
                ],
            }
            for number in range(first, first + size)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        *("data=jsonl", "data.train=train.jsonl", "data.validation=held_out.jsonl", "data.num_workers=0"),
        *("data.max_tokens=2048", "data.val_fraction=0", "states_dir=null", "vocab.size=null", "data.max_length=1024"),
        *("trainer.accelerator=cpu", "+trainer.enable_progress_bar=false", "callbacks.progress=null"),
    ]
    quoted = ",".join(f'"{override}"' for override in overrides)
    parts = ("target=tiny", "target.device=cpu", "draft=mlp", "draft.num_depths=2", f"overrides=[{quoted}]")
    outcome = lkspec_cli("duel", "loss=lk_alpha", *parts)
    assert outcome.code == 0, outcome.err + Path("runs/duel/base.log").read_text()
    assert "lk_alpha against kl: 2 seeds, 6 held-out answers" in outcome.out
    for measure in ("walk, temperature 1, num_draft_tokens 2", "alpha, depth 1", "alpha, depth 2"):
        (line,) = [line for line in outcome.out.splitlines() if measure in line]
        assert any(verdict in line for verdict in ("better", "worse", "not resolved"))
    assert len(folders("runs/duel")) == 4
    again = lkspec_cli("duel", "loss=lk_lambda", "loss.eta=5", *parts)
    assert again.code == 0, again.err
    assert "2 kept" in Path("runs/duel/base.log").read_text()
    assert "lk_lambda loss.eta=5 against kl" in again.out
    failing = lkspec_cli("duel", "loss=lk_lambda", "loss.eta=-5", *parts)
    assert "training with lk_lambda failed" in failing.err
    same = lkspec_cli("duel", "loss=kl", *parts)
    assert "are the same" in same.error_line


def test_where_only_measuring_code_changed_a_run_is_kept_until_evaluate_renews_its_rows(lkspec_cli):
    command = ("train", *TINY_RUN, *BRIEF_EVALUATION, "trainer.max_steps=1", "on_existing=continue")
    assert lkspec_cli(*command).code == 0
    (folder,) = folders().values()
    run = RunFolder(folder)
    identity = run.read_identity()
    run.write_identity({**identity, "measured_by": {**identity["measured_by"], "lkspec/decoding/chain.py": "00000000"}})
    kept = lkspec_cli(*command)
    assert kept.code == 0
    assert "kept; measured before code lkspec/decoding/chain.py changed" in kept.out
    assert lkspec_cli("evaluate", "run=latest", *BRIEF_EVALUATION, "temperatures=[0]").code == 0
    assert run.read_identity() != identity, "rows at T = 1 are still those of the code before"
    assert lkspec_cli("evaluate", "run=latest", *BRIEF_EVALUATION).code == 0
    assert run.read_identity() == identity
