from __future__ import annotations

import re

import pytest
from rich.console import Console

from lkspec.data import chat as module
from lkspec.data.chat import Encoded, colour_spans, encode_conversation
from lkspec.data.conversations import Conversation, Message

LONG = 10_000
TWO_TURNS = (
    Message("user", "Hi"),
    Message("assistant", "Hello, what is it?"),
    Message("user", "Say é日"),
    Message("assistant", "é日 \n\nand <b>more</b>"),
)
SYSTEM = (Message("system", "Speak."), *TWO_TURNS)


def encode(chat, messages, **options):
    conversation = Conversation("c-1", tuple(messages), 0.5)
    return encode_conversation(chat.tokenizer, conversation, **{"max_length": LONG, "eos_ids": chat.eos_ids, **options})


def supervised_texts(chat, encoded):
    """The supervised text of each turn, and the text with every turn replaced by its number."""
    texts = {}
    around = ""
    for token, turn in zip(encoded.tokens, encoded.turns, strict=True):
        if turn:
            texts.setdefault(turn, []).append(token)
            around += "" if around.endswith(f"[{turn}]") else f"[{turn}]"
        else:
            around += chat.tokenizer.decode([token])
    return [chat.tokenizer.decode(texts[turn]) for turn in sorted(texts)], around


TEMPLATES = [
    ("chatml", "<|im_end|>", "<|im_start|>assistant\n", "\n<|im_start|>user\n"),
    ("marked", "<|im_end|>", "<|im_start|>assistant\n", "\n<|im_start|>user\n"),
    ("llama3", "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|start_header_id|>user"),
    ("gemma", "<end_of_turn>", "<start_of_turn>model\n", "\n<start_of_turn>user\n"),
]


@pytest.mark.parametrize("trim_offsets", [None, True, False])
@pytest.mark.parametrize(("name", "eos", "prompt", "after"), TEMPLATES)
def test_turns_hold_the_answer_and_its_end_token_and_nothing_else(make_chat, name, eos, prompt, after, trim_offsets):
    chat = make_chat(name, eos=(eos,), trim_offsets=trim_offsets)
    encoded = encode(chat, TWO_TURNS)
    texts, around = supervised_texts(chat, encoded)
    assert texts == [message.content + eos for message in TWO_TURNS if message.role == "assistant"]
    assert f"{prompt}[1]{after}" in around
    assert f"{prompt}[2]" in around
    full = chat.tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in TWO_TURNS], return_dict=False
    )
    assert encoded.tokens == full
    assert (encoded.id, encoded.temperature) == ("c-1", 0.5)
    assert encoded.num_supervised == sum(len(text.removesuffix(eos).encode()) + 1 for text in texts)


def test_positions_counted_by_hand(make_chat):
    chat = make_chat("chatml")
    encoded = encode(chat, [Message("user", "Hi"), Message("assistant", "Yes")])
    # <|im_start|>system\nBe kind.<|im_end|>\n = 1 + 7 + 8 + 1 + 1; user: 1 + 5 + 2 + 1 + 1; header: 1 + 10.
    before = 18 + 10 + 11
    assert encoded.turns == [0] * before + [1] * 4 + [0]
    assert chat.tokenizer.decode(encoded.tokens[before:]) == "Yes<|im_end|>\n"


def test_a_template_with_generation_marks_agrees_with_its_own_mask(make_chat):
    chat = make_chat("marked")
    own = chat.tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in SYSTEM], return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = encode(chat, SYSTEM)
    assert [int(turn > 0) for turn in encoded.turns] == own["assistant_masks"]
    assert sum(own["assistant_masks"]) > 0


def test_a_template_that_strips_is_fine_when_only_whitespace_goes(make_chat):
    chat = make_chat("llama3", eos=("<|eot_id|>",))
    texts, _ = supervised_texts(chat, encode(chat, [Message("user", " Hi "), Message("assistant", "\n Yes, \n")]))
    assert texts == ["Yes,<|eot_id|>"]


def test_whitespace_of_an_answer_is_supervised_when_the_template_keeps_it(make_chat):
    for trim_offsets in (None, True, False):
        chat = make_chat("chatml", trim_offsets=trim_offsets)
        texts, _ = supervised_texts(chat, encode(chat, [Message("user", "Hi"), Message("assistant", " \n Yes \n ")]))
        assert texts == [" \n Yes \n <|im_end|>"]


def test_the_first_of_several_end_tokens_ends_the_turn(make_chat):
    chat = make_chat("llama3", eos=("<|im_end|>", "<|eot_id|>"))
    assert supervised_texts(chat, encode(chat, TWO_TURNS))[0][0] == "Hello, what is it?<|eot_id|>"


PROMPT = "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
BROKEN = {
    # No generation prompt: the answer would begin with the header.
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}": (
        "alters the answer or has no generation prompt: expected 'Hello, what is it\\?' .* got 'assistant:Hello"
    ),
    # Alters the answer.
    "{% for m in messages %}{{ 'A:' + m['content'] | upper + '<|im_end|>' }}{% endfor %}" + PROMPT: (
        "alters the answer .* got 'HELLO, WHAT"
    ),
    # A generation prompt (an opened thought) that the finished conversation does not have.
    "{% for m in messages %}{{ 'A:' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:<think>' }}{% endif %}": "first differing token: 7 'H', alone it is '<'",
    # Earlier messages look different once they are not the last.
    "{% for m in messages %}{{ 'A:' + ('(last)' if loop.last else '') + m['content'] + '<|im_end|>' }}{% endfor %}"
    + PROMPT: "message 1: the tokens before the answer are not how the whole conversation begins",
    # Does not end turns.
    "{% for m in messages %}{{ 'A:' + m['content'] + '\n' }}{% endfor %}" + PROMPT: (
        "expected an end-of-turn token \\(<\\|im_end\\|>\\) right after the answer, found none"
    ),
    # Ends only the whole conversation: the first end token stands behind the second answer.
    "{% for m in messages %}{{ 'A:' + m['content'] + '\n' }}"
    "{{ '<|im_end|>' if loop.last and m['role'] == 'assistant' else '' }}{% endfor %}"
    + PROMPT: "message 1: expected an end-of-turn token",
    # Fails by itself.
    "{{ raise_exception('no such role') }}": "no such role",
}


@pytest.mark.parametrize(("template", "reason"), BROKEN.items())
def test_a_template_whose_mask_would_be_wrong_is_refused(make_chat, template, reason):
    with pytest.raises(ValueError, match=f"(?s)conversation 'c-1': .*{reason}"):
        encode(make_chat(template), TWO_TURNS)


def test_a_template_that_drops_earlier_thoughts_is_refused(make_chat):
    template = (
        "{% for m in messages %}{% set shown = m['content'] if loop.last else m['content'].split('</think>')[-1] %}"
        "{{ 'A:' + shown + '<|im_end|>' }}{% endfor %}" + PROMPT
    )
    thought = (Message("user", "Hi"), Message("assistant", "<think>Hm</think>Yes"))
    chat = make_chat(template)
    assert supervised_texts(chat, encode(chat, thought))[0] == ["<think>Hm</think>Yes<|im_end|>"]
    with pytest.raises(ValueError, match="message 1: the chat template alters the answer"):
        encode(chat, (*thought, Message("user", "And?"), Message("assistant", "No")))


def test_a_system_message_that_the_template_refuses_is_a_bad_row(make_chat):
    with pytest.raises(ValueError, match="conversation 'c-1': System role not supported"):
        encode(make_chat("gemma", eos=("<end_of_turn>",)), SYSTEM)


def test_tokens_that_merge_over_the_start_of_an_answer_are_refused(make_chat):
    chat = make_chat("chatml", merges=(("Ċ", "Y"),))
    assert "ĊY" in chat.tokenizer.get_vocab()
    assert supervised_texts(chat, encode(chat, TWO_TURNS))[0][0] == "Hello, what is it?<|im_end|>"
    with pytest.raises(ValueError, match=r"message 1: .* first differing token: 38 '\\nY', alone it is '\\n'"):
        encode(chat, [Message("user", "Hi"), Message("assistant", "Yes")])


def test_offsets_alone_also_find_a_merge_over_the_start(make_chat):
    chat = make_chat("chatml", merges=(("Ċ", "Y"),))
    rendering = module._Rendering(
        chat.tokenizer, (Message("user", "Hi"), Message("assistant", "Yes")), frozenset(chat.eos_ids)
    )
    with pytest.raises(ValueError, match="token 38 '\\\\nY' reaches over the start of the answer"):
        rendering.spans_by_text()


def test_methods_that_disagree_are_an_error_with_the_first_differing_token(make_chat):
    chat = make_chat("chatml")
    space = chat.tokenizer.convert_tokens_to_ids("Ġ")
    with pytest.raises(ValueError, match=re.escape("message 1: by token prefixes")) as caught:
        encode(chat, TWO_TURNS, eos_ids=(*chat.eos_ids, space))  # "Hello, " would end the turn
    assert "tokens[39:46], by text offsets tokens[39:58]; first differing token: 46 'w'" in str(caught.value)


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("special", ["<|im_end|>", "<|im_start|>", "</s>"])
def test_special_tokens_inside_a_message_are_refused(make_chat, role, special):
    messages = [
        Message(role, f"a {special} b") if message.role == role else message
        for message in (Message("system", "S"), Message("user", "Hi"), Message("assistant", "Yes"))
    ]
    with pytest.raises(ValueError, match=re.escape(f"the content holds the special token {special!r}")):
        encode(make_chat("chatml"), messages)


def test_an_added_token_that_is_not_special_may_stand_in_an_answer(make_chat):
    chat = make_chat("chatml " + module.__name__)  # a tokenizer of its own, since it is changed
    chat.tokenizer.chat_template = make_chat("chatml").tokenizer.chat_template
    chat.tokenizer.add_tokens(["<think>"])
    texts, _ = supervised_texts(chat, encode(chat, [Message("user", "Hi"), Message("assistant", "<think>a")]))
    assert texts == ["<think>a<|im_end|>"]


def test_a_slow_tokenizer_is_refused(make_chat, monkeypatch):
    chat = make_chat("chatml slow")
    monkeypatch.setattr(type(chat.tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="expected a fast tokenizer"):
        encode(chat, TWO_TURNS)


def cut(content):
    return (*TWO_TURNS[:3], Message("assistant", content, "length"))


@pytest.mark.parametrize("trim_offsets", [None, True])
@pytest.mark.parametrize("content", ["and so", "and so ", "and so\n", "é日"])
@pytest.mark.parametrize("name", ["chatml", "marked"])
def test_a_cut_answer_ends_with_its_own_text(make_chat, name, content, trim_offsets):
    chat = make_chat(name, trim_offsets=trim_offsets)
    encoded = encode(chat, cut(content))
    texts, around = supervised_texts(chat, encoded)
    assert texts == ["Hello, what is it?<|im_end|>", content]
    assert around.endswith("assistant\n[2]<|im_end|>\n")


def test_a_cut_answer_that_the_template_strips(make_chat):
    chat = make_chat("llama3", eos=("<|eot_id|>",))
    assert supervised_texts(chat, encode(chat, cut("and so ")))[0][1] == "and so"


def test_a_token_that_merges_a_cut_answer_with_the_template_is_not_supervised(make_chat):
    chat = make_chat("plain", eos=("</s>",), merges=(("a", "Ċ"),))
    messages = [Message("user", "Hi"), Message("assistant", "la", "length")]
    encoded = encode(chat, messages)
    assert supervised_texts(chat, encoded)[0] == ["l"]
    # Not cut, the same answer keeps the template's newline up to the end token, which the target must produce.
    whole = [Message("user", "Hi"), Message("assistant", "la", "stop")]
    assert supervised_texts(chat, encode(chat, whole))[0] == ["la\n</s>"]


def test_truncation_keeps_a_prefix(make_chat):
    chat = make_chat("chatml")
    whole = encode(chat, TWO_TURNS)
    start = whole.turns.index(1)
    for length in (start, start + 3, whole.turns.index(2) + 1, len(whole.tokens)):
        part = encode(chat, TWO_TURNS, max_length=length)
        assert part.tokens == whole.tokens[:length]
        assert part.turns == whole.turns[:length]
    assert encode(chat, TWO_TURNS, max_length=start).num_supervised == 0


def test_a_conversation_may_end_with_the_user(make_chat):
    chat = make_chat("chatml")
    encoded = encode(chat, TWO_TURNS[:3])
    assert supervised_texts(chat, encoded)[0] == ["Hello, what is it?<|im_end|>"]


def test_colours_show_exactly_the_supervised_text(make_chat):
    chat = make_chat("chatml")
    encoded = encode(chat, TWO_TURNS)
    text = colour_spans(chat.tokenizer, encoded)
    assert text.plain == chat.tokenizer.decode(encoded.tokens)
    pieces = [(str(span.style), text.plain[span.start : span.end]) for span in text.spans]
    coloured = [(style, piece) for style, piece in pieces if style != "dim"]
    assert [piece for _, piece in coloured] == ["Hello, what is it?<|im_end|>", "é日 \n\nand <b>more</b><|im_end|>"]
    assert coloured[0][0] != coloured[1][0]
    Console(file=None, quiet=True).print(text)


def test_colours_of_a_conversation_that_ends_inside_a_turn(make_chat):
    chat = make_chat("chatml")
    ids = chat.tokenizer("abc")["input_ids"]
    text = colour_spans(chat.tokenizer, Encoded("x", ids, [0, 1, 1]))
    assert [(span.start, span.end) for span in text.spans] == [(0, 1), (1, 3)]
