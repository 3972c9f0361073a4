"""Alpha in parts by the entropy of q: what is measured, and what an s for each part gets."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lkspec.data.chat import Encoded
from lkspec.drafts.medusa import Medusa
from lkspec.vocab import DraftVocab

SCRIPT = Path(__file__).parents[3] / "experiments" / "ablations" / "by_entropy.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("ablation_by_entropy", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.inference_mode()
def test_entropies_and_alpha_of_every_proposed_token(script, tiny_target):
    torch.manual_seed(0)
    draft = Medusa(tiny_target.spec, DraftVocab.full(tiny_target.vocab_size), num_depths=2)
    answer = Encoded("a", list(range(20, 32)), [0] * 4 + [1] * 8, 1.0)
    tokens = script.measure(SimpleNamespace(target=tiny_target, draft=draft), [answer, answer], [1.0, 2.0])
    assert tokens.answer.tolist() == [0] * 7 + [1] * 7  # all tokens of the turn but its first
    batch = script.collate([[answer]])
    states = tiny_target.states(batch)
    q = draft.head(1).logits(draft.unroll(batch, states, 1)[0, 0]).double().softmax(-1)
    p = tiny_target.head.logits(states.last[0]).double().softmax(-1)
    for place, anchor in enumerate(range(3, 10)):
        ours, theirs = q[anchor], p[anchor + 1]
        assert float(tokens.of_draft[place]) == pytest.approx(float(-(ours * ours.log()).sum()), rel=1e-5)
        assert float(tokens.of_target[place]) == pytest.approx(float(-(theirs * theirs.log()).sum()), rel=1e-5)
        for index, power in enumerate((1, 2)):
            sharper = ours**power / (ours**power).sum()
            assert float(tokens.alpha[index, place]) == pytest.approx(
                float(torch.minimum(sharper, theirs).sum()), rel=1e-5
            )


def test_an_s_for_each_part_is_chosen_on_other_answers_than_it_is_told_for(script, capsys):
    entropy = torch.tensor([0.1, 3.0] * 4)
    sharp_suits_the_sure = torch.tensor([[0.5, 0.4] * 4, [0.7, 0.2] * 4])
    tokens = script.Tokens(torch.tensor([0, 0, 1, 1] * 2), entropy, entropy, sharp_suits_the_sure)
    part = script.parts_of(entropy, 2)
    assert part.tolist() == [0, 1] * 4
    chosen, one, each = script.choose(tokens, part, 2)
    assert chosen == [1, 0]
    assert (one, each) == pytest.approx((0.45, 0.55))
    script.show(tokens, [1.0, 2.0], 2)
    table = capsys.readouterr().out
    assert "| 0.10 to 0.10 | 0.10 | 0.500 | 0.700 |" in table
    assert "0.4500 with one s, 0.5500 with one for each part (2, 1)" in table
