"""EAGLE-3: the layer against its slow description, initialisation, checkpoint names. See also test_contracts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.draft_cases import unrolled
from helpers.eagle3_reference import DIMS, SOME, Reference, V, make_batch, make_draft, make_spec

from lkspec.drafts.eagle3 import Eagle3
from lkspec.vocab import DraftVocab

PARAMETERS = {  # the checkpoint format of the serving engines
    "fc.weight": (16, 48),
    "midlayer.self_attn.q_proj.weight": (24, 32),
    "midlayer.self_attn.k_proj.weight": (12, 32),
    "midlayer.self_attn.v_proj.weight": (12, 32),
    "midlayer.self_attn.o_proj.weight": (16, 24),
    "midlayer.mlp.gate_proj.weight": (20, 16),
    "midlayer.mlp.up_proj.weight": (20, 16),
    "midlayer.mlp.down_proj.weight": (16, 20),
    "midlayer.input_layernorm.weight": (16,),
    "midlayer.hidden_norm.weight": (16,),
    "midlayer.post_attention_layernorm.weight": (16,),
    "norm.weight": (16,),
    "lm_head.weight": (8, 16),
}


def test_positions_matter() -> None:
    draft = make_draft()
    batch, states = make_batch([[9]])
    stretched = unrolled(draft, replace(batch, positions=batch.positions * 2), states)
    assert ((unrolled(draft, batch, states) - stretched)[0, 0, 1:].abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("norm_before_residual", [False, True])
@pytest.mark.parametrize("rows", [[[9]], [[9], [5]], [[4, 6], [3, 2, 5]]], ids=["one", "padded", "packed"])
def test_unroll_is_the_slow_reference(rows: list[list[int]], norm_before_residual: bool) -> None:
    draft = make_draft(num_depths=4, norm_before_residual=norm_before_residual)
    batch, states = make_batch(rows)
    hidden = unrolled(draft, batch, states)
    reference = Reference(draft, norm_before_residual=norm_before_residual)
    num_compared = 0
    for row, lengths in enumerate(rows):
        for segment in range(1, len(lengths) + 1):
            inside = batch.segments[row] == segment
            expected = reference.unroll(draft.embedding, batch.tokens[row, inside], states.aux[row, inside], 4)
            known = ~expected.isnan()
            error = (hidden[:, row, inside].double() - expected)[known].abs().max()
            assert error < 1e-5
            num_compared += int(known.any(-1).sum())
    assert num_compared == sum(max(n - k, 0) for row in rows for n in row for k in range(1, 5))


def test_rows_shorter_than_the_depths() -> None:
    draft = make_draft(num_depths=6)
    batch, states = make_batch([[3]])
    hidden = unrolled(draft, batch, states)
    assert hidden.shape == (6, 1, 3, 16)
    expected = Reference(draft).unroll(draft.embedding, batch.tokens[0], states.aux[0], 6)
    known = ~expected.isnan()
    torch.testing.assert_close(hidden[:, 0][known].double(), expected[known], rtol=1e-5, atol=1e-5)
    assert hidden.isfinite().all()


def test_later_depths_reach_earlier_ones() -> None:
    """Depth 3 reads depth 2's output, not a copy: its gradient changes what depth 1 computes."""
    draft = make_draft()
    batch, states = make_batch([[9]])
    aux = states.aux.clone().requires_grad_()
    hidden = draft.unroll(batch, replace(states, aux=aux))
    hidden[2, 0, 4].sum().backward()
    reached = aux.grad[0].abs().amax(-1) > 1e-6
    assert reached.tolist() == [slot <= 4 for slot in range(9)]


@pytest.mark.parametrize("vocab", [SOME, DraftVocab.full(V)], ids=["truncated", "full"])
def test_head_from_the_target(vocab: DraftVocab) -> None:
    """Rows of the draft vocabulary, times the target's scale; the norm makes logits of unit variance."""
    spec = make_spec(scale=0.5)
    draft = Eagle3(spec, vocab)
    for index, target_id in enumerate(vocab.ids.tolist()):
        assert torch.equal(draft.lm_head.weight[index], 0.5 * spec.head.weight[target_id])
    row_norms = (0.5 * spec.head.weight[vocab.ids]).double().square().sum(1).sqrt()
    torch.testing.assert_close(draft.norm.weight.double(), torch.full((16,), 1 / float(row_norms.mean())).double())
    assert draft.lm_head.weight.data_ptr() != spec.head.weight.data_ptr(), "trained apart from the target's"
    hidden = torch.randn(2, 16)
    torch.testing.assert_close(draft.head(1).logits(hidden), vocab.restrict(spec.head.logits(hidden)))


def test_random_head() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draft = Eagle3(make_spec(bias=True), DraftVocab.full(V), head_init="random")
    assert float(draft.lm_head.weight.detach().std()) == pytest.approx(0.02, rel=0.15)
    assert torch.equal(draft.norm.weight, torch.ones(16))


@pytest.mark.parametrize(
    ("options", "bias", "message"),
    [
        ({"num_depths": 0}, False, "draft.num_depths: expected at least 1, got 0"),
        ({"head_init": "zeros"}, False, "draft.head_init: expected 'target' or 'random', got 'zeros'"),
        ({"head_init": "target"}, True, "draft.head_init=target: the target's head has a bias"),
    ],
)
def test_settings_that_are_refused(options: dict, bias: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Eagle3(make_spec(bias=bias), SOME, **options)


def test_checkpoint_names_and_shapes() -> None:
    """Exactly what the engines load, and the vocabulary; the target's embedding is shared and stays out."""
    spec = make_spec()
    draft = Eagle3(spec, SOME)
    state = draft.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {**PARAMETERS, "vocab.ids": (8,)}
    assert {name for name, _ in draft.named_parameters()} == set(PARAMETERS)
    assert draft.embedding.data_ptr() == spec.embedding.data_ptr()
    assert draft.num_trainable == sum(torch.Size(shape).numel() for shape in PARAMETERS.values())
    assert draft.num_frozen == V * 16


def test_dimensions_of_the_reference_are_not_symmetric() -> None:
    """What the other tests rely on: no two sizes of the layer can be mixed up unnoticed."""
    assert DIMS.head_dim * DIMS.num_heads != DIMS.hidden_size
    assert DIMS.num_kv_heads not in (1, DIMS.num_heads)
    assert DIMS.rope_attention_factor != 1
