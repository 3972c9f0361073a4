"""The model card: every number of it is a run's own, and nothing of the machine it was written on."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from helpers.draft_cases import CASES, half_vocab, make_draft
from helpers.own_draft import OneHead

from lkspec.export.base import Layout, WriteOptions
from lkspec.export.card import Facts, model_card, newest
from lkspec.export.eagle3 import PlainEagle3
from lkspec.export.medusa import VllmMedusa
from lkspec.export.writing import Export, layout_for
from lkspec.runs.rows import ResultRow
from lkspec.targets.tiny import TinyTarget

ROW = ResultRow(
    run="run-1",
    commit="abc",
    code_hash="def",
    draft="eagle3",
    loss="lk_lambda",
    loss_args='{"eta": 3.0}',
    target="tiny",
    data_fingerprint="0123",
    seed=4,
    supervised_tokens=1234,
    steps=50,
    benchmark="mt_bench",
    temperature=1.0,
    num_draft_tokens=3,
    engine="lkspec",
    sharpness=1.0,
    tau=2.3456,
    low=2.3011,
    high=2.4022,
    alpha=(0.7123, 0.4012, 0.2321),
    tau_whole_rounds=2.3,
    walk_tau=2.2,
    walk_over_k="[1.7, 2.0, 2.2]",
    tokens_per_second=12.0,
    speedup=None,
    num_prompts=80,
    eta=3.0,
    eta_source="the paper's for eagle3",
    protocol=json.dumps({"name": "mt_bench", "max_new_tokens": 256, "seed": 9, "top_p": 1.0}),
)
CONFIG: dict[str, Any] = {
    "draft": {"_target_": "lkspec.drafts.eagle3.Eagle3", "init_from": None},
    "names": {"draft": "eagle3", "loss": "lk_lambda", "target": "tiny", "data": "embedded"},
    "data": {"_target_": "x", "train": "embedded:train.jsonl"},
    "loss": {"_target_": "y", "eta": 3.0},
    "loss_options": {"gamma": 0.8},
    "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.002},
    "seed": 4,
}
FACTS = Facts(
    run="run-1",
    config=CONFIG,
    origin={"commit": "abc123", "code_hash": "fedcba9876543210"},
    info={"data_fingerprint": "0123456789abcdef", "num_supervised_seen": 1234},
    step=50,
    rows=[
        replace(ROW, steps=0, tau=1.0),
        ROW,
        replace(ROW, temperature=0.0, tau=2.6789, alpha=(0.8, 0.6), num_draft_tokens=2),
    ],
    license="apache-2.0",
)
HOME = "/home/somebody/secret"


def card(target: Any, facts: Facts = FACTS, *, target_id: str | None = None) -> str:
    draft = make_draft(CASES["eagle3"], target.spec, half_vocab(264))
    options = WriteOptions(num_draft_tokens=3, target_id=target_id)
    return model_card(facts, draft, target, exported(options, "first check", "second check"))


def exported(options: WriteOptions, *checks: str, layout: Layout | None = None) -> Export:
    return Export(Path(HOME) / "out", layout or PlainEagle3(), options, checks, ())


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_header_is_the_hubs(tiny_target: TinyTarget) -> None:
    _, header, _ = card(tiny_target).split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "lkspec",
        "tags": ["speculative-decoding", "draft-model"],
        "license": "apache-2.0",
    }


def as_source(target: TinyTarget, source: str) -> Any:
    """The target as if it had been loaded from there."""
    kept = ("spec", "name", "num_parameters", "fingerprint")
    return SimpleNamespace(**{name: getattr(target, name) for name in kept}, source=source)


def test_a_target_on_the_hub_is_the_base_model(tiny_target: TinyTarget) -> None:
    text = card(as_source(tiny_target, "org/target"), replace(FACTS, license=None))
    header = yaml.safe_load(text.split("---\n", 2)[1])
    assert header["base_model"] == "org/target"
    assert "license" not in header
    assert "- these weights: not stated by whoever exported them" in section(text, "Licences")
    assert "vllm serve org/target " in section(text, "Serving")


def test_a_name_that_others_know(tiny_target: TinyTarget) -> None:
    text = card(as_source(tiny_target, "/models/mine"), target_id="org/target")
    assert "# EAGLE-3 draft for org/target\n" in text
    assert yaml.safe_load(text.split("---\n", 2)[1])["base_model"] == "org/target"


def test_a_sharpened_draft_tells_only_what_sharpness_leaves(tiny_target: TinyTarget) -> None:
    text = card(tiny_target, replace(FACTS, sharpness=1.75))
    assert "its heads were multiplied by 1.75" in section(text, "The draft")
    results = section(text, "Acceptance length")
    assert "**2.679**" in results
    assert "**2.346**" not in results
    sampled = card(tiny_target, replace(FACTS, rows=[ROW], sharpness=1.75))
    assert "Not measured: `lkspec evaluate` with sharpness=1.75 had not been run" in section(
        sampled, "Acceptance length"
    )


def test_a_sharpened_draft_tells_what_was_measured_with_that_sharpness(tiny_target: TinyTarget) -> None:
    rows = [ROW, replace(ROW, sharpness=1.5, tau=2.511), replace(ROW, sharpness=1.75, tau=2.522)]
    for sharpness, told in ((1.0, "2.346"), (1.5, "2.511"), (1.75, "2.522")):
        results = section(card(tiny_target, replace(FACTS, rows=rows, sharpness=sharpness)), "Acceptance length")
        assert re.findall(r"\*\*(.*?)\*\*", results) == [told]


def test_no_path_of_the_machine(tiny_target: TinyTarget, tmp_path: Path) -> None:
    config = {
        **CONFIG,
        "draft": {"init_from": f"{HOME}/runs/first"},
        "data": {"train": [f"{HOME}/answers.jsonl", "org/data"]},
    }
    text = card(as_source(tiny_target, str(tmp_path)), replace(FACTS, config=config))
    assert "- data: `answers.jsonl`, `org/data` (" in text
    assert "- started from: `first`" in text
    assert "/home/" not in text
    assert str(tmp_path) not in text
    assert "# EAGLE-3 draft for tiny\n" in text
    assert '"model": "PATH_OR_ID"' in text
    assert "vllm serve TARGET_PATH_OR_ID " in text


def test_the_results_of_the_last_step(tiny_target: TinyTarget) -> None:
    results = section(card(tiny_target), "Acceptance length")
    rows = [line for line in results.splitlines() if line.startswith("| mt_bench")]
    assert rows == [
        "| mt_bench | lkspec | 0 | 2 | **2.679** | 2.301 - 2.402 | 0.800 | 0.600 |  | 80 |",
        "| mt_bench | lkspec | 1 | 3 | **2.346** | 2.301 - 2.402 | 0.712 | 0.401 | 0.232 | 80 |",
    ]
    assert "| alpha_3 | prompts |" in results
    assert results.count("- mt_bench: max_new_tokens 256, seed 9, top_p 1.0") == 1


def test_rows_are_those_after_the_most_steps() -> None:
    rows = [replace(ROW, steps=steps, benchmark=name) for steps, name in ((0, "a"), (9, "b"), (9, "a"), (4, "c"))]
    assert [(row.steps, row.benchmark) for row in newest(rows)] == [(9, "a"), (9, "b")]
    assert newest([]) == []


def test_without_results(tiny_target: TinyTarget) -> None:
    text = card(tiny_target, replace(FACTS, rows=[]))
    assert section(text, "Acceptance length").startswith("\nNot measured: `lkspec evaluate` had not been run")


def test_how_it_was_trained(tiny_target: TinyTarget) -> None:
    text = section(card(tiny_target), "The draft")
    draft = make_draft(CASES["eagle3"], tiny_target.spec, half_vocab(264))
    num = sum(parameter.numel() for parameter in draft.parameters())
    assert f"- parameters: {num:,} ({num / tiny_target.num_parameters:.1%} of the target's" in text
    assert "- draft vocabulary: 132 of 264 tokens" in text
    assert (
        "- data: `embedded:train.jsonl` (fingerprint 0123456789abcdef), 1,234 supervised tokens seen in 50 steps"
        in text
    )
    assert '- objective: lk_lambda {"eta": 3.0}, 3 depths, gamma 0.8' in text
    assert '- optimiser: {"lr": 0.002}, seed 4' in text
    assert "- code: commit abc123, hash fedcba987654" in text
    assert "started from" not in text
    started = {**CONFIG, "draft": {**CONFIG["draft"], "init_from": "org/name"}}
    assert "- started from: `org/name`" in card(tiny_target, replace(FACTS, config=started))


def test_a_checkpoint_that_was_not_trained_here(tiny_target: TinyTarget) -> None:
    config = {"draft": {"init_from": "org/name"}, "names": {"loss": "pretrained"}, "loss": {}, "seed": 0}
    text = section(card(tiny_target, replace(FACTS, config=config, step=0, rows=[])), "The draft")
    assert "- weights: `org/name`, not trained by lkspec" in text
    assert "objective" not in text


@pytest.mark.parametrize(
    ("case", "name", "limit"),
    [("eagle3", "EAGLE-3", None), ("medusa", "MEDUSA", 3), ("mlp", "MLP speculator", 3), ("mtp", "MTP", None)],
)
def test_each_architecture(case: str, name: str, limit: int | None, tiny_target: TinyTarget) -> None:
    draft = make_draft(CASES[case], tiny_target.spec)
    text = model_card(FACTS, draft, tiny_target, exported(WriteOptions(), layout=layout_for(None, draft)))
    assert f"# {name} draft for tiny\n" in text
    limits = section(text, "Limits")
    assert ("drafted tokens a round" in limits) == (limit is not None)
    assert "tokens outside the draft vocabulary" not in limits  # it has the whole one
    assert "arXiv:" in section(text, "Citation")


def test_an_architecture_that_says_nothing_of_itself(tiny_target: TinyTarget) -> None:
    draft = OneHead(tiny_target.spec, half_vocab(264))
    text = model_card(FACTS, draft, tiny_target, exported(WriteOptions(), layout=VllmMedusa()))
    assert "# OneHead draft for tiny\n" in text
    assert "A draft model (OneHead) for lossless" in text
    assert section(text, "Citation").startswith("\nObjective and protocol:\n")


def test_serving_and_checks(tiny_target: TinyTarget) -> None:
    text = card(tiny_target)
    serving = section(text, "Serving")
    assert '"draft_sample_method": "probabilistic"' in serving
    assert "--speculative-use-rejection-sampling" in serving
    assert "Engines draft greedily unless told otherwise" in serving
    assert section(text, "Checked when it was written").split("\n")[1:3] == ["- first check", "- second check"]
    assert "2602.23881" in section(text, "Citation")
    assert tiny_target.fingerprint in section(text, "Limits")
