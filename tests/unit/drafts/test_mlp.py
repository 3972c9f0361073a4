"""The MLP speculator against fms-extras' definition, the start of a training, names of the format, refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.eagle3_reference import SOME, V, make_batch, make_spec
from torch import Tensor

from lkspec.drafts.mlp import MLPSpeculator
from lkspec.types import Batch, TargetSpec, TargetStates
from lkspec.vocab import DraftVocab

H, K = 16, 4
ROWS = [[4, 7], [6]]  # packed and padded
FULL = DraftVocab.full(V)


def make_inputs(rows: list[list[int]] = ROWS) -> tuple[Batch, TargetStates]:
    """States with a mean far from 0: the format's norm leaves it in."""
    batch, states = make_batch(rows)
    last = torch.randn(*batch.tokens.shape, H, generator=torch.Generator().manual_seed(5)) + 1.0
    return batch, replace(states, last=last)


def make_mlp(vocab: DraftVocab = FULL, *, spec: TargetSpec | None = None, moved: bool = True, **options):
    """A draft; ``moved``: with every parameter far from its initial value."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draft = MLPSpeculator(spec or make_spec(), vocab, **{"num_depths": K, **options})
        if moved:
            with torch.no_grad():
                for parameter in draft.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return draft


def normed(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean() + 1e-6)


class Reference:
    """fms-extras' forward pass of one anchor in float64, with its names; tied weights are looked up, not shared."""

    def __init__(self, draft: MLPSpeculator, inner_dim: int, *, tied: bool, scale_input: bool) -> None:
        self.weights = {name: tensor.double() for name, tensor in draft.state_dict().items()}
        self.inner_dim, self.tied, self.scale_input = inner_dim, tied, scale_input
        if "emb.0.weight" not in self.weights:
            table = make_spec().embedding.double()
            self.weights["target"] = table / table.std() / math.sqrt(inner_dim)

    def unroll(self, hidden: Tensor, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """States and logits of depths 1.. of an anchor with this hidden state, followed by these tokens."""
        state_weight = 0.5 ** (0.5 / K)
        emb_weight = math.sqrt(1 - state_weight**2)
        state = hidden.double()
        if self.scale_input:
            state = normed(state) / 2**0.5
        states, logits = [], []
        for i, token in enumerate(tokens.tolist()):
            own = 0 if self.tied else i
            proj = min(i, 1) if self.tied else i
            table = self.weights.get(f"emb.{own}.weight", self.weights.get("target"))
            z = table[token] * (emb_weight * math.sqrt(self.inner_dim / 2))
            mixed = (self.weights[f"proj.{proj}.weight"] @ state) * state_weight + z
            mixed = normed(mixed) * self.weights[f"ln.{own}.weight"] + self.weights[f"ln.{own}.bias"]
            state = mixed * (1 + torch.erf(mixed / math.sqrt(2))) / 2
            states.append(state)
            logits.append(self.weights[f"heads.{own}.weight"] @ state)
        return states, logits


@pytest.mark.parametrize("vocab", [SOME, FULL], ids=["truncated", "full"])
@pytest.mark.parametrize("scale_input", [False, True])
@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize(("embeddings", "inner_dim"), [("learned", 10), ("learned", None), ("target", None)])
def test_unroll_is_the_definition(
    embeddings: str, inner_dim: int | None, tie_weights: bool, scale_input: bool, vocab: DraftVocab
) -> None:
    draft = make_mlp(
        vocab, embeddings=embeddings, inner_dim=inner_dim, tie_weights=tie_weights, scale_input=scale_input
    )
    reference = Reference(draft, inner_dim or H, tied=tie_weights, scale_input=scale_input)
    batch, states = make_inputs()
    with torch.no_grad():
        hidden = draft.unroll(batch, states)
        logits = torch.stack([draft.head(k).logits(hidden[k - 1]) for k in range(1, K + 1)])
    assert hidden.shape == (K, *batch.tokens.shape, inner_dim or H)
    num_compared = 0
    for row, slot in torch.nonzero(batch.segments).tolist():
        same = batch.segments[row, slot + 1 : slot + K + 1] == batch.segments[row, slot]
        following = batch.tokens[row, slot + 1 : slot + K + 1][same]
        for depth, expected in enumerate(zip(*reference.unroll(states.last[row, slot], following), strict=True)):
            for ours, theirs in zip((hidden, logits), expected, strict=True):
                torch.testing.assert_close(ours[depth, row, slot].double(), theirs, rtol=1e-5, atol=1e-5)
            num_compared += 1
    assert num_compared == sum(max(n - k, 0) for row in ROWS for n in row for k in range(1, K + 1))


def test_the_state_makes_up_half_of_the_last_one() -> None:
    """What the two weights are for: after K mixings the first state's share of the variance is 1/2."""
    draft = make_mlp()
    share = 1.0
    for _ in range(K):
        share *= draft.state_weight**2
    assert share == pytest.approx(0.5)
    embedded = draft.emb_weight**2 * 2 / H  # of unit variance when the embedding's is 1 / D and the state's 1 / 2
    assert draft.state_weight**2 + embedded == pytest.approx(1.0)


def test_fewer_depths_than_were_trained() -> None:
    draft = make_mlp()
    batch, states = make_inputs()
    assert torch.equal(draft.unroll(batch, states, 2), draft.unroll(batch, states)[:2])


# --- the start of a training --------------------------------------------------------------------------------------


def test_statistics_of_the_start() -> None:
    """All weights N(0, 1 / inner_dim), norms the identity, as fms-extras resets them."""
    inner_dim = 50
    draft = make_mlp(moved=False, embeddings="learned", inner_dim=inner_dim)
    groups: dict[str, list[Tensor]] = {"emb": [], "proj": [], "heads": []}
    for name, parameter in draft.named_parameters():
        group = name.split(".")[0]
        if group == "ln":
            assert torch.equal(parameter, torch.full((inner_dim,), 1.0 if name.endswith("weight") else 0.0))
        else:
            groups[group].append(parameter.detach().flatten())
    for group, parameters in groups.items():
        assert len({float(p[0]) for p in parameters}) == K, f"{group}: depths are drawn apart"
        values = torch.cat(parameters) * inner_dim**0.5
        assert float(values.std()) == pytest.approx(1.0, rel=0.05)
        assert abs(float(values.mean())) < 4 / values.numel() ** 0.5


def test_target_embeddings_start_like_learned_ones() -> None:
    spec = make_spec()
    draft = make_mlp(spec=spec, moved=False)
    rows = draft._embed(torch.arange(V), 1)
    assert float(rows.std()) == pytest.approx(H**-0.5, rel=1e-5)
    torch.testing.assert_close(rows / rows.norm(), spec.embedding / spec.embedding.norm())
    assert draft.target_embedding.data_ptr() == spec.embedding.data_ptr()
    assert draft.num_frozen == V * H
    assert make_mlp(embeddings="learned").num_frozen == 0


@pytest.mark.parametrize("vocab", [SOME, FULL], ids=["truncated", "full"])
def test_heads_from_the_target(vocab: DraftVocab) -> None:
    spec = make_spec(scale=0.5)
    draft = make_mlp(vocab, spec=spec, moved=False, head_init="target")
    for depth in range(1, K + 1):
        for index, target_id in enumerate(vocab.ids.tolist()):
            assert torch.equal(draft.head(depth).weight[index], 0.5 * spec.head.weight[target_id])
    assert len({draft.head(depth).weight.data_ptr() for depth in range(1, K + 1)}) == K


@pytest.mark.parametrize("embeddings", ["learned", "target"])
@pytest.mark.parametrize("tie_weights", [False, True])
def test_gradients_reach_every_parameter(tie_weights: bool, embeddings: str) -> None:
    draft = make_mlp(SOME, tie_weights=tie_weights, embeddings=embeddings, scale_input=True)
    hidden = draft.unroll(*make_inputs())
    sum(draft.head(k).logits(hidden[k - 1]).square().sum() for k in range(1, K + 1)).backward()
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 1e-6, name


def test_a_target_in_half_precision() -> None:
    draft = make_mlp(SOME, spec=make_spec(dtype=torch.bfloat16), head_init="target")
    batch, states = make_inputs()
    assert draft.unroll(batch, replace(states, last=states.last.bfloat16())).dtype == torch.float32
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.float32}


# --- the format, refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("embeddings", ["learned", "target"])
@pytest.mark.parametrize(("tie_weights", "num_own", "num_proj"), [(False, K, K), (True, 1, 2)])
def test_names_and_shapes(tie_weights: bool, num_own: int, num_proj: int, embeddings: str) -> None:
    """The format's, but for ``heads`` (``head`` there); what is tied is there once."""
    inner_dim = 10 if embeddings == "learned" else H
    draft = make_mlp(SOME, tie_weights=tie_weights, embeddings=embeddings, inner_dim=inner_dim)
    expected: dict[str, tuple[int, ...]] = {"proj.0.weight": (inner_dim, H)}
    expected |= {f"proj.{i}.weight": (inner_dim, inner_dim) for i in range(1, num_proj)}
    for i in range(num_own):
        expected |= {f"ln.{i}.weight": (inner_dim,), f"ln.{i}.bias": (inner_dim,)}
        expected[f"heads.{i}.weight"] = (SOME.size, inner_dim)
        if embeddings == "learned":
            expected[f"emb.{i}.weight"] = (V, inner_dim)  # any token can be read, also one that is not proposed
    assert {name: tuple(p.shape) for name, p in draft.named_parameters()} == expected
    assert set(draft.state_dict()) == {*expected, "vocab.ids"}


@pytest.mark.parametrize(
    ("options", "bias", "message"),
    [
        ({"num_depths": 0}, False, "draft.num_depths: expected at least 1, got 0"),
        ({"inner_dim": 0}, False, "draft.inner_dim: expected at least 1, got 0"),
        ({"embeddings": "tied"}, False, "draft.embeddings: expected one of learned, target, got 'tied'"),
        ({"inner_dim": 8}, False, "draft.embeddings=target has the target's width 16, but draft.inner_dim is 8; leave"),
        ({"head_init": "zeros"}, False, "draft.head_init: expected 'target' or 'random', got 'zeros'"),
        ({"head_init": "target"}, True, "draft.head_init=target: the target's head has a bias"),
        (
            {"head_init": "target", "embeddings": "learned", "inner_dim": 8},
            False,
            "draft.head_init=target: the target's head reads 16 features, this draft's 8; make them equal or set",
        ),
    ],
)
def test_settings_that_are_refused(options: dict, bias: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLPSpeculator(make_spec(bias=bias), SOME, **options)


@pytest.mark.parametrize("tie_weights", [False, True])
def test_more_tokens_than_heads_are_refused(tie_weights: bool) -> None:
    """Also of a tied one: its weights of state and embedding are made for K depths."""
    draft = make_mlp(tie_weights=tie_weights)
    draft.check_num_draft_tokens(K)
    with pytest.raises(ValueError, match=r"num_draft_tokens=5: this MLPSpeculator has 4 heads; use at most 4"):
        draft.unroll(*make_inputs(), K + 1)


def test_what_the_draft_says_of_itself() -> None:
    full = make_mlp(FULL)
    assert full.served_by == "fms-extras and TGI (mlp_speculator); current vLLM and SGLang no longer serve it"
    assert make_mlp(SOME).served_by == (
        "research only: the mlp_speculator format has no draft vocabulary (vocab.size=null has fms-extras, TGI)"
    )
    assert (full.num_depths, full.max_depths, full.paper_eta) == (K, K, 3.0)
    assert not full.full_vocabulary
