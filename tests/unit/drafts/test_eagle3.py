"""EAGLE-3: alignment (contract 1), the layer against its slow description, gradients, initialisation, checkpoints."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from eagle3_reference import DIMS, SOME, Reference, V, conversation, make_batch, make_draft, make_spec
from torch import Tensor

from lkspec.drafts.eagle3 import Eagle3
from lkspec.types import Batch, TargetStates
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


@torch.no_grad()
def unrolled(draft: Eagle3, batch: Batch, states: TargetStates, num_depths: int | None = None) -> Tensor:
    return draft.unroll(batch, states, num_depths)


# --- contract 1: which token, state and position each anchor and depth reads --------------------------------------

NUM_SLOTS, K = 9, 3


def changed_entries(before: Tensor, after: Tensor) -> Tensor:
    """Which [K, T] entries differ, with room between noise and effect."""
    difference = (before - after)[:, 0].abs().amax(-1)
    assert not bool(((difference > 1e-6) & (difference < 1e-5)).any())
    return difference > 1e-5


@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_depth_k_at_anchor_t_reads_tokens_up_to_t_plus_k(norm_before_residual: bool) -> None:
    """So its output is a distribution of x_{t+1+k}: that token and later ones change nothing, x_{t+k} does."""
    draft = make_draft(num_depths=K, norm_before_residual=norm_before_residual)
    batch, states = make_batch([[NUM_SLOTS]])
    before = unrolled(draft, batch, states)
    assert before.shape == (K, 1, NUM_SLOTS, 16)
    for slot in range(NUM_SLOTS):
        tokens = batch.tokens.clone()
        tokens[0, slot] = (tokens[0, slot] + 1) % V
        changed = changed_entries(before, unrolled(draft, replace(batch, tokens=tokens), states))
        # x_0 is in the states only; x_j enters the depth-1 entry of anchor j - 1, which every later anchor sees.
        expected = [[1 <= slot <= anchor + depth for anchor in range(NUM_SLOTS)] for depth in range(1, K + 1)]
        assert changed.tolist() == expected, f"slot {slot}"


def test_states_after_the_anchor_never_matter() -> None:
    draft = make_draft(num_depths=K)
    batch, states = make_batch([[NUM_SLOTS]])
    before = unrolled(draft, batch, states)
    for slot in range(NUM_SLOTS):
        aux = states.aux.clone()
        aux[0, slot] += 1.0
        changed = changed_entries(before, unrolled(draft, batch, replace(states, aux=aux)))
        assert changed.tolist() == [[slot <= anchor for anchor in range(NUM_SLOTS)]] * K, f"slot {slot}"


def test_only_auxiliary_states_are_read() -> None:
    draft = make_draft()
    batch, states = make_batch([[NUM_SLOTS]])
    other = replace(states, last=states.last + 1)
    assert torch.equal(unrolled(draft, batch, states), unrolled(draft, batch, other))


def test_positions_matter_only_by_their_differences() -> None:
    draft = make_draft()
    batch, states = make_batch([[NUM_SLOTS]])
    before = unrolled(draft, batch, states)
    moved = unrolled(draft, replace(batch, positions=batch.positions + 17), states)
    torch.testing.assert_close(moved, before, rtol=1e-5, atol=1e-5)
    stretched = unrolled(draft, replace(batch, positions=batch.positions * 2), states)
    assert changed_entries(before, stretched)[0, 1:].all()


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


def test_neighbours_and_padding_change_nothing() -> None:
    """Each supervised entry of a packed, padded row equals that of the conversation by itself."""
    draft = make_draft(num_depths=4)
    rows = [[4, 6, 3], [7], [2, 2, 2, 2]]
    batch, states = make_batch(rows)
    hidden, mask = unrolled(draft, batch, states), batch.depth_mask(4)
    num_compared = 0
    for row, lengths in enumerate(rows):
        for segment in range(1, len(lengths) + 1):
            alone_batch, alone_states = conversation(batch, states, row, segment)
            alone = unrolled(draft, alone_batch, alone_states)[:, 0]
            inside = batch.segments[row] == segment
            counted = mask[:, row, inside]
            assert torch.equal(counted, alone_batch.depth_mask(4)[:, 0])
            torch.testing.assert_close(hidden[:, row, inside][counted], alone[counted], rtol=1e-5, atol=1e-5)
            num_compared += int(counted.sum())
    assert num_compared == int(mask.sum()) > 15
    assert hidden.isfinite().all()


def test_rows_shorter_than_the_depths() -> None:
    draft = make_draft(num_depths=6)
    batch, states = make_batch([[3]])
    hidden = unrolled(draft, batch, states)
    assert hidden.shape == (6, 1, 3, 16)
    expected = Reference(draft).unroll(draft.embedding, batch.tokens[0], states.aux[0], 6)
    known = ~expected.isnan()
    torch.testing.assert_close(hidden[:, 0][known].double(), expected[known], rtol=1e-5, atol=1e-5)
    assert hidden.isfinite().all()


def test_any_number_of_depths_can_be_unrolled() -> None:
    """Weights are shared over depths: fewer are a prefix of more, also beyond the trained ones."""
    draft = make_draft(num_depths=3)
    batch, states = make_batch([[9], [6]])
    five = unrolled(draft, batch, states, 5)
    assert five.shape[0] == 5
    assert torch.equal(unrolled(draft, batch, states), five[:3])
    assert torch.equal(unrolled(draft, batch, states, 1), five[:1])


# --- training -----------------------------------------------------------------------------------------------------


def loss_of(draft: Eagle3, batch: Batch, states: TargetStates) -> Tensor:
    hidden = draft.unroll(batch, states)
    targets = torch.arange(hidden[..., 0].numel()) % draft.vocab.size
    logits = torch.stack([draft.head(k).logits(hidden[k - 1]) for k in range(1, draft.num_depths + 1)])
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, -2), targets)


@pytest.mark.parametrize("norm_before_residual", [False, True])
@pytest.mark.parametrize("vocab", [SOME, DraftVocab.full(V)], ids=["truncated", "full"])
def test_gradients_reach_every_parameter_and_not_the_embedding(vocab: DraftVocab, norm_before_residual: bool) -> None:
    draft = make_draft(vocab, norm_before_residual=norm_before_residual)
    loss_of(draft, *make_batch([[9], [4, 3]])).backward()
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        assert float(parameter.grad.abs().max()) > 1e-6, name
    assert not draft.embedding.requires_grad
    assert draft.embedding.grad is None


def test_later_depths_reach_earlier_ones() -> None:
    """Depth 3 reads depth 2's output, not a copy: its gradient changes what depth 1 computes."""
    draft = make_draft()
    batch, states = make_batch([[9]])
    aux = states.aux.clone().requires_grad_()
    hidden = draft.unroll(batch, replace(states, aux=aux))
    hidden[2, 0, 4].sum().backward()
    reached = aux.grad[0].abs().amax(-1) > 1e-6
    assert reached.tolist() == [slot <= 4 for slot in range(9)]


def test_bfloat16_autocast() -> None:
    draft = make_draft(SOME)
    batch, states = make_batch([[9], [4, 3]])
    exact = unrolled(draft, batch, states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = draft.unroll(batch, replace(states, aux=states.aux.bfloat16()))
        loss = loss_of(draft, batch, states)
    loss.backward()
    assert (rounded.float() - exact).norm() / exact.norm() < 0.05
    assert all(parameter.grad.isfinite().all() for parameter in draft.parameters())


# --- construction and checkpoints ---------------------------------------------------------------------------------


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


def test_a_target_in_half_precision() -> None:
    """The draft trains in float32, whatever the target's weights and states are in."""
    draft = Eagle3(make_spec(dtype=torch.bfloat16), SOME)
    batch, states = make_batch([[6]])
    hidden = unrolled(draft, batch, replace(states, aux=states.aux.bfloat16()))
    assert hidden.dtype == torch.float32
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.float32}


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


def test_number_of_draft_tokens() -> None:
    draft = make_draft(num_depths=2)
    draft.check_num_draft_tokens(50)  # more than it trained: weights are shared over depths
    with pytest.raises(ValueError, match="num_draft_tokens: expected at least 1, got 0"):
        draft.check_num_draft_tokens(0)


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


def test_checkpoint_round_trip() -> None:
    one, other = make_draft(SOME, seed=0), make_draft(SOME, seed=1)
    batch, states = make_batch([[9], [4]])
    assert not torch.allclose(unrolled(one, batch, states), unrolled(other, batch, states))
    other.load_state_dict(one.state_dict())
    assert torch.equal(unrolled(one, batch, states), unrolled(other, batch, states))
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("name", [*PARAMETERS, "vocab.ids"])
def test_a_missing_tensor_is_an_error(name: str) -> None:
    draft = make_draft(SOME)
    state = draft.state_dict()
    del state[name]
    with pytest.raises(RuntimeError, match=name):
        draft.load_state_dict(state)


def test_dimensions_of_the_reference_are_not_symmetric() -> None:
    """What the other tests rely on: no two sizes of the layer can be mixed up unnoticed."""
    assert DIMS.head_dim * DIMS.num_heads != DIMS.hidden_size
    assert DIMS.num_kv_heads not in (1, DIMS.num_heads)
    assert DIMS.rope_attention_factor != 1
