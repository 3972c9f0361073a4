"""MEDUSA as vLLM has it and as it was released."""

from __future__ import annotations

import json
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

from lkspec.drafts.medusa import Medusa
from lkspec.export.base import WriteOptions
from lkspec.export.medusa import VllmMedusa
from lkspec.targets.tiny import TinyTarget
from lkspec.vocab import DraftVocab

K, L = 3, 2
OPTIONS = WriteOptions(num_draft_tokens=K)
CONFIG: dict[str, Any] = {
    "architectures": ["MedusaModel"],
    "model_type": "medusa",
    "hidden_size": H,
    "vocab_size": V,
    "truncated_vocab_size": HALF.size,
    "num_heads": K,
    "num_hidden_layers": L,
    "medusa_fc_bias": True,
}
ORIGINAL_CONFIG = {"base_model_name_or_path": "org/target", "medusa_num_heads": 2, "medusa_num_layers": 1}


def blocks(*, bias: bool = True) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor | None]]:
    """(head, layer) -> weight and bias."""
    return {
        (h, l): (drawn(H, H, seed=10 * h + l), drawn(H, seed=100 + 10 * h + l) - 1.0 if bias else None)
        for h in range(K)
        for l in range(L)
    }


def heads(size: int) -> list[torch.Tensor]:
    return [drawn(size, H, seed=200 + h) for h in range(K)]


def vllm_tensors(rows: list[torch.Tensor]) -> Tensors:
    tensors = {f"lm_heads.{h}.weight": weight for h, weight in enumerate(rows)} | {"token_map": HALF.ids}
    for (h, l), (weight, bias) in blocks().items():
        tensors |= {f"blocks.{h}.layers.{l}.weight": weight, f"blocks.{h}.layers.{l}.bias": bias}
    return tensors


def exact_q(target: TinyTarget, rows: list[torch.Tensor], ids: torch.Tensor, *, bias: bool = True) -> torch.Tensor:
    """softmax(head (x + SiLU(W x + b) ..)) in float64, [K, T, V]."""
    _, states = inputs(target)
    q = torch.zeros(K, states.last.shape[1], V, dtype=torch.float64)
    for h in range(K):
        x = states.last[0].double()
        for l in range(L):
            weight, offset = blocks(bias=bias)[h, l]
            z = x @ weight.double().T + (0 if offset is None else offset.double())
            x = x + z * torch.sigmoid(z)
        q[h][:, ids] = (x @ rows[h].double().T).softmax(-1)
    return q


# --- vLLM's -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", ["", "model.", "medusa_heads."])
def test_a_truncated_vocabulary(wrapped: str, tiny_target: TinyTarget, tmp_path: Path) -> None:
    rows = heads(HALF.size)
    tensors = {f"{wrapped}{name}": tensor for name, tensor in vllm_tensors(rows).items()}
    assert_q(write_folder(tmp_path, tensors, CONFIG), tiny_target, exact_q(tiny_target, rows, HALF.ids))


def test_a_map_by_frequency(tiny_target: TinyTarget, tmp_path: Path) -> None:
    order = torch.randperm(HALF.size, generator=torch.Generator().manual_seed(3))
    rows = heads(HALF.size)
    tensors = vllm_tensors([weight[order] for weight in rows]) | {"token_map": HALF.ids[order]}
    assert_q(write_folder(tmp_path, tensors, CONFIG), tiny_target, exact_q(tiny_target, rows, HALF.ids))


def test_whole_heads_of_which_the_map_takes_some(tiny_target: TinyTarget, tmp_path: Path) -> None:
    rows = heads(V)
    folder = write_folder(tmp_path, vllm_tensors(rows), CONFIG)
    assert_q(folder, tiny_target, exact_q(tiny_target, [weight[HALF.ids] for weight in rows], HALF.ids))


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_heads.0.weight"])
def test_one_head_for_all_depths(name: str, tiny_target: TinyTarget, tmp_path: Path) -> None:
    shared = heads(V)[0]
    tensors = {key: tensor for key, tensor in vllm_tensors([]).items() if key != "token_map"} | {name: shared}
    config = {**CONFIG, "truncated_vocab_size": V, "original_lm_head": True}
    folder = write_folder(tmp_path, tensors, config)
    assert_q(folder, tiny_target, exact_q(tiny_target, [shared] * K, torch.arange(V)))


def own_draft(target: TinyTarget, vocab: DraftVocab | None, case: str = "medusa_deep") -> Medusa:
    draft = make_draft(CASES[case], target.spec, vocab)
    assert isinstance(draft, Medusa)
    return draft


@pytest.mark.parametrize("vocab", [HALF, None], ids=["half", "whole"])
def test_what_is_written(vocab: DraftVocab | None, tiny_target: TinyTarget, tmp_path: Path) -> None:
    draft = own_draft(tiny_target, vocab)
    VllmMedusa().write(tmp_path, draft, tiny_target, OPTIONS)
    tensors, config = read_folder(tmp_path)
    shapes = {f"lm_heads.{h}.weight": (V, H) for h in range(3)}
    for h in range(3):
        for l in range(2):
            shapes |= {f"blocks.{h}.layers.{l}.weight": (H, H), f"blocks.{h}.layers.{l}.bias": (H,)}
    if vocab is not None:
        shapes["token_map"] = (HALF.size,)
        assert torch.equal(tensors["token_map"], HALF.ids)
        outside = torch.ones(V, dtype=torch.bool).index_fill(0, HALF.ids, False)
        for h in range(3):
            ours, theirs = draft.state_dict()[f"lm_heads.{h}.weight"], tensors[f"lm_heads.{h}.weight"]
            assert torch.equal(theirs[HALF.ids], ours)
            assert torch.equal(theirs[outside], ours[:1].expand(int(outside.sum()), H))
    assert shapes_of(tensors) == shapes
    assert config == {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": H,
        "vocab_size": V,
        "truncated_vocab_size": V,
        **({} if vocab is None else {"trained_vocab_size": HALF.size}),
        "num_heads": 3,
        "num_hidden_layers": 2,
        "medusa_fc_bias": True,
        "original_lm_head": False,
        "logit_scale": 1.0,
        "max_position_embeddings": 2048,
        "torch_dtype": "float32",
    }


@pytest.mark.parametrize("case", ["medusa", "medusa_deep"])
@pytest.mark.parametrize("vocab", [HALF, None], ids=["half", "whole"])
def test_there_and_back(case: str, vocab: DraftVocab | None, tiny_target: TinyTarget, tmp_path: Path) -> None:
    draft = own_draft(tiny_target, vocab, case)
    VllmMedusa().write(tmp_path, draft, tiny_target, OPTIONS)
    assert same_q(draft, reopened(tmp_path, tiny_target), tiny_target)
    lines = checks_after(VllmMedusa(), tmp_path, draft, tiny_target)
    ending = "by their own ids" if vocab is None else "by token_map; the other rows of the heads repeat the first's"
    assert lines[2].endswith(ending)


def test_rows_outside_the_draft_vocabulary_are_never_drafted(tiny_target: TinyTarget, tmp_path: Path) -> None:
    draft = own_draft(tiny_target, HALF)
    VllmMedusa().write(tmp_path, draft, tiny_target, OPTIONS)
    tensors, _ = read_folder(tmp_path)
    hidden = drawn(200, H, seed=5)
    for h in range(3):
        ours = HALF.ids[(hidden @ draft.state_dict()[f"lm_heads.{h}.weight"].T).argmax(-1)]
        theirs = (hidden @ tensors[f"lm_heads.{h}.weight"].T).argmax(-1)
        # Repeated rows tie with the vocabulary's first token and with nothing else.
        assert torch.equal(theirs[ours != HALF.ids[0]], ours[ours != HALF.ids[0]])


def test_how_it_is_served(tiny_target: TinyTarget) -> None:
    (vllm,) = VllmMedusa().serve_commands(own_draft(tiny_target, HALF), "org/target", "out", OPTIONS)
    assert vllm.engine == "vLLM"
    assert vllm.command == (
        'vllm serve org/target --speculative-config \'{"method": "medusa", "model": "out", '
        '"num_speculative_tokens": 3}\''
    )
    assert vllm.options_for_q == "none: vLLM drafts by argmax at every temperature with method medusa"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 2}, "does not describe the draft's num_depths"),
        ({"hidden_size": 32}, "made for a target with hidden_size 32, tiny has 64"),
        ({"vocab_size": 300}, "made for a target with vocab_size 300, tiny has 264"),
    ],
)
def test_a_config_that_is_not_the_drafts(
    changes: dict[str, Any], message: str, tiny_target: TinyTarget, tmp_path: Path
) -> None:
    draft = own_draft(tiny_target, HALF)
    VllmMedusa().write(tmp_path, draft, tiny_target, OPTIONS)
    other = own_draft(tiny_target, DraftVocab(HALF.ids - 1, V))
    with pytest.raises(ValueError, match="the rows of its heads are not the tokens of the draft's vocabulary"):
        checks_after(VllmMedusa(), tmp_path, other, tiny_target)
    with pytest.raises(ValueError, match=message):
        checks_after(VllmMedusa(), tmp_path, draft, tiny_target, **changes)


@pytest.mark.parametrize(
    ("config", "without", "more", "message"),
    [
        ({}, "token_map", None, "there is no tensor token_map"),
        ({}, "blocks.1.layers.0.bias", None, "there is no tensor blocks.1.layers.0.bias"),
        ({}, "lm_heads.2.weight", None, "there is no tensor lm_heads.2.weight"),
        ({}, None, "blocks.3.layers.0.weight", "no place for blocks.3.layers.0.weight (1 in all)"),
        ({"medusa_fc_bias": False}, None, None, "no place for blocks.0.layers.0.bias, "),
        ({"logit_scale": 2.0}, None, None, "config.json says logit_scale=2.0, but lkspec's draft of this kind has"),
        ({"num_heads": 2}, None, None, "no place for blocks.2.layers.0.bias, "),
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
    tensors = changed(vllm_tensors(heads(HALF.size)), without, more)
    assert refusal(write_folder(tmp_path, tensors, {**CONFIG, **config}), tiny_target).startswith(message)


def test_a_config_without_heads(tiny_target: TinyTarget, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, vllm_tensors(heads(HALF.size)), {"model_type": "medusa"})
    with pytest.raises(ValueError, match=r"config\.json has no num_heads, num_hidden_layers"):
        reopened(folder, tiny_target)


# --- the original repository's -------------------------------------------------------------------------------------


def original_tensors(*, bias: bool) -> Tensors:
    tensors = {f"{h}.{L}.weight": weight for h, weight in enumerate(heads(V))}
    for (h, l), (weight, offset) in blocks(bias=bias).items():
        tensors[f"{h}.{l}.linear.weight"] = weight
        if offset is not None:
            tensors[f"{h}.{l}.linear.bias"] = offset
    return tensors


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("file", ["medusa_lm_head.safetensors", "medusa_lm_head.pt"])
def test_the_original_layout(bias: bool, file: str, tiny_target: TinyTarget, tmp_path: Path) -> None:
    """The config names fewer heads and layers than there are."""
    tensors = original_tensors(bias=bias)
    if file.endswith(".pt"):
        torch.save(tensors, tmp_path / file)
        (tmp_path / "config.json").write_text(json.dumps(ORIGINAL_CONFIG))
    else:
        write_folder(tmp_path, tensors, ORIGINAL_CONFIG, name="medusa_lm_head")
    assert_q(str(tmp_path), tiny_target, exact_q(tiny_target, heads(V), torch.arange(V), bias=bias))


@pytest.mark.parametrize(
    ("without", "more", "message"),
    [
        ("1.0.linear.weight", None, "there is no tensor 1.0.linear.weight"),
        ("2.2.weight", None, "there is no tensor 2.2.weight"),
        (None, "1.3.linear.weight", "no place for 1.3.linear.weight (1 in all)"),
    ],
)
def test_what_does_not_fit_the_original_layout(
    without: str | None, more: str | None, message: str, tiny_target: TinyTarget, tmp_path: Path
) -> None:
    tensors = changed(original_tensors(bias=True), without, more)
    folder = write_folder(tmp_path, tensors, ORIGINAL_CONFIG, name="medusa_lm_head")
    assert refusal(folder, tiny_target) == message


def test_another_target(tiny_target: TinyTarget, tmp_path: Path) -> None:
    tensors = {name: tensor[..., :32] for name, tensor in original_tensors(bias=False).items()}
    folder = write_folder(tmp_path, tensors, ORIGINAL_CONFIG, name="medusa_lm_head")
    with pytest.raises(ValueError, match=r"blocks\.0\.layers\.0\.weight is \[64, 32\] there, \[64, 64\] in this draft"):
        reopened(folder, tiny_target)
