"""Callbacks of training: when the acceptance length is measured, and the progress bar."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from lkspec.measure.benchmark import Measurement
from lkspec.measure.metrics import acceptance_metrics
from lkspec.runs.rows import measurement_name


class AcceptanceLength(Callback):
    """Decides when to measure by real decoding; the module's ``evaluate`` knows what and how.

    Args:
        every_n_epochs: measure after every n-th epoch; 0 never.
        before_training: measure once before the first step of a fresh run.
    """

    def __init__(self, *, every_n_epochs: int = 0, before_training: bool = False) -> None:
        self._every_n_epochs = every_n_epochs
        self._before_training = before_training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._before_training and trainer.global_step == 0:
            self._run(trainer, pl_module, "before")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        number = trainer.current_epoch + 1
        last = trainer.max_epochs is not None and number == trainer.max_epochs
        if self._every_n_epochs and number % self._every_n_epochs == 0 and not last:
            self._run(trainer, pl_module, "during")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run(trainer, pl_module, "after")

    def _run(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.eval()
        for measurement in pl_module.evaluate(stage, trainer.global_step):
            scalars = measurement_scalars(measurement)
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=trainer.global_step)
        pl_module.train()


def measurement_scalars(measurement: Measurement) -> dict[str, Any]:
    """What loggers show of a measurement; K is in the names, as several may be measured."""
    setting = measurement.setting
    metrics = acceptance_metrics(measurement.prompt_rounds(), num_draft_tokens=setting.num_draft_tokens)
    prefix = "eval/" + measurement_name(
        measurement.benchmark, setting.temperature, setting.num_draft_tokens, setting.sharpness
    )
    return {
        f"{prefix}/acceptance_length": metrics.tau,
        f"{prefix}/walk_acceptance_length": measurement.walk_acceptance_lengths()[-1],
        f"{prefix}/tokens_per_second": measurement.tokens_per_second,
    }


class TrainingProgress(RichProgressBar):
    """Lightning's rich bar without the version number, which means nothing here."""

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=True)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items
