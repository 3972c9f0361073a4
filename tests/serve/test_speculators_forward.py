"""speculators loads an exported EAGLE-3 draft, and its forward pass gives our logits."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.draft_cases import CASES, half_vocab, make_draft
from safetensors.torch import load_file, save_file
from torch import Tensor

from lkspec.drafts.base import Draft
from lkspec.export.base import WriteOptions
from lkspec.export.writing import layout_for, write_export
from lkspec.targets.tiny import TinyTarget
from lkspec.targets.transformers import TransformersTarget
from lkspec.types import Batch, TargetStates
from lkspec.vocab import DraftVocab

pytestmark = [pytest.mark.serve, pytest.mark.slow]

WORKER = Path(__file__).with_name("speculators_worker.py")
NUM_DEPTHS = 3
LENGTHS = (50, 78)  # 128 together: the block of speculators' FlexAttention
TOLERANCE = 1e-4
DRAFTS = [(norm, vocab) for norm in ("eagle3", "eagle3_norm_first") for vocab in ("full", "half")]


@dataclass(frozen=True)
class Compared:
    """One draft.

    Attributes:
        ours, theirs: logits [K, T, D].
        ids: target id of each of their columns; None where they have no map.
    """

    draft: Draft
    ours: Tensor
    theirs: Tensor
    ids: Tensor | None


@pytest.fixture(scope="module")
def compared(speculators_python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Compared]:
    """All drafts, in one process of theirs."""
    folder = tmp_path_factory.mktemp("speculators")
    TinyTarget(num_layers=4, aux_layer_ids=(1, 2, 3), device="cpu").save(folder / "target")
    target = TransformersTarget(str(folder / "target"), aux_layer_ids=(1, 2, 3), device="cpu")
    batch = _packed(target.vocab_size)
    states = target.states(batch)
    # Their rows begin with x_1 beside the state of x_0 (shift_batch of speculators.models.eagle3.data).
    inputs = {
        "hidden_states": states.aux,
        "input_ids": batch.tokens.roll(-1, dims=1),
        "document_ids": batch.segments,
    }
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, folder / "inputs.safetensors")
    vocabs = {"full": DraftVocab.full(target.vocab_size), "half": half_vocab(target.vocab_size)}
    drafts, jobs = {}, []
    for norm, vocab in DRAFTS:
        draft = drafts[norm, vocab] = make_draft(CASES[norm], target.spec, vocabs[vocab], num_depths=NUM_DEPTHS).eval()
        out = folder / f"{norm}-{vocab}"
        write_export(draft, target, out, layout=layout_for("speculators", draft), options=WriteOptions())
        jobs.append(
            {
                "folder": str(out),
                "inputs": str(folder / "inputs.safetensors"),
                "outputs": str(out / "logits.safetensors"),
                "num_depths": NUM_DEPTHS,
            }
        )
    lines = "".join(json.dumps(job) + "\n" for job in jobs)
    done = subprocess.run([speculators_python, str(WORKER)], input=lines, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {key: load_file(job["outputs"]) for key, job in zip(DRAFTS, jobs, strict=True)}
    return {
        key: Compared(draft, _logits(draft, batch, states), found[key]["logits"], found[key].get("ids"))
        for key, draft in drafts.items()
    }


def _packed(vocab_size: int) -> Batch:
    """Two conversations of random tokens in one row."""
    tokens = torch.randint(0, vocab_size, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    segments = torch.cat([torch.full((length,), number) for number, length in enumerate(LENGTHS, start=1)])[None]
    return Batch(tokens, positions, segments, segments, (("first", "second"),))


@torch.no_grad()
def _logits(draft: Draft, batch: Batch, states: TargetStates) -> Tensor:
    hidden = draft.unroll(batch, states)
    return torch.stack([draft.head(depth).logits(hidden[depth - 1, 0]) for depth in range(1, NUM_DEPTHS + 1)])


@pytest.mark.parametrize(("norm", "vocab"), DRAFTS)
def test_logits(compared: dict[tuple[str, str], Compared], norm: str, vocab: str) -> None:
    found = compared[norm, vocab]
    assert found.theirs.shape == found.ours.shape
    for depth in range(1, NUM_DEPTHS + 1):
        whole = sum(LENGTHS) - depth  # further anchors would read tokens behind the row
        difference = (found.theirs[depth - 1, :whole] - found.ours[depth - 1, :whole]).abs().max()
        assert float(difference) <= TOLERANCE, f"depth {depth}: {float(difference):.1e}"


@pytest.mark.parametrize(("norm", "vocab"), DRAFTS)
def test_vocabulary(compared: dict[tuple[str, str], Compared], norm: str, vocab: str) -> None:
    found = compared[norm, vocab]
    assert (found.ids is None) == (vocab == "full")
    if found.ids is not None:
        assert torch.equal(found.ids, found.draft.vocab.ids)


@pytest.mark.parametrize("depth", range(NUM_DEPTHS))
def test_the_cases_differ(compared: dict[tuple[str, str], Compared], depth: int) -> None:
    """norm_before_residual and the depth change the logits by far more than is allowed."""
    plain, norm_first = compared["eagle3", "full"].ours, compared["eagle3_norm_first", "full"].ours
    assert float((plain[depth] - norm_first[depth]).abs().max()) > 100 * TOLERANCE
    assert float((plain[depth] - plain[depth - 1]).abs().max()) > 100 * TOLERANCE
