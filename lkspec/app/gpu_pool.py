"""One GPU for each process of a sweep: a pool of lock files, so that no two processes of a machine share one.

A process takes a device before anything initialises CUDA and keeps it to its end, since CUDA cannot move to another.
The lock goes with the process, however it ends.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from lkspec.runs.lock import try_lock

VISIBLE = "CUDA_VISIBLE_DEVICES"

_taken: IO[str] | None = None  # this process's lock


def visible_devices() -> list[str]:
    """The devices that this process may use, in CUDA's words; does not initialise CUDA."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [device for device in re.split(r"\s*,\s*", named.strip()) if device]
    import torch  # here: a sweep is refused or listed without it

    return [str(index) for index in range(torch.cuda.device_count())]


def take_device(devices: Sequence[str], *, folder: Path | None = None) -> str:
    """Makes the first free device of a pool the only visible one; the same one when asked again.

    Args:
        devices: the pool, in the words of ``CUDA_VISIBLE_DEVICES``.
        folder: of the lock files; all sweeps of a user share the default one.

    Raises:
        ValueError: none is free.
    """
    global _taken
    if _taken is not None:
        return os.environ[VISIBLE]
    import torch

    folder = folder or Path(tempfile.gettempdir()) / f"lkspec-gpus-{os.getuid()}"
    assert not torch.cuda.is_initialized(), "a device is taken before CUDA is initialised"
    for device in devices:
        if (file := try_lock(folder / re.sub(r"[^A-Za-z0-9.-]", "-", device))) is not None:
            _taken = file
            os.environ[VISIBLE] = device
            return device
    raise ValueError(
        f"no free GPU among {', '.join(devices)}: another sweep of yours has them; wait for its end, name others in "
        f"{VISIBLE}, or lower hydra.launcher.n_jobs"
    )
