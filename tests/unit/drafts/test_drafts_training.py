"""What training does with every draft: gradients, what it leaves alone, frozen parameters, checkpoints."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from helpers.draft_cases import Case, batch_for, half_vocab, make_draft, unrolled
from torch import Tensor

from lkspec.drafts.base import Draft
from lkspec.losses import objectives
from lkspec.losses.fused.in_forward import InForward
from lkspec.losses.objectives import LKLambda, Objective, masked_sums, reduce_loss
from lkspec.targets.tiny import TinyTarget
from lkspec.training.statistics import draft_stats
from lkspec.types import LinearHead, TargetSpec

KINDS = [kind for kind in vars(objectives).values() if isinstance(kind, type) and issubclass(kind, Objective)]
OBJECTIVES = [
    *(kind() for kind in KINDS if kind is not Objective),
    LKLambda(fixed_lambda=0.5),
    LKLambda(per_token=True),
]


def loss_of(draft: Draft, target: TinyTarget, objective: Objective) -> Tensor:
    batch, _ = batch_for(target.spec, [[9], [5, 4]])
    stats = draft_stats(draft, batch, target.states(batch), target.head, row_value=objective.row_value)
    sums = masked_sums(stats)
    values = objective.values(stats, sums["alpha"] / sums["count"])
    return reduce_loss(values, stats.mask, sums["count"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_step_waits_for_its_device_once(case: Case) -> None:
    """When backward checks that the loss has the weights that were promised to the gradient formed in forward."""
    target = TinyTarget(device="cuda")
    draft = make_draft(case, target.spec, half_vocab(target.vocab_size)).cuda()
    made, _ = batch_for(target.spec, [[9], [5, 4]])
    batch, objective = made.to("cuda"), LKLambda()
    counts = made.depth_mask(draft.num_depths).sum((1, 2)).cuda()
    states, promised = target.states(batch), InForward.of(objective, counts)

    def step() -> None:
        stats = draft_stats(draft, batch, states, target.head, in_forward=promised)
        assert stats.value is not None
        reduce_loss(stats.value, stats.mask, counts, 0.8).backward()

    step()  # kernels are compiled
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in told if "called a synchronizing" in str(one.message)]
    assert len(waits) <= 1, waits


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("truncated", [False, True], ids=["full", "truncated"])
def test_gradients_reach_every_parameter(
    case: Case, tiny_target: TinyTarget, objective: Objective, truncated: bool
) -> None:
    draft = make_draft(case, tiny_target.spec, half_vocab(tiny_target.vocab_size) if truncated else None)
    assert_gradients(draft, tiny_target, objective)


def test_gradients_reach_every_parameter_beside_every_target(case: Case, target: TinyTarget) -> None:
    assert_gradients(make_draft(case, target.spec), target, LKLambda())


def assert_gradients(draft: Draft, target: TinyTarget, objective: Objective) -> None:
    """Finite and not zero, at every parameter."""
    loss_of(draft, target, objective).backward()
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert float(parameter.grad.abs().max()) > 1e-6, name


def test_a_fresh_draft_can_learn(case: Case, target: TinyTarget) -> None:
    """At its initial values no parameter is stuck at a gradient of zero, and a few steps lower the loss."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draft = case.architecture(target.spec, half_vocab(target.vocab_size), num_depths=2, **case.options)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2, weight_decay=0.0)
    before = {name: parameter.detach().clone() for name, parameter in draft.named_parameters()}
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of(draft, target, LKLambda())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    for name, parameter in draft.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_the_target_stays_as_it_is(case: Case, target: TinyTarget) -> None:
    """A step that moves every parameter of the draft moves none of the target, in memory shared or not."""
    draft = make_draft(case, target.spec)
    known = {name: parameter.clone() for name, parameter in target.model.named_parameters()}
    loss_of(draft, target, LKLambda()).backward()
    torch.optim.SGD(draft.parameters(), lr=1.0).step()
    for name, parameter in target.model.named_parameters():
        assert torch.equal(parameter, known[name]), name
        assert parameter.grad is None, name
    for tensor in draft.frozen_tensors():
        assert not tensor.requires_grad
    assert {id(tensor) for tensor in draft.frozen_tensors()}.isdisjoint(map(id, draft.parameters()))


# --- counts and frozen parameters ---------------------------------------------------------------------------------


def tied(spec: TargetSpec) -> TargetSpec:
    """The same with a head that is the embedding."""
    return replace(spec, head=LinearHead(spec.embedding))


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("truncated", [False, True], ids=["full", "truncated"])
def test_numbers_of_parameters(case: Case, tiny_target: TinyTarget, truncated: bool, is_tied: bool) -> None:
    """What is shared with the target counts as frozen, and once where embedding and head are one tensor."""
    spec = tied(tiny_target.spec) if is_tied else tiny_target.spec
    vocab_size, size = spec.embedding.shape
    vocab = half_vocab(vocab_size) if truncated else None
    draft = make_draft(case, spec, vocab)
    rows = {"embedding": vocab_size, "head": draft.vocab.size}
    if is_tied and not truncated and case.shared == {"embedding", "head"}:
        rows["head"] = 0
    assert draft.num_frozen == size * sum(rows[name] for name in case.shared)
    assert draft.num_trainable == sum(parameter.numel() for parameter in draft.parameters()) > 0


def test_frozen_parameters_keep_their_values(case: Case, tiny_target: TinyTarget) -> None:
    draft = make_draft(case, tiny_target.spec)
    trainable, frozen = draft.num_trainable, draft.num_frozen
    names = [name for name, _ in draft.named_parameters()]
    part = names[0].split(".")[0]
    matching = {name for name in names if name.startswith(part)}
    assert 0 < len(matching) < len(names)
    draft.freeze([f"{part}*"])
    count = sum(draft.get_parameter(name).numel() for name in matching)
    assert (draft.num_trainable, draft.num_frozen) == (trainable - count, frozen + count)
    before = {name: parameter.detach().clone() for name, parameter in draft.named_parameters()}
    loss_of(draft, tiny_target, LKLambda()).backward()
    torch.optim.AdamW(draft.parameters(), lr=1e-3).step()
    kept = {name for name, parameter in draft.named_parameters() if torch.equal(parameter, before[name])}
    assert kept == matching


def test_patterns_that_freeze_nothing_or_everything(case: Case, tiny_target: TinyTarget) -> None:
    draft = make_draft(case, tiny_target.spec)
    first = next(name for name, _ in draft.named_parameters())
    with pytest.raises(ValueError, match=r"draft\.freeze: 'nonsense' matches no parameter") as error:
        draft.freeze([first, "nonsense"])
    assert case.architecture.__name__ in str(error.value)
    assert all(name in str(error.value) for name, _ in draft.named_parameters())
    with pytest.raises(ValueError, match=r"draft\.freeze=\['\*'\] leaves nothing to train"):
        draft.freeze(["*"])


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncated", [False, True], ids=["full", "truncated"])
def test_a_checkpoint_holds_the_draft_alone(case: Case, target: TinyTarget, truncated: bool) -> None:
    """Its parameters and which tokens its vocabulary has; nothing of the target, by name or by value."""
    vocab = half_vocab(target.vocab_size) if truncated else None
    draft = make_draft(case, target.spec, vocab)
    state = draft.state_dict()
    assert set(state) == {*(name for name, _ in draft.named_parameters()), "vocab.ids"}
    assert state["vocab.ids"].tolist() == draft.vocab.ids.tolist()
    known = [*target.model.parameters(), *draft.frozen_tensors()]
    for name, value in state.items():
        assert not any(value.data_ptr() == other.data_ptr() for other in known), name
        assert not any(value.shape == other.shape and torch.equal(value, other) for other in known), name


@pytest.mark.parametrize("truncated", [False, True], ids=["full", "truncated"])
def test_a_checkpoint_round_trip(case: Case, target: TinyTarget, truncated: bool) -> None:
    vocab = half_vocab(target.vocab_size) if truncated else None
    one, other = (make_draft(case, target.spec, vocab, seed=seed) for seed in (0, 1))
    batch, states = batch_for(target.spec, [[9], [4]])

    def logits(draft: Draft) -> Tensor:
        hidden = unrolled(draft, batch, states)
        return torch.stack([draft.head(k).logits(hidden[k - 1]) for k in range(1, 4)]).detach()

    assert not torch.allclose(logits(one), logits(other))
    other.load_state_dict(one.state_dict())
    assert torch.equal(logits(one), logits(other))


def test_a_tensor_missing_from_a_checkpoint_is_an_error(case: Case, tiny_target: TinyTarget) -> None:
    draft = make_draft(case, tiny_target.spec)
    for name in draft.state_dict():
        state = draft.state_dict()
        del state[name]
        with pytest.raises(RuntimeError, match=name):
            draft.load_state_dict(state)
