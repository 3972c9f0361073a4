"""From the command line: a run out to an engine's format, and that format in again, as draft, start and target."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import BRIEF_EVALUATION, NO_EVALUATION, REPOSITORY, TINY_RUN, Outcome, Run, logged, only_run, weights
from safetensors.torch import load_file, save_file

from lkspec.targets.tiny import TinyTarget

pytestmark = pytest.mark.slow

RUN = (*TINY_RUN, "trainer.max_steps=3", "optimizer.lr=3e-3", "logger=csv", "vocab.size=200")
MEASURED = (*BRIEF_EVALUATION, "num_draft_tokens=[1,2]")
TARGET = ("target=tiny", "target.device=cpu")
FORMATS = {"eagle3": "vllm", "medusa": "medusa", "mlp": "mlp_speculator"}


@pytest.fixture(scope="module")
def runs(trained_run: Callable[[str], Path]) -> dict[str, Path]:
    """One finished run of each draft, measured."""
    return {name: trained_run(name) for name in FORMATS}


@pytest.fixture(scope="module")
def exports(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, module_cli: Run) -> dict[str, Path]:
    """Each run's export, and EAGLE-3 in speculators' layout."""
    folder = tmp_path_factory.mktemp("exports")
    for name, run in runs.items():
        outcome = module_cli(folder, "export", f"run={run}", f"out={name}")
        assert outcome.code == 0, outcome.err
    outcome = module_cli(folder, "export", f"run={runs['eagle3']}", "format=speculators", "out=speculators")
    assert outcome.code == 0, outcome.err
    return {name: folder / name for name in (*runs, "speculators")}


def rows(run: Path) -> list[tuple[str, ...]]:
    """What a measurement found, the run's own facts and its speed left out."""
    kept = ("benchmark", "temperature", "num_draft_tokens", "tau", "low", "high", "alpha_1", "alpha_2", "walk_tau")
    with (run / "results.csv").open() as file:
        return sorted(tuple(row[key] for key in kept) for row in csv.DictReader(file))


def pretrained(folder: Path) -> tuple[str, ...]:
    return ("draft=pretrained", f"draft.path={folder}", *TARGET)


@pytest.mark.parametrize("name", ["eagle3", "medusa", "mlp", "speculators"])
def test_an_export_is_measured_like_its_run(
    name: str, lkspec_cli: Run, runs: dict[str, Path], exports: dict[str, Path]
) -> None:
    """Every number, and once more from the folder that was made for its results."""
    outcome = lkspec_cli("evaluate", *pretrained(exports[name]), *MEASURED)
    assert outcome.code == 0, outcome.err
    assert "acceptance length without training (step 0)" in outcome.out
    folder = only_run()
    assert folder.name.startswith(f"{name}-pretrained-tiny-s0-")
    expected = rows(runs["eagle3" if name == "speculators" else name])
    assert rows(folder) == expected
    assert (folder / "figures" / "tau_over_k.png").is_file()
    (folder / "results.csv").unlink()
    again = lkspec_cli("evaluate", "run=latest", *MEASURED)
    assert again.code == 0, again.err
    assert rows(folder) == expected
    once_more = lkspec_cli("evaluate", *pretrained(exports[name]), *MEASURED)
    assert once_more.code == 0, once_more.err
    assert only_run() == folder


def test_a_sharpened_export_drafts_the_same_greedily_and_another_at_a_temperature(
    lkspec_cli: Run, runs: dict[str, Path]
) -> None:
    exported = lkspec_cli("export", f"run={runs['eagle3']}", "out=sharp", "sharpness=3")
    assert exported.code == 0, exported.err
    outcome = lkspec_cli("evaluate", *pretrained(Path("sharp")), *MEASURED)
    assert outcome.code == 0, outcome.err
    ours, plain = rows(only_run()), rows(runs["eagle3"])
    assert [row for row in ours if float(row[1]) == 0] == [row for row in plain if float(row[1]) == 0]
    assert [row for row in ours if float(row[1]) == 1] != [row for row in plain if float(row[1]) == 1]


def test_what_the_command_says(exports: dict[str, Path], lkspec_cli: Run, runs: dict[str, Path]) -> None:
    options = ("out=here", "num_draft_tokens=5", "license=apache-2.0", "target_id=org/target")
    outcome = lkspec_cli("export", f"run={runs['eagle3']}", *options)
    assert outcome.code == 0, outcome.err
    checked = ["auxiliary states: ", "RoPE: ", "norms: ", "positions: ", "vocabulary: ", "q, read back: at most "]
    assert [line for line in outcome.out.splitlines() if any(line.strip().startswith(c) for c in checked)]
    assert outcome.out.startswith(f"exported {runs['eagle3'].name} (format=vllm) to here\nchecked:\n")
    assert "4 rounds of 5 tokens" in outcome.out
    place = Path("here").absolute()
    assert f'vllm serve org/target --speculative-config \'{{"method": "eagle3", "model": "{place}", ' in outcome.out
    assert "--speculative-num-steps 5 --speculative-eagle-topk 1 --speculative-num-draft-tokens 6" in outcome.out
    card = Path("here/README.md").read_text()
    assert 'license: "apache-2.0"' in card
    assert "base_model: org/target" in card
    for row in rows(runs["eagle3"]):
        assert f"**{float(row[3]):.3f}** | {float(row[4]):.3f} - {float(row[5]):.3f}" in card
    assert runs["eagle3"].name in card
    assert str(Path.cwd()) not in card


def test_nothing_is_overwritten_unless_told(lkspec_cli: Run, exports: dict[str, Path], runs: dict[str, Path]) -> None:
    shutil.copytree(exports["medusa"], "out")
    export = ("export", f"run={runs['eagle3']}", "out=out")
    assert "there is an export already; overwrite=true replaces it" in lkspec_cli(*export).error_line
    assert json.loads(Path("out/config.json").read_text())["model_type"] == "medusa"
    assert lkspec_cli(*export, "overwrite=true").code == 0
    assert json.loads(Path("out/config.json").read_text())["model_type"] == "llama"
    Path("notes").mkdir()
    Path("notes/a").write_text("mine")
    line = lkspec_cli("export", f"run={runs['eagle3']}", "out=notes", "overwrite=true").error_line
    assert "something else than an export of lkspec" in line


def test_a_checkpoint_is_shown_and_converted(lkspec_cli: Run, exports: dict[str, Path]) -> None:
    Path("q.txt").write_text("Why?")
    shown = lkspec_cli("show", *pretrained(exports["eagle3"]), "prompt_file=q.txt", "max_new_tokens=8")
    assert shown.code == 0, shown.err
    assert (only_run() / "show.html").is_file()
    converted = lkspec_cli("export", *pretrained(exports["eagle3"]), "format=speculators", "out=converted")
    assert converted.code == 0, converted.err
    assert "not trained by lkspec" in Path("converted/README.md").read_text()
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (exports["speculators"], Path("converted")))
    assert set(ours) == set(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("name", ["eagle3", "medusa", "mlp"])
def test_training_goes_on_from_an_export(
    name: str, lkspec_cli: Run, runs: dict[str, Path], exports: dict[str, Path]
) -> None:
    """As from the run itself: the same losses, the same vocabulary."""
    bare = [override for override in RUN if not override.startswith("vocab.size")]
    embeddings = ("draft.embeddings=learned",) if name == "mlp" else ()
    losses = []
    for root, source in (("a", runs[name]), ("b", exports[name])):
        learned = embeddings if root == "b" else ()
        start = ("train", f"draft={name}", f"draft.init_from={source}", *learned, *bare, *NO_EVALUATION)
        outcome = lkspec_cli(*start, f"run_root={root}")
        assert outcome.code == 0, outcome.err
        losses.append(logged(only_run(Path(root)), "train/loss"))
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)
    first, second = (weights(only_run(Path(root)))["draft.vocab.ids"] for root in ("a", "b"))
    assert torch.equal(first, second)


def test_training_of_whatever_a_checkpoint_is(lkspec_cli: Run, exports: dict[str, Path]) -> None:
    """``draft=pretrained`` becomes the class it is: the run is resumed and evaluated without the folder."""
    path = Path(shutil.copytree(exports["eagle3"], "my-draft"))
    bare = [override for override in RUN if not override.startswith("vocab.size")]
    outcome = lkspec_cli("train", "draft=pretrained", f"draft.path={path}", *bare, *NO_EVALUATION)
    assert outcome.code == 0, outcome.err
    run = only_run()
    assert run.name.startswith("my-draft-lk_lambda-tiny-s0-")
    assert len(weights(run)["draft.vocab.ids"]) == 200
    shutil.rmtree(path)
    for command in (("train", "resume=latest"), ("evaluate", "run=latest", *BRIEF_EVALUATION, "num_draft_tokens=2")):
        again = lkspec_cli(*command)
        assert again.code == 0, again.err


def test_a_run_starts_from_the_folder_of_a_checkpoint(lkspec_cli: Run, exports: dict[str, Path]) -> None:
    evaluated = lkspec_cli("evaluate", *pretrained(exports["medusa"]), *BRIEF_EVALUATION, "num_draft_tokens=1")
    assert evaluated.code == 0, evaluated.err
    bare = [override for override in RUN if not override.startswith("vocab.size")]
    start = ("train", "draft=medusa", f"draft.init_from={only_run()}", *bare, *NO_EVALUATION, "run_root=tuned")
    outcome = lkspec_cli(*start)
    assert outcome.code == 0, outcome.err


def test_a_module_goes_into_its_target_and_comes_out(lkspec_cli: Run) -> None:
    """A target without MTP gets a trained module; the copy then is target, draft and start of further training."""
    target = TinyTarget(kind="deepseek_v3", device="cpu")
    target.model.save_pretrained("bare")
    target.tokenizer.save_pretrained("bare")
    own = ("target=transformers", "target.path=bare", "target.dtype=float32", "target.device=cpu")
    run = [override for override in RUN if not override.startswith(("target", "vocab.size"))]
    trained = lkspec_cli("train", "draft=mtp", *own, *run, *BRIEF_EVALUATION, "evaluation.num_draft_tokens=[1,2]")
    assert trained.code == 0, trained.err
    exported = lkspec_cli("export", "run=latest", "out=whole", "target_copy=true")
    assert exported.code == 0, exported.err
    place = Path("whole").absolute()
    assert f'vllm serve {place} --speculative-config \'{{"method": "mtp"' in exported.out
    assert f"--model-path {place} --speculative-algorithm NEXTN" in exported.out
    alone = lkspec_cli("export", "run=latest", "out=alone")
    assert alone.code == 0, alone.err
    assert "no current engine serves this folder as it is" in alone.out
    stitched = [override.replace("bare", "whole") for override in own]
    for folder, root in (("whole", "a"), ("alone", "b")):
        draft = ("draft=pretrained", f"draft.path={folder}", f"run_root={root}")
        measured = lkspec_cli("evaluate", *draft, *stitched, *MEASURED)
        assert measured.code == 0, measured.err
        assert rows(only_run(Path(root))) == rows(only_run())
    tuned = lkspec_cli("train", "draft=mtp_native", *stitched, *run, *NO_EVALUATION, "run_root=tuned")
    assert tuned.code == 0, tuned.err
    losses = [logged(only_run(Path(root)), "train/loss")[0] for root in ("runs", "tuned")]
    assert losses[1] < 0.98 * losses[0]


# --- refusals -----------------------------------------------------------------------------------------------------


def changed(folder: Path, to: Path, **config: object) -> Path:
    """A copy with another config."""
    shutil.copytree(folder, to)
    old = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**old, **config}))
    return to


def test_a_start_that_computes_something_else(lkspec_cli: Run, exports: dict[str, Path]) -> None:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 500.0}
    cases = {
        "norm": ({"norm_before_residual": True}, "draft.norm_before_residual is True there, False in this draft"),
        "rope": (rope, "its decoder layer has rope_parameters .*500.*; set draft.layer.rope_parameters, or take"),
        "eps": (
            {"rms_norm_eps": 0.5},
            "its decoder layer has rms_norm_eps 0.5, this draft's 1e-06; set draft.layer.rms",
        ),
    }
    bare = [override for override in RUN if not override.startswith("vocab.size")]
    for name, (config, message) in cases.items():
        folder = changed(exports["eagle3"], Path(name), **config)
        start = ("train", "draft=eagle3", f"draft.init_from={folder.absolute()}", *bare, *NO_EVALUATION)
        assert re.search(message, lkspec_cli(*start, f"run_root=r_{name}").error_line)
    taken_over = lkspec_cli("train", "draft=pretrained", "draft.path=rope", *bare, *NO_EVALUATION, "run_root=r")
    assert taken_over.code == 0, taken_over.err
    fitting = ("train", "draft=eagle3", f"draft.init_from={Path('rope').absolute()}", *bare, *NO_EVALUATION)
    told = lkspec_cli(*fitting, "draft.layer={rope_parameters:{rope_type:default,rope_theta:500.0}}", "run_root=s")
    assert told.code == 0, told.err


def test_a_checkpoint_that_changes_afterwards(lkspec_cli: Run, exports: dict[str, Path]) -> None:
    shutil.copytree(exports["medusa"], "out")
    brief = (*BRIEF_EVALUATION, "num_draft_tokens=1")
    assert lkspec_cli("evaluate", *pretrained(Path("out")), *brief).code == 0
    tensors = load_file("out/model.safetensors")
    tensors["lm_heads.0.weight"] *= 1.5
    save_file(tensors, "out/model.safetensors")
    line = lkspec_cli("evaluate", "run=latest", *brief).error_line
    assert "out has other weights than when this folder was made; give it again as draft=pretrained" in line
    assert lkspec_cli("evaluate", *pretrained(Path("out")), *brief).code == 0
    assert len(list(Path("runs").iterdir())) == 2


def refusal(lkspec_cli: Run, *arguments: str) -> str:
    outcome: Outcome = lkspec_cli(*arguments)
    return outcome.error_line


def test_what_a_user_may_get_wrong(lkspec_cli: Run, exports: dict[str, Path], runs: dict[str, Path]) -> None:
    folder, run = exports["eagle3"], runs["eagle3"]
    own = ("draft=pretrained", f"draft.path={folder}")
    assert "run has no value yet: give one as run=... (latest" in refusal(lkspec_cli, "evaluate")
    assert "draft=pretrained: say for which target, as target=..." in refusal(lkspec_cli, "evaluate", *own)
    both = refusal(lkspec_cli, "evaluate", *own, *TARGET, f"run={run}")
    assert f"run={run} and draft=pretrained: give one of them" in both
    assert "draft.path has no value yet" in refusal(lkspec_cli, "evaluate", "draft=pretrained", *TARGET)
    assert "the draft of a finished run" in refusal(lkspec_cli, "evaluate", "draft=eagle3", f"run={run}")
    assert "the target of a finished run" in refusal(lkspec_cli, "export", "target=tiny", f"run={run}", "out=x")
    missing = refusal(lkspec_cli, "evaluate", "draft=pretrained", "draft.path=./nothing", *TARGET)
    assert "./nothing: no such folder or hub id" in missing
    assert "out has no value yet" in refusal(lkspec_cli, "export", f"run={run}")
    assert "format: expected one of vllm, " in refusal(lkspec_cli, "export", f"run={run}", "out=x", "format=gguf")
    assert "use format=vllm or speculators" in refusal(lkspec_cli, "export", f"run={run}", "out=x", "format=medusa")
    assert "dtype: expected one of float32" in refusal(lkspec_cli, "export", f"run={run}", "out=x", "save_dtype=int4")
    layers = refusal(lkspec_cli, "evaluate", *own, *TARGET, "target.aux_layer_ids=[1,2,3]")
    assert "set target.aux_layer_ids=[2,4,5]" in layers
    wrong_class = refusal(lkspec_cli, "train", "draft=medusa", f"draft.init_from={folder}", *RUN, *NO_EVALUATION)
    assert "holds a draft of class Eagle3, this one is Medusa" in wrong_class
    assert not Path("x").exists()


def test_a_draft_of_ones_own_has_no_format(lkspec_cli: Run) -> None:
    """Said in one line, with nothing left behind."""
    shutil.copy(REPOSITORY / "tests/helpers/own_draft.py", "my_draft.py")
    Path("conf/draft").mkdir(parents=True)
    Path("conf/draft/mine.yaml").write_text("_target_: my_draft.OneHead\nnum_depths: 2\npaper_eta: 3.0\n")
    outcome = lkspec_cli("train", "draft=mine", *RUN, *NO_EVALUATION)
    assert outcome.code == 0, outcome.err
    before = sorted(Path().rglob("*"))
    for options in ((), ("format=vllm",)):
        line = refusal(lkspec_cli, "export", "run=latest", "out=deep/out", *options)
        assert "no format holds drafts of class OneHead; there are vllm (Eagle3), speculators (Eagle3), " in line
    brief = (*BRIEF_EVALUATION, "num_draft_tokens=[1]", "temperatures=[0]")
    served = refusal(lkspec_cli, "evaluate", "run=latest", "engine=vllm", f"engine.python={sys.executable}", *brief)
    assert "engine=vllm: vLLM does not serve this draft (research only: no engine is known" in served
    assert "OneHead; it loads the formats (and drafts) vllm (Eagle3), " in served
    assert sorted(Path().rglob("*")) == before
