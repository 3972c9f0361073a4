"""What holds for every draft: alignment (contract 1), neighbours, depths, precision and the draft vocabulary."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.draft_cases import CASES, Case, batch_for, conversation, half_vocab, make_draft, unrolled
from torch import Tensor

from lkspec.targets.tiny import TinyTarget
from lkspec.training.statistics import draft_stats
from lkspec.types import LinearHead
from lkspec.vocab import DraftVocab

NUM_SLOTS, K = 8, 3


def changed_entries(before: Tensor, after: Tensor) -> list[list[bool]]:
    """Which [K, T] entries differ, with room between noise and effect."""
    difference = (before - after)[:, 0].abs().amax(-1)
    assert not bool(((difference > 1e-6) & (difference < 1e-5)).any())
    return (difference > 1e-5).tolist()


def test_which_tokens_each_anchor_and_depth_reads(case: Case, target: TinyTarget) -> None:
    """x_{t+1+k}, which depth k proposes, and later tokens change nothing."""
    draft = make_draft(case, target.spec, num_depths=K)
    batch, states = batch_for(target.spec, [[NUM_SLOTS]])
    before = unrolled(draft, batch, states)
    assert before.shape[:3] == (K, 1, NUM_SLOTS)
    for slot in range(NUM_SLOTS):
        tokens = batch.tokens.clone()
        tokens[0, slot] = (tokens[0, slot] + 1) % target.vocab_size
        changed = changed_entries(before, unrolled(draft, replace(batch, tokens=tokens), states))
        for depth in range(1, K + 1):
            for anchor in range(NUM_SLOTS):
                where = f"slot {slot}, anchor {anchor}, depth {depth}"
                assert changed[depth - 1][anchor] == case.reads_token(slot, anchor, depth), where
                assert slot <= anchor + depth or not changed[depth - 1][anchor], f"{where} sees what it proposes"


def test_which_states_each_anchor_reads(case: Case, target: TinyTarget) -> None:
    """Those of one kind only, none after the anchor, at every depth the same."""
    draft = make_draft(case, target.spec, num_depths=K)
    batch, states = batch_for(target.spec, [[NUM_SLOTS]])
    before = unrolled(draft, batch, states)
    unread = "last" if case.reads == "aux" else "aux"
    other = replace(states, **{unread: getattr(states, unread) + 1.0})
    assert torch.equal(unrolled(draft, batch, other), before)
    for slot in range(NUM_SLOTS):
        moved = getattr(states, case.reads).clone()
        moved[0, slot, ::2] += 1.0  # not a constant, which a LayerNorm would take away
        changed = changed_entries(before, unrolled(draft, batch, replace(states, **{case.reads: moved})))
        assert changed == [[case.reads_state(slot, anchor) for anchor in range(NUM_SLOTS)]] * K, f"slot {slot}"
        assert not any(changed[0][:slot])


def test_neighbours_and_padding_change_nothing(case: Case, target: TinyTarget) -> None:
    """Each supervised entry of a packed, padded row equals that of the conversation by itself."""
    draft = make_draft(case, target.spec, num_depths=4)
    rows = [[4, 6, 3], [11], [2, 2, 2, 2]]  # 11 is more than a sliding window of the targets
    batch, states = batch_for(target.spec, rows)
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
    assert num_compared == int(mask.sum()) > 30
    assert hidden.isfinite().all()


def test_training_mode_computes_what_evaluation_mode_does(case: Case, target: TinyTarget) -> None:
    """No dropout, and no branch of the target's own layer that only one of them takes."""
    draft = make_draft(case, target.spec)
    batch, states = batch_for(target.spec, [[9], [4, 3]])
    trained = unrolled(draft.train(), batch, states)
    torch.testing.assert_close(unrolled(draft.eval(), batch, states), trained, rtol=1e-5, atol=1e-5)


def test_positions_matter_by_their_differences_alone(case: Case, target: TinyTarget) -> None:
    """A conversation may begin anywhere."""
    draft = make_draft(case, target.spec)
    batch, states = batch_for(target.spec, [[11]])
    moved = unrolled(draft, replace(batch, positions=batch.positions + 17), states)
    torch.testing.assert_close(moved, unrolled(draft, batch, states), rtol=1e-4, atol=1e-4)


def test_rows_shorter_than_the_depths(case: Case, tiny_target: TinyTarget) -> None:
    """A row that ends early gives the entries it has, and finite ones elsewhere."""
    draft = make_draft(case, tiny_target.spec, num_depths=6)
    batch, states = batch_for(tiny_target.spec, [[9]])
    whole = unrolled(draft, batch, states)
    short_batch, short_states = batch_for(tiny_target.spec, [[3]])
    short_batch = replace(short_batch, tokens=batch.tokens[:, :3])
    short_states = replace(short_states, aux=states.aux[:, :3], last=states.last[:, :3])
    short = unrolled(draft, short_batch, short_states)
    assert short.shape[:3] == (6, 1, 3)
    assert short.isfinite().all()
    known = torch.tensor([[anchor + depth < 3 for anchor in range(3)] for depth in range(1, 7)])
    torch.testing.assert_close(short[:, 0][known], whole[:, 0, :3][known], rtol=1e-5, atol=1e-5)


def test_fewer_depths_are_a_prefix_of_more(case: Case, target: TinyTarget) -> None:
    draft = make_draft(case, target.spec, num_depths=3)
    batch, states = batch_for(target.spec, [[9], [6]])
    three = unrolled(draft, batch, states)
    assert three.shape[0] == 3
    assert torch.equal(unrolled(draft, batch, states, 2), three[:2])
    if not case.independent_depths:
        seven = unrolled(draft, batch, states, 7)
        assert seven.shape[0] == 7
        assert torch.equal(seven[:3], three)


def test_more_depths_than_were_trained(case: Case, tiny_target: TinyTarget) -> None:
    draft = make_draft(case, tiny_target.spec, num_depths=2)
    batch, states = batch_for(tiny_target.spec, [[9]])
    for depths in (1, 2):
        draft.check_num_draft_tokens(depths)
    if case.independent_depths:
        assert draft.max_depths == 2
        with pytest.raises(ValueError, match=r"num_draft_tokens=3: .* has 2 heads"):
            draft.check_num_draft_tokens(3)
        with pytest.raises(ValueError, match=r"num_draft_tokens=3: .* has 2 heads"):
            draft.unroll(batch, states, 3)
    else:
        assert draft.max_depths is None
        draft.check_num_draft_tokens(7)


def test_counts_that_are_refused(case: Case, tiny_target: TinyTarget) -> None:
    with pytest.raises(ValueError, match=r"num_draft_tokens: expected at least 1, got 0"):
        make_draft(case, tiny_target.spec).check_num_draft_tokens(0)
    with pytest.raises(ValueError, match=r"draft\.num_depths: expected at least 1, got 0"):
        make_draft(case, tiny_target.spec, num_depths=0)


def test_bfloat16_autocast(case: Case, target: TinyTarget) -> None:
    """Near what float32 computes, with finite gradients in float32."""
    draft = make_draft(case, target.spec)
    batch, states = batch_for(target.spec, [[9], [4, 3]])
    exact = unrolled(draft, batch, states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = draft.unroll(batch, replace(states, aux=states.aux.bfloat16(), last=states.last.bfloat16()))
        stats = draft_stats(draft, batch, states, target.head)
    counted = batch.depth_mask(draft.num_depths)
    error = (rounded.float() - exact)[counted].norm(dim=-1) / exact[counted].norm(dim=-1)
    # A token whose experts are nearly tied may be routed to others.
    assert float(error.detach().median()) < 0.03
    assert stats.kl.isfinite().all()
    stats.kl.sum().backward()
    for name, parameter in draft.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt_oss"])
def half_target(request: pytest.FixtureRequest) -> TinyTarget:
    """A target in bfloat16."""
    return TinyTarget(kind=request.param, device="cpu", dtype="bfloat16")


@pytest.mark.parametrize("truncated", [False, True], ids=["full", "truncated"])
def test_a_target_in_half_precision(case: Case, half_target: TinyTarget, truncated: bool) -> None:
    """The draft trains in float32, whatever the target's weights and states are in."""
    vocab = half_vocab(half_target.vocab_size) if truncated else None
    draft = make_draft(case, half_target.spec, vocab)
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.float32}
    batch, _ = batch_for(half_target.spec, [[9], [4, 3]])
    states = half_target.states(batch)
    assert states.last.dtype == torch.bfloat16
    assert unrolled(draft, batch, states).dtype == torch.float32
    stats = draft_stats(draft, batch, states, half_target.head)
    stats.kl.sum().backward()
    assert stats.kl.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in draft.parameters())


def test_a_truncated_vocabulary_has_only_its_own_tokens(case: Case, target: TinyTarget) -> None:
    """Heads have one row a token of the draft vocabulary; what is drafted are target ids inside it."""
    vocab = half_vocab(target.vocab_size)
    draft = make_draft(case, target.spec, vocab)
    batch, states = batch_for(target.spec, [[9], [6]])
    hidden = unrolled(draft, batch, states)
    for depth in range(1, draft.num_depths + 1):
        assert draft.head(depth).logits(hidden[depth - 1]).shape[-1] == vocab.size < target.vocab_size
    stats = draft_stats(draft, batch, target.states(batch), target.head)
    assert ((stats.coverage > 0) & (stats.coverage < 1))[stats.mask].all()
    assert (stats.log_alpha.exp() <= stats.coverage + 1e-6)[stats.mask].all()
    outside = vocab.to_draft(batch.tokens) < 0
    for depth in range(1, draft.num_depths + 1):
        here = stats.mask[depth - 1].nonzero().tolist()
        refused = [stats.accept_prob[depth - 1, b, t].item() for b, t in here if outside[b, t + 1 + depth]]
        assert refused
        assert set(refused) == {0.0}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "head" in case.shared])
@pytest.mark.parametrize("truncated", [False, True], ids=["full", "truncated"])
def test_a_shared_head_is_the_targets(target: TinyTarget, name: str, truncated: bool) -> None:
    """Rows of the draft vocabulary with bias, scale and soft cap."""
    size = target.vocab_size
    bias = torch.randn(size, generator=torch.Generator().manual_seed(0))
    head = LinearHead(target.head.weight, bias, scale=0.5, soft_cap=7.0)
    vocab = half_vocab(size) if truncated else DraftVocab.full(size)
    draft = make_draft(CASES[name], replace(target.spec, head=head), vocab)
    hidden = 5 * torch.randn(4, target.head.weight.shape[1], generator=torch.Generator().manual_seed(1))
    for depth in (1, 3):
        torch.testing.assert_close(draft.head(depth).logits(hidden), vocab.restrict(head.logits(hidden)))
    assert draft.num_frozen == (size + vocab.size) * hidden.shape[1] + vocab.size
    if not truncated:
        assert draft.head(1).weight.data_ptr() == target.head.weight.data_ptr(), "no second copy in memory"


def test_sharpened_heads_make_q_its_power(case: Case, target: TinyTarget) -> None:
    draft = make_draft(case, target.spec, num_depths=K)
    batch, states = batch_for(target.spec, [[NUM_SLOTS]])
    hidden = unrolled(draft, batch, states)
    before = [draft.head(depth).logits(hidden[depth - 1]) for depth in range(1, K + 1)]
    told = draft_stats(draft, batch, states, target.head, sharpness=1.5)
    if "head" in case.shared:
        with pytest.raises(ValueError, match=r"sharpness=1\.5: the head of .* is the target's own"):
            draft.sharpen(1.5)
        return
    draft.sharpen(1.5)
    for depth in range(1, K + 1):
        q = before[depth - 1].softmax(-1) ** 1.5
        sharp = draft.head(depth).logits(hidden[depth - 1]).softmax(-1)
        assert torch.allclose(sharp, q / q.sum(-1, keepdim=True), atol=1e-6)
    stats = draft_stats(draft, batch, states, target.head)
    assert torch.allclose(stats.log_alpha, told.log_alpha, atol=1e-5)
    assert torch.equal(stats.hit, told.hit)


@pytest.mark.parametrize("sharpness", [0.0, -1.0, float("nan"), float("inf")])
def test_a_sharpness_that_is_none_is_refused(target: TinyTarget, sharpness: float) -> None:
    draft = make_draft(CASES["mlp"], target.spec, num_depths=K)
    with pytest.raises(ValueError, match="sharpness: expected a positive number"):
        draft.sharpen(sharpness)
