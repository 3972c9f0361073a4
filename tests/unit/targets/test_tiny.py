from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from target_batches import KINDS, padded, random_tokens

from lkspec.targets.tiny import TinyTarget, byte_tokenizer
from lkspec.targets.transformers import TransformersTarget

TOKENIZER = byte_tokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<|" not in text))
def test_ids_are_the_bytes_of_the_text(text):
    ids = TOKENIZER.encode(text)
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_chat_template_is_chatml():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = TOKENIZER.encode(text)
    assert (ids.count(256), ids.count(257)) == (3, 2)  # each special token is one id, not its bytes
    assert len(TOKENIZER) == 259


def test_prompt_ids_end_where_the_answer_begins():
    im_start, im_end = [256], [257]
    expected = [*im_start, *"user\nHé?".encode(), *im_end, *b"\n", *im_start, *b"assistant\n"]
    assert TinyTarget(device="cpu").prompt_ids([{"role": "user", "content": "Hé?"}]) == tuple(expected)


@pytest.mark.parametrize(("kind", "attention"), KINDS)
def test_same_seed_same_model(kind, attention):
    first = TinyTarget(kind=kind, attn_implementation=attention, device="cpu")
    again = TinyTarget(kind=kind, attn_implementation=attention, device="cpu")
    for (name, ours), theirs in zip(first.model.named_parameters(), again.model.parameters(), strict=True):
        assert ours.equal(theirs), name
    assert not first.head.weight.equal(TinyTarget(kind=kind, seed=1, device="cpu").head.weight)
    assert first.attn_implementation == attention


def test_global_random_state_is_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    TinyTarget(device="cpu")
    assert torch.rand(3).equal(expected)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_oss", "deepseek_v3"])
def test_predictions_are_peaked_and_depend_on_the_context(kind):
    target = TinyTarget(kind=kind, device="cpu")
    first, second = random_tokens(2, 40)
    second[-1] = first[-1]
    states = target.states(padded([first, second]))
    probs = target.head.logits(states.last).softmax(-1)
    entropy = -(probs * probs.log()).sum(-1).mean()
    assert 1.5 < float(entropy) < 4.0  # log 264 = 5.6 would be flat
    overlap = torch.minimum(probs[0, -1], probs[1, -1]).sum()
    assert float(overlap) < 0.9  # the same last token after another text


def test_other_sizes_and_dtypes():
    target = TinyTarget(hidden_size=32, num_heads=2, num_kv_heads=1, vocab_size=300, dtype="bfloat16", device="cpu")
    assert target.states(padded([random_tokens(4)])).last.shape == (1, 4, 32)
    assert (target.vocab_size, target.dtype, target.spec.dims.head_dim) == (300, torch.bfloat16, 16)


def test_unknown_kind():
    with pytest.raises(
        ValueError, match=r"target\.kind: expected one of llama, gemma3, gpt_oss, deepseek_v3, got 'mamba'"
    ):
        TinyTarget(kind="mamba")


def test_vocabulary_smaller_than_the_tokenizer():
    with pytest.raises(ValueError, match="at least 259, got 256"):
        TinyTarget(vocab_size=256)


def test_saved_and_loaded_it_is_the_same_target(tmp_path):
    made = TinyTarget(num_layers=4, aux_layer_ids=(1, 2, 3), device="cpu")
    made.save(tmp_path / "target")
    loaded = TransformersTarget(str(tmp_path / "target"), aux_layer_ids=(1, 2, 3), device="cpu")
    assert (made.source, loaded.source) == (None, str(tmp_path / "target"))
    for name in ("fingerprint", "eos_ids", "special_ids", "max_positions", "dtype"):
        assert getattr(loaded, name) == getattr(made, name), name
    batch = padded(random_tokens(2, 12))
    assert loaded.head.logits(loaded.states(batch).last).equal(made.head.logits(made.states(batch).last))
    messages = [{"role": "user", "content": "Grüße"}]
    texts = [target.tokenizer.apply_chat_template(messages, tokenize=False) for target in (made, loaded)]
    assert texts[0] == texts[1]
    assert loaded.tokenizer.encode(texts[1]) == made.tokenizer.encode(texts[0])


def test_saving_leaves_what_is_there_alone(tiny_target, tmp_path):
    with pytest.raises(ValueError, match=r"expected a new place for tiny, there is something already"):
        tiny_target.save(tmp_path)
    assert not list(tmp_path.iterdir())
