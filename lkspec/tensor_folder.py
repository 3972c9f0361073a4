"""Reads single tensors of a safetensors checkpoint by name, without loading the rest of it."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_DEFAULT_BLOCK = (128, 128)


class TensorFolder:
    """A checkpoint folder, or a model on the hub, of which only the needed shards are fetched.

    Raises:
        ValueError: a path without ``config.json`` and safetensors weights.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._files = self._index()

    def _index(self) -> dict[str, str]:
        """The file that holds each tensor."""
        index = self._fetch("model.safetensors.index.json")
        if index is not None:
            with open(index, encoding="utf-8") as file:
                weights: dict[str, str] = json.load(file)["weight_map"]
            return weights
        single = self._fetch("model.safetensors")
        if single is None:
            raise ValueError(
                f"{self.path}: expected a folder or a hub id with model.safetensors or model.safetensors.index.json"
            )
        with safe_open(single, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), "model.safetensors")

    def _fetch(self, name: str) -> str | None:
        try:
            return cached_file(self.path, name, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise ValueError(f"{self.path}: no such folder or hub id ({' '.join(str(error).split())})") from error

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``."""
        file = self._fetch("config.json")
        if file is None:
            raise ValueError(f"{self.path}: there is no config.json")
        with open(file, encoding="utf-8") as opened:
            config: dict[str, Any] = json.load(opened)
        return config

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self, prefix: str) -> list[str]:
        """Names of the tensors that begin so."""
        return sorted(name for name in self._files if name.startswith(prefix))

    def get(self, name: str) -> Tensor:
        """One tensor; block-quantised fp8 weights come dequantised, in float32.

        w[i, j] = fp8[i, j] * scale_inv[i // 128, j // 128], 128 being the config's ``weight_block_size``.

        Raises:
            ValueError: no such tensor, or fp8 without its scales.
        """
        tensor = self._read(name)
        if tensor.dtype not in _FP8:
            return tensor
        scales = f"{name}_scale_inv"
        if scales not in self:
            raise ValueError(f"{self.path}: {name} is {tensor.dtype}, but its scales {scales} are not there")
        block = self.config.get("quantization_config", {}).get("weight_block_size", _DEFAULT_BLOCK)
        return dequantised(tensor, self._read(scales), tuple(block))

    def _read(self, name: str) -> Tensor:
        if name not in self:
            raise ValueError(f"{self.path}: there is no tensor {name}")
        file = self._fetch(self._files[name])
        if file is None:
            raise ValueError(f"{self.path}: {self._files[name]}, which holds {name}, is not there")
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(name)


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
    scales = scale_inv.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return weight.float() * scales[:num_rows, :num_columns]
