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
import string
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import InterpolationKeyError

from lkspec.app import sweeps
from lkspec.app.overrides import Composition, refuse_fixed
from lkspec.app.values import check_arguments

_VERSION = "1.3"  # of Hydra's defaults
_OF_A_RUN = ("evaluate", "walk", "throughput", "export", "show")  # verbs that read a finished run


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


def launch(verb: str, arguments: Sequence[str]) -> None:
    """Composes the configuration of a verb and runs it, once or as a sweep; a user's mistake is said in a line.

    Nothing heavy is imported before the configuration is known to be composed as it was meant.
    """
    sys.path.insert(0, os.getcwd())
    Plugins.instance().register(WorkingDirectorySearchPath)
    # Our launchers stand in place of their plugins' own, and fit the same schema.
    warnings.filterwarnings("ignore", message="(?s).*validated against ConfigStore schema with the same name")
    options = get_args_parser().parse_args(arguments)
    known = {"help", "run", "multirun", "overrides"}
    if any(value for name, value in vars(options).items() if name not in known):  # --cfg and the like only show
        sys.argv = [sys.argv[0], *arguments]
        hydra.main(version_base=_VERSION, config_path=str(config_dir()), config_name=verb)(Task(verb))()
        return
    with hydra.initialize_config_dir(str(config_dir()), job_name=verb, version_base=_VERSION):
        application = GlobalHydra.instance().hydra
        assert application is not None
        try:
            if verb in _OF_A_RUN:
                refuse_fixed(options.overrides)
            composition = Composition(application, verb, options.overrides)
            if options.help:
                print(_help(composition))
                return
            composition.refuse_missing()
            is_sweep = options.multirun or composition.config.hydra.mode == RunMode.MULTIRUN
            _start(application.multirun if is_sweep else application.run, verb, options.overrides)
        except (HydraException, ValueError) as error:
            _exit_with(error)


def _start(run: Callable[..., Any], verb: str, overrides: list[str]) -> None:
    interrupted = True
    try:
        run(config_name=verb, task_function=Task(verb), overrides=overrides)
        interrupted = False
    finally:
        if status := sweeps.finish(interrupted=interrupted):
            sys.exit(status)


def _help(composition: Composition) -> str:
    """The help text of a configuration (``hydra.help.template``), with all groups, choices and keys."""
    groups = "".join(f"{group}: {', '.join(composition.options(group))}\n" for group in composition.groups())
    template = string.Template(composition.config.hydra.help.template)
    return template.substitute(APP_CONFIG_GROUPS=groups, CONFIG=OmegaConf.to_yaml(composition.own))


@dataclass(frozen=True)
class Task:
    """What Hydra calls with a composed configuration: a verb. Launchers send it to other processes."""

    verb: str

    def __call__(self, config: DictConfig) -> Any:
        if config.get("journal") is not None:  # a job of a sweep
            return sweeps.Sweep.of(config).run_job(functools.partial(self._run, config), _users_mistake)
        try:
            self._find_run(config)
        except ValueError as error:
            _exit_with(error)
        try:
            return self._run(config)
        except Exception as error:
            _exit_with(error, "\n(set HYDRA_FULL_ERROR=1 for the stack trace)")

    def _find_run(self, config: DictConfig) -> None:
        """Refuses a run that is not there before anything heavy is imported."""
        from lkspec.runs.find import find_run  # here: help and typing errors do without

        if self.verb in _OF_A_RUN and config.run is None and config.get("draft") is None:
            raise ValueError(
                "run has no value yet: give one as run=... (latest, the beginning of a name, or a path), or a "
                "checkpoint as draft=pretrained draft.path=... target=..."
            )
        for key in ("run", "resume"):
            if config.get(key) is not None:
                find_run(config[key], Path(config.run_root))

    def _run(self, config: DictConfig) -> Any:
        quiet_libraries()
        check_arguments(config)
        return importlib.import_module(f"lkspec.commands.{self.verb}").main(config)


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
    if isinstance(error, OverrideParseException):
        return f"{error.override}: expected key=value ({' '.join(error.message.partition('See')[0].split())})"
    if isinstance(error, InterpolationKeyError):
        return f"{error.full_key}: {str(error).splitlines()[0]}"
    if isinstance(error, HydraException) and not isinstance(error, InstantiationException):
        return " ".join(f"{error} {error.__cause__ or ''}".split())
    cause = error
    while isinstance(cause, InstantiationException) and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    return str(cause) if isinstance(cause, ValueError) or isinstance(error, InstantiationException) else None


def _exit_with(error: Exception, hint: str = "") -> NoReturn:
    """Prints what a user did wrong without a stack trace (``HYDRA_FULL_ERROR=1`` shows it)."""
    mistake = _users_mistake(error)
    if mistake is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    print(f"Error: {mistake}{hint}", file=sys.stderr)
    sys.exit(2)
