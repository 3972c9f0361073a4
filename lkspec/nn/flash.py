"""Flash kernels for the shared part of ``attention``: torch's own on CPUs, and the package's on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

KERNELS = ("auto", "blocks", "flash_attn")


class Flash(NamedTuple):
    """A flash kernel of causal grouped-query attention; heads are [B, N, S, E], log-sum-exps [B, N, S].

    Attributes:
        forward: (queries, keys, values, scaling) -> result, log-sum-exp.
        backward: (gradient, queries, keys, values, result, log-sum-exp, scaling) -> their gradients.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def check_kernel(kernel: str) -> None:
    """Refuses what ``CausalMask.kernel`` cannot be.

    ``auto`` takes torch's flash kernel on CPUs and ``blocks`` elsewhere, ``blocks`` recomputes the definition, and
    ``flash_attn`` is the package of that name.

    Raises:
        ValueError: an unknown name, or flash_attn where the package is not installed.
    """
    if kernel not in KERNELS:
        raise ValueError(f"attention kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}")
    if kernel == "flash_attn" and find_spec("flash_attn") is None:
        raise ValueError(
            "attention kernel flash_attn: that package is not installed; pip install flash-attn or use auto"
        )


def flash_kernel(kernel: str, queries: Tensor, keys: Tensor, values: Tensor) -> Flash | None:
    """The kernel for these tensors; None where there is none."""
    same = queries.dtype == keys.dtype == values.dtype and keys.shape == values.shape
    if kernel == "flash_attn":
        if not (same and queries.dtype in (torch.bfloat16, torch.float16)):
            raise ValueError(
                "attention kernel flash_attn: expected half precision and keys as wide as values, got "
                f"{queries.dtype}, {keys.shape[-1]} and {values.shape[-1]}; use trainer.precision=bf16-mixed, or "
                "unroll.attention=auto"
            )
        return Flash(_package_forward, _package_backward)
    if kernel == "auto" and same and queries.device.type == "cpu":
        return Flash(_cpu_forward, _cpu_backward)
    return None


def _cpu_forward(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(queries, keys, values, 0.0, True, scale=scaling)


def _cpu_backward(*parts: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, scaling = parts
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, 0.0, True, scale=scaling)


def _package_forward(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_forward  # type: ignore[import-not-found]

    heads = (tensor.transpose(1, 2) for tensor in (queries, keys, values))
    mixed, log_sum, *_ = _flash_attn_forward(*heads, 0.0, scaling, True, -1, -1, 0.0, None, False)
    return mixed.transpose(1, 2), log_sum


def _package_backward(*parts: Any) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_backward

    *tensors, log_sum, scaling = parts
    gradient, queries, keys, values, mixed = (tensor.transpose(1, 2).contiguous() for tensor in tensors)
    found = (torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values))
    options = (0.0, scaling, True, -1, -1, 0.0, None, False)
    _flash_attn_backward(gradient, queries, keys, values, mixed, log_sum.contiguous(), *found, *options)
    return found[0].transpose(1, 2), found[1].transpose(1, 2), found[2].transpose(1, 2)
