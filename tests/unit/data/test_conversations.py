from __future__ import annotations

import json

import pytest

from lkspec.data import sources
from lkspec.data.conversations import BadRows, Conversation, Message, parse_row, read_conversations

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
PAIR = (Message("user", "Hi"), Message("assistant", "Hello."))


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (GOOD, PAIR),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}, PAIR),
        ({"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello."}]}, PAIR),
        (
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    *({"from": r, "value": "x"} for r in ("human", "gpt")),
                ]
            },
            (Message("system", "S"), Message("user", "x"), Message("assistant", "x")),
        ),
        ({"conversation": [{"content": "Hi"}], "generated_message": {"content": "Hello."}}, PAIR),
        (
            # The second message is the original answer, which the target's own one replaces.
            {
                "conversation": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "old"}],
                "generated_message": {"role": "assistant", "content": "Hello."},
            },
            PAIR,
        ),
    ],
)
def test_every_format_gives_the_same_messages(row, messages):
    assert parse_row(row, default_id="f:1") == Conversation("f:1", messages, None)


def test_formats_are_told_apart_row_by_row_and_other_fields_are_kept(tmp_path):
    rows = [
        {**GOOD, "id": "a", "temperature": 0},
        {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
            "question_id": 7,
            "temperature": 0.7,
            "finish_reason": "length",
        },
        {**GOOD, "id": None, "temperature": None},
    ]
    read = read_conversations(write_rows(tmp_path / "mixed.jsonl", rows))
    assert [(c.id, c.temperature) for c in read] == [("a", 0.0), ("7", 0.7), ("mixed:3", None)]
    assert [c.messages[-1].finish_reason for c in read] == [None, "length", None]


def user(content="Hi"):
    return {"role": "user", "content": content}


def answer(content="Hello.", **extra):
    return {"role": "assistant", "content": content, **extra}


BAD_ROWS = [
    ("{not json", "invalid JSON"),
    ("[1, 2]", "expected a JSON object, got list"),
    ({"text": "x"}, "expected one of the fields 'messages', 'conversations' or .* the row has \\['text'\\]"),
    ({"messages": []}, "expected 'messages' to be a non-empty list"),
    ({"messages": [user(), {"role": "assistant"}]}, r"messages\[1\]: expected an object with 'role' and 'content'"),
    ({"conversations": [{"from": "human"}]}, r"conversations\[0\]: expected an object with 'from' and 'value'"),
    ({"messages": [user(), answer("  \n")]}, r"messages\[1\]: empty content"),
    ({"messages": [user(), answer(None)]}, r"messages\[1\]: empty content"),
    ({"messages": [user([{"type": "text"}]), answer()]}, r"messages\[0\]: expected the content to be text, got list"),
    ({"messages": [user("\ud800"), answer()]}, r"messages\[0\]: a lone surrogate"),
    ({"messages": [user(), {"role": "tool", "content": "x"}]}, r"messages\[1\]: unknown role 'tool'"),
    ({"messages": [user()]}, "no assistant message"),
    ({"messages": [answer(), user()]}, "roles must alternate .* got assistant, user"),
    ({"messages": [user(), user(), answer()]}, "roles must alternate .* got user, user, assistant"),
    ({"messages": [user(), {"role": "system", "content": "S"}, answer()]}, "roles must alternate"),
    ({**GOOD, "id": ["x"]}, "expected the id to be a text or a whole number"),
    ({**GOOD, "temperature": "hot"}, "expected the temperature to be a number >= 0, got 'hot'"),
    ({**GOOD, "temperature": -1}, "expected the temperature to be a number >= 0, got -1"),
    ({**GOOD, "finish_reason": "abort"}, "unknown finish_reason 'abort'"),
    (
        {"messages": [user(), answer(finish_reason="length"), user(), answer()]},
        "finish_reason 'length' is only possible for the last message",
    ),
    ({"conversation": [user()] * 3, "generated_message": answer()}, "hold one prompt"),
    ({"conversation": [answer()], "generated_message": answer()}, "expected the user's prompt, got the role 'assist"),
    ({"conversation": [user()], "generated_message": "text"}, "expected 'generated_message' to be an object"),
    ({"conversation": [user()], "generated_message": {"content": ""}}, "generated_message: empty content"),
    ({**GOOD, "id": "first"}, "the id 'first' was already used at .*bad.jsonl:1"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=lambda value: value[:30] if isinstance(value, str) else "row")
def test_a_bad_row_is_an_error_with_file_line_and_reason(tmp_path, row, reason):
    path = write_rows(tmp_path / "bad.jsonl", [{**GOOD, "id": "first"}, "", row])
    with pytest.raises(ValueError, match=rf"bad\.jsonl:3: .*{reason}"):
        read_conversations(path)


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=lambda value: value[:30] if isinstance(value, str) else "row")
def test_a_bad_row_can_be_skipped_and_counted(tmp_path, row, reason):
    path = write_rows(tmp_path / "bad.jsonl", [{**GOOD, "id": "first"}, row, {**GOOD, "id": "last"}])
    bad_rows = BadRows("skip")
    assert [c.id for c in read_conversations(path, bad_rows)] == ["first", "last"]
    assert bad_rows.count == 1
    assert len(bad_rows.reasons) == 1
    assert "1 bad rows left out" in bad_rows.summary()
    assert "bad.jsonl:2" in bad_rows.summary()


def test_a_line_that_is_not_utf8_is_a_bad_row(tmp_path):
    path = tmp_path / "bytes.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"messages": "\xff"}\n')
    with pytest.raises(ValueError, match=r"bytes\.jsonl:2: invalid JSON"):
        read_conversations(str(path))


def test_only_the_first_reasons_are_kept_but_all_rows_counted(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [*["[]"] * 20, GOOD])
    bad_rows = BadRows("skip")
    read_conversations(path, bad_rows)
    assert bad_rows.count == 20
    assert len(bad_rows.reasons) == 5


def test_a_folder_is_read_in_the_order_of_names_and_ids_are_unique_over_its_files(tmp_path):
    write_rows(tmp_path / "b.jsonl", [GOOD])
    write_rows(tmp_path / "a.jsonl", [GOOD, GOOD])
    (tmp_path / "notes.txt").write_text("not data")
    assert [c.id for c in read_conversations(str(tmp_path))] == ["a:1", "a:2", "b:1"]
    write_rows(tmp_path / "c.jsonl", [{**GOOD, "id": "a:2"}])
    with pytest.raises(ValueError, match=r"c\.jsonl:1: the id 'a:2' was already used at .*a\.jsonl:2"):
        read_conversations(str(tmp_path))


def test_nothing_usable_is_an_error_that_says_why(tmp_path):
    empty = write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match=r"empty\.jsonl: expected at least one conversation"):
        read_conversations(empty)
    with pytest.raises(ValueError, match=r"1 bad rows left out\n.*no assistant message"):
        read_conversations(write_rows(tmp_path / "b.jsonl", [{"messages": [user()]}]), BadRows("skip"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"expected a folder with .jsonl files"):
        read_conversations(str(tmp_path / "folder"))


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "/no/such/folder", "~/no_such_folder_of_lkspec"])
def test_a_missing_local_path_never_asks_the_hub(path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="found nothing there"):
        read_conversations(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(ValueError, match=r"expected a \.jsonl file"):
        read_conversations(str(tmp_path / "rows.json"))


def test_a_hub_data_set_is_read_by_its_id(monkeypatch):
    calls = []

    def load_dataset(path, *, split):
        calls.append((path, split))
        return [{"conversation": [{"content": "Hi"}], "generated_message": {"content": "Hello."}}, {**GOOD, "id": "b"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    read = read_conversations("someone/answers")
    assert calls == [("someone/answers", "train")]
    assert [(c.id, c.messages) for c in read] == [("row:1", PAIR), ("b", PAIR)]


@pytest.mark.parametrize("error", [ConnectionError("offline\nlong story"), ValueError('Unknown split "train".')])
def test_a_hub_error_says_what_was_expected(monkeypatch, error):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=r"someone/answers: expected a .jsonl file, a folder .* hub data set"
    ) as caught:
        read_conversations("someone/answers")
    assert str(error).splitlines()[0] in str(caught.value)
    assert "long story" not in str(caught.value)


def test_on_bad_row_is_checked():
    with pytest.raises(ValueError, match=r"data.on_bad_row: expected 'error' or 'skip', got 'ignore'"):
        BadRows("ignore")


def test_embedded_paths_name_packaged_files(tmp_path, monkeypatch):
    (tmp_path / "embedded").mkdir()
    write_rows(tmp_path / "embedded" / "train.jsonl", [GOOD])
    monkeypatch.setattr(sources.importlib.resources, "files", lambda package: {"lkspec.data": tmp_path}[package])
    assert read_conversations("embedded:train.jsonl") == [Conversation("train:1", PAIR)]
    with pytest.raises(ValueError, match=r"no such packaged data set; expected one of: train.jsonl"):
        read_conversations("embedded:other.jsonl")


def test_tiny_conversations_are_the_same_every_time_and_nested():
    many, few = (read_conversations(f"tiny:{n}") for n in (64, 8))
    assert many == read_conversations("tiny:64")
    assert many[:8] == few
    assert len(many) == 64
    answers = [m.content for c in many for m in c.messages if m.role == "assistant"]
    assert all(40 <= len(text) <= 80 for text in answers)
    assert len(set(answers)) > 50
    assert {len(c.messages) for c in many} == {2, 4}
    assert {c.temperature for c in many} == {None}
    with pytest.raises(ValueError, match="expected tiny:<number of conversations>"):
        read_conversations("tiny:many")
