"""MTP modules out of released checkpoints: what they compute, in training and in decoding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.draft_cases import batch_for, unrolled
from helpers.mtp_checkpoints import BLOCK, KINDS, V, load_native, made, target_of
from helpers.mtp_reference import DeepSeekReference, QwenReference
from torch import Tensor

from lkspec.decoding.chain import ChainDecoder, Completion, Request
from lkspec.decoding.sampling import Sampling
from lkspec.drafts.mtp import MTP
from lkspec.nn.kv_cache import PositionCache
from lkspec.targets.tiny import byte_tokenizer
from lkspec.targets.transformers import TransformersTarget
from lkspec.types import Batch, DraftSampler, FreshStates
from lkspec.vocab import DraftVocab

K = 3
TOLERANCE = 2e-5  # of the largest entry
ROWS = {"one": [[6]], "padded": [[6], [4]], "packed": [[4, 5], [2, 3, 4]]}
FULL = DraftVocab.full(V)


def loaded(kind: str, folder: Path, vocab: DraftVocab = FULL) -> MTP:
    """A draft with the weights of a folder that is written for it."""
    checkpoint, spec = made(kind)
    draft = MTP(spec, vocab, num_depths=K, layer_init="random")
    load_native(draft, checkpoint.write(folder))
    return draft


def reference(kind: str, **options) -> DeepSeekReference | QwenReference:
    return (QwenReference if kind == "qwen3_next" else DeepSeekReference)(made(kind)[0], **options)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


# --- what the module computes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_unroll_is_the_papers_formulas(kind: str, rows: list[list[int]], tmp_path: Path) -> None:
    draft = loaded(kind, tmp_path)
    batch, states = batch_for(made(kind)[1], rows)
    hidden, expected_of = unrolled(draft, batch, states), reference(kind)
    num_compared = 0
    for row, lengths in enumerate(rows):
        for segment in range(1, len(lengths) + 1):
            inside = batch.segments[row] == segment
            expected = expected_of.unroll(batch.tokens[row, inside], states.last[row, inside], K)
            known = ~expected.isnan()
            error = (hidden[:, row, inside].double() - expected)[known].abs().max()
            assert error < TOLERANCE * expected[known].abs().max()
            num_compared += int(known.any(-1).sum())
    assert num_compared == sum(max(n - k, 0) for row in rows for n in row for k in range(1, K + 1))


def test_the_next_depth_reads_the_normalised_output(kind: str, tmp_path: Path) -> None:
    """Reading the output before its norm would agree at depth 1 and differ, clearly, from depth 2 on."""
    batch, states = batch_for(made(kind)[1], [[5]])
    hidden = unrolled(loaded(kind, tmp_path), batch, states)[:, 0, :2].double()
    other = reference(kind, feed_normalised=False).unroll(batch.tokens[0], states.last[0], K)[:, :2]
    error = (hidden - other).abs().amax((1, 2)) / other.abs().max()
    assert error[0] < TOLERANCE
    assert error[1:].min() > 100 * TOLERANCE


def test_the_embedding_read_at_position_0(kind: str, tmp_path: Path) -> None:
    """DeepSeek's is zero, as the engines have it, so x_1 is not read at anchor 0; Qwen3-Next's is x_1's."""
    draft = loaded(kind, tmp_path)
    batch, states = batch_for(made(kind)[1], [[5]])
    tokens = batch.tokens.clone()
    tokens[0, 1] = (tokens[0, 1] + 1) % V
    before, after = (unrolled(draft, b, states)[0, 0, 0] for b in (batch, replace(batch, tokens=tokens)))
    assert torch.equal(before, after) == (kind != "qwen3_next")
    later = replace(batch, positions=batch.positions + 1)
    moved = replace(later, tokens=tokens)
    assert not torch.equal(unrolled(draft, later, states)[0, 0, 0], unrolled(draft, moved, states)[0, 0, 0])


def test_logits_are_those_of_the_targets_head(kind: str, tmp_path: Path) -> None:
    _, spec = made(kind)
    hidden = torch.randn(2, spec.dims.hidden_size)
    expected = spec.head.logits(hidden)
    torch.testing.assert_close(loaded(kind, tmp_path / "full").head(1).logits(hidden), expected)
    some = DraftVocab(torch.arange(0, V, 3), V)
    torch.testing.assert_close(loaded(kind, tmp_path / "some", some).head(1).logits(hidden), expected[:, ::3])


def test_fp8_blocks_matter() -> None:
    """What the fp8 case relies on: weights of several blocks with ragged edges, and scales that differ."""
    checkpoint, _ = made("deepseek_yarn_fp8")
    scales = {name: tensor for name, tensor in checkpoint.stored.items() if name.endswith("_scale_inv")}
    several = [name for name, tensor in scales.items() if tensor.numel() > 1]
    assert len(several) > 20
    for name in several:
        weight = checkpoint.stored[name.removesuffix("_scale_inv")]
        assert weight.dtype == torch.float8_e4m3fn
        assert any(size % BLOCK for size in weight.shape)
        assert len(set(scales[name].flatten().tolist())) == scales[name].numel()
    whole = {name for name in checkpoint.stored if f"{name}_scale_inv" not in scales and name not in scales}
    assert whole == {
        *(f"model.layers.3.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "mlp.gate")),
        *(f"model.layers.3.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")),
        *(f"model.layers.3.self_attn.{name}_layernorm.weight" for name in ("q_a", "kv_a")),
        "model.layers.3.mlp.gate.e_score_correction_bias",
        "model.layers.3.embed_tokens.weight",
        "model.layers.3.shared_head.head.weight",
    }


def test_the_same_folder_is_target_and_draft(tmp_path: Path) -> None:
    """What ``draft=mtp_native`` does: transformers reads the target out of it and leaves the module to the draft."""
    checkpoint, spec = made("deepseek")
    folder = checkpoint.write(tmp_path)
    byte_tokenizer().save_pretrained(folder)
    target = TransformersTarget(folder, aux_layer_ids=(0, 1), device="cpu")
    draft = MTP(target.spec, FULL, num_depths=K, layer_init="random")
    load_native(draft, folder)
    batch, _ = batch_for(spec, [[6]])
    states = target.states(batch)
    torch.testing.assert_close(states.last, target_of(checkpoint).states(batch).last)
    expected = reference("deepseek").unroll(batch.tokens[0], states.last[0], 1)[0, :-1]
    assert (unrolled(draft, batch, states)[0, 0, :-1] - expected).abs().max() < TOLERANCE * expected.abs().max()
    assert draft.served_by == "vLLM and SGLang, inside the target's own checkpoint"


# --- decoding -----------------------------------------------------------------------------------------------------


class Recorder:
    """Remembers, of a decoding with one row, each round's text so far, drafted tokens and draft logits."""

    def __init__(self, draft: MTP, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rounds: list[tuple[list[int], list[int], Tensor]] = []
        self.text: dict[int, int] = {}
        observe, propose = draft.observe, draft.propose

        def observing(cache: PositionCache, fresh: FreshStates) -> Tensor:
            for slot in range(int(fresh.lengths[0])):
                self.text[int(fresh.positions[0, slot]) + 1] = int(fresh.next_tokens[0, slot])
            self.anchor = int(fresh.positions[0, fresh.lengths[0] - 1])
            return observe(cache, fresh)

        def proposing(cache: PositionCache, fresh: FreshStates, sample: DraftSampler, num_draft_tokens: int) -> Tensor:
            logits: list[Tensor] = []

            def sampling(depth_logits: Tensor) -> Tensor:
                logits.append(depth_logits[0].clone())
                return sample(depth_logits)

            tokens = propose(cache, fresh, sampling, num_draft_tokens)
            text = [self.text[position] for position in range(1, self.anchor + 2)]
            self.rounds.append((text, tokens[0].tolist(), torch.stack(logits)))
            return tokens

        monkeypatch.setattr(draft, "observe", observing)
        monkeypatch.setattr(draft, "propose", proposing)


def decoded(target: TransformersTarget, draft: MTP, *, batch_size: int) -> list[Completion]:
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(0, 256, (n,), generator=generator).tolist()) for n in (5, 1, 9)]
    requests = [Request(f"p{i}", 0, prompt, 24) for i, prompt in enumerate(prompts)]
    decoder = ChainDecoder(target, draft, sampling=Sampling(), num_draft_tokens=K, batch_size=batch_size, seed=1)
    return sorted(decoder.run(requests), key=lambda completion: completion.request.prompt_id)


def test_decoding_computes_the_q_of_unroll(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents in the cache, rounds rejected at once, in the middle and nowhere; also at position 0."""
    target, draft = target_of(made("deepseek")[0]), loaded("deepseek", tmp_path)
    together = decoded(target, draft, batch_size=3)
    recorder = Recorder(draft, monkeypatch)
    alone = decoded(target, draft, batch_size=1)
    assert together == alone, "rows of a batch do not depend on each other"
    assert {made.accepted for completion in alone for made in completion.rounds} == set(range(K + 1))
    assert len(recorder.rounds) == sum(len(completion.rounds) for completion in alone)
    rounds = iter(recorder.rounds)
    for completion in alone:
        prompt = completion.request.tokens
        for _ in completion.rounds:
            text, drafted, logits = next(rounds)
            tokens = torch.tensor([[prompt[0], *text, *drafted]])
            assert tokens[0, : len(prompt)].tolist() == list(prompt)
            ones, positions = torch.ones_like(tokens), torch.arange(tokens.shape[1])[None]
            batch = Batch(tokens, positions, ones, ones, (("alone",),))
            hidden = unrolled(draft, batch, target.states(batch))[:, 0, len(text) - 1]
            expected = target.head.logits(hidden)
            torch.testing.assert_close(logits.softmax(-1), expected.softmax(-1), rtol=0, atol=1e-5)
