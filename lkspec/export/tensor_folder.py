"""Reads single tensors of a checkpoint by name, without loading the rest of it where it is in safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
DEFAULT_BLOCK = (128, 128)
INDEX = "model.safetensors.index.json"
# In this order; the last ones are how some drafts were released.
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin", "medusa_lm_head.safetensors", "medusa_lm_head.pt")


class TensorFolder:
    """A checkpoint folder, or a model on the hub, of which only the needed shards are fetched.

    Attributes:
        files: tensor name -> the file that holds it.

    Raises:
        ValueError: a path without weights.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._opened: dict[str, tuple[list[str], Callable[[str], Tensor]]] = {}
        self.files = self._index()

    def _index(self) -> dict[str, str]:
        index = self._find(INDEX)
        if index is not None:
            weights: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            return weights
        for name in _SINGLE_FILES:
            single = self._find(name)
            if single is not None:
                return dict.fromkeys(self._open(single)[0], name)
        raise ValueError(
            f"{self.path}: expected a folder or a hub id with model.safetensors or {INDEX} (or, as some drafts were "
            f"released, {', '.join(_SINGLE_FILES[1:])})"
        )

    def _open(self, file: str) -> tuple[list[str], Callable[[str], Tensor]]:
        """The names in a file and what reads one; of a file that torch.save wrote nothing but tensors is unpickled."""
        if file not in self._opened:
            if file.endswith(".safetensors"):
                opened = safe_open(file, framework="pt")
                self._opened[file] = list(opened.keys()), opened.get_tensor
            else:
                tensors = torch.load(file, map_location="cpu", weights_only=True)
                self._opened[file] = list(tensors), tensors.__getitem__
        return self._opened[file]

    def _find(self, name: str) -> str | None:
        try:
            return cached_file(self.path, name, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise ValueError(f"{self.path}: no such folder or hub id ({' '.join(str(error).split())})") from error

    def fetched(self, name: str, *, holds: str | None = None) -> str:
        """Where one of its files lies on this machine.

        Raises:
            ValueError: it is not there.
        """
        file = self._find(name)
        if file is None:
            why = "" if holds is None else f", which holds {holds},"
            raise ValueError(f"{self.path}: {name}{why} is not there")
        return file

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``."""
        config: dict[str, Any] = json.loads((self.local / "config.json").read_text(encoding="utf-8"))
        return config

    @property
    def local(self) -> Path:
        """Where its files lie on this machine; for a hub id, those fetched so far."""
        return Path(self.fetched("config.json")).parent

    def get(self, name: str) -> Tensor:
        """One tensor; block-quantised fp8 weights come dequantised, in float32.

        w[i, j] = fp8[i, j] * scale_inv[i // 128, j // 128], 128 being the config's ``weight_block_size``.

        Raises:
            ValueError: no such tensor, or fp8 without its scales.
        """
        tensor = self.raw(name)
        if tensor.dtype not in _FP8:
            return tensor
        scales = f"{name}_scale_inv"
        if scales not in self.files:
            raise ValueError(f"{self.path}: {name} is {tensor.dtype}, but its scales {scales} are not there")
        block = self.config.get("quantization_config", {}).get("weight_block_size", DEFAULT_BLOCK)
        return dequantised(tensor, self.raw(scales), tuple(block))

    def raw(self, name: str) -> Tensor:
        """One tensor as it is stored; errors as ``get``."""
        if name not in self.files:
            raise ValueError(f"{self.path}: there is no tensor {name}")
        return self._open(self.fetched(self.files[name], holds=name))[1](name)


def dequantised(weight: Tensor, scale_inv: Tensor, block: tuple[int, int]) -> Tensor:
    """w[i, j] = weight[i, j] * scale_inv[i // block rows, j // block columns], in float32.

    Raises:
        ValueError: scales that are not one a block.
    """
    num_rows, num_columns = weight.shape
    expected = (-(-num_rows // block[0]), -(-num_columns // block[1]))
    if tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"fp8 scales: expected {list(expected)} for a weight of {list(weight.shape)} in blocks of {list(block)}, "
            f"got {list(scale_inv.shape)}"
        )
    return weight.float() * _spread(scale_inv.float(), weight, block)


def quantised(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A weight in fp8 (e4m3) with one scale a block, as ``dequantised`` reads it: scale_inv = max |block| / 448."""
    blocks = [rows.split(block[1], dim=1) for rows in weight.float().split(block[0])]
    largest = torch.tensor([[float(part.abs().max()) for part in rows] for rows in blocks])
    scales = (largest / torch.finfo(torch.float8_e4m3fn).max).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight.float() / _spread(scales, weight, block)).to(torch.float8_e4m3fn), scales


def _spread(scales: Tensor, weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Each entry's scale."""
    return scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: weight.shape[0], : weight.shape[1]]
