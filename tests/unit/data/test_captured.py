from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers.normalizers import Lowercase

import lkspec
from lkspec.data.capture_format import DamagedShardError, bytes_per_token
from lkspec.data.captured import CapturedStates, capture_writer, store_keys
from lkspec.data.chat import Encoded
from lkspec.data.dataset import EncodedStore, collate
from lkspec.losses.fused.head_summary import head_summary
from lkspec.targets.memory import RememberedStates
from lkspec.types import TargetStates

WIDTHS = (3 * 64, 64)  # three auxiliary states and the last one, H = 64
ONE_EACH = 1  # shard_bytes that every conversation fills


def conversation(length: int, *, name: str | None = None, seed: int | None = None) -> Encoded:
    generator = torch.Generator().manual_seed(length if seed is None else seed)
    tokens = torch.randint(0, 256, (length,), generator=generator).tolist()
    return Encoded(name or f"c{length}", tokens, [0] * (length // 2) + [1] * (length - length // 2))


def store_of(*conversations: Encoded) -> EncodedStore:
    store = EncodedStore()
    for encoded in conversations:
        store.append(encoded)
    return store


CONVERSATIONS = [conversation(length) for length in (12, 30, 7, 19)]
PADDED = collate([[encoded] for encoded in CONVERSATIONS])
PACKED = collate([CONVERSATIONS[:3], CONVERSATIONS[2:]])


def key_of(encoded: Encoded) -> str:
    return next(store_keys(store_of(encoded)))


def alone(target, encoded: Encoded) -> TargetStates:
    states = target.states(collate([[encoded]])).at(0)
    return replace(states, summary=head_summary(target.head, states.last.bfloat16()))


def capture(folder: Path, target, conversations=CONVERSATIONS, **options) -> list[str]:
    """Captures what a folder lacks; returns the names of what was computed."""
    computed = []
    with capture_writer(folder, target, data="some-data", **{"shard_bytes": 20_000, **options}) as writer:
        for encoded in conversations:
            if key_of(encoded) not in writer:
                writer.add(key_of(encoded), alone(target, encoded))
                computed.append(encoded.id)
    return computed


def like(target, **changes) -> SimpleNamespace:
    """A target of which some attributes differ."""
    names = ("fingerprint", "dtype", "device", "aux_layer_ids", "tokenizer", "spec", "states", "head")
    return SimpleNamespace(**{name: getattr(target, name) for name in names} | changes)


def damage(file: Path, at: int) -> None:
    """Turns one bit over."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.fixture
def folder(tmp_path, tiny_target) -> Path:
    """Four conversations in two shards."""
    capture(tmp_path / "states", tiny_target)
    assert [path.name for path in shards(tmp_path / "states")] == ["shard-00000.safetensors", "shard-00001.safetensors"]
    return tmp_path / "states"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("batch", [PADDED, PACKED], ids=["padded", "packed"])
def test_states_are_the_targets_rounded_to_bfloat16(folder, tiny_target, batch):
    expected = RememberedStates(tiny_target.states, 1.0)(batch)  # each conversation by itself, as they are captured
    states = CapturedStates(folder, tiny_target)(batch)
    assert states.aux.dtype == states.last.dtype == torch.float32
    assert states.aux.equal(expected.aux.bfloat16().float())
    assert states.last.equal(expected.last.bfloat16().float())
    assert not states.last[batch.segments == 0].any()
    assert states.summary is not None
    logits = tiny_target.head.logits(states.last).double()
    text = batch.segments > 0
    assert torch.allclose(states.summary.log_normaliser.double()[text], logits.logsumexp(-1)[text], atol=1e-5)
    assert states.summary.argmax[text].equal(logits.argmax(-1)[text])
    assert not states.summary.argmax[~text].any()


def test_they_may_be_remembered_and_used_in_training(folder, tiny_target):
    captured = CapturedStates(folder, tiny_target)
    remembered = RememberedStates(captured, 1.0)
    with torch.inference_mode():
        remembered(PADDED)
    for path in shards(folder):
        path.unlink()
    states = remembered(PACKED)
    assert not states.last.is_inference()
    weight = torch.ones(64, requires_grad=True)
    (states.last @ weight).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.isnan().any()


def test_a_batch_without_text(folder, tiny_target):
    states = CapturedStates(folder, tiny_target)(collate([[]]))
    assert (states.aux.shape, states.last.shape) == ((1, 2, WIDTHS[0]), (1, 2, WIDTHS[1]))


def test_the_files_are_plain_safetensors_of_the_documented_size(folder, tiny_target):
    tensors = {key: tensor for path in shards(folder) for key, tensor in load_file(path).items()}
    assert list(map(len, map(tensors.get, map(key_of, CONVERSATIONS)))) == [12, 30, 7, 19]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    first = alone(tiny_target, CONVERSATIONS[0])
    written = tensors[key_of(CONVERSATIONS[0])]
    assert written[:, :-4].equal(torch.cat([first.aux, first.last], dim=-1).bfloat16())
    normaliser, argmax = written[:, -4:].contiguous().view(torch.int32).unbind(-1)
    assert normaliser.contiguous().view(torch.float32).equal(first.summary.log_normaliser)
    assert argmax.equal(first.summary.argmax.int())
    assert bytes_per_token(tiny_target) == 2 * (3 + 1) * 64 + 8
    assert sum(tensor.nbytes for tensor in tensors.values()) == (12 + 30 + 7 + 19) * bytes_per_token(tiny_target)


def test_texts_count_and_names_do_not(folder, tiny_target):
    renamed = Encoded("another name", CONVERSATIONS[0].tokens, CONVERSATIONS[0].turns)
    captured = CapturedStates(folder, tiny_target)
    captured.check(store_of(renamed))
    impostor = conversation(12, seed=99)  # of the same name and length
    assert impostor.id == CONVERSATIONS[0].id
    with pytest.raises(
        ValueError, match=r"states lacks a conversation \(c12\), it was captured from the data some-data"
    ):
        captured(collate([[impostor]]))


def test_missing_conversations_are_counted_and_named_before_training(folder, tiny_target):
    captured = CapturedStates(folder, tiny_target)
    captured.check(store_of(*CONVERSATIONS[:2]), store_of(CONVERSATIONS[3]))  # a part of what was captured
    new = [conversation(length) for length in (40, 41, 42, 43)]
    with pytest.raises(ValueError, match=r"lacks 4 of the 6 conversations of this run \(c40, c41, c42, \.\.\.\)"):
        captured.check(store_of(CONVERSATIONS[0], *new[:2]), store_of(*new[2:], CONVERSATIONS[1]))


def test_no_capture_at_all(tmp_path, tiny_target):
    with pytest.raises(ValueError, match=r"nothing-here holds no capture \(no manifest.json\)"):
        CapturedStates(tmp_path / "nothing-here", tiny_target)


def other_tokenizer(target):
    tokenizer = deepcopy(target.tokenizer)
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    return tokenizer


def other_template(target):
    tokenizer = deepcopy(target.tokenizer)
    tokenizer.chat_template += " "
    return tokenizer


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("target: captured 2691716531250f6d, now 0123", lambda target: {"fingerprint": "0123"}),
        ("dtype: captured float32, now bfloat16", lambda target: {"dtype": torch.bfloat16}),
        ("aux_layer_ids: captured 2, 4, 5, now 1, 4, 5", lambda target: {"aux_layer_ids": (1, 4, 5)}),
        ("tokenizer: ", lambda target: {"tokenizer": other_tokenizer(target)}),
        ("chat_template: ", lambda target: {"tokenizer": other_template(target)}),
    ],
    ids=["target", "dtype", "layers", "tokenizer", "template"],
)
def test_another_target_tokenizer_template_or_layers_are_refused(folder, tiny_target, part, changes):
    other = like(tiny_target, **changes(tiny_target))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for use in (lambda: CapturedStates(folder, other), lambda: capture(folder, other)):
        with pytest.raises(ValueError, match="was captured for something else") as refused:
            use()
        assert part in str(refused.value)
        assert str(refused.value).count(", now ") == 1  # and nothing else is said to differ
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert capture(folder, other, overwrite=True) == [encoded.id for encoded in CONVERSATIONS]
    CapturedStates(folder, other)
    assert len(shards(folder)) == 2


def test_padding_a_batch_does_not_make_another_tokenizer(folder, tiny_target):
    tokenizer = deepcopy(tiny_target.tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.to_str() != tiny_target.tokenizer.backend_tokenizer.to_str()
    CapturedStates(folder, like(tiny_target, tokenizer=tokenizer))


def test_a_capture_is_added_to(folder, tiny_target):
    before = shards(folder)[0].stat().st_mtime_ns
    more = [*CONVERSATIONS, conversation(25)]
    assert capture(folder, tiny_target, more) == ["c25"]
    assert shards(folder)[0].stat().st_mtime_ns == before
    CapturedStates(folder, tiny_target).check(store_of(*more))


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from lkspec.data import capture_format, captured
from lkspec.targets.tiny import TinyTarget
from test_captured import CONVERSATIONS, capture

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def save_half(tensors, path, metadata):
    Path(path).write_bytes(b"half a shard")
    die()

where = sys.argv[3]
write = captured.write_shard
count = 0
def counted(path, tensors):
    global count
    count += 1
    if count == 3 and where == "inside a shard":
        capture_format.save_file = save_half
    shard = write(path, tensors)
    if count == 3:
        die()
    return shard
captured.write_shard = counted
capture(Path(sys.argv[1]), TinyTarget(device="cpu"), shard_bytes=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["inside a shard", "between shard and manifest"])
def test_a_killed_capture_goes_on(tmp_path, tiny_target, where):
    folder = tmp_path / "states"
    environment = os.environ | {"PYTHONPATH": str(Path(lkspec.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(folder), str(Path(__file__).parent), where]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(json.loads((folder / "manifest.json").read_text())["shards"]) == 2
    unfinished = [path.name for path in folder.iterdir() if path.name.startswith((".shard-", "shard-00002"))]
    assert len(unfinished) == 1
    captured = CapturedStates(folder, tiny_target)  # what is there can be read already
    captured.check(store_of(*CONVERSATIONS[:2]))
    assert capture(folder, tiny_target, shard_bytes=ONE_EACH) == ["c7", "c19"]
    whole = tmp_path / "whole"
    capture(whole, tiny_target, shard_bytes=ONE_EACH)
    contents = [{path.name: path.read_bytes() for path in of.iterdir()} for of in (folder, whole)]
    assert contents[0] == contents[1]


def test_what_a_kill_left_is_removed_even_when_nothing_is_missing(folder, tiny_target):
    left = [folder / "shard-00002.safetensors", folder / ".shard-00002.safetensors.x1.tmp"]
    for path in left:
        path.write_bytes(b"half a shard")
    CapturedStates(folder, tiny_target)
    assert capture(folder, tiny_target) == []
    assert not any(path.exists() for path in left)


def test_a_second_writer_is_refused(tmp_path, tiny_target):
    folder = tmp_path / "states"
    with capture_writer(folder, tiny_target, data="d") as writer:
        with (
            pytest.raises(ValueError, match=rf"{folder}: another process is capturing into it"),
            capture_writer(folder, tiny_target, data="d", overwrite=True),
        ):
            pass
        writer.add(key_of(CONVERSATIONS[0]), alone(tiny_target, CONVERSATIONS[0]))
    CapturedStates(folder, tiny_target).check(store_of(CONVERSATIONS[0]))
    assert capture(folder, tiny_target) == ["c30", "c7", "c19"]  # the lock is free again


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path, tiny_target):
    holder = textwrap.dedent("""
        import fcntl, sys, time
        lock = open(sys.argv[1], "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("held", flush=True)
        time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / ".lock")], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another process is capturing"):
            capture(tmp_path, tiny_target)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert len(capture(tmp_path, tiny_target)) == len(CONVERSATIONS)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {
    "first byte": (lambda file: damage(file, 0), "its header does not have the sha256"),
    "header": (lambda file: damage(file, 100), "its header does not have the sha256"),
    "a conversation": (lambda file: damage(file, -1), "a conversation does not have the sha256"),
    "cut off": (cut_off, "bytes, found"),
    "missing": (Path.unlink, "the file is missing"),
}


@pytest.mark.parametrize(("harm", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_shard_names_itself_and_is_captured_again(folder, tiny_target, harm, reason):
    expected = CapturedStates(folder, tiny_target)(PADDED)
    harm(shards(folder)[1])
    with pytest.raises(
        DamagedShardError, match=rf"shard-00001.safetensors is damaged: .*{reason}.* again: it replaces"
    ):
        CapturedStates(folder, tiny_target)(PADDED)
    with capture_writer(folder, tiny_target, data="some-data") as writer:
        assert [str(folder / "shard-00001.safetensors") in text and reason in text for text in writer.repaired] == [
            True
        ]
        kept = [encoded.id for encoded in CONVERSATIONS if key_of(encoded) in writer]
    assert kept == ["c12", "c30"]
    assert capture(folder, tiny_target) == ["c7", "c19"]
    assert CapturedStates(folder, tiny_target)(PADDED).last.equal(expected.last)


@pytest.mark.slow
def test_every_byte_of_a_shard_is_covered(folder, tiny_target):
    file = shards(folder)[1]
    intact = file.read_bytes()
    for at in range(0, len(intact), 97):
        damage(file, at)
        with pytest.raises(DamagedShardError):
            CapturedStates(folder, tiny_target)(PADDED)
        file.write_bytes(intact)
    CapturedStates(folder, tiny_target)(PADDED)


def test_a_shard_that_shrinks_while_it_is_read(folder, tiny_target):
    captured = CapturedStates(folder, tiny_target)
    captured(PADDED)
    cut_off(shards(folder)[1])
    with pytest.raises(DamagedShardError, match="shard-00001"):
        captured(PADDED)


@pytest.mark.parametrize("content", ["", "{}", '{"format": 0, "dtype": "torch.bfloat16"}', "[1]"])
def test_a_manifest_that_is_none(folder, tiny_target, content):
    (folder / "manifest.json").write_text(content)
    for use in (lambda: CapturedStates(folder, tiny_target), lambda: capture(folder, tiny_target)):
        with pytest.raises(ValueError, match=r"manifest.json is damaged or of another version .* overwrite=true"):
            use()
