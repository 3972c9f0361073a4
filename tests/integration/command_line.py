"""The command line in this process or in one of its own, and what its runs left behind."""

from __future__ import annotations

import csv
import io
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton

import lkspec.app.application  # noqa: F401  # registers a resolver, which must outlive what a run leaves behind
from lkspec import cli
from lkspec.runs.folder import RunFolder

REPOSITORY = Path(__file__).parents[2]
CPU = ("target.device=cpu", "trainer.accelerator=cpu")
# A small draft, 9 conversations in 4 steps an epoch of a tenth of a second each.
TINY_DATA = ("target=tiny", "data=tiny", "data.train=tiny:10", "data.max_tokens=512")
TINY_RUN = (*TINY_DATA, "debug=smoke", "draft.num_depths=2", *CPU)
NO_EVALUATION = ("~callbacks.acceptance_length",)
# A few tokens of decoding: enough rounds to count.
BRIEF_EVALUATION = ("benchmark=mini_math", "benchmark.num_prompts=2", "++benchmark.max_new_tokens=16")
STEPS, SAVED = 6, 4  # of a trained run, and where it left a checkpoint on its way
TRAINED_RUN = (
    *TINY_RUN,
    f"trainer.max_steps={STEPS}",
    "optimizer.lr=3e-3",
    f"callbacks.checkpoint.every_n_train_steps={SAVED}",
    "logger=csv",
)


@dataclass(frozen=True)
class Outcome:
    """What a command printed and how it exited."""

    code: int
    out: str
    err: str

    @property
    def error_line(self) -> str:
        """The line that tells a user what was wrong; checks that nothing but it, and no stack trace, was printed."""
        assert self.code == 2, self
        assert "Traceback" not in self.out + self.err, self
        first, *rest = self.err.strip().splitlines()
        assert first.startswith("Error: "), self
        assert rest in ([], ["(set HYDRA_FULL_ERROR=1 for the stack trace)"]), self
        return first


Run = Callable[..., Outcome]


def run_cli(*arguments: str, stdin: str = "") -> Outcome:
    """The console entry in this process, in the working directory."""
    out, err = io.StringIO(), io.StringIO()
    with _nothing_left_behind(), redirect_stdout(out), redirect_stderr(err):
        sys.argv = ["lkspec", *arguments]
        sys.stdin = io.StringIO(stdin)
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 0 if exit_.code is None else 1
    return Outcome(code, out.getvalue(), err.getvalue())


@contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """Restores what a process owns only once and an entry point changes."""
    root = logging.getLogger()
    handlers, level, environment = root.handlers[:], root.level, dict(os.environ)
    singletons, path, argv, stdin = Singleton.get_state(), sys.path[:], sys.argv, sys.stdin
    modules = set(sys.modules)
    GlobalHydra.instance().clear()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        root.handlers[:], sys.path[:], sys.argv, sys.stdin = handlers, path, argv, stdin
        root.setLevel(level)
        os.environ.clear()
        os.environ.update(environment)
        GlobalHydra.instance().clear()
        Singleton.set_state(singletons)
        for name in set(sys.modules) - modules:
            if _lies_in(sys.modules[name], Path.cwd()):  # a user's own classes: another test has others
                del sys.modules[name]


def _lies_in(module: object, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).is_relative_to(folder)


def run_process(command: Sequence[str], *, cwd: Path, python_path: str | None = None, timeout: float = 600) -> Outcome:
    """A command in a process of its own, which Lightning must not take for one of several ranks."""
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", **({"PYTHONPATH": python_path} if python_path else {})}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["lightning.pytorch", "transformers", "hydra.main", "tensorboard", "pandas"])


def subprocess_cli(*arguments: str, cwd: Path) -> Outcome:
    """The console entry in a process of its own, forked from one that has imported the large packages."""
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _PROCESSES.Process(target=_console_entry, args=(arguments, cwd, dict(os.environ), out, err))
        process.start()
        process.join(600)
        with suppress(ProcessLookupError):  # it, and the data workers that a killed run leaves behind
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode is not None
        return Outcome(process.exitcode, out.read_text(), err.read_text())


def _console_entry(arguments: Sequence[str], cwd: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = ["lkspec", *arguments]
    try:
        cli.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def only_run(root: Path = Path("runs")) -> Path:
    """The one run folder there is."""
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    assert len(folders) == 1, folders
    return folders[0]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint's."""
    checkpoint = RunFolder(run).last_checkpoint
    assert checkpoint is not None
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def logged(run: Path, name: str) -> dict[int, float]:
    """Step -> value of a metric that ``logger=csv`` wrote."""
    with (run / "csv" / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def assert_same_training(first: Path, second: Path, *, atol: float, from_step: int = 0) -> None:
    """Losses (of two runs with ``logger=csv``) from a step on, and final weights, are equal up to ``atol``."""
    expected = {step: loss for step, loss in logged(first, "train/loss").items() if step >= from_step}
    losses = logged(second, "train/loss")
    assert list(losses) == list(expected)
    assert len(losses) > 1
    difference = max(abs(loss - expected[step]) for step, loss in losses.items())
    assert difference <= atol, f"losses differ by {difference}"
    others = weights(second)
    for name, value in weights(first).items():
        torch.testing.assert_close(value, others[name], atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
