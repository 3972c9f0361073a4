"""Run folders and their tables: round trips, replacement by key, crashes, names, and how a run is found."""

from __future__ import annotations

import json
import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.tensorboard import SummaryWriter

from lkspec import files
from lkspec.runs import folder as results
from lkspec.runs.find import find_run, list_runs
from lkspec.runs.folder import RunFolder, run_name
from lkspec.runs.rows import ResultRow, RoundRow
from lkspec.runs.tables import read_rows, write_rows

CONFIG = {"seed": 0, "loss": {"_target_": "lkspec.losses.objectives.LK", "eta": 3.0}, "lr": 1e-5, "name": "ünï"}


def result_row(**changes) -> ResultRow:
    row = ResultRow(
        run="mlp-kl-tiny-s0-00000000",
        commit="none",
        code_hash="ab",
        draft="mlp",
        loss="kl",
        loss_args='{"eta": 3, "note": "a, \\"b\\""}',
        target="tiny",
        data_fingerprint="f",
        seed=0,
        supervised_tokens=12_345_678_901,
        steps=10,
        benchmark="gsm8k",
        temperature=1.0,
        num_draft_tokens=2,
        engine="lkspec",
        sharpness=1.0,
        tau=1.0 + 1 / 3,
        low=1.2,
        high=1.4,
        alpha=(0.3, 1 / 30),
        tau_whole_rounds=None,
        walk_tau=None,
        walk_over_k="[]",
        tokens_per_second=None,
        speedup=None,
        num_prompts=5,
        eta=None,
        eta_source=None,
        protocol='{"top_p": 1.0, "max_new_tokens": 32}',
    )
    return replace(row, **changes)


def round_row(**changes) -> RoundRow:
    row = RoundRow(
        benchmark="gsm8k",
        prompt_id="q1",
        turn=0,
        temperature=1.0,
        num_draft_tokens=2,
        engine="lkspec",
        sharpness=1.0,
        round=0,
        position=1,
        accepted=2,
        past_end=False,
    )
    return replace(row, **changes)


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder.create(
        tmp_path / "runs", "mlp-kl-tiny-s0-00000000", config=CONFIG, overrides=["loss=kl", "seed=0"]
    )


@pytest.fixture
def crash_before_rename(monkeypatch):
    """The machine goes down after the temporary file is written and before it takes the old one's place."""

    def crash() -> None:
        def fail(path: Path) -> None:
            raise OSError("power cut")

        monkeypatch.setattr(files, "_sync", fail)

    return crash


def make_run(root: Path, name: str, created: str) -> RunFolder:
    run = RunFolder.create(root, name, config=CONFIG, overrides=[])
    origin = run.path / "git.txt"
    origin.write_text(re.sub(r"created: .*", f"created: {created}", origin.read_text()))
    return run


# --- names


def test_name_says_what_the_run_is():
    name = run_name("eagle3", "lk_lambda", "Qwen/Qwen3-4B", seed=7, outcome=CONFIG)
    assert re.fullmatch(r"eagle3-lk_lambda-Qwen-Qwen3-4B-s7-[0-9a-f]{8}", name)


@given(st.text(), st.text(), st.text(), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_name_is_always_legal(draft, loss, target, seed):
    name = run_name(draft, loss, target, seed=seed, outcome={"draft": draft})
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)


def test_another_outcome_has_another_name():
    names = [
        run_name("a", "b", "c", seed=0, outcome=outcome) for outcome in ({"x": 1, "y": 2}, {"y": 2, "x": 1}, {"x": 2})
    ]
    assert names[0] == names[1] != names[2]


# --- creating and opening


def test_create_records_where_a_run_comes_from(run):
    assert run.config == CONFIG
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == CONFIG
    assert run.overrides == ["loss=kl", "seed=0"]
    assert {"commit", "dirty", "created"} == set(run.origin)
    assert run.checkpoints_dir.is_dir()
    assert RunFolder.open(run.path) == run
    assert run.tb_dir == run.path / "tb"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_commit_is_that_of_the_package(tmp_path, monkeypatch):
    package = tmp_path / "checkout" / "lkspec"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(results, "_PACKAGE", package)
    outside = RunFolder.create(tmp_path, "a", config={}, overrides=[]).origin
    assert (outside["commit"], outside["dirty"]) == ("none", "none")

    git(package.parent, "init", "-q")
    git(package.parent, "commit", "-q", "--allow-empty", "-m", "somebody else's")
    untracked = RunFolder.create(tmp_path, "b", config={}, overrides=[]).origin
    assert untracked["commit"] == "none"

    git(package.parent, "add", ".")
    git(package.parent, "commit", "-q", "-m", "ours")
    clean = RunFolder.create(tmp_path, "c", config={}, overrides=[]).origin
    assert (clean["commit"], clean["dirty"]) == (git(package, "rev-parse", "HEAD"), "no")

    (package / "new.py").write_text("")
    assert RunFolder.create(tmp_path, "d", config={}, overrides=[]).origin["dirty"] == "yes"


def test_machine_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert RunFolder.create(tmp_path, "a", config={}, overrides=[]).origin["commit"] == "none"


@pytest.mark.parametrize("name", ["", "a b", "../a", "a=b", ".a", "a/b", "ä"])
def test_illegal_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"only letters, digits and \._-"):
        RunFolder.create(tmp_path, name, config={}, overrides=[])


@pytest.mark.parametrize("held", ["checkpoints/step=5.ckpt", "checkpoints/best.ckpt", "metrics.json", "results.csv"])
def test_a_run_is_not_overwritten(run, held):
    (run.path / held).write_text("")
    with pytest.raises(
        ValueError, match=rf"\({re.escape(Path(held).name)}\): .*resume={run.name}.*on_existing=replace.*seed.*remove"
    ):
        RunFolder.create(run.path.parent, run.name, config={}, overrides=[])
    assert run.config == CONFIG
    assert run.has_results
    run.remove()
    assert RunFolder.create(run.path.parent, run.name, config={}, overrides=[]).config == {}


def test_a_run_that_died_before_its_first_checkpoint_is_taken_over(run):
    run.tb_dir.mkdir()
    assert not run.has_results
    again = RunFolder.create(run.path.parent, run.name, config={"seed": 1}, overrides=["seed=1"])
    assert (again.config, again.overrides) == ({"seed": 1}, ["seed=1"])


def test_open_refuses_what_is_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"not a run folder: expected a config\.yaml"):
        RunFolder.open(tmp_path)


def test_checkpoints_come_in_the_order_of_their_steps(run):
    assert run.checkpoints == []
    assert run.last_checkpoint is None
    names = ["epoch=0-step=9.ckpt", "epoch=1-step=20.ckpt", "epoch=1-step=20-v1.ckpt", "step=100.ckpt"]
    for name in [*reversed(names), "best.ckpt", "notes.txt", ".step=200.ckpt.x.tmp"]:
        (run.checkpoints_dir / name).write_text("")
    assert [file.name for file in run.checkpoints] == names
    assert run.last_checkpoint == run.checkpoints_dir / "step=100.ckpt"
    (run.checkpoints_dir / "last.ckpt").write_text("")
    assert run.last_checkpoint == run.checkpoints_dir / "last.ckpt"
    (run.checkpoints_dir / "last-v1.ckpt").write_text("")
    assert run.last_checkpoint == run.checkpoints_dir / "last-v1.ckpt"


# --- metrics.json


def test_metrics_are_merged(run):
    assert run.read_metrics() == {}
    run.write_metrics({"train/loss": 1 / 3, "steps": 5, "eval/gsm8k/T1/acceptance_length": 2.0})
    run.write_metrics({"steps": 6, "eval/mini/T0/acceptance_length": math.nan})
    expected = {
        "train/loss": 1 / 3,
        "steps": 6,
        "eval/gsm8k/T1/acceptance_length": 2.0,
        "eval/mini/T0/acceptance_length": None,
    }
    assert run.read_metrics() == expected
    text = (run.path / "metrics.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) == expected


# --- TensorBoard


def write_scalars(folder: Path, scalars: dict[str, dict[int, float]]) -> None:
    with SummaryWriter(str(folder)) as writer:
        for tag, values in scalars.items():
            for step, value in values.items():
                writer.add_scalar(tag, value, step)


def test_depth_history_is_in_the_order_of_depths_and_steps(run):
    assert run.read_depth_history("train/alpha") == []
    depths = {f"train/alpha/depth_{k}": {0: k / 16, 10: k / 32} for k in (10, 9, 8, 7, 6, 5, 4, 3, 2, 1)}
    write_scalars(run.tb_dir, {**depths, "val/T1/alpha/depth_1": {0: 0.5}, "train/alpha/mean": {0: 0.5}})
    ten = range(1, 11)
    assert run.read_depth_history("train/alpha") == [(0, [k / 16 for k in ten]), (10, [k / 32 for k in ten])]
    assert run.read_depth_history("val/T1/alpha") == [(0, [0.5])]
    assert run.read_depth_history("val/T0/alpha") == []


def test_depth_history_leaves_out_steps_that_lack_a_depth(run):
    write_scalars(run.tb_dir, {"a/depth_1": {0: 0.5, 1: 0.5}, "a/depth_2": {1: 0.25}})
    assert run.read_depth_history("a") == [(1, [0.5, 0.25])]


# --- rounds.parquet


def test_rounds_round_trip(run):
    assert run.read_rounds() == []
    run.write_rounds([])
    rows = [round_row(round=i, position=3 * i, accepted=i, past_end=i == 2, temperature=0.1) for i in range(3)]
    run.write_rounds(rows)
    assert run.read_rounds() == rows
    schema = {field.name: str(field.type) for field in pq.read_schema(run.path / "rounds.parquet")}
    assert schema == {
        "benchmark": "string",
        "prompt_id": "string",
        "turn": "int64",
        "temperature": "double",
        "num_draft_tokens": "int64",
        "engine": "string",
        "sharpness": "double",
        "round": "int64",
        "position": "int64",
        "accepted": "int64",
        "past_end": "bool",
    }


@pytest.mark.parametrize(
    "other",
    [{"benchmark": "humaneval"}, {"temperature": 0.0}, {"num_draft_tokens": 3}, {"engine": "vllm"}, {"sharpness": 2.0}],
)
def test_rounds_of_the_same_setting_are_replaced(run, other):
    kept = [round_row(**other), round_row(**other, round=1)]
    run.write_rounds([round_row(), *kept, round_row(round=1)])
    new = [round_row(prompt_id="q9", accepted=0)]
    run.write_rounds(row for row in new)
    assert run.read_rounds() == [*kept, *new]


def test_several_settings_are_replaced_at_once(run):
    cells = [round_row(temperature=t, num_draft_tokens=k) for t in (0.0, 1.0) for k in (1, 2, 3)]
    run.write_rounds(cells)
    new = [replace(cells[0], accepted=0), replace(cells[5], accepted=1)]
    run.write_rounds(new)
    assert run.read_rounds() == [*cells[1:5], *new]


def test_rounds_of_another_version_are_refused_by_name(run):
    run.write_rounds([round_row()])
    path = run.path / "rounds.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["sharpness"]), path)
    with pytest.raises(
        ValueError, match=r"rounds\.parquet: expected the columns of a RoundRow; missing \['sharpness'\]"
    ):
        run.read_rounds()


# --- results.csv


FINITE = st.floats(allow_nan=False)
# A lone carriage return is the one character that csv does not quote among lines that end in "\n".
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=8)


@given(
    st.lists(
        st.tuples(FINITE, st.lists(FINITE, max_size=4), st.none() | FINITE, st.none() | TEXT.filter(bool), TEXT),
        max_size=4,
    )
)
@settings(max_examples=100, deadline=None)
def test_results_round_trip(tmp_path_factory, cells):
    rows = [
        result_row(tau=tau, alpha=tuple(alpha), walk_tau=walk, eta=walk, eta_source=source, draft=draft)
        for tau, alpha, walk, source, draft in cells
    ]
    path = tmp_path_factory.mktemp("csv") / "results.csv"
    write_rows(path, ResultRow, rows)
    assert read_rows(path, ResultRow) == rows


def test_results_columns(tmp_path):
    path = tmp_path / "results.csv"
    write_rows(path, ResultRow, [result_row(), result_row(alpha=(0.5, 0.25, 0.125))])
    header, first, second = path.read_text().splitlines()
    assert header == (
        "run,commit,code_hash,draft,loss,loss_args,target,data_fingerprint,seed,supervised_tokens,steps,benchmark,"
        "temperature,num_draft_tokens,engine,sharpness,tau,low,high,alpha_1,alpha_2,alpha_3,tau_whole_rounds,walk_tau,"
        "walk_over_k,tokens_per_second,speedup,num_prompts,eta,eta_source,protocol"
    )
    assert ",1.3333333333333333,1.2,1.4,0.3,0.03333333333333333,,,,[],,,5,,," in first
    assert ",0.5,0.25,0.125," in second


def test_nan_reads_back(tmp_path):
    write_rows(tmp_path / "results.csv", ResultRow, [result_row(tau=math.nan)])
    assert math.isnan(read_rows(tmp_path / "results.csv", ResultRow)[0].tau)


def test_results_with_the_same_key_are_replaced_in_place(run):
    assert run.read_results() == []
    first, second = result_row(), result_row(temperature=0.0)
    run.write_results([first, second])
    respelled = replace(first, tau=9.0, protocol='{"max_new_tokens":32,"top_p":1.0}')
    other_protocol = replace(first, protocol='{"max_new_tokens": 64, "top_p": 1.0}')
    untrained, sharper = replace(first, steps=0), replace(first, sharpness=1.5)
    run.write_results(row for row in [respelled, other_protocol, untrained, sharper])
    assert run.read_results() == [respelled, second, other_protocol, untrained, sharper]
    assert (first.name, sharper.name) == ("gsm8k/T1/K2", "gsm8k/T1/K2/s1.5")


def test_foreign_columns_and_cells_are_named(tmp_path):
    path = tmp_path / "results.csv"
    write_rows(path, ResultRow, [result_row()])
    good = path.read_text()
    path.write_text(good.replace("walk_tau,", "walked,"))
    with pytest.raises(ValueError, match=r"missing \['walk_tau'\], unknown \['walked'\]"):
        read_rows(path, ResultRow)
    path.write_text(good.replace("12345678901", "many"))
    with pytest.raises(ValueError, match=r"results\.csv:2: column supervised_tokens: .*'many'"):
        read_rows(path, ResultRow)
    path.write_text(good.replace("0.03333333333333333", "small"))
    with pytest.raises(ValueError, match=r"results\.csv:2: column alpha_2: .*'small'"):
        read_rows(path, ResultRow)


# --- crashes


@pytest.mark.parametrize("write", ["metrics", "rounds", "results"])
def test_a_crash_leaves_the_old_file(run, crash_before_rename, write):
    old = {"metrics": {"a": 1}, "rounds": [round_row()], "results": [result_row()]}
    new = {"metrics": {"a": 2}, "rounds": [round_row(accepted=0)], "results": [result_row(tau=2.0)]}
    getattr(run, f"write_{write}")(old[write])
    before = sorted(run.path.iterdir())
    crash_before_rename()
    with pytest.raises(OSError, match="power cut"):
        getattr(run, f"write_{write}")(new[write])
    assert getattr(run, f"read_{write}")() == old[write]
    assert sorted(run.path.iterdir()) == before


def test_a_crash_in_the_middle_of_a_table_leaves_the_old_one(run):
    class Bomb:
        def __str__(self) -> str:
            raise OSError("power cut")

    run.write_results([result_row()])
    with pytest.raises(OSError, match="power cut"):
        run.write_results([result_row(temperature=0.0), result_row(temperature=0.5, draft=Bomb())])
    assert run.read_results() == [result_row()]


def test_a_crash_in_create_leaves_no_run(tmp_path, crash_before_rename):
    crash_before_rename()
    with pytest.raises(OSError, match="power cut"):
        RunFolder.create(tmp_path, "a", config={}, overrides=[])
    assert list_runs(tmp_path) == []


# --- finding runs


@pytest.fixture
def runs_root(tmp_path) -> Path:
    root = tmp_path / "runs"
    make_run(root, "mlp-kl-tiny-s0-11111111", "2026-01-02T00:00:00.000000+00:00")
    make_run(root, "mlp-kl-tiny-s1-22222222", "2026-01-03T00:00:00.000000+00:00")
    make_run(root, "eagle3-kl-tiny-s0-33333333", "2026-01-01T00:00:00.000000+00:00")
    (root / "zzz-not-a-run").mkdir()
    return root


def test_latest_is_the_newest_by_its_record(runs_root):
    assert find_run("latest", runs_root).name == "mlp-kl-tiny-s1-22222222"
    assert [run.name[-8:] for run in list_runs(runs_root)] == ["22222222", "11111111", "33333333"]


def test_latest_is_none_that_failed_before_it_had_anything(runs_root):
    newest, *others = list_runs(runs_root)
    newest.write_failure("no such file")
    assert find_run("latest", runs_root) == others[0]
    (newest.checkpoints_dir / "step=5.ckpt").write_bytes(b"")
    assert find_run("latest", runs_root) == newest, "it can be resumed"
    for run in others:
        run.write_failure("no such file")
    assert find_run("latest", runs_root) == newest


def test_order_of_creation_is_recorded(tmp_path):
    for name in "cab":
        RunFolder.create(tmp_path, name, config={}, overrides=[])
    assert [run.name for run in list_runs(tmp_path)] == ["b", "a", "c"]


def test_a_folder_without_a_record_is_the_oldest(runs_root):
    (runs_root / "zzz-not-a-run" / "config.yaml").write_text("{}")
    assert list_runs(runs_root)[-1].name == "zzz-not-a-run"


def test_find_by_path_and_by_prefix(runs_root, tmp_path, monkeypatch):
    wanted = runs_root / "eagle3-kl-tiny-s0-33333333"
    assert find_run(str(wanted), tmp_path / "elsewhere").path == wanted
    assert find_run("eagle", runs_root).path == wanted
    assert find_run(wanted.name, runs_root).path == wanted
    monkeypatch.chdir(tmp_path)
    assert find_run("runs/eagle3-kl-tiny-s0-33333333/", Path("nowhere")).path.resolve() == wanted


def test_a_whole_name_wins_over_a_longer_one(runs_root):
    make_run(runs_root, "mlp-kl-tiny-s1-22222222-long", "2026-02-01T00:00:00.000000+00:00")
    assert find_run("mlp-kl-tiny-s1-22222222", runs_root).name == "mlp-kl-tiny-s1-22222222"


def test_ambiguous_prefix_lists_the_candidates(runs_root):
    with pytest.raises(ValueError, match="beginning of 2 names") as caught:
        find_run("mlp", runs_root)
    assert re.findall(r"\S+-\d{8}", str(caught.value)) == ["mlp-kl-tiny-s1-22222222", "mlp-kl-tiny-s0-11111111"]


def test_unknown_run_lists_the_newest(runs_root):
    for i in range(4):
        make_run(runs_root, f"medusa-{i}", f"2026-03-0{i + 1}T00:00:00.000000+00:00")
    with pytest.raises(ValueError, match="'latest', a path or the beginning of a name") as caught:
        find_run("mtp", runs_root)
    listed = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert listed == ["medusa-3", "medusa-2", "medusa-1", "medusa-0", "mlp-kl-tiny-s1-22222222", "..."]


@pytest.mark.parametrize("name", ["latest", "mlp"])
def test_no_runs_at_all(tmp_path, name):
    with pytest.raises(ValueError, match=r"there are no runs under .*nowhere"):
        find_run(name, tmp_path / "nowhere")
