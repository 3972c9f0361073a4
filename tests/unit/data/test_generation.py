from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lkspec.data.generation import (
    AnswerFilter,
    Prompt,
    PromptFilter,
    ResumableJsonl,
    bare_user_header,
    is_loop,
    prompts_digest,
    read_prompts,
)
from lkspec.targets.tiny import byte_tokenizer

IM_START, IM_END = 256, 257
SETTINGS = {"temperature": 1.0, "seed": 0, "field": "prompt"}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def ids(*parts: str | int) -> tuple[int, ...]:
    """Token ids of the byte tokenizer: bytes of texts, and special ids as they are."""
    return tuple(i for part in parts for i in (part.encode() if isinstance(part, str) else [part]))


@pytest.fixture
def write(tmp_path):
    def _write(*lines: object, name: str = "p.jsonl") -> str:
        texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
        (tmp_path / name).write_text("\n".join(texts) + "\n", encoding="utf-8")
        return str(tmp_path / name)

    return _write


class TestReadPrompts:
    def test_text_field(self, write):
        path = write({"prompt": "Why?", "id": "w"}, {"prompt": "How?"}, {"prompt": "So?", "id": 7})
        assert read_prompts(path) == [
            Prompt("w", (user("Why?"),)),
            Prompt("p-00002", (user("How?"),)),
            Prompt("7", (user("So?"),)),
        ]

    def test_another_field(self, write):
        path = write({"instruction": "Why?", "prompt": 3})
        assert read_prompts(path, field_name="instruction")[0].messages == (user("Why?"),)

    def test_messages_come_before_the_field_and_lose_other_keys(self, write):
        history = [
            {"role": "system", "content": "Be kind."},
            {**user("Hi"), "name": "Ann"},
            {"role": "assistant", "content": "Hello"},
            user("Why?"),
        ]
        (prompt,) = read_prompts(write({"messages": history, "prompt": "not this"}))
        assert prompt.messages == (history[0], user("Hi"), history[2], user("Why?"))

    def test_several_files_in_order_with_a_limit(self, write):
        first = write({"prompt": "a"}, "", {"prompt": "b"}, name="one.jsonl")
        second = write({"prompt": "c"}, name="two.jsonl")
        names = [prompt.id for prompt in read_prompts([first, second])]
        assert names == ["one-00001", "one-00003", "two-00001"]  # blank lines are skipped but counted
        assert [prompt.id for prompt in read_prompts([second, first], limit=2)] == ["two-00001", "one-00001"]

    def test_a_missing_id_may_be_written_as_null(self, write):
        prompts = read_prompts(write({"prompt": "a", "id": None}, {"prompt": "b", "id": None}))
        assert [prompt.id for prompt in prompts] == ["p-00001", "p-00002"]

    @pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
    def test_only_newlines_end_a_row(self, tmp_path, separator):
        text = f"one{separator}two"
        row = json.dumps({"prompt": text}, ensure_ascii=False)
        (tmp_path / "p.jsonl").write_text(f"{row}\n{row}\r\n", encoding="utf-8", newline="")
        prompts = read_prompts(str(tmp_path / "p.jsonl"))
        assert [prompt.messages[0]["content"] for prompt in prompts] == [text, text]

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ('{"prompt": "cut', r"not JSON \("),
            ([1, 2], r"expected a JSON object, got \[1, 2\]"),
            ({"text": "Why?"}, r"expected a non-empty text in 'prompt', the row has \['text'\]"),
            ({"prompt": " \n"}, "expected a non-empty text in 'prompt'"),
            ({"prompt": 3}, "expected a non-empty text in 'prompt'"),
            ({"messages": []}, "messages must end with the user's"),
            ({"messages": [user("Hi"), {"role": "assistant", "content": "Hello"}]}, "must end with the user's"),
            ({"messages": "Hi"}, "expected 'messages' to be a list of objects"),
            ({"messages": [{"role": "user"}]}, "every message needs the texts 'role' and 'content'"),
            ({"messages": [{"role": "user", "content": None}]}, "every message needs the texts"),
            ({"messages": ["Hi"]}, "expected 'messages' to be a list of objects"),
        ],
        ids=str,
    )
    def test_a_bad_row_is_named_by_file_and_line(self, write, row, reason):
        path = write({"prompt": "fine"}, "", row)
        with pytest.raises(ValueError, match=rf"^{re.escape(path)}:3: .*{reason}"):
            read_prompts(path)

    def test_nothing_to_read_is_refused(self, write, tmp_path):
        missing = str(tmp_path / "none.jsonl")
        with pytest.raises(ValueError, match=f"found nothing at {re.escape(missing)}"):
            read_prompts(missing)
        with pytest.raises(ValueError, match="holds no prompt"):
            read_prompts(write(""))

    @pytest.mark.parametrize("limit", [0, -1])
    def test_a_limit_below_1_is_refused(self, write, limit):
        with pytest.raises(ValueError, match=f"num_prompts: expected at least 1, or null for all, got {limit}"):
            read_prompts(write({"prompt": "a"}), limit=limit)

    def test_repeated_ids_are_refused(self, write):
        first = write({"prompt": "a", "id": "x"}, name="one.jsonl")
        second = write({"prompt": "b", "id": "x"}, name="two.jsonl")
        with pytest.raises(ValueError, match="'x' stands more than once"):
            read_prompts([first, second])


def test_the_digest_tells_prompts_apart():
    def digest(*prompts: Prompt) -> str:
        return prompts_digest(prompts)

    a, b = Prompt("a", (user("Why?"),)), Prompt("b", (user("Why?"),))
    others = [digest(a, b), digest(b, a), digest(a), digest(b), digest(), digest(Prompt("a", (user("Why"),)))]
    assert len(set(others)) == len(others)
    assert digest(a, b) == digest(Prompt("a", (user("Why?"),)), b)
    assert all(len(bytes.fromhex(name)) == 8 for name in others)


class TestChatHeader:
    def test_bare_header_ends_where_the_user_begins(self):
        assert bare_user_header(byte_tokenizer(), None) == ids(IM_START, "user\n")

    def test_bare_header_with_a_system_prompt(self):
        expected = ids(IM_START, "system\nBe brief.", IM_END, "\n", IM_START, "user\n")
        assert bare_user_header(byte_tokenizer(), "Be brief.") == expected

    def test_a_template_that_trims_is_fine(self):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] | trim }}{% endfor %}"
        assert bare_user_header(tokenizer, None) == (IM_START,)

    @pytest.mark.parametrize("shown", ["m['content'] | upper", "m['role']", "m['content'][1:]"])
    def test_a_template_that_alters_the_text_is_refused(self, shown):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = f"{{% for m in messages %}}{{{{ {shown} }}}}{{% endfor %}}"
        with pytest.raises(ValueError, match="does not print the user's text unchanged"):
            bare_user_header(tokenizer, None)


class TestPromptFilter:
    GOOD = "Tell me about red foxes"

    @pytest.mark.parametrize(
        ("text", "finish_reason", "reason"),
        [
            ("", "stop", "empty"),
            ("Two words", "stop", "empty"),
            ("Two words", "length", "empty"),
            ("Tell me about the", "length", "cut"),
            ("a b c " * 5, "length", "cut"),
            ("a b c " * 5, "stop", "loop"),
            ("Tell me about red foxes", "stop", "duplicate"),
            ("  tell me, about RED\tfoxes!?", "stop", "duplicate"),
        ],
    )
    def test_reasons(self, text, finish_reason, reason):
        keep = PromptFilter()
        assert keep(self.GOOD, "stop")
        assert not keep(text, finish_reason)
        assert dict(keep.dropped) == {reason: 1}

    def test_other_texts_are_kept_and_reasons_counted(self):
        keep = PromptFilter(min_words=2)
        assert keep(self.GOOD, "stop")
        assert keep(self.GOOD + " please", "stop")
        assert keep("Red foxes", "stop")
        assert [keep(self.GOOD, "stop"), keep("Red: foxes", "stop"), keep("Red", "stop")] == [False] * 3
        assert dict(keep.dropped) == {"duplicate": 2, "empty": 1}

    def test_what_was_dropped_is_no_duplicate(self):
        keep = PromptFilter()
        assert not keep(self.GOOD, "length")
        assert keep(self.GOOD, "stop")


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("one two three four five six seven eight nine", False),
        ("a b c " * 3, False),  # 6 four-grams, 3 different: exactly half are repetitions
        ("a b c " * 4, True),  # 9 four-grams, 3 different
        ("no " * 8, True),  # 5 four-grams, 1 different
        ("no " * 7, False),  # 4 four-grams say nothing yet
        ("", False),
    ],
)
def test_is_loop(text, loops):
    assert is_loop(text) is loops


def test_is_loop_with_other_sizes():
    assert is_loop("a b a b a b", size=2, share=0.5)  # 5 pairs, 2 different
    assert not is_loop("a b a b a b", size=2, share=0.6)


class TestAnswerFilter:
    def row(self, answer: str, **fields: object) -> dict[str, object]:
        messages = [user("Why?"), {"role": "assistant", "content": answer}]
        return {"id": "p", "messages": messages, "finish_reason": "stop", **fields}

    @pytest.mark.parametrize(
        ("answer", "fields"),
        [
            ("Because.", {}),
            ("Because it", {"finish_reason": "length"}),
            ("Be", {"token_ids": list(ids("Be", IM_END))}),
        ],
        ids=["stop", "length", "token ids"],
    )
    def test_what_training_can_read_is_kept(self, answer, fields):
        keep = AnswerFilter(byte_tokenizer(), (IM_END,))
        assert keep(self.row(answer, **fields))
        assert keep.dropped.total() == 0

    @pytest.mark.parametrize(
        ("answer", "fields"),
        [
            ("", {}),
            (" \n", {}),
            ("So<|im_end|>", {}),
            ("<|im_start|>user\nHi", {"finish_reason": "length"}),
            ("Be", {"token_ids": list(ids("By", IM_END))}),
        ],
        ids=["empty", "blank", "end token", "start token", "other token ids"],
    )
    def test_the_rest_is_dropped_and_counted(self, answer, fields):
        keep = AnswerFilter(byte_tokenizer(), (IM_END,))
        assert not keep(self.row(answer, **fields))
        assert keep.dropped.total() == 1


def named(name: str, text: str = "") -> dict[str, str]:
    return {"id": name, "text": text}


def lines_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


class TestResumableJsonl:
    def test_finish_keeps_sorts_and_leaves_no_partial_file(self, tmp_path):
        out = ResumableJsonl(tmp_path / "deep" / "out.jsonl", SETTINGS)
        for name in "cabd":
            out.append(named(name))
        assert not out.path.exists()
        out.finish(lambda row: row["id"], keep=lambda row: row["id"] != "b")
        assert lines_of(out.path) == out.rows == [named("a"), named("c"), named("d")]
        left = {file.name for file in out.path.parent.iterdir()}
        assert left == {"out.jsonl", "out.jsonl.settings.json"}
        assert json.loads((out.path.parent / "out.jsonl.settings.json").read_text()) == SETTINGS

    def test_nothing_kept_is_an_empty_file(self, tmp_path):
        out = ResumableJsonl(tmp_path / "out.jsonl", SETTINGS)
        out.append(named("a"))
        out.finish(lambda row: row["id"], keep=lambda row: False)
        assert out.path.read_bytes() == b""

    def test_a_killed_run_is_taken_up_again(self, tmp_path):
        path = tmp_path / "out.jsonl"
        odd = named("b", 'é\u2028\x85"\r\n\t😀')
        killed = ResumableJsonl(path, SETTINGS)
        killed.append(named("a"))
        killed.append(odd)
        resumed = ResumableJsonl(path, dict(SETTINGS))  # the first one was never closed
        assert resumed.rows == [named("a"), odd]
        resumed.append(named("c"))
        resumed.finish(lambda row: row["id"], keep=lambda row: True)
        assert lines_of(path) == [named("a"), odd, named("c")]

    @pytest.mark.parametrize("torn", [b"{", '{"id": "b", "text": "é'.encode()[:-1], b'{"id": "b", "text": ""}'])
    def test_a_torn_last_line_is_dropped(self, tmp_path, torn):
        path = tmp_path / "out.jsonl"
        killed = ResumableJsonl(path, SETTINGS)
        killed.append(named("a"))
        whole = killed.partial.read_bytes()
        killed.partial.write_bytes(whole + torn)
        resumed = ResumableJsonl(path, SETTINGS)
        assert resumed.rows == [named("a")]
        assert resumed.partial.read_bytes() == whole
        resumed.append(named("b", "again"))
        resumed.finish(lambda row: row["id"], keep=lambda row: True)
        assert lines_of(path) == [named("a"), named("b", "again")]

    @pytest.mark.parametrize(
        ("settings", "names"),
        [
            ({**SETTINGS, "temperature": 0.7}, "temperature"),
            ({**SETTINGS, "seed": 1, "field": "text"}, "field, seed"),
            ({"temperature": 1.0, "seed": 0}, "field"),
            ({**SETTINGS, "top_p": 0.9}, "top_p"),
        ],
    )
    def test_changed_settings_are_refused(self, tmp_path, settings, names):
        path = tmp_path / "out.jsonl"
        ResumableJsonl(path, SETTINGS).append(named("a"))
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        with pytest.raises(ValueError, match=rf"out\.jsonl\.partial was made with another {names};"):
            ResumableJsonl(path, settings)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
        assert ResumableJsonl(path, SETTINGS).rows == [named("a")]

    def test_a_partial_file_without_a_row_binds_to_nothing(self, tmp_path):
        path = tmp_path / "out.jsonl"
        ResumableJsonl(path, SETTINGS)
        assert path.with_name("out.jsonl.partial").exists()
        out = ResumableJsonl(path, {"seed": 1})
        assert json.loads(path.with_name("out.jsonl.settings.json").read_text()) == {"seed": 1}
        out.append(named("a"))
        with pytest.raises(ValueError, match="was made with another"):
            ResumableJsonl(path, SETTINGS)

    def test_a_partial_file_of_unknown_settings_is_refused(self, tmp_path):
        path = tmp_path / "out.jsonl"
        ResumableJsonl(path, SETTINGS).append(named("a"))
        path.with_name("out.jsonl.settings.json").unlink()
        with pytest.raises(ValueError, match="was made with another field, seed, temperature"):
            ResumableJsonl(path, SETTINGS)

    def test_an_existing_output_is_refused(self, tmp_path):
        path = tmp_path / "out.jsonl"
        path.write_text("precious\n")
        with pytest.raises(ValueError, match="exists already; name another file or remove it"):
            ResumableJsonl(path, SETTINGS)
        assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]
        assert path.read_text() == "precious\n"

    def test_a_kill_while_finishing_loses_nothing(self, tmp_path, monkeypatch):
        path = tmp_path / "out.jsonl"
        out = ResumableJsonl(path, SETTINGS)
        for name in "ba":
            out.append(named(name))

        def killed(self: Path, target: Path) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                out.finish(lambda row: row["id"], keep=lambda row: True)
        assert not path.exists()
        resumed = ResumableJsonl(path, SETTINGS)
        assert resumed.rows == [named("b"), named("a")]
        resumed.finish(lambda row: row["id"], keep=lambda row: True)
        assert lines_of(path) == [named("a"), named("b")]
