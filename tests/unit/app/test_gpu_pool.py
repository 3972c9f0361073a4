"""Processes of a sweep share no device; on fake ones, since only names and locks are involved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lkspec.app.gpu_pool import VISIBLE, visible_devices

TAKE = """
import sys
from pathlib import Path
from lkspec.app.gpu_pool import take_device
for _ in range(2):
    try:
        print(take_device(sys.argv[2:], folder=Path(sys.argv[1])), flush=True)
    except ValueError as error:
        print(error, flush=True)
sys.stdin.read()
"""


class Process:
    """A process that takes a device, twice, and lives until it is let go."""

    def __init__(self, folder: Path, *devices: str) -> None:
        command = [sys.executable, "-c", TAKE, str(folder), *devices]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.said = [self.process.stdout.readline().strip() for _ in range(2)]

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@pytest.mark.slow
def test_each_process_has_a_device_of_its_own_as_long_as_it_lives(tmp_path):
    first, second = (Process(tmp_path, "fake0", "GPU-1/2") for _ in range(2))
    third = Process(tmp_path, "fake0", "GPU-1/2")
    assert [first.said, second.said] == [["fake0"] * 2, ["GPU-1/2"] * 2]
    assert all("no free GPU among fake0, GPU-1/2" in line for line in third.said)
    first.process.kill()
    first.process.wait()
    fourth = Process(tmp_path, "fake0", "GPU-1/2")
    assert fourth.said == ["fake0"] * 2
    for process in (second, third, fourth):
        process.end()
    first.end()


@pytest.mark.parametrize(("named", "expected"), [("3, 5", ["3", "5"]), ("GPU-a", ["GPU-a"]), ("", []), (" ", [])])
def test_the_devices_that_were_named_are_the_pool(monkeypatch, named, expected):
    monkeypatch.setenv(VISIBLE, named)
    assert visible_devices() == expected


def test_without_names_all_there_are(monkeypatch):
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert visible_devices() == ["0", "1", "2"]
