from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lkspec.data.chat import encode_conversation
from lkspec.data.conversations import read_conversations
from lkspec.data.datamodule import SpeculatorDataModule, is_held_out
from lkspec.types import text_key

CONF = Path(__file__).parents[3] / "conf"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(name, answer="Yes.", **extra):
    return {"id": name, "messages": [{"role": "user", "content": f"Is it {name}?"}, answer_of(answer)], **extra}


def answer_of(text):
    return {"role": "assistant", "content": text}


def ready(chat, **options):
    data = SpeculatorDataModule(**{"max_length": 300, "max_tokens": 1200, **options})
    data.bind(chat.tokenizer, eos_ids=chat.eos_ids, max_positions=2048)
    data.adopt(data.read())
    return data


@pytest.fixture
def chat(make_chat):
    return make_chat("chatml")


class Ranks:
    """What the data module reads of a trainer."""

    def __init__(self, world_size, global_rank):
        self.world_size, self.global_rank = world_size, global_rank


def test_numbers_of_the_training_split_are_those_of_its_conversations(chat):
    data = ready(chat, train="tiny:12")
    expected = [
        encode_conversation(chat.tokenizer, c, max_length=300, eos_ids=chat.eos_ids)
        for c in read_conversations("tiny:12")
    ]
    counts = Counter(token for e in expected for token, turn in zip(e.tokens, e.turns, strict=True) if turn)
    vocab_size = len(chat.tokenizer)
    assert len(data.train_set) == 12
    assert data.num_supervised_tokens == sum(counts.values())
    assert data.token_counts(vocab_size).tolist() == [counts[token] for token in range(vocab_size)]
    assert data.token_counts(vocab_size).shape == (vocab_size,)
    assert [data.train_set[i] for i in range(12)] == expected
    assert data.fingerprint == ready(chat, train="tiny:12", seed=5).fingerprint
    assert data.fingerprint != ready(chat, train="tiny:13").fingerprint
    with pytest.raises(ValueError, match="the target's vocabulary has 5: its tokenizer belongs to another model"):
        data.token_counts(5)


def test_the_split_goes_by_conversation_and_stays_when_rows_are_added(chat):
    def split(path, **options):
        data = ready(chat, train=path, val_fraction=0.3, **options)
        held_out = set(data.validation_set.ids)
        assert not held_out & set(data.train_set.ids)
        return held_out, set(data.train_set.ids)

    few, many = split("tiny:30"), split("tiny:90")
    assert few[0] == {name for name in many[0] if name in few[0] | few[1]}
    assert len(many[0]) + len(many[1]) == 90
    assert split("tiny:30", seed=9) == few
    assert split("tiny:30", split_seed=9) != few


def test_the_held_out_share_is_the_fraction():
    share = np.mean([is_held_out(f"c-{n}", fraction=0.25, seed=0) for n in range(4000)])
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert not any(is_held_out(f"c-{n}", fraction=0.0, seed=0) for n in range(100))


def test_validation_conversations_keep_their_temperature(chat, tmp_path):
    cold = write(tmp_path / "t0.jsonl", [row("a", temperature=0), row("b", temperature=0.0)])
    warm = write(tmp_path / "t1.jsonl", [row("a", temperature=1)])
    data = ready(chat, train="tiny:8", validation=[cold, warm])
    assert [(e.id, e.temperature) for e in data.validation_set] == [("a", 0.0), ("b", 0.0), ("a", 1.0)]


def test_a_held_out_share_joins_the_validation_sets(chat, tmp_path):
    cold = write(tmp_path / "t0.jsonl", [row("a", temperature=0)])
    train = write(tmp_path / "train.jsonl", [row(f"c{n}", temperature=1) for n in range(20)])
    data = ready(chat, train=train, validation=cold, val_fraction=0.3)
    warm = {e.id for e in data.validation_set if e.temperature == 1}
    assert warm == {f"c{n}" for n in range(20) if is_held_out(f"c{n}", fraction=0.3, seed=0)}
    assert [e.id for e in data.validation_set if e.temperature == 0] == ["a"]
    assert not warm & set(data.train_set.ids)
    assert len(warm) + len(data.train_set) == 20


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_validation_batches_show_each_conversation_once_over_ranks(chat, tmp_path, world_size):
    warm = write(tmp_path / "t1.jsonl", [row(f"w{n}", temperature=1) for n in range(5)])
    cold = write(tmp_path / "t0.jsonl", [row(f"c{n}", temperature=0) for n in range(3)])
    data = ready(chat, train="tiny:8", validation=["tiny:20", warm, cold], max_tokens=600)
    assert data.val_temperatures == [0.0, 1.0, None]
    seen = [[], [], []]
    lengths = set()
    for rank in range(world_size):
        data.trainer = Ranks(world_size, rank)
        loaders = data.val_dataloader()
        for names, loader in zip(seen, loaders, strict=True):
            first, again = ([[batch.ids for batch in step] for step in loader] for _ in range(2))
            assert first == again
            assert all(len(step) == 1 for step in first)
            assert len(first) == len(loader)
            names += [name for step in first for ids in step for r in ids for name in r]
        lengths.add(tuple(len(loader) for loader in loaders))
    assert sorted(seen[0]) == [f"c{n}" for n in range(3)]
    assert sorted(seen[1]) == [f"w{n}" for n in range(5)]
    assert sorted(seen[2]) == [f"tiny-{n:05d}" for n in range(20)]
    assert len(lengths) == 1


@pytest.mark.parametrize("pack", [False, True])
def test_training_steps_are_split_over_the_trainers_ranks(chat, pack):
    data = ready(chat, train="tiny:32", accumulate=2, pack=pack, max_tokens=600, num_workers=0)
    alone = data.train_dataloader()
    assert all(len(step) == 2 for step in alone)
    seen = []
    for rank in range(2):
        data.trainer = Ranks(2, rank)
        loader = data.train_dataloader()
        assert len(loader) == len(alone) // 2
        batches = [batch for step in loader for batch in step]
        assert any(batch.is_packed for batch in batches) == pack
        assert all(batch.positions.max() < 300 for batch in batches)
        seen += [name for batch in batches for r in batch.ids for name in r]
    assert len(seen) == len(set(seen)) > 20


def test_no_validation_gives_no_loader(chat):
    assert ready(chat, train="tiny:8").val_dataloader() == []


def test_bad_rows_of_reading_and_of_tokenising_are_counted_and_reported(chat, tmp_path, caplog):
    path = write(tmp_path / "x.jsonl", [row("a"), row("b", ""), row("c", "x <|im_end|> y"), row("d")])
    with caplog.at_level(logging.WARNING):
        data = ready(chat, train=path, on_bad_row="skip")
    assert data.train_set.ids == ["a", "d"]
    assert data.encoded.num_bad_rows == 2
    assert "empty content" in caplog.text
    assert "conversation 'c': message 1: the content holds the special token '<|im_end|>'" in caplog.text
    good = write(tmp_path / "y.jsonl", [row("a"), row("c", "x <|im_end|> y")])
    with pytest.raises(ValueError, match=r"conversation 'c': .* holds the special token"):
        ready(chat, train=good)


def test_conversations_without_an_answer_in_reach_are_dropped_and_counted(chat, tmp_path, caplog):
    path = write(tmp_path / "x.jsonl", [row("a"), row("b" * 300)])
    with caplog.at_level(logging.WARNING):
        data = ready(chat, train=path, max_length=100)
    assert data.train_set.ids == ["a"]
    assert data.encoded.num_dropped == 1
    assert "1 conversations have no answer within data.max_length=100" in caplog.text
    with pytest.raises(
        ValueError, match=r"none of 2 is left: 2 conversations have no answer within data.max_length=20"
    ):
        ready(chat, train=path, max_length=20)


def test_limit_conversations_spreads_over_training_only(chat):
    data = ready(chat, train="tiny:20", validation="tiny:6", limit_conversations=4)
    assert (len(data.train_set), len(data.validation_set)) == (4, 6)
    every = ready(chat, train="tiny:20", validation="tiny:6").train_set
    assert [data.train_set[i].id for i in range(4)] == [every[i].id for i in (0, 5, 10, 15)]
    with pytest.raises(ValueError, match=r"data.limit_conversations"):
        SpeculatorDataModule(train="tiny:8", limit_conversations=0)


def test_settings_that_cannot_work_say_what_to_set(chat):
    with pytest.raises(ValueError, match=r"data.max_length <= data.max_tokens"):
        SpeculatorDataModule(train="tiny:8", max_length=100, max_tokens=50)
    with pytest.raises(ValueError, match=r"data.accumulate"):
        SpeculatorDataModule(train="tiny:8", accumulate=0)
    with pytest.raises(ValueError, match=r"data.val_fraction: expected a share"):
        SpeculatorDataModule(train="tiny:8", val_fraction=1.0)
    with pytest.raises(ValueError, match="val_fraction=1e-05 holds out 0 of 8"):
        ready(chat, train="tiny:8", val_fraction=1e-5)
    with pytest.raises(ValueError, match="beyond the target's context: set it to at most 64"):
        SpeculatorDataModule(train="tiny:8").bind(chat.tokenizer, eos_ids=chat.eos_ids, max_positions=64)


def configured(choice: str) -> dict[str, Any]:
    """The settings of a data file; the order of training is the run's."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(overrides=[f"+data={choice}", "+seed=0"]).data
    settings = OmegaConf.to_container(config)
    assert settings.pop("_target_") == "lkspec.data.datamodule.SpeculatorDataModule"
    assert settings.pop("seed") == "${seed}"
    return settings


@pytest.mark.parametrize("choice", sorted(path.stem for path in (CONF / "data").glob("*.yaml")))
def test_every_data_file_names_every_argument(choice):
    config = configured(choice)
    defaults = SpeculatorDataModule.__init__.__kwdefaults__
    assert set(config) == {*defaults, "train"} - {"seed"}
    SpeculatorDataModule(**config)


def test_the_tiny_set_runs_as_configured(chat):
    data = ready(chat, **configured("tiny"))
    assert len(data.train_dataloader()) >= 4
    assert len(data.validation_set) >= 4


def test_a_conversation_has_the_same_company_however_it_is_batched(chat):
    data = ready(chat, train="tiny:40", val_fraction=0.2)
    company = data.encoded.company(max_tokens=900)
    for store in (data.train_set, data.validation_set):
        for index in range(len(store)):
            key = text_key(torch.tensor(store[index].tokens))
            batch = company(key)
            assert key in {conversation.key for conversation in batch.conversations()}
            assert batch.tokens.numel() <= 900
            assert batch.tokens.equal(company(key).tokens)
    assert company("of nobody") is None
    sizes = [len(company(text_key(torch.tensor(data.train_set[i].tokens))).ids) for i in range(10)]
    assert max(sizes) > 1
