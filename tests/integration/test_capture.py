"""`lkspec capture`, and training from what it wrote."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import NO_EVALUATION, TINY_DATA, TINY_RUN, logged, only_run

from lkspec.targets.tiny import TinyTarget

CAPTURE = ("capture", *TINY_DATA, "target.device=cpu", "shard_mb=0.2")
SHORT_RUN = ("train", *TINY_RUN, *NO_EVALUATION, "logger=csv", "trainer.max_epochs=3", "trainer.max_steps=12")
BYTES_PER_TOKEN = 2 * (3 + 1) * 64 + 8  # three auxiliary states and the last one, H = 64, and two numbers of 4 bytes


def train(cli, *overrides: str, root: str) -> Path:
    """A run of twelve steps and three validations."""
    outcome = cli(*SHORT_RUN, *overrides, f"run_root={root}")
    assert outcome.code == 0, outcome.err
    return only_run(Path(root))


@pytest.fixture(scope="module")
def states(tmp_path_factory, module_cli) -> Path:
    """The states of the tiny data in several shards."""
    folder = tmp_path_factory.mktemp("captured")
    outcome = module_cli(folder, *CAPTURE, "out=states")
    assert outcome.code == 0, outcome.err
    assert len(list((folder / "states").glob("*.safetensors"))) > 2
    return folder / "states"


@pytest.fixture
def no_target_pass(monkeypatch):
    """Lets no batch pass through the target."""

    def refuse(self, batch):
        raise AssertionError("the target was run")

    monkeypatch.setattr(TinyTarget, "states", refuse)


def numbers(text: str) -> dict[str, list[float]]:
    """Each line of the plan by its first word."""
    found = {}
    for line in text.splitlines():
        found[line[:11].strip()] = [float(n.replace(",", "")) for n in re.findall(r"\d[\d,.]*(?:e-?\d+)?", line[11:])]
    return found


def test_a_plan_says_disk_memory_and_hours_and_writes_nothing(lkspec_cli, tmp_path):
    outcome = lkspec_cli(*CAPTURE, "out=some/where", "plan=true")
    assert outcome.code == 0, outcome.err
    plan = numbers(outcome.out)
    waiting, total, num_tokens = plan["to capture"]
    assert waiting == total == 10
    gigabytes, bytes_per_token, free = plan["disk"]
    assert bytes_per_token == BYTES_PER_TOKEN
    assert gigabytes == pytest.approx(num_tokens * BYTES_PER_TOKEN / 1e9, rel=0.01)
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, rel=0.1)
    hours, speed, megabytes_per_second = plan["hours"]
    assert hours == pytest.approx(num_tokens / speed / 3600, rel=0.1)
    assert megabytes_per_second == pytest.approx(speed * BYTES_PER_TOKEN / 1e6, abs=1)
    assert 0.1 < plan["memory"][0] < 100
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_computed_again(lkspec_cli, states, no_target_pass):
    before = {path.name: path.stat().st_mtime_ns for path in states.glob("*.safetensors")}
    planned = lkspec_cli(*CAPTURE, f"out={states}", "plan=true")
    assert planned.code == 0, planned.err
    assert numbers(planned.out)["to capture"] == [0, 10, 0]
    again = lkspec_cli(*CAPTURE, f"out={states}")
    assert again.code == 0, again.err
    assert {path.name: path.stat().st_mtime_ns for path in states.glob("*.safetensors")} == before


def test_the_command_that_a_capture_prints_trains_from_it(lkspec_cli):
    captured = lkspec_cli(*CAPTURE, "target.aux_layer_ids=[1,3,6]")  # the folder is named by target and data
    assert captured.code == 0, captured.err
    verb, *arguments = shlex.split(captured.out.strip().splitlines()[-1])[1:]
    assert verb == "train"
    assert "states_dir=captured/tiny-tiny" in arguments
    rest = [override for override in TINY_RUN if override not in arguments]
    trained = lkspec_cli("train", *arguments, *rest, *NO_EVALUATION, "trainer.max_steps=1")
    assert trained.code == 0, trained.err


@pytest.mark.slow
def test_losses_are_the_online_ones(lkspec_cli, states, monkeypatch):
    online = train(lkspec_cli, root="online")
    monkeypatch.setattr(TinyTarget, "states", None)  # from here on the target cannot be run
    offline = train(lkspec_cli, f"states_dir={states}", root="offline")
    remembered = train(lkspec_cli, f"states_dir={states}", "states_memory_gb=1", root="remembered")
    compared = ["train/loss", "train/alpha/depth_2", "val/text/alpha/depth_1", "val/text/objective/depth_2"]
    for name in compared:
        expected = logged(online, name)
        assert len(expected) == (12 if name.startswith("train") else 3)
        assert logged(offline, name) == pytest.approx(expected, abs=1e-3)
        assert logged(offline, name) != expected  # the states are rounded
        assert logged(remembered, name) == pytest.approx(logged(offline, name), abs=1e-6)


@pytest.mark.slow
def test_a_run_is_named_by_whether_states_are_captured_not_by_where(lkspec_cli, states):
    shutil.copytree(states, "elsewhere")
    brief = (*NO_EVALUATION, "trainer.max_steps=1")
    for root, override in {"a": "seed=0", "b": f"states_dir={states}", "c": "states_dir=elsewhere"}.items():
        outcome = lkspec_cli("train", *TINY_RUN, *brief, override, f"run_root={root}")
        assert outcome.code == 0, outcome.err
    online, captured, elsewhere = (only_run(Path(root)).name for root in "abc")
    assert captured == elsewhere != online


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("target.seed=1", "target: captured "),
        ("target.kind=gemma3", "target: captured "),
        ("target.aux_layer_ids=[1,2,3]", "aux_layer_ids: captured 2, 4, 5, now 1, 2, 3"),
        ("target.dtype=bfloat16", "dtype: captured float32, now bfloat16"),
        ("data.train=tiny:12", r"lacks 2 of the 12 conversations of this run \(tiny-00010, tiny-00011\)"),
        ("data.max_length=80", r"lacks \d+ of the 10 conversations of this run"),
    ],
)
def test_training_on_anything_else_is_refused_before_it_starts(lkspec_cli, states, override, message):
    outcome = lkspec_cli(*SHORT_RUN, f"states_dir={states}", override)
    assert re.search(message, outcome.error_line)
    assert not list(Path("runs").rglob("*.ckpt"))


def test_part_of_what_was_captured_will_do(lkspec_cli, states, no_target_pass):
    brief = ("trainer.max_steps=1", "trainer.max_epochs=1", "data.limit_conversations=4")
    outcome = lkspec_cli(*SHORT_RUN, *brief, f"states_dir={states}")
    assert outcome.code == 0, outcome.err


def test_a_folder_without_a_capture(lkspec_cli):
    assert "nowhere holds no capture" in lkspec_cli(*SHORT_RUN, "states_dir=nowhere").error_line


@pytest.mark.slow
def test_a_damaged_shard_is_named_and_captured_again(lkspec_cli, states):
    shutil.copytree(states, "states")
    shard = Path("states/shard-00001.safetensors")
    intact = shard.read_bytes()
    shard.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    assert "states/shard-00001.safetensors is damaged" in lkspec_cli(*SHORT_RUN, "states_dir=states").error_line
    repaired = lkspec_cli(*CAPTURE, "out=states")
    assert repaired.code == 0, repaired.err
    assert "captured anew: states/shard-00001.safetensors" in repaired.out
    outcome = lkspec_cli(*SHORT_RUN, "trainer.max_epochs=1", "states_dir=states")
    assert outcome.code == 0, outcome.err


def test_another_target_needs_another_folder_or_overwrite(lkspec_cli, states):
    shutil.copytree(states, "states")
    other = (*CAPTURE, "out=states", "target.seed=1")
    for plan in ("true", "false"):
        assert "target: captured " in lkspec_cli(*other, f"plan={plan}").error_line
    outcome = lkspec_cli(*other, "overwrite=true")
    assert outcome.code == 0, outcome.err
    assert "captured 10 conversations" in outcome.out


def test_a_full_disk_is_noticed_before_starting(lkspec_cli, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    outcome = lkspec_cli(*CAPTURE, "out=states")
    assert re.search(r"states: the states take [\d.]+ GB, but only 0.0001 GB are free", outcome.error_line)
    assert not list(Path("states").glob("*.safetensors"))


def test_a_shard_has_a_size(lkspec_cli):
    assert "shard_mb: expected a size above 0, got 0" in lkspec_cli(*CAPTURE, "shard_mb=0").error_line
