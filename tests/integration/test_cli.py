"""The verbs that read a finished run or write data, help, and a user's own classes."""

from __future__ import annotations

import csv
import json
import signal
import sys
import zipfile
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from command_line import (
    BRIEF_EVALUATION,
    NO_EVALUATION,
    REPOSITORY,
    TINY_RUN,
    only_run,
    run_process,
    subprocess_cli,
    weights,
)

from lkspec.cli import VERBS
from lkspec.runs.folder import RunFolder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, module_cli) -> Path:
    """A finished run, not yet measured."""
    folder = tmp_path_factory.mktemp("trained")
    outcome = module_cli(folder, "train", *TINY_RUN, *NO_EVALUATION, "loss=lk_alpha")
    assert outcome.code == 0, outcome.err
    return only_run(folder / "runs")


class TestHelp:
    def test_of_the_program(self, lkspec_cli):
        for arguments in ([], ["--help"], ["-h"]):
            outcome = lkspec_cli(*arguments)
            assert outcome.code == 0
            assert all(f"lkspec {verb}" in outcome.out for verb in VERBS)

    def test_an_unknown_verb(self, lkspec_cli):
        outcome = lkspec_cli("trian")
        assert outcome.code == 2
        assert "'trian'" in outcome.err.splitlines()[0]
        assert all(verb in outcome.err for verb in VERBS)

    @pytest.mark.parametrize("verb", VERBS)
    def test_of_a_verb(self, lkspec_cli, verb):
        outcome = lkspec_cli(verb, "--help")
        assert outcome.code == 0
        assert outcome.out.startswith(f"lkspec {verb}: ")
        keys = set(yaml.safe_load((REPOSITORY / "conf" / f"{verb}.yaml").read_text())) - {"defaults", "hydra"}
        assert all(f"\n{key}:" in outcome.out for key in keys)
        assert "$" not in outcome.out.partition("== Keys")[0]


class TestEvaluate:
    def test_a_run_is_named_by_latest_prefix_or_path(self, lkspec_cli, trained, tmp_path):
        commands = [
            ("run=latest", f"run_root={trained.parent}", "num_draft_tokens=[1,3]"),
            (f"run={trained.name[:12]}", f"run_root={trained.parent}", "num_draft_tokens=2"),
            (f"run={trained}", "num_draft_tokens=2", "temperatures=0", "batch_size=1"),
        ]
        for command in commands:
            outcome = lkspec_cli("evaluate", *command, *BRIEF_EVALUATION)
            assert outcome.code == 0, outcome.err
            assert str(trained / "results.csv") in outcome.out
        rows = RunFolder(trained).read_results()
        measured = {(row.num_draft_tokens, row.temperature, row.speedup is not None) for row in rows}
        assert measured == {
            *((k, t, False) for k in (1, 2, 3) for t in (0.0, 1.0)),
            (2, 0.0, True),  # another batch size is another protocol
        }
        assert len(rows) == 7
        assert all(len(row.alpha) == row.num_draft_tokens for row in rows)
        assert {row.steps for row in rows} == {8}
        assert not list(tmp_path.iterdir())

    def test_measuring_again_replaces_the_row(self, lkspec_cli, trained):
        command = ("evaluate", f"run={trained}", "num_draft_tokens=5", "temperatures=1", *BRIEF_EVALUATION)
        found = []
        for _ in range(2):
            assert lkspec_cli(*command).code == 0
            found.append([row for row in RunFolder(trained).read_results() if row.num_draft_tokens == 5])
        assert len(found[0]) == len(found[1]) == 1
        assert found[0][0].tau == found[1][0].tau
        rounds = [row for row in RunFolder(trained).read_rounds() if row.num_draft_tokens == 5]
        assert len({(row.prompt_id, row.round) for row in rounds}) == len(rounds)

    @pytest.mark.parametrize("override", ["draft=eagle3", "target=tiny", "vocab.size=8", "+data.seed=1", "loss=kl"])
    def test_what_the_run_has_fixed_cannot_be_overridden(self, lkspec_cli, trained, override):
        line = lkspec_cli("evaluate", f"run={trained}", override).error_line
        assert override in line
        assert "cannot be overridden" in line

    @pytest.mark.parametrize(
        ("overrides", "named"),
        [
            ([], "run"),
            (["run=latest"], "no runs"),
            (["run=nonsense", "run_root={root}"], "nonsense"),
            (["run={run}", "num_draft_tokens=0"], "num_draft_tokens"),
            (["run={run}", "num_draft_tokens=[2,0]"], "num_draft_tokens"),
            (["run={run}", "temperatures=[-1]"], "temperature"),
            (["run={run}", "batch_size=0"], "batch_size"),
            (["run={run}", "benchmark=jsonl", "benchmark.path=none.jsonl"], "none.jsonl"),
            (["run={run}", "dtype=float8"], "float8"),
        ],
    )
    def test_a_bad_input_is_one_readable_line(self, lkspec_cli, trained, overrides, named):
        overrides = [override.format(run=trained, root=trained.parent) for override in overrides]
        outcome = lkspec_cli("evaluate", "benchmark=mini_math", "benchmark.num_prompts=1", *overrides)
        if named == "nonsense":  # the names to choose from follow
            assert outcome.code == 2
            assert named in outcome.err.splitlines()[0]
            assert trained.name in outcome.err
        else:
            assert named in outcome.error_line

    def test_another_target_under_the_same_name_is_refused(self, lkspec_cli, trained):
        folder = Path("runs/changed")
        folder.mkdir(parents=True)
        config = yaml.safe_load((trained / "config.yaml").read_text())
        config["target"]["seed"] = 1
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "checkpoints").symlink_to(trained / "checkpoints")
        assert "its weights have changed" in lkspec_cli("evaluate", "run=changed").error_line


class Page(HTMLParser):
    """Checks that every tag is closed by its own end tag, and collects tags and the text of each class."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: set[str] = set()
        self.texts: dict[str, list[str]] = {}
        self.titles: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag in self.VOID:
            return
        attributes = dict(attrs)
        self.titles += [attributes["title"]] if "title" in attributes else []
        self.open.append((tag, attributes.get("class", "")))
        if self.open[-1][1]:
            self.texts.setdefault(self.open[-1][1], []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, name in self.open:
            if name:
                self.texts[name][-1] += data


HOSTILE = 'Why is <script>alert("1")</script> & "so" bad?'


class TestShow:
    def test_a_text_file_as_terminal_text_and_page(self, lkspec_cli, trained, tmp_path):
        (tmp_path / "question[1].txt").write_text(HOSTILE + "\n")
        outcome = lkspec_cli("show", f"run={trained}", "prompt_file='question[1].txt'", "max_new_tokens=24")
        assert outcome.code == 0, outcome.err
        assert HOSTILE in outcome.out
        assert "24 tokens in " in outcome.out
        page = Page((trained / "show.html").read_text(encoding="utf-8"))
        assert page.texts["prompt"] == [HOSTILE]
        assert "script" not in page.tags
        assert page.texts["count"][0].startswith("24 tokens in ")
        assert len(page.texts["answer"][0]) > 0
        assert {"the target (bonus)", "the draft, accepted at depth 4"} <= set(page.titles)

    def test_prompts_in_a_jsonl_file(self, lkspec_cli, trained, tmp_path):
        rows = [{"id": "first[/b]", "prompt": "One?"}, {"id": "second", "prompt": "Two?"}]
        (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        settings = ("max_new_tokens=8", "temperature=1", "num_draft_tokens=2", "html=pages/page.html")
        outcome = lkspec_cli("show", f"run={trained}", "prompt_file=prompts.jsonl", *settings)
        assert outcome.code == 0, outcome.err
        assert "first[/b]" in outcome.out
        page = Page((tmp_path / "pages" / "page.html").read_text(encoding="utf-8"))
        assert page.texts["prompt"] == ["One?", "Two?"]
        assert len(page.texts["answer"]) == 2
        assert "T = 1, K = 2" in (tmp_path / "pages" / "page.html").read_text()

    def test_standard_input(self, lkspec_cli, trained):
        settings = ("prompt_file=-", "max_new_tokens=4", "system='Be brief.'", "html=page.html")
        outcome = lkspec_cli("show", f"run={trained}", *settings, stdin="Why?")
        assert outcome.code == 0, outcome.err
        assert Page(Path("page.html").read_text()).texts["prompt"] == ["Why?"]

    def test_bad_inputs(self, lkspec_cli, trained):
        assert "prompt_file" in lkspec_cli("show", f"run={trained}").error_line
        assert "nowhere.txt" in lkspec_cli("show", f"run={trained}", "prompt_file=nowhere.txt").error_line
        assert "empty" in lkspec_cli("show", f"run={trained}", "prompt_file=-", stdin=" \n").error_line
        assert "draft" in lkspec_cli("show", f"run={trained}", "prompt_file=-", "draft=eagle3").error_line
        nothing_drafted = lkspec_cli("show", f"run={trained}", "prompt_file=-", "num_draft_tokens=0", stdin="Why?")
        assert "num_draft_tokens" in nothing_drafted.error_line


class TestInspect:
    INSPECT = ("inspect", "target=tiny", "target.device=cpu", "data=tiny")

    def test_examples_and_counts(self, lkspec_cli):
        outcome = lkspec_cli(*self.INSPECT, "num_examples=3")
        assert outcome.code == 0, outcome.err
        assert outcome.out.count("<|im_start|>user") >= 3
        assert "64 conversations" in outcome.out

    def test_no_conversation_need_be_held_out(self, lkspec_cli):
        outcome = lkspec_cli(*self.INSPECT, "data.train=tiny:9", "data.val_fraction=0.02", "num_examples=9")
        assert outcome.code == 0, outcome.err
        assert outcome.out.count("tokens supervised") == 9
        assert "9 conversations" in outcome.out

    def test_conversations_by_name(self, lkspec_cli):
        outcome = lkspec_cli(*self.INSPECT, "ids=[tiny-00005]")
        assert outcome.code == 0, outcome.err
        assert "tiny-00005: " in outcome.out
        assert "tiny-9" in lkspec_cli(*self.INSPECT, "ids=[tiny-00005,tiny-9]").error_line

    def test_a_missing_file(self, lkspec_cli):
        assert "none.jsonl" in lkspec_cli(*self.INSPECT[:3], "data=jsonl", "data.train=none.jsonl").error_line


KILLER_TARGET = """
import os, pathlib, signal
from lkspec.targets.tiny import TinyTarget

class Killed(TinyTarget):
    steps = 0

    def step(self, *arguments):
        self.steps += 1
        if self.steps == 30 and not pathlib.Path("killed").exists():
            pathlib.Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(*arguments)
"""


WRITER_TARGET = """
from dataclasses import replace
import torch
from lkspec.targets.tiny import TinyTarget

class Writer(TinyTarget):
    \"\"\"Writes letters and spaces only, ends after some.\"\"\"

    def __init__(self, **settings):
        super().__init__(**settings)
        bias = torch.full((self.vocab_size,), -1e4)
        bias[97:123] = 0.0
        bias[32] = 2.0
        bias[self.eos_ids[0]] = 2.0
        self.head = replace(self.head, bias=bias, scale=0.3)
"""


class TestGenerate:
    GENERATE = ("generate", "target=tiny", "target.device=cpu", "prompts=prompts.jsonl", "max_new_tokens=12")

    @pytest.fixture(autouse=True)
    def prompts(self, tmp_path) -> list[dict[str, str]]:
        rows = [{"id": f"p{i}", "prompt": f"Question {i}:\u2028 why?"} for i in range(6)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / "prompts.jsonl").write_text(text, encoding="utf-8")
        return rows

    @staticmethod
    def read(path: str) -> list[dict]:
        return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]

    def test_answers_do_not_depend_on_the_batch(self, lkspec_cli, prompts):
        for size in (1, 4):
            outcome = lkspec_cli(*self.GENERATE, f"batch_size={size}", f"out=answers{size}.jsonl", "token_ids=true")
            assert outcome.code == 0, outcome.err
        assert Path("answers1.jsonl").read_bytes() == Path("answers4.jsonl").read_bytes()
        rows = self.read("answers4.jsonl")
        assert [row["id"] for row in rows] == [row["id"] for row in prompts]
        for row, prompt in zip(rows, prompts, strict=True):
            assert row["messages"][0] == {"role": "user", "content": prompt["prompt"]}
            assert row["messages"][1]["role"] == "assistant"
            assert len(row["token_ids"]) == row["num_tokens"] <= 12
        assert not list(Path().glob("*.partial"))

    def test_answers_train_a_draft(self, lkspec_cli):
        assert lkspec_cli(*self.GENERATE, "out=answers.jsonl").code == 0
        data = ("data=jsonl", "data.train=answers.jsonl", "data.val_fraction=0.4", "data.max_length=512")
        run = (*TINY_RUN, *NO_EVALUATION, *data, "data.num_workers=0", "trainer.max_steps=1")
        outcome = lkspec_cli("train", *run)
        assert outcome.code == 0, outcome.err

    @pytest.mark.slow
    def test_a_killed_generation_resumes_without_losses_or_duplicates(self, lkspec_cli, tmp_path):
        Path("killer.py").write_text(KILLER_TARGET)
        Path("conf/target").mkdir(parents=True)
        Path("conf/target/killed.yaml").write_text("defaults: [tiny, _self_]\n_target_: killer.Killed\n")
        command = (*self.GENERATE, "target=killed", "batch_size=2")
        outcome = subprocess_cli(*command, "out=answers.jsonl", cwd=tmp_path)
        assert outcome.code == -signal.SIGKILL, outcome
        assert not Path("answers.jsonl").exists()
        done = self.read("answers.jsonl.partial")
        assert 0 < len(done) < 6
        with Path("answers.jsonl.partial").open("a", encoding="utf-8") as file:
            file.write('{"id": "p5", "messages": [{"ro')  # torn by the kill
        resumed = lkspec_cli(*command, "out=answers.jsonl")
        assert resumed.code == 0, resumed.err
        assert f"{len(done)} rows are done" in resumed.out
        assert lkspec_cli(*command, "out=whole.jsonl").code == 0
        assert Path("answers.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
        assert len(self.read("whole.jsonl")) == 6
        assert not list(Path().glob("*.partial"))

    def interrupted(self, lkspec_cli, *overrides: str) -> Path:
        """A partial file with three of the six answers."""
        assert lkspec_cli(*self.GENERATE, *overrides, "out=answers.jsonl").code == 0
        partial = Path("answers.jsonl.partial")
        partial.write_bytes(b"".join(Path("answers.jsonl").read_bytes().splitlines(keepends=True)[:3]))
        Path("answers.jsonl").unlink()
        return partial

    @pytest.mark.parametrize("override", ["temperature=0.5", "seed=1", "max_new_tokens=13", "target.seed=1"])
    def test_a_partial_file_made_with_other_settings_is_refused(self, lkspec_cli, override):
        partial = self.interrupted(lkspec_cli)
        kept = partial.read_bytes()
        line = lkspec_cli(*self.GENERATE, "out=answers.jsonl", override).error_line
        assert override.partition("=")[0].partition(".")[0] in line
        assert partial.read_bytes() == kept

    def test_prompts_that_have_changed_are_refused(self, lkspec_cli):
        self.interrupted(lkspec_cli)
        Path("prompts.jsonl").write_text('{"id": "p0", "prompt": "Another?"}\n')
        assert "prompts" in lkspec_cli(*self.GENERATE, "out=answers.jsonl").error_line

    def test_another_batch_size_resumes(self, lkspec_cli):
        self.interrupted(lkspec_cli)
        assert lkspec_cli(*self.GENERATE, "out=answers.jsonl", "batch_size=5").code == 0
        assert [row["id"] for row in self.read("answers.jsonl")] == [f"p{i}" for i in range(6)]

    def test_an_existing_file_is_kept(self, lkspec_cli):
        Path("answers.jsonl").write_text("mine")
        assert "answers.jsonl exists" in lkspec_cli(*self.GENERATE, "out=answers.jsonl").error_line
        assert Path("answers.jsonl").read_text() == "mine"

    @pytest.mark.parametrize(
        ("wrong", "named"),
        [
            (["prompts=nowhere.jsonl"], "nowhere.jsonl"),
            (["prompts=magpie"], "num_prompts"),
            (["field=question"], "question"),
            (["target.kind=nonsense"], "target.kind"),
            (["temperature=-1"], "temperature"),
            (["batch_size=0"], "batch_size"),
            (["num_prompts=0"], "num_prompts"),
        ],
    )
    def test_a_mistake_does_not_stand_in_the_way_of_the_right_command(self, lkspec_cli, wrong, named):
        assert named in lkspec_cli(*self.GENERATE, "out=answers.jsonl", *wrong).error_line
        assert lkspec_cli(*self.GENERATE, "out=answers.jsonl", "num_prompts=1").code == 0

    def test_prompts_from_the_bare_chat_header(self, lkspec_cli):
        Path("writer.py").write_text(WRITER_TARGET)
        Path("conf/target").mkdir(parents=True)
        Path("conf/target/writer.yaml").write_text("defaults: [tiny, _self_]\n_target_: writer.Writer\n")
        magpie = (*self.GENERATE[:3], "target=writer", "prompts=magpie", "num_prompts=3", "max_new_tokens=40")
        for size in (3, 4):
            outcome = lkspec_cli(*magpie, f"batch_size={size}", f"out=prompts{size}.jsonl")
            assert outcome.code == 0, outcome.err
        assert Path("prompts3.jsonl").read_bytes() == Path("prompts4.jsonl").read_bytes()
        rows = self.read("prompts3.jsonl")
        assert len(rows) == 3
        assert all(len(row["prompt"].split()) >= 3 for row in rows)
        answered = lkspec_cli(*self.GENERATE[:3], "prompts=prompts3.jsonl", "max_new_tokens=4", "out=a.jsonl")
        assert answered.code == 0, answered.err

    def test_a_target_that_never_writes_a_prompt_is_not_asked_for_ever(self, lkspec_cli):
        magpie = ("prompts=magpie", "num_prompts=1", "max_new_tokens=2", "batch_size=25")  # no word is that short
        line = lkspec_cli(*self.GENERATE[:3], *magpie, "out=prompts_.jsonl").error_line
        assert "only 0 of 50 attempts" in line
        assert "max_new_tokens" in line


MY_LOSS = """
from lkspec.losses.objectives import Objective

class SquaredTV(Objective):
    def __init__(self, power: float) -> None:
        self.power = power

    def values(self, stats, mean_alpha):
        return (1 - stats.log_alpha.exp()) ** self.power * stats.mask

    def describe(self):
        return f"squared_tv({self.power})"
"""


@pytest.mark.slow
def test_two_files_in_an_empty_folder_make_a_loss(tmp_path):
    (tmp_path / "my_loss.py").write_text(MY_LOSS)
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    (tmp_path / "conf" / "loss" / "my_loss.yaml").write_text("_target_: my_loss.SquaredTV\npower: 2.0\n")
    outcome = subprocess_cli("train", *TINY_RUN, *NO_EVALUATION, "loss=my_loss", "trainer.max_steps=2", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    run = only_run(tmp_path / "runs")
    assert run.name.startswith("eagle3-my_loss-tiny-s0-")
    assert "squared_tv(2.0)" in outcome.out
    assert all(bool(value.isfinite().all()) for value in weights(run).values())


def test_a_draft_of_ones_own_is_measured_under_its_name(lkspec_cli):
    Path("my_draft.py").write_text("from lkspec.drafts.eagle3 import Eagle3\n\nclass Mine(Eagle3):\n    pass\n")
    Path("conf/draft").mkdir(parents=True)
    Path("conf/draft/mine.yaml").write_text("_target_: my_draft.Mine\nnum_depths: 2\npaper_eta: 3.0\n")
    outcome = lkspec_cli("train", *TINY_RUN, *BRIEF_EVALUATION, "draft=mine", "trainer.max_steps=1")
    assert outcome.code == 0, outcome.err
    with (only_run() / "results.csv").open() as file:
        assert {row["draft"] for row in csv.DictReader(file)} == {"mine"}


@pytest.mark.slow
def test_an_installed_wheel_brings_its_configuration(tmp_path):
    if find_spec("hatchling") is None:
        pytest.skip("building a wheel without the network needs hatchling: pip install hatchling")
    built, installed, empty = (tmp_path / name for name in ("built", "installed", "empty"))
    empty.mkdir()
    command = ["-m", "pip", "wheel", str(REPOSITORY), "--no-deps", "--no-build-isolation", "-w", str(built), "-q"]
    outcome = run_process([sys.executable, *command], cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    with zipfile.ZipFile(next(built.glob("lkspec-*.whl"))) as wheel:
        wheel.extractall(installed)
    train = [sys.executable, "-m", "lkspec.cli", "train", *TINY_RUN, *NO_EVALUATION, "trainer.max_steps=1"]
    outcome = run_process(train, cwd=empty, python_path=str(installed))
    assert outcome.code == 0, outcome.err
    assert "commit: none" in (only_run(empty / "runs") / "git.txt").read_text()
    where = "import lkspec.app.application; print(lkspec.app.application.config_dir())"
    found = run_process([sys.executable, "-c", where], cwd=empty, python_path=str(installed))
    assert found.out.strip() == str(installed / "lkspec" / "conf")
