"""Tokenised files are kept by what they depend on, and only where that is worth it and nothing was left out."""

from __future__ import annotations

import json

import pytest

from lkspec.data import tokenised
from lkspec.data.datamodule import SpeculatorDataModule
from lkspec.data.dataset import EncodedStore
from lkspec.data.tokenised import cache_file


@pytest.fixture
def chat(make_chat):
    return make_chat("chatml")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LKSPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenised, "_MIN_CACHED", 2)


def write(path, *answers):
    rows = [
        {"id": f"c{n}", "temperature": n % 2, "messages": [user(f"Is it {n}?"), {"role": "assistant", "content": text}]}
        for n, text in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def user(text):
    return {"role": "user", "content": text}


def read(chat, path, **options):
    data = SpeculatorDataModule(train=path, **{"max_length": 300, "max_tokens": 1200, **options})
    data.bind(chat.tokenizer, eos_ids=chat.eos_ids, max_positions=2048)
    return data.read()


def files(tmp_path):
    return sorted((tmp_path / "cache" / "tokenised").glob("*"))


def test_a_file_is_tokenised_once_and_read_back_the_same(chat, tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl", "Yes.", "No.", "Perhaps.")
    first = read(chat, path).train
    assert len(files(tmp_path)) == 1

    def never(*arguments, **options):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokenised, "encode_conversation", never)
    again = read(chat, path).train
    assert (again.ids, again.temperatures, again.lengths) == (first.ids, first.temperatures, first.lengths)
    assert [again[i] for i in range(3)] == [first[i] for i in range(3)]
    assert again.fingerprint() == first.fingerprint()
    held_out = read(chat, path, val_fraction=0.5, split_seed=1)  # the split is no part of what is kept
    assert len(held_out.train) + len(held_out.validation) == 3
    again.append(first[0])
    assert again[3] == first[0]


def test_whatever_tokens_depend_on_has_a_place_of_its_own(chat, make_chat, tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl", "Yes.", "No.")
    settings = {"max_length": 300, "eos_ids": chat.eos_ids}

    def place(tokenizer=chat.tokenizer, **changed):
        return cache_file(path, tokenizer, **{**settings, **changed})

    places = [place(), place(max_length=200), place(eos_ids=(1,)), place(tokenizer=make_chat("llama3").tokenizer)]
    assert place() == places[0]
    write(tmp_path / "x.jsonl", "Yes.", "Not.")
    places.append(place())
    monkeypatch.setattr(tokenised, "sha256_of", lambda file: "other code")
    places.append(place())
    assert len(set(places)) == len(places)


def test_small_incomplete_and_remote_data_are_not_kept(chat, tmp_path):
    assert cache_file("tiny:8", chat.tokenizer, max_length=300, eos_ids=chat.eos_ids) is None
    assert cache_file("org/data", chat.tokenizer, max_length=300, eos_ids=chat.eos_ids) is None
    read(chat, write(tmp_path / "one.jsonl", "Yes."))
    left_out = write(tmp_path / "bad.jsonl", "Yes.", "No.", "x <|im_end|> y")
    for _ in range(2):  # said in every run
        assert read(chat, left_out, on_bad_row="skip").num_bad_rows == 1
    assert files(tmp_path) == []


def test_a_damaged_file_is_made_again(chat, tmp_path):
    path = write(tmp_path / "x.jsonl", "Yes.", "No.")
    first = read(chat, path).train
    (kept,) = files(tmp_path)
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    assert read(chat, path).train.fingerprint() == first.fingerprint()
    assert EncodedStore.load(kept).fingerprint() == first.fingerprint()
