"""The MLP speculator as fms-extras has it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import (
    HALF,
    H,
    Tensors,
    V,
    assert_q,
    changed,
    checks_after,
    drawn,
    inputs,
    read_folder,
    refusal,
    reopened,
    same_q,
    shapes_of,
    write_folder,
)
from helpers.draft_cases import CASES, make_draft
from torch import Tensor

from lkspec.drafts.mlp import MLPSpeculator
from lkspec.export.base import WriteOptions
from lkspec.export.mlp import FmsMLP
from lkspec.export.reading import Pretrained
from lkspec.targets.tiny import TinyTarget

K, D = 3, 40
OPTIONS = WriteOptions(num_draft_tokens=K)
CONFIG: dict[str, Any] = {
    "architectures": ["MLPSpeculatorPreTrainedModel"],
    "model_type": "mlp_speculator",
    "vocab_size": V,
    "emb_dim": H,
    "inner_dim": D,
    "n_predict": K,
    "n_candidates": 5,
    "top_k_tokens_per_head": [5, 4, 3],
    "tie_weights": False,
    "scale_input": True,
}


def fms_tensors(*, tied: bool = False) -> Tensors:
    """By their released names; tied weights are there for every depth."""
    tensors = {}
    for i in range(K):
        own = 0 if tied else i
        read = H if i == 0 else D
        tensors[f"speculator.proj.{i}.weight"] = drawn(D, read, seed=min(i, 1) if tied else i)
        tensors[f"speculator.emb.{i}.weight"] = drawn(V, D, seed=10 + own)
        tensors[f"speculator.head.{i}.weight"] = drawn(V, D, seed=20 + own)
        tensors[f"speculator.ln.{i}.weight"] = drawn(D, seed=30 + own)
        tensors[f"speculator.ln.{i}.bias"] = drawn(D, seed=40 + own) - 1.0
    return tensors


def exact_q(target: TinyTarget, tensors: Tensors, *, scale_input: bool) -> Tensor:
    """The format's description in float64, [K, T, V]; NaN where x_{t+k} is not there."""
    batch, states = inputs(target)
    weights = {name.removeprefix("speculator."): tensor.double() for name, tensor in tensors.items()}
    tokens, num_slots = batch.tokens[0], batch.tokens.shape[1]
    state_weight = 0.5 ** (0.5 / K)
    emb_weight = math.sqrt((1 - state_weight**2) * D / 2)
    q = torch.full((K, num_slots, V), torch.nan, dtype=torch.float64)

    def normed(x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean() + 1e-6)

    for t in range(num_slots):
        state = states.last[0, t].double()
        state = normed(state) / math.sqrt(2) if scale_input else state
        for i in range(min(K, num_slots - 1 - t)):
            mixed = weights[f"proj.{i}.weight"] @ state
            mixed = mixed + emb_weight / state_weight * weights[f"emb.{i}.weight"][tokens[t + 1 + i]]
            z = normed(mixed) * weights[f"ln.{i}.weight"] + weights[f"ln.{i}.bias"]
            state = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
            q[i, t] = (weights[f"head.{i}.weight"] @ state).softmax(-1)
    return q


@pytest.mark.parametrize("scale_input", [True, False])
@pytest.mark.parametrize("tied", ["no", "every depth", "once"])
def test_a_public_checkpoint_proposes_what_the_formulas_say(
    tied: str, scale_input: bool, tiny_target: TinyTarget, tmp_path: Path
) -> None:
    tensors = fms_tensors(tied=tied != "no")
    kept = tensors
    if tied == "once":
        kept = {name: tensor for name, tensor in tensors.items() if ".0." in name or name == "speculator.proj.1.weight"}
    config = {**CONFIG, "tie_weights": tied != "no", "scale_input": scale_input}
    expected = exact_q(tiny_target, tensors, scale_input=scale_input)
    assert_q(write_folder(tmp_path, kept, config), tiny_target, expected)


def test_an_inner_size_of_zero_is_the_targets(tiny_target: TinyTarget, tmp_path: Path) -> None:
    settings = Pretrained.open(write_folder(tmp_path, fms_tensors(), {**CONFIG, "inner_dim": 0})).settings
    assert settings["inner_dim"] == H


def own_draft(target: TinyTarget, case: str, **options: Any) -> MLPSpeculator:
    draft = make_draft(CASES[case], target.spec, None, **options)
    assert isinstance(draft, MLPSpeculator)
    return draft


@pytest.mark.parametrize("case", ["mlp", "mlp_tied"])
def test_what_is_written(case: str, tiny_target: TinyTarget, tmp_path: Path) -> None:
    draft = own_draft(tiny_target, case)
    size = H if case == "mlp" else D
    FmsMLP().write(tmp_path, draft, tiny_target, OPTIONS)
    tensors, config = read_folder(tmp_path)
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(3):
        shapes |= {
            f"speculator.emb.{i}.weight": (V, size),
            f"speculator.proj.{i}.weight": (size, H if i == 0 else size),
            f"speculator.head.{i}.weight": (V, size),
            f"speculator.ln.{i}.weight": (size,),
            f"speculator.ln.{i}.bias": (size,),
        }
    assert shapes_of(tensors) == shapes
    assert config == {
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "model_type": "mlp_speculator",
        "vocab_size": V,
        "emb_dim": H,
        "inner_dim": size,
        "n_predict": 3,
        "top_k_tokens_per_head": [1, 1, 1],
        "n_candidates": 1,
        "tie_weights": case == "mlp_tied",
        "scale_input": case == "mlp_tied",
        "torch_dtype": "float32",
    }


def test_the_targets_table_is_written_scaled(tiny_target: TinyTarget, tmp_path: Path) -> None:
    """To a standard deviation of 1 / sqrt(D), as a learned table starts."""
    FmsMLP().write(tmp_path, own_draft(tiny_target, "mlp"), tiny_target, OPTIONS)
    tensors, _ = read_folder(tmp_path)
    table = tiny_target.spec.embedding
    for i in range(3):
        torch.testing.assert_close(tensors[f"speculator.emb.{i}.weight"], table / table.std() / math.sqrt(H))


@pytest.mark.parametrize("num_depths", [1, 3])
@pytest.mark.parametrize("case", ["mlp", "mlp_tied"])
def test_there_and_back(case: str, num_depths: int, tiny_target: TinyTarget, tmp_path: Path) -> None:
    draft = own_draft(tiny_target, case, num_depths=num_depths)
    FmsMLP().write(tmp_path, draft, tiny_target, OPTIONS)
    assert same_q(draft, reopened(tmp_path, tiny_target), tiny_target, num_depths)
    lines = checks_after(FmsMLP(), tmp_path, draft, tiny_target)
    assert lines[2] == "vocabulary: all 264 tokens of the target"
    assert FmsMLP().serve_commands(draft, "org/target", "out", OPTIONS) == []


def test_a_truncated_vocabulary_is_refused(tiny_target: TinyTarget, tmp_path: Path) -> None:
    draft = make_draft(CASES["mlp"], tiny_target.spec, HALF)
    with pytest.raises(ValueError, match=r"whole vocabulary only \(264 tokens\); this run's .* 132\. Train with vocab"):
        FmsMLP().write(tmp_path, draft, tiny_target, OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_is_not_the_drafts(tiny_target: TinyTarget, tmp_path: Path) -> None:
    draft = own_draft(tiny_target, "mlp")
    FmsMLP().write(tmp_path, draft, tiny_target, OPTIONS)
    with pytest.raises(ValueError, match=r"config\.json does not describe the draft's scale_input$"):
        checks_after(FmsMLP(), tmp_path, draft, tiny_target, scale_input=True)


@pytest.mark.parametrize(
    ("config", "without", "more", "message"),
    [
        ({}, "speculator.ln.1.bias", None, "there is no tensor ln.1.bias"),
        ({}, "speculator.head.2.weight", None, "there is no tensor head.2.weight"),
        ({}, None, "speculator.emb.3.weight", "no place for speculator.emb.3.weight (1 in all)"),
        ({"tie_weights": True}, None, None, "config.json says tie_weights, but ln.1.weight is not the same as ln.0"),
        ({"emb_dim": 32}, None, None, "made for a target with emb_dim 32, tiny has 64"),
        ({"vocab_size": 300}, None, None, "made for a target with vocab_size 300, tiny has 264"),
        ({"inner_dim": 48}, None, None, "proj.0.weight is [40, 64] there, [48, 64] in this draft"),
    ],
)
def test_what_does_not_fit(
    config: dict[str, Any],
    without: str | None,
    more: str | None,
    message: str,
    tiny_target: TinyTarget,
    tmp_path: Path,
) -> None:
    folder = write_folder(tmp_path, changed(fms_tensors(), without, more), {**CONFIG, **config})
    assert refusal(folder, tiny_target).startswith(message)


def test_a_config_without_sizes(tiny_target: TinyTarget, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, fms_tensors(), {"model_type": "mlp_speculator"})
    with pytest.raises(ValueError, match=r"config\.json has no n_predict, emb_dim"):
        reopened(folder, tiny_target)
