"""MEDUSA: hidden states and logits against the formula, the start of a training, names of the format, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.eagle3_reference import SOME, V, make_batch, make_spec
from torch import Tensor

from lkspec.drafts.medusa import Medusa
from lkspec.types import Batch, TargetStates
from lkspec.vocab import DraftVocab

H, K = 16, 3
ROWS = [[4, 6], [5]]  # packed and padded
FULL = DraftVocab.full(V)


def make_inputs(rows: list[list[int]] = ROWS) -> tuple[Batch, TargetStates]:
    batch, states = make_batch(rows)
    last = torch.randn(*batch.tokens.shape, H, generator=torch.Generator().manual_seed(5))
    return batch, replace(states, last=last)


def make_medusa(vocab: DraftVocab = FULL, *, seed: int = 0, moved: bool = True, **options) -> Medusa:
    """A draft; ``moved``: with every parameter far from its initial value."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draft = Medusa(make_spec(), vocab, **{"num_depths": K, **options})
        if moved:
            with torch.no_grad():
                for parameter in draft.parameters():
                    parameter.add_(0.5 * torch.randn_like(parameter))
    return draft


def reference(draft: Medusa, last: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Hidden state and logits of one anchor in float64, from the tensors that vLLM loads."""
    weights = {name: tensor.double() for name, tensor in draft.state_dict().items()}
    hidden, head, layer = last.double(), depth - 1, 0
    while f"blocks.{head}.layers.{layer}.weight" in weights:
        name = f"blocks.{head}.layers.{layer}"
        mixed = weights[f"{name}.weight"] @ hidden + weights.get(f"{name}.bias", torch.zeros(H))
        hidden = hidden + mixed / (1 + torch.exp(-mixed))
        layer += 1
    return hidden, weights[f"lm_heads.{head}.weight"] @ hidden


@pytest.mark.parametrize("vocab", [SOME, FULL], ids=["truncated", "full"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_unroll_is_the_formula(num_layers: int, bias: bool, vocab: DraftVocab) -> None:
    draft = make_medusa(vocab, num_layers=num_layers, bias=bias)
    batch, states = make_inputs()
    with torch.no_grad():
        hidden = draft.unroll(batch, states)
        logits = torch.stack([draft.head(k).logits(hidden[k - 1]) for k in range(1, K + 1)])
    assert hidden.shape == (K, *batch.tokens.shape, H)
    assert logits.shape == (K, *batch.tokens.shape, vocab.size)
    for depth in range(1, K + 1):
        for row, slot in torch.nonzero(batch.segments).tolist():
            expected = reference(draft, states.last[row, slot], depth)
            got = hidden[depth - 1, row, slot], logits[depth - 1, row, slot]
            for ours, theirs in zip(got, expected, strict=True):
                torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_fewer_heads_than_were_trained() -> None:
    draft = make_medusa()
    batch, states = make_inputs()
    assert torch.equal(draft.unroll(batch, states, 2), draft.unroll(batch, states)[:2])


# --- the start of a training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_blocks_start_as_the_identity(num_layers: int, bias: bool) -> None:
    draft = make_medusa(moved=False, num_layers=num_layers, bias=bias)
    batch, states = make_inputs()
    assert torch.equal(draft.unroll(batch, states), states.last.expand(K, *states.last.shape))


@pytest.mark.parametrize("vocab", [SOME, FULL], ids=["truncated", "full"])
def test_heads_from_the_target(vocab: DraftVocab) -> None:
    """Every depth starts with the target's own next-token distribution over the draft vocabulary."""
    spec = make_spec(scale=0.5)
    draft = Medusa(spec, vocab, num_depths=K, head_init="target")
    batch, states = make_inputs()
    hidden = draft.unroll(batch, states)
    for depth in range(1, K + 1):
        weight = draft.head(depth).weight
        for index, target_id in enumerate(vocab.ids.tolist()):
            assert torch.equal(weight[index], 0.5 * spec.head.weight[target_id])
        assert weight.data_ptr() != spec.head.weight.data_ptr(), "trained apart from the target's"
        expected = vocab.restrict(spec.head.logits(states.last))
        torch.testing.assert_close(draft.head(depth).logits(hidden[depth - 1]), expected)
    assert len({draft.head(depth).weight.data_ptr() for depth in range(1, K + 1)}) == K, "heads are independent"


def test_random_heads() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draft = Medusa(make_spec(bias=True), FULL, num_depths=K, head_init="random")
    heads = torch.stack([draft.head(depth).weight.detach() for depth in range(1, K + 1)])
    assert float(heads.std()) == pytest.approx(0.02, rel=0.1)
    assert abs(float(heads.mean())) < 3 * 0.02 / heads.numel() ** 0.5
    assert not torch.equal(heads[0], heads[1])


def test_the_zero_start_is_not_a_dead_one() -> None:
    """SiLU has slope 1/2 at 0, so gradients reach the blocks from the first step on."""
    draft = make_medusa(moved=False, num_layers=2, bias=True)
    hidden = draft.unroll(*make_inputs())
    sum(draft.head(k).logits(hidden[k - 1]).square().sum() for k in range(1, K + 1)).backward()
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 1e-6, name


def test_a_target_in_half_precision() -> None:
    draft = Medusa(make_spec(dtype=torch.bfloat16), SOME, num_depths=K, head_init="target")
    batch, states = make_inputs()
    assert draft.unroll(batch, replace(states, last=states.last.bfloat16())).dtype == torch.float32
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.float32}


# --- the format, refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_parameters_are_what_vllm_loads(bias: bool) -> None:
    draft = Medusa(make_spec(), SOME, num_depths=2, num_layers=2, bias=bias)
    expected: dict[str, tuple[int, ...]] = {}
    for head in range(2):
        expected[f"lm_heads.{head}.weight"] = (SOME.size, H)
        for layer in range(2):
            expected[f"blocks.{head}.layers.{layer}.weight"] = (H, H)
            if bias:
                expected[f"blocks.{head}.layers.{layer}.bias"] = (H,)
    assert {name: tuple(p.shape) for name, p in draft.named_parameters()} == expected
    assert set(draft.state_dict()) == {*expected, "vocab.ids"}
    assert draft.num_trainable == sum(torch.Size(shape).numel() for shape in expected.values())
    assert draft.num_frozen == 0


@pytest.mark.parametrize(
    ("options", "bias", "message"),
    [
        ({"num_depths": 0}, False, "draft.num_depths: expected at least 1, got 0"),
        ({"num_layers": 0}, False, "draft.num_layers: expected at least 1, got 0"),
        ({"head_init": "zeros"}, False, "draft.head_init: expected 'target' or 'random', got 'zeros'"),
        ({"head_init": "target"}, True, "draft.head_init=target: the target's head has a bias"),
    ],
)
def test_settings_that_are_refused(options: dict, bias: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Medusa(make_spec(bias=bias), SOME, **options)


def test_more_tokens_than_heads_are_refused() -> None:
    draft = make_medusa()
    draft.check_num_draft_tokens(K)
    with pytest.raises(ValueError, match=r"num_draft_tokens=4: this Medusa has 3 heads; use at most 3, or train more"):
        draft.unroll(*make_inputs(), K + 1)


def test_what_the_draft_says_of_itself() -> None:
    draft = make_medusa()
    assert draft.served_by == "vLLM 0.5 to 0.32, drafting by argmax (removed in 0.33); not SGLang"
    assert (draft.num_depths, draft.max_depths, draft.paper_eta) == (K, K, 10.0)
    assert not draft.full_vocabulary
    assert Medusa(make_spec(), SOME).num_depths == 6
