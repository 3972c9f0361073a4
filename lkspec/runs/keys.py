"""What each configuration key decides: the one table that run names, staleness, reports, duels and captions ask."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """What a key decides. TRAINED and MEASURED together are the outcome of a run."""

    TRAINED = "trained"  # the draft that training ends with
    MEASURED = "measured"  # what is measured of it, not the draft
    MACHINE = "machine"  # where and how fast it runs; results agree up to rounding
    OUTPUT = "output"  # names, folders, logs, and which jobs run at all


# The longest entry that is a key or a section above it counts. A section whose keys are of several kinds lists them; a
# key that is not here, such as one of a user's own class, decides what its section does: nothing is reused by mistake.
KINDS: Mapping[str, Kind] = {
    "draft": Kind.TRAINED,
    "target": Kind.TRAINED,
    "target.name": Kind.OUTPUT,
    "target.device": Kind.MACHINE,
    "data": Kind.TRAINED,
    "data.num_workers": Kind.MACHINE,
    "data.validation": Kind.MEASURED,
    "loss": Kind.TRAINED,
    "loss_options": Kind.TRAINED,
    "loss_options.chunk_size": Kind.MACHINE,
    "optimizer": Kind.TRAINED,
    "scheduler": Kind.TRAINED,
    "gradient_clip": Kind.TRAINED,
    "seed": Kind.TRAINED,
    "vocab": Kind.TRAINED,
    "unroll": Kind.MACHINE,
    "matmul_precision": Kind.TRAINED,
    "states_dir": Kind.MACHINE,  # but see ``outcome``
    "states_memory_gb": Kind.MACHINE,
    "trainer": Kind.TRAINED,
    "trainer.accelerator": Kind.MACHINE,
    "trainer.devices": Kind.MACHINE,  # but see ``outcome``
    "trainer.num_nodes": Kind.MACHINE,
    "trainer.strategy": Kind.MACHINE,
    "trainer.enable_progress_bar": Kind.OUTPUT,
    "trainer.enable_model_summary": Kind.OUTPUT,
    "trainer.log_every_n_steps": Kind.OUTPUT,
    "trainer.val_check_interval": Kind.MEASURED,
    "trainer.check_val_every_n_epoch": Kind.MEASURED,
    "trainer.limit_val_batches": Kind.MEASURED,
    "trainer.num_sanity_val_steps": Kind.MEASURED,
    "benchmark": Kind.MEASURED,
    "evaluation": Kind.MEASURED,
    "callbacks": Kind.TRAINED,
    "callbacks.acceptance_length": Kind.MEASURED,
    "callbacks.checkpoint": Kind.OUTPUT,
    "callbacks.progress": Kind.OUTPUT,
    "logger": Kind.OUTPUT,
    "names": Kind.OUTPUT,
    "run_root": Kind.OUTPUT,
    "on_existing": Kind.OUTPUT,
    "list_jobs": Kind.OUTPUT,
    "journal": Kind.OUTPUT,
    "resume": Kind.OUTPUT,
}
_OUTCOME = (Kind.TRAINED, Kind.MEASURED)


def kind(key: str) -> Kind:
    """What a dotted key (``trainer.devices``) decides; one that the table does not know, the draft."""
    while key not in KINDS and "." in key:
        key = key.rpartition(".")[0]
    return KINDS.get(key, Kind.TRAINED)


def outcome(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that decides a run's results; equal outcomes are the same run.

    Devices count by their number, and states read from a capture (rounded to bfloat16) by being captured. Whole floats
    count as integers: eta=3 and eta=3.0 are the same job.
    """
    kept = _outcome(config, "")
    if (num_devices := _number(config["trainer"]["devices"])) != 1:
        kept["num_devices"] = num_devices
    if config["states_dir"] is not None:
        kept["captured_states"] = True
    return kept


def _outcome(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    kept = {}
    for key, value in config.items():
        inside = any(name.startswith(f"{prefix}{key}.") for name in KINDS)
        if isinstance(value, Mapping) and inside:
            kept[key] = _outcome(value, f"{prefix}{key}.")
        elif kind(f"{prefix}{key}") in _OUTCOME:
            kept[key] = _plain(value)
    return kept


def _number(devices: Any) -> Any:
    """How many devices ``trainer.devices`` names."""
    return len(devices) if isinstance(devices, list) else 1 if devices in ("1", "auto") else devices


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
