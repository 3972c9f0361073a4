"""Runs a training to its end: what Lightning has to be told besides the module and the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lkspec.data.datamodule import SpeculatorDataModule
from lkspec.training.module import SpeculatorModule

__all__ = ["Trainer", "fit", "is_first_rank", "log_hyperparameters", "make_trainer", "seed_run"]


def is_first_rank() -> bool:
    """Whether this process decides, writes and prints; known before any process group is made."""
    return rank_zero_only.rank == 0


def seed_run(seed: int, matmul_precision: str) -> None:
    """Seeds every random generator and chooses the precision of float32 products on GPUs."""
    seed_everything(seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision(matmul_precision)


def make_trainer(make: Callable[[], Trainer], precision: str) -> Trainer:
    """Makes a trainer.

    Raises:
        ValueError: what Lightning refuses, or float16, whose losses would need scaling.
    """
    if precision.startswith("16"):
        raise ValueError("trainer.precision: float16 would need loss scaling; use bf16-mixed or 32-true")
    try:
        return make()
    except MisconfigurationException as error:
        raise ValueError(f"trainer: {error}") from error


def fit(
    trainer: Trainer, module: SpeculatorModule, data: SpeculatorDataModule, *, resume: Path | None, checkpoints: Path
) -> None:
    """Trains from the start or from a checkpoint, saves the last state, and validates where training ended."""
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    # Lightning's word for "with the optimiser and loop states"; the file itself loads under torch's weights_only=True.
    trainer.save_checkpoint(checkpoints / f"step={trainer.global_step}.ckpt", weights_only=False)
    if len(data.validation_set) == 0 or trainer.limit_val_batches == 0 or module.validated_step == trainer.global_step:
        return  # fit validates at the end of an epoch, but not where steps or time run out within one
    logged = dict(trainer.logged_metrics)
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.logged_metrics.update({key: value for key, value in logged.items() if key not in trainer.logged_metrics})


def log_hyperparameters(trainer: Trainer, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Fills TensorBoard's table of hyper-parameters and final metrics."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(_flat(settings), {f"hparams/{name}": value for name, value in metrics.items()})
            logger.save()


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings as ``a/b`` -> scalar."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        elif value is not None:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float) else str(value)
    return flat
