"""Single tensors out of a checkpoint: where they lie, what is opened, fp8 blocks."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from lkspec.export.tensor_folder import TensorFolder, dequantised, quantised

FP8 = torch.float8_e4m3fn


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_sharded(folder: Path, shards: dict[str, dict[str, Tensor]]) -> TensorFolder:
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return TensorFolder(str(folder))


def write_single(folder: Path, tensors: dict[str, Tensor], config: dict | None = None) -> TensorFolder:
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return TensorFolder(str(folder))


def by_loops(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Entry by entry, in float64."""
    values = torch.zeros(weight.shape, dtype=torch.float64)
    for i, row in enumerate(weight.double().tolist()):
        for j, value in enumerate(row):
            values[i, j] = value * float(scales[i // block[0], j // block[1]])
    return values


# --- where tensors lie --------------------------------------------------------------------------------------------


def test_one_file(tmp_path: Path) -> None:
    tensors = {"a.x": drawn(2, 3), "a.y": drawn(4, seed=1).bfloat16(), "b": torch.arange(5)}
    folder = write_single(tmp_path, tensors, {"num_hidden_layers": 3})
    for name, tensor in tensors.items():
        assert name in folder.files
        assert folder.get(name).dtype == tensor.dtype
        assert torch.equal(folder.get(name), tensor)
    assert sorted(folder.files) == ["a.x", "a.y", "b"]
    assert folder.config == {"num_hidden_layers": 3}
    assert folder.path == str(tmp_path)


def test_shards_are_found_by_the_index_and_opened_when_needed(tmp_path: Path) -> None:
    first, second = {"a": drawn(2), "c": drawn(3)}, {"b": drawn(4)}
    folder = write_sharded(tmp_path, {"one.safetensors": first, "two.safetensors": second})
    assert sorted(folder.files) == ["a", "b", "c"]
    (tmp_path / "one.safetensors").unlink()
    assert torch.equal(folder.get("b"), second["b"])
    with pytest.raises(ValueError, match=r"one\.safetensors, which holds a, is not there"):
        folder.get("a")


def test_an_index_goes_before_a_single_file(tmp_path: Path) -> None:
    write_single(tmp_path, {"stale": drawn(2)})
    folder = write_sharded(tmp_path, {"one.safetensors": {"a": drawn(2)}})
    assert sorted(folder.files) == ["a"]


def test_a_missing_tensor(tmp_path: Path) -> None:
    folder = write_single(tmp_path, {"a": drawn(2)})
    assert "b" not in folder.files
    with pytest.raises(ValueError, match=r"there is no tensor b$"):
        folder.get("b")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a folder or a hub id with model\.safetensors or .*index\.json"):
        TensorFolder(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder", "no such folder or hub id"),
        ("/no/such/folder", "no such folder or hub id"),
        ("no/where", "expected a folder or a hub id with"),  # offline, as all tests are: it might exist
    ],
)
def test_a_folder_that_is_not_there(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        TensorFolder(name)


# --- drafts as they were released -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "medusa_lm_head.pt", "medusa_lm_head.safetensors"])
def test_other_single_files(name: str, tmp_path: Path) -> None:
    tensors = {"a": drawn(2, 3), "b": drawn(4, seed=1).half()}
    if name.endswith(".safetensors"):
        save_file(tensors, tmp_path / name)
    else:
        torch.save(tensors, tmp_path / name)
    folder = TensorFolder(str(tmp_path))
    assert folder.files == dict.fromkeys(["a", "b"], name)
    for key, tensor in tensors.items():
        assert torch.equal(folder.get(key), tensor)
        assert folder.get(key).dtype == tensor.dtype
    write_single(tmp_path, {"c": drawn(2)})
    assert list(TensorFolder(str(tmp_path)).files) == ["c"]  # model.safetensors goes first


def test_nothing_but_tensors_is_unpickled(tmp_path: Path) -> None:
    torch.save({"a": Path("evil")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        TensorFolder(str(tmp_path))


def test_where_files_lie(tmp_path: Path) -> None:
    folder = write_single(tmp_path, {"a": drawn(2)}, {"x": 1})
    assert folder.local == tmp_path
    assert folder.fetched("model.safetensors") == str(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not there$"):
        folder.fetched("tokenizer.json")


def test_no_config(tmp_path: Path) -> None:
    folder = write_single(tmp_path, {"a": drawn(2)})
    with pytest.raises(ValueError, match=r"config\.json is not there$"):
        _ = folder.config


# --- fp8 ----------------------------------------------------------------------------------------------------------


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    block=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_each_entry_has_its_own_blocks_scale(shape: tuple[int, int], block: tuple[int, int], seed: int) -> None:
    """Whole blocks, ragged edges, blocks larger than the weight."""
    weight = drawn(*shape, seed=seed).to(FP8)
    scales = drawn(*(-(-n // b) for n, b in zip(shape, block, strict=True)), seed=seed + 1)
    values = dequantised(weight, scales, block)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), by_loops(weight, scales, block), rtol=1e-6, atol=0)


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    block=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_quantising_keeps_four_bits_and_each_blocks_largest_entry(
    shape: tuple[int, int], block: tuple[int, int], seed: int
) -> None:
    weight = drawn(*shape, seed=seed)
    codes, scales = quantised(weight, block)
    assert codes.dtype == FP8
    again = by_loops(codes, scales, block)
    for i in range(0, shape[0], block[0]):
        for j in range(0, shape[1], block[1]):
            part, back = (w[i : i + block[0], j : j + block[1]].double() for w in (weight, again))
            largest = part.abs().max()
            assert ((back - part).abs() <= part.abs() * 2**-4 + largest * 2**-9 / 448).all()
            assert float(back.abs().max()) == pytest.approx(float(largest), rel=1e-6)


def test_a_block_of_zeros_stays_zero() -> None:
    codes, scales = quantised(torch.zeros(3, 5), (2, 2))
    assert torch.equal(dequantised(codes, scales, (2, 2)), torch.zeros(3, 5))


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"weight_block_size": [3, 2]}}], ids=["128", "3x2"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantised_weights_come_dequantised(dtype: torch.dtype, config: dict, tmp_path: Path) -> None:
    block = (3, 2) if config else (128, 128)
    weight = drawn(130, 7).to(dtype)
    scales = drawn(-(-130 // block[0]), -(-7 // block[1]), seed=1)
    folder = write_single(tmp_path, {"w": weight, "w_scale_inv": scales, "plain": drawn(3)}, config)
    assert folder.get("w").dtype == torch.float32
    torch.testing.assert_close(folder.get("w").double(), by_loops(weight, scales, block), rtol=1e-6, atol=0)
    assert torch.equal(folder.get("w_scale_inv"), scales)
    assert torch.equal(folder.get("plain"), drawn(3))


def test_fp8_without_scales(tmp_path: Path) -> None:
    folder = write_single(tmp_path, {"w": drawn(2, 2).to(FP8)}, {})
    with pytest.raises(ValueError, match=r"w is torch\.float8_e4m3fn, but its scales w_scale_inv are not there"):
        folder.get("w")


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (3, 2), (2, 3), (130, 200), (4,), ()])
def test_scales_of_another_shape(shape: tuple[int, ...]) -> None:
    weight = drawn(130, 200).to(FP8)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # compared whole
        dequantised(weight, torch.ones(shape), (128, 128))
    assert str(caught.value) == (
        f"fp8 scales: expected [2, 2] for a weight of [130, 200] in blocks of [128, 128], got {list(shape)}"
    )
