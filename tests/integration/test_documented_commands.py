"""Every command that the README and the help texts show is legal: it parses and its configuration composes."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from string import Template

import pytest
import yaml
from command_line import REPOSITORY
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.singleton import Singleton
from omegaconf import OmegaConf

from lkspec.app.application import config_dir
from lkspec.cli import VERBS

README_FILES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("experiments/*/README.md"))]
ENTRY_FILES = sorted(path for path in (REPOSITORY / "conf").glob("*.yaml"))
FIXED_BY_RUN = dict.fromkeys(
    ("evaluate", "walk", "throughput", "show", "export"), ("draft", "target", "vocab", "data", "loss")
)


def commands_in(text: str) -> Iterator[str]:
    """Lines that call ``lkspec``, also behind a pipe, a prompt or variables; remarks after two spaces are cut off."""
    for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
        match = re.match(r"\s*(?:\$ |[A-Z_]+=\S+ |[^|`]*\| )*(lkspec [a-z]+(?: .*)?)$", line)
        if match:
            yield re.split(r"\s{2,}", match[1].partition(" #")[0])[0].strip()


def code_blocks(markdown: str) -> str:
    """The fenced blocks, and commands in the running text."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", markdown, flags=re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`(lkspec [^`]+)`", re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE))
    return "\n".join([*fenced, *inline])


def with_variables(text: str) -> str:
    """The text with the shell variables that its own ``export`` lines set."""
    variables: dict[str, str] = {}
    for line in re.findall(r"^export (.*)$", text, flags=re.MULTILINE):
        for name, value in (word.split("=", 1) for word in shlex.split(line, comments=True)):
            variables[name] = Template(value).safe_substitute(variables)
    return Template(text).safe_substitute(variables)


def documented() -> list[tuple[str, str]]:
    """(where, command) of each."""
    found = []
    for file in README_FILES:
        text = with_variables(code_blocks(file.read_text()))
        found += [(file.relative_to(REPOSITORY).as_posix(), command) for command in commands_in(text)]
    for file in ENTRY_FILES:
        template = yaml.safe_load(file.read_text())["hydra"]["help"]["template"]
        found += [(f"conf/{file.name}", c) for c in commands_in(template)]
    return [(where, command) for where, command in found if "VERB" not in command and not made_up(command)]


def made_up(command: str) -> bool:
    """Whether it names the reader's own class, which the README shows how to write."""
    return "loss=squared_tv" in command


COMMANDS = documented()


@pytest.mark.parametrize("file", ENTRY_FILES, ids=[file.stem for file in ENTRY_FILES])
def test_every_help_text_shows_commands_of_its_own_verb(file):
    own = [command for where, command in COMMANDS if where == f"conf/{file.name}"]
    assert own
    assert {command.split()[1] for command in own} == {file.stem}


@pytest.mark.parametrize(("where", "command"), COMMANDS, ids=[f"{where}: {command}" for where, command in COMMANDS])
def test_a_documented_command_is_legal(where, command):
    _, verb, *arguments = shlex.split(command)
    assert verb in VERBS
    flags = {argument for argument in arguments if argument.startswith("-")}
    assert flags <= {"-m", "--multirun", "--help", "--cfg"}
    parsed = OverridesParser.create().parse_overrides([a for a in arguments if a not in flags])
    for override in parsed:
        fixed = re.match(r"[a-z_]+", override.key_or_group)
        of_run = () if "draft=pretrained" in arguments else FIXED_BY_RUN.get(verb, ())
        assert fixed is None or fixed[0] not in of_run, f"{verb} refuses {override.input_line}"
    sweeps = [override for override in parsed if override.is_sweep_override()]
    assert not sweeps or flags & {"-m", "--multirun"}, "several values need -m"
    missing = missing_keys(verb, *sorted(first_of(override) for override in parsed))
    assert not missing, f"{verb} needs {sorted(missing)}"


@functools.cache
def missing_keys(verb: str, *overrides: str) -> set[str]:
    """Composes and resolves a verb's configuration; returns the keys without a value."""
    state = Singleton.get_state()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            config = compose(verb, overrides=list(overrides), return_hydra_config=True)
            HydraConfig.instance().set_config(config)
            return OmegaConf.missing_keys(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
    finally:
        Singleton.set_state(state)


def first_of(override: Override) -> str:
    """The override, with the first value in place of several; file names, which decide nothing here, are one name."""
    line = str(override.input_line)
    if override.is_sweep_override():
        line = f"{override.key_or_group}={next(iter(override.sweep_string_iterator()))}"
    return re.sub(r"^(run|runs|out|prompts|prompt_file|answers|data\.train|target\.path|draft\.path)=.*", r"\1=x", line)


def test_the_commands_are_found_as_people_write_them():
    text = """
    lkspec train -m loss=kl,tv seed=0,1    a sweep
    $ lkspec show run=latest prompt_file=q.txt  # a remark
    echo "Why?" | lkspec show run=latest prompt_file=-
    lkspec train \\
        draft=eagle3
    lkspec train: a title
    This line speaks of lkspec train and is none.
    """
    assert list(commands_in(text)) == [
        "lkspec train -m loss=kl,tv seed=0,1",
        "lkspec show run=latest prompt_file=q.txt",
        "lkspec show run=latest prompt_file=-",
        "lkspec train draft=eagle3",
    ]
    assert list(commands_in(code_blocks("Say `lkspec inspect` or\n```\nlkspec train seed=1\n```\n"))) == [
        "lkspec train seed=1",
        "lkspec inspect",
    ]


def test_every_verb_has_a_help_text_and_every_group_is_documented():
    assert {file.stem for file in ENTRY_FILES} == set(VERBS)
    for file in sorted(Path(config_dir()).rglob("*.yaml")):
        config = yaml.safe_load(file.read_text()) or {}
        target = config.get("_target_")
        assert target is None or re.fullmatch(r"(lkspec|lightning|torch|hydra_plugins)(\.\w+)+", target), file
