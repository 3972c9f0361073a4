"""Holds a run's folder against other processes, before it is made."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Holds a run's folder; False where another process has it. A kill lets go of it, and nothing is left behind."""
    lock = folder.parent / ".locks" / folder.name
    file = try_lock(lock)
    try:
        yield file is not None
    finally:
        if file is not None:
            lock.unlink()
            fcntl.flock(file, fcntl.LOCK_UN)  # closing would not let go while a data loader's worker has the file too
            file.close()
        with suppress(OSError):  # not empty
            lock.parent.rmdir()
            folder.parent.rmdir()


def is_held(folder: Path) -> bool:
    """Whether another process uses a run's folder; looking leaves nothing behind."""
    lock = folder.parent / ".locks" / folder.name
    if not lock.exists():
        return False
    with held(folder) as free:
        return not free


def try_lock(path: Path) -> IO[str] | None:
    """Locks a file until the returned one is closed or the process ends; None where another process has it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        except FileNotFoundError:  # the folder was removed in between
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # removed by whoever held it: lock the new one
