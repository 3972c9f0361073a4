"""What every entry point shares: where the configuration lies, how bad input is reported.

The packaged ``conf`` folder is found both in a checkout and in an installed wheel. ``./conf`` of the working directory
is on Hydra's search path and the working directory is importable, so that a user's own draft, loss or benchmark is two
files (a class and a yaml) in a folder of their own.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.errors import InstantiationException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf

from lkspec.app import sweeps

log = logging.getLogger(__name__)


def config_dir() -> Path:
    """The packaged configuration: inside the wheel, or at the root of a checkout."""
    packaged = Path(__file__).parents[1] / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "conf"


def target_name(target: DictConfig) -> str:
    """What results call a configured target, known before it is built: its ``name``, else the last part of its path."""
    path = target.get("path")
    return str(target.get("name") or (Path(path).name if path else target._target_.rpartition(".")[2]))


OmegaConf.register_new_resolver("target_name", target_name, replace=True)


class WorkingDirectorySearchPath(SearchPathPlugin):
    """Puts ``./conf`` behind the packaged configuration."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        local = Path.cwd() / "conf"
        if local.is_dir() and local.resolve() != config_dir().resolve():
            search_path.append(provider="working-directory", path=f"file://{local}")


_FIXED_BY_RUN = re.compile(r"[+~]*(draft|target|vocab|data|loss)\b(?!_)")


def entry_point(
    config_name: str, *, fixed_by_run: bool = False
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Makes a Hydra application of a function, with ``./conf`` searched and user errors printed in one line.

    ``fixed_by_run``: the application reads a finished run, whose draft, target, vocabulary, data and loss are given; a
    checkpoint (``draft=pretrained``) brings its draft and is told its target.
    """

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], None]:
        task = _Task(function)

        @functools.wraps(function)
        def main() -> None:
            sys.path.insert(0, os.getcwd())
            Plugins.instance().register(WorkingDirectorySearchPath)
            if fixed_by_run and "draft=pretrained" not in sys.argv:
                _refuse_fixed(sys.argv[1:])
            # Our launchers stand in place of their plugins' own, and fit the same schema.
            warnings.filterwarnings("ignore", message="(?s).*validated against ConfigStore schema with the same name")
            application = hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config_name)(task)
            interrupted = True
            try:
                application()
                interrupted = False
            finally:
                if status := sweeps.finish(interrupted=interrupted):
                    sys.exit(status)

        main.task = task  # type: ignore[attr-defined]
        return main

    return decorate


class _Task:
    """What Hydra calls: a function whose errors are reported, as a launcher's other processes can import it.

    Pickled by its place: by its content it would take along all that its module holds, which runs as ``__main__``.
    """

    def __init__(self, function: Callable[[DictConfig], Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        spec = function.__globals__["__spec__"]
        self.__module__ = function.__module__ if spec is None else spec.name

    def __call__(self, config: DictConfig) -> Any:
        quiet_libraries()
        if config.get("journal") is not None:  # a job of a sweep
            return sweeps.Sweep.of(config).run_job(functools.partial(self._function, config), _users_mistake)
        try:
            return self._function(config)
        except Exception as error:
            _exit_with(error)

    def __reduce__(self) -> tuple[Callable[[str, str], Any], tuple[str, str]]:
        return _task_at, (self.__module__, self._function.__name__)


def _task_at(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name).task


def _refuse_fixed(arguments: list[str]) -> None:
    for argument in arguments:
        if "=" in argument and (match := _FIXED_BY_RUN.match(argument.partition("=")[0])):
            print(
                f"Error: {argument}: the {match[1]} of a finished run is the one it was trained with and cannot be "
                "overridden; train another run, or leave it out (device=... and dtype=... may be set)",
                file=sys.stderr,
            )
            sys.exit(2)


def instantiate(config: DictConfig, *arguments: Any, **named: Any) -> Any:
    """Hydra's instantiate, with plain lists and dicts for the classes it builds.

    Objects are given to a partial: Hydra would take dataclasses among them for configurations.

    Raises:
        ValueError: an argument that the class does not take.
    """
    made = hydra.utils.instantiate(config, _convert_="all", **({"_partial_": True} if arguments or named else {}))
    if not isinstance(made, functools.partial):
        return made
    try:
        inspect.signature(made.func).bind_partial(*made.args, *arguments, **made.keywords, **named)
    except TypeError as error:
        raise ValueError(f"{config._target_}: {error}") from error
    return made(*arguments, **named) if arguments or named else made


def resolved(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain data, interpolations resolved."""
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def quiet_libraries() -> None:
    """Hides progress bars and notices of libraries that say nothing about the user's run."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("tensorboard", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated.*")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # resumed, as meant
    warnings.filterwarnings("ignore", message="The dirpath has changed")  # the run folder was moved
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # what is logged is summed over ranks already
    warnings.filterwarnings("ignore", message=".*ModelCheckpoint with manual optimization.*")  # after a step, as meant
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight.*")  # norms under bf16-mixed


def _users_mistake(error: Exception) -> str | None:
    """One line about what a user did wrong; None for other errors."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value yet: give one as {error.full_key}=..."
    cause = error
    while isinstance(cause, InstantiationException) and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    return str(cause) if isinstance(cause, ValueError) or isinstance(error, InstantiationException) else None


def _exit_with(error: Exception) -> None:
    """Prints what a user did wrong without a stack trace (``HYDRA_FULL_ERROR=1`` shows it)."""
    mistake = _users_mistake(error)
    if mistake is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    print(f"Error: {mistake}\n(set HYDRA_FULL_ERROR=1 for the stack trace)", file=sys.stderr)
    sys.exit(2)
