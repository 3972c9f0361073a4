"""The walk along answers: the target's head is read once for all s."""

from __future__ import annotations

import pytest
import torch

from lkspec.data.chat import Encoded
from lkspec.data.dataset import EncodedStore
from lkspec.drafts.medusa import Medusa
from lkspec.measure.walk import walk_answers
from lkspec.vocab import DraftVocab


@pytest.mark.parametrize("truncated", [False, True], ids=["full", "truncated"])
def test_several_s_at_a_time_are_each_by_itself(tiny_target, truncated):
    size = tiny_target.vocab_size
    torch.manual_seed(0)
    vocab = DraftVocab(torch.arange(1, size, 2), size) if truncated else DraftVocab.full(size)
    draft = Medusa(tiny_target.spec, vocab, num_depths=3)
    store = EncodedStore()
    for number, temperature in enumerate((1.0, 1.0, 0.0, 0.7)):
        tokens = [(7 * number + 3 * place) % 250 for place in range(20 + number)]
        store.append(Encoded(f"a{number}", tokens, [0] * 5 + [1] * (len(tokens) - 5), temperature))

    def walked(*sharpness: float) -> dict[tuple[object, ...], tuple[float, float, float]]:
        rows = walk_answers(
            tiny_target, draft, store, states=tiny_target.states, num_draft_tokens=3, steps=0, sharpness=sharpness
        )
        return {(r.conversation, r.sharpness, r.depth): (r.alpha, r.rounds, r.accepted) for r in rows}

    together, alone = walked(1.0, 1.5), walked(1.0) | walked(1.5)
    assert together.keys() == alone.keys()
    assert ("a2", 1.5, 1) not in together, "at T = 0 s changes nothing"
    for name, found in together.items():
        assert found == pytest.approx(alone[name], rel=1e-5), name
    assert together["a0", 1.5, 1] != pytest.approx(together["a0", 1.0, 1], rel=1e-3)
