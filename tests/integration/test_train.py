"""`lkspec train` from the command line to the run folder."""

from __future__ import annotations

import csv
import json
from itertools import cycle
from pathlib import Path

import pytest
import torch
import yaml
from command_line import (
    BRIEF_EVALUATION,
    NO_EVALUATION,
    REPOSITORY,
    TINY_RUN,
    assert_same_training,
    logged,
    only_run,
    weights,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lkspec.drafts.eagle3 import Eagle3
from lkspec.runs.folder import RunFolder
from lkspec.vocab import DraftVocab

# mtp_native needs a target that ships a module, pretrained a checkpoint: tests/unit/drafts, test_export.py.
DRAFTS = sorted({path.stem for path in (REPOSITORY / "conf" / "draft").glob("*.yaml")} - {"mtp_native", "pretrained"})
LOSSES = sorted(path.stem for path in (REPOSITORY / "conf" / "loss").glob("*.yaml"))
BARE_RUN = (*TINY_RUN, *NO_EVALUATION, "logger=csv")


@pytest.fixture(scope="module")
def complete_run(tmp_path_factory, module_cli) -> Path:
    """One run with everything switched on."""
    folder = tmp_path_factory.mktemp("complete")
    overrides = [
        *TINY_RUN,
        *BRIEF_EVALUATION,
        "trainer.max_steps=4",
        "callbacks.acceptance_length.before_training=true",
    ]
    outcome = module_cli(folder, "train", *overrides)
    assert outcome.code == 0, outcome.err
    run = only_run(folder / "runs")
    assert str(run.relative_to(folder)) in outcome.out
    assert (run / "overrides.txt").read_text().splitlines() == overrides
    return run


def test_a_run_folder_says_where_it_comes_from(complete_run):
    config = yaml.safe_load((complete_run / "config.yaml").read_text())
    assert config["names"] == {"draft": "eagle3", "target": "tiny", "loss": "lk_lambda", "data": "tiny"}
    assert config["loss"]["eta"] == 3.0
    assert "${" not in (complete_run / "config.yaml").read_text()
    origin = dict(line.split(": ", 1) for line in (complete_run / "git.txt").read_text().splitlines())
    assert set(origin) == {"commit", "dirty", "created"}
    identity = RunFolder(complete_run).read_identity()
    assert identity["trained_by"].keys() >= {"lkspec/drafts/eagle3.py", "lkspec/losses/objectives.py"}
    assert "lkspec/decoding/chain.py" in identity["measured_by"]


def test_a_checkpoint_holds_the_draft_and_nothing_of_the_target(complete_run, tiny_target):
    file = complete_run / "checkpoints" / "step=4.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    draft = Eagle3(tiny_target.spec, DraftVocab.full(tiny_target.vocab_size), num_depths=2)
    assert set(checkpoint["state_dict"]) == {f"draft.{name}" for name in draft.state_dict()}
    assert checkpoint["global_step"] == 4
    assert checkpoint["lkspec"]["target_fingerprint"] == tiny_target.fingerprint
    frozen = [tiny_target.spec.embedding, tiny_target.head.weight]
    for name, value in checkpoint["state_dict"].items():
        assert not any(value.shape == known.shape and torch.equal(value, known) for known in frozen), name
    three_copies = 3 * 4 * draft.num_trainable  # weights and both moments of AdamW
    assert file.stat().st_size < 1.2 * three_copies


def test_tensorboard_shows_the_documented_keys(complete_run):
    events = EventAccumulator(str(complete_run / "tb"))
    events.Reload()
    depths = [f"{name}/depth_{k}" for name in ("alpha", "kl", "top1", "lambda") for k in (1, 2)]
    train = ("loss", "grad_norm", "lr", "coverage", "supervised_tokens", "tokens_per_second", *depths)
    val = ("coverage", *(f"{name}/depth_{k}" for name in ("alpha", "kl", "top1", "objective") for k in (1, 2)))
    measured = ("acceptance_length", "walk_acceptance_length", "tokens_per_second")
    expected = {
        *(f"train/{name}" for name in train),
        *(f"val/text/{name}" for name in val),
        *(f"eval/mini_math/T{t}/K4/{name}" for t in (0, 1) for name in measured),
        *(f"hparams/mini_math/T{t}/K4" for t in (0, 1)),
    }
    assert expected <= set(events.Tags()["scalars"])
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(events.PluginTagToContent("hparams"))
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3]
    assert [event.step for event in events.Scalars("eval/mini_math/T1/K4/acceptance_length")] == [0, 4]


def test_the_learning_rate_logged_is_the_one_of_the_step(complete_run):
    events = EventAccumulator(str(complete_run / "tb"))
    events.Reload()
    rates = [event.value for event in events.Scalars("train/lr")]
    assert rates[0] == pytest.approx(4e-4)  # one step of warm-up, then half a cosine over the other three
    assert rates[1] == pytest.approx(4e-4)
    assert rates[1] > rates[2] > rates[3] > 0


def test_results_rounds_and_metrics_agree(complete_run):
    folder = RunFolder(complete_run)
    rows = folder.read_results()
    assert [(row.steps, row.temperature, row.num_prompts) for row in rows] == [
        (0, 0.0, 2),
        (0, 1.0, 2),
        (4, 0.0, 2),
        (4, 1.0, 2),
    ]
    rounds = folder.read_rounds()
    metrics = json.loads((complete_run / "metrics.json").read_text())
    for row in rows[2:]:
        accepted = [r.accepted for r in rounds if r.temperature == row.temperature]
        assert row.tau == pytest.approx(1 + sum(accepted) / len(accepted))
        assert row.tau == pytest.approx(1 + sum(row.alpha))
        assert metrics[f"eval/mini_math/T{row.temperature:g}/K4/acceptance_length"] == row.tau
        assert row.supervised_tokens == metrics["train/supervised_tokens"] > 0
        assert row.run == complete_run.name
    with (complete_run / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4


def test_figures_are_drawn(complete_run):
    pictures = {path.name for path in (complete_run / "figures").iterdir()}
    assert pictures == {"tau_over_k.png", "acceptance_per_position.png", "alpha_over_time.png"}
    for name in pictures:
        assert (complete_run / "figures" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("draft", "loss"), zip(cycle(DRAFTS), LOSSES, strict=False))
def test_every_loss_trains_a_draft(lkspec_cli, draft, loss):
    """The drafts in turn; tests/unit/training/test_every_pair.py has all pairs."""
    outcome = lkspec_cli("train", *BARE_RUN, f"draft={draft}", f"loss={loss}", "trainer.max_steps=2")
    assert outcome.code == 0, outcome.err
    losses = logged(only_run(), "train/loss")
    assert len(losses) == 2
    assert all(0 < value < 100 for value in losses.values())


@pytest.mark.slow
def test_training_lowers_the_loss(lkspec_cli):
    settings = ("loss=lk_alpha", "draft.head_init=random", "trainer.max_epochs=6", "optimizer.lr=3e-3")
    outcome = lkspec_cli("train", *BARE_RUN, "draft=eagle3", *settings)
    assert outcome.code == 0, outcome.err
    losses = list(logged(only_run(), "train/loss").values())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_a_second_identical_run_is_refused_replaced_or_skipped(lkspec_cli):
    arguments = ("train", *BARE_RUN, "trainer.max_steps=1")
    assert lkspec_cli(*arguments).code == 0
    run = only_run()
    checkpoint = next(iter((run / "checkpoints").iterdir()))
    written = checkpoint.stat().st_mtime_ns
    line = lkspec_cli(*arguments).error_line
    assert f"resume={run.name}" in line
    assert "on_existing=replace" in line
    skipped = lkspec_cli(*arguments, "on_existing=skip")
    assert skipped.code == 0
    assert "done: skipped (on_existing=skip)" in skipped.out
    assert checkpoint.stat().st_mtime_ns == written
    assert lkspec_cli(*arguments, "on_existing=replace").code == 0
    assert only_run() == run
    assert checkpoint.stat().st_mtime_ns > written


def test_an_interrupted_run_is_not_skipped_as_if_it_were_finished(lkspec_cli):
    arguments = ("train", *BARE_RUN, "trainer.max_steps=1")
    assert lkspec_cli(*arguments).code == 0
    (only_run() / "metrics.json").unlink()  # what a run writes last
    assert "resume=" in lkspec_cli(*arguments, "on_existing=skip").error_line


BAD_INPUTS = {
    "a word for a size": (["vocab.size=atuo"], "vocab.size"),
    "a vocabulary that is too large": (["vocab.size=100000"], "vocab.size"),
    "a word for eta": (["loss=lk_lambda", "loss.eta=abc"], "loss.eta: expected a number, got 'abc'"),
    "a word for epochs": (["trainer.max_epochs=abc"], "trainer.max_epochs: expected a whole number or null, got 'abc'"),
    "a word for a rate": (["optimizer.lr=abc"], "optimizer.lr: expected a number or Tensor, got 'abc'"),
    "a number for a file": (["data.train=5"], "data.train: expected text"),
    "a missing file": (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
    "a value left out": (["data.train=???"], "data.train"),
    "float16": (["trainer.precision=16"], "bf16-mixed"),
    "mixed float16": (["trainer.precision=16-mixed"], "bf16-mixed"),
    "an unknown strategy": (["trainer.strategy=nonsense"], "nonsense"),
    "gamma": (["loss_options.gamma=0"], "gamma"),
    "chunks": (["loss_options.chunk_size=0"], "chunk_size"),
    "eta": (["loss=lk_lambda", "loss.eta=-1"], "eta"),
    "an unknown argument of the loss": (["+loss.nonsense=1"], "nonsense"),
    "an unknown argument of the draft": (["+draft.nonsense=1"], "nonsense"),
    "an unknown argument of the optimiser": (["+optimizer.nonsense=1"], "nonsense"),
    "a head": (["draft.head_init=nonsense"], "draft.head_init"),
    "no depths": (["draft.num_depths=0"], "draft.num_depths"),
    "a kind of target": (["target.kind=nonsense"], "target.kind"),
    "a data type": (["target.dtype=float8"], "float8"),
    "a context": (["data.max_length=4096", "data.max_tokens=4096"], "data.max_length"),
    "a benchmark without a prompt": (["benchmark=mini_math", "benchmark.num_prompts=0"], "num_prompts"),
    "nothing drafted": (["evaluation.num_draft_tokens=[0]"], "num_draft_tokens"),
    "no rows to decode": (["evaluation.batch_size=0"], "batch_size"),
    "a temperature below zero": (["evaluation.temperatures=[-1]"], "temperature"),
    "nothing to resume": (["resume=latest"], "no runs"),
    "on_existing": (["on_existing=perhaps"], "on_existing"),
    "a parallel sweep": (["trainer.devices=2", "seed=0,1", "-m"], "trainer.devices=1"),
}


@pytest.mark.parametrize(("overrides", "named"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_a_bad_input_is_one_readable_line(lkspec_cli, overrides, named):
    outcome = lkspec_cli("train", *TINY_RUN, "trainer.max_steps=1", *BRIEF_EVALUATION[:1], *overrides)
    assert named in outcome.error_line
    assert not Path("runs").exists(), "a refused run leaves nothing behind"


@pytest.mark.parametrize("override", ["vocab.szie=100", "draft=eagel3", "trianer=ddp"])
def test_a_key_or_choice_that_is_not_there_is_named_without_a_stack_trace(lkspec_cli, override):
    outcome = lkspec_cli("train", *TINY_RUN, override)
    assert outcome.code != 0
    assert "Traceback" not in outcome.out + outcome.err
    assert override.partition("=")[2 if "draft" in override else 0].rpartition(".")[2] in outcome.err
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_sweep_trains_each_member_as_if_it_were_alone(lkspec_cli):
    swept = lkspec_cli("train", "-m", *BARE_RUN, "trainer.max_steps=2", "loss=kl,lk_alpha", "seed=0,1")
    assert swept.code == 0, swept.err
    runs = sorted(path.parent for path in Path("runs").glob("*/config.yaml"))
    assert [run.name.rpartition("-")[0] for run in runs] == [
        f"eagle3-{loss}-tiny-s{seed}" for loss in ("kl", "lk_alpha") for seed in (0, 1)
    ]
    outcome = lkspec_cli("train", *BARE_RUN, "trainer.max_steps=2", "loss=lk_alpha", "seed=1", "run_root=alone")
    assert outcome.code == 0, outcome.err
    alone = only_run(Path("alone"))
    assert alone.name == runs[3].name
    assert_same_training(alone, runs[3], atol=0.0)
    assert logged(runs[2], "train/loss") != logged(runs[3], "train/loss")


def pair_of_runs(cli, first: list[str], second: list[str]) -> tuple[Path, Path]:
    """Two runs of four steps that differ in some overrides."""
    for root, overrides in (("first", first), ("second", second)):
        outcome = cli("train", *BARE_RUN, "trainer.max_epochs=4", "trainer.max_steps=4", *overrides, f"run_root={root}")
        assert outcome.code == 0, outcome.err
    return only_run(Path("first")), only_run(Path("second"))


@pytest.mark.slow
def test_chunks_change_nothing(lkspec_cli):
    runs = pair_of_runs(lkspec_cli, ["loss_options.chunk_size=100"], ["loss_options.chunk_size=100000"])
    assert_same_training(*runs, atol=1e-5)


@pytest.mark.slow
def test_remembered_states_change_nothing(lkspec_cli):
    runs = pair_of_runs(lkspec_cli, ["states_memory_gb=0"], ["states_memory_gb=1"])
    assert_same_training(*runs, atol=1e-5)


@pytest.mark.slow
def test_a_step_does_not_depend_on_how_it_is_cut_into_micro_batches(lkspec_cli):
    # All 9 conversations in every step, in one micro-batch or in two. (lk_lambda's weight belongs to a micro-batch.)
    whole = ["loss=kl", "data.max_tokens=20000"]
    cut = ["loss=kl", "data.max_tokens=1000", "data.accumulate=2"]
    first, second = pair_of_runs(lkspec_cli, whole, cut)
    assert len(logged(first, "train/loss")) == 4
    assert logged(first, "train/supervised_tokens") == logged(second, "train/supervised_tokens")
    assert_same_training(first, second, atol=1e-5)


@pytest.mark.slow
def test_mixed_precision_trains_float32_weights_near_the_full_precision(lkspec_cli):
    full, mixed = pair_of_runs(lkspec_cli, [], ["trainer.precision=bf16-mixed"])
    first, second = (list(logged(run, "train/loss").values()) for run in (full, mixed))
    assert second != first
    assert second == pytest.approx(first, rel=0.02)
    assert {value.dtype for name, value in weights(mixed).items() if name != "draft.vocab.ids"} == {torch.float32}


def test_packed_rows_train(lkspec_cli):
    outcome = lkspec_cli("train", *BARE_RUN, "data.pack=true", "trainer.max_steps=2")
    assert outcome.code == 0, outcome.err
    assert all(0 < value < 100 for value in logged(only_run(), "train/loss").values())


NAN_AT_THIRD_STEP = """
import torch
from lkspec.losses.objectives import KL

class Broken(KL):
    scope = "batch"  # so that it is asked once a step
    steps = 0

    def values(self, stats, mean_alpha):
        self.steps += torch.is_grad_enabled()
        return super().values(stats, mean_alpha) * (float("nan") if self.steps == 3 else 1.0)
"""


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(lkspec_cli):
    Path("broken.py").write_text(NAN_AT_THIRD_STEP)
    Path("conf/loss").mkdir(parents=True)
    Path("conf/loss/broken.yaml").write_text("_target_: broken.Broken\n")
    line = lkspec_cli("train", *BARE_RUN, "loss=broken", "callbacks.checkpoint.every_n_train_steps=1").error_line
    assert "nan" in line
    assert "step 2" in line
    assert "tiny-0" in line
    assert "optimizer.lr" in line
    kept = only_run() / "checkpoints" / "step=2.ckpt"
    assert all(bool(value.isfinite().all()) for value in torch.load(kept, weights_only=True)["state_dict"].values())
    assert len(list(kept.parent.iterdir())) == 2
