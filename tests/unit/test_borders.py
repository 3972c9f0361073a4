"""The borders between packages, read off the import statements (those inside functions included)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEAVES = {f"lkspec.{name}" for name in ("types", "vocab", "files")}
PROTOCOLS = {"lkspec.drafts.base", "lkspec.targets.base"}
PACKAGES = ("losses", "drafts", "targets", "data", "benchmarks", "decoding")
NOT_ARCHITECTURES = {f"lkspec.drafts{name}" for name in ("", ".base", ".layers")}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted((ROOT / "lkspec").rglob("*.py"))}


def imported(source: str, module: str, known: set[str], *, is_package: bool = False) -> set[str]:
    """Full names of the modules that a module's source imports; ``from package import module`` counts as the module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")
            kept = len(parents) - node.level + is_package
            base = ".".join([*(parents[:kept] if node.level else []), *([node.module] if node.module else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in known else base for name in inner}
    return found


def imports_of(module: str) -> set[str]:
    file = FILES[module]
    return imported(file.read_text(encoding="utf-8"), module, set(FILES), is_package=file.name == "__init__.py")


IMPORTS = {module: imports_of(module) for module in FILES}


def ours(module: str) -> set[str]:
    return {name for name in IMPORTS[module] if name.split(".")[0] == "lkspec"}


def libraries(module: str) -> set[str]:
    return {name.split(".")[0] for name in IMPORTS[module]} - {"lkspec"}


def within(package: str) -> list[str]:
    return [module for module in FILES if module == package or module.startswith(f"{package}.")]


def reached(module: str) -> Iterator[str]:
    """The module and everything of ours that importing it loads."""
    waiting, seen = [module], set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting.extend(ours(name))
            yield name


def test_every_form_of_import_is_found():
    source = """
import torch.nn as nn, lkspec.vocab
from lkspec.drafts import base, layers
from lkspec.types import Batch
from . import layers as near
from .base import Draft
from ..targets.base import Target
if TYPE_CHECKING:
    import hydra
def late():
    from lightning.pytorch import Trainer
"""
    known = {"lkspec.drafts.base", "lkspec.drafts.layers", "lkspec.types"}
    assert imported(source, "lkspec.drafts.eagle3", known) == {
        "torch.nn", "lkspec.vocab", "lkspec.drafts.base", "lkspec.drafts.layers", "lkspec.types",
        "lkspec.targets.base", "hydra", "lightning.pytorch",
    }  # fmt: skip
    assert imported("from .base import Draft", "lkspec.drafts", known, is_package=True) == {"lkspec.drafts.base"}


def test_the_modules_under_test_are_there():
    assert set(FILES) >= LEAVES | PROTOCOLS | NOT_ARCHITECTURES
    assert all(len(within(f"lkspec.{package}")) > 1 for package in (*PACKAGES, "nn", "app", "commands", "training"))


def test_few_modules_lie_flat():
    flat = {module for module in FILES if FILES[module].parent == ROOT / "lkspec"}
    assert flat == {"lkspec", "lkspec.cli", *LEAVES}


def test_imports_of_ours_lead_to_modules():
    assert {module: ours(module) - set(FILES) for module in FILES if ours(module) - set(FILES)} == {}


@pytest.mark.parametrize("module", sorted(LEAVES))
def test_leaves_import_nothing_of_ours(module):
    assert ours(module) == set()


def test_nn_imports_nothing_else_of_ours():
    assert set().union(*(ours(module) for module in within("lkspec.nn"))) <= LEAVES | set(within("lkspec.nn"))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_leaves_protocols_and_themselves_only(package):
    own = within(f"lkspec.{package}")
    allowed = LEAVES | PROTOCOLS | set(own) | set(within("lkspec.nn"))
    assert {module: ours(module) - allowed for module in own if ours(module) - allowed} == {}


def test_export_knows_drafts_and_how_they_are_decoded_but_nothing_of_training():
    own = set(within("lkspec.export"))
    below = {name for package in ("drafts", "decoding", "benchmarks") for name in within(f"lkspec.{package}")}
    allowed = LEAVES | PROTOCOLS | own | below | {"lkspec.targets.dims", "lkspec.runs.rows"}
    assert {module: ours(module) - allowed for module in own if ours(module) - allowed} == {}
    assert "lkspec.export.reading" in own


def test_only_commands_and_what_they_share_know_hydra():
    users = {module for module in FILES if libraries(module) & {"hydra", "omegaconf"}}
    assert users - set(within("lkspec.commands")) - set(within("lkspec.app")) == set()
    assert "lkspec.app.application" in users


def test_only_commands_import_what_they_share():
    app, commands = set(within("lkspec.app")), set(within("lkspec.commands"))
    users = {module for module in FILES if ours(module) & app}
    assert users - app - commands == {"lkspec.cli"}


def test_measuring_prints_nothing():
    for module in within("lkspec.measure"):
        assert not {name for name in IMPORTS[module] if name.split(".")[0] == "rich" or "lkspec.reporting" in name}
        calls = [node for node in ast.walk(ast.parse(FILES[module].read_text())) if isinstance(node, ast.Call)]
        assert "print" not in {node.func.id for node in calls if isinstance(node.func, ast.Name)}


def test_only_training_and_the_datamodule_know_lightning():
    users = {module for module in FILES if libraries(module) & {"lightning", "pytorch_lightning"}}
    assert users - set(within("lkspec.training")) - {"lkspec.data.datamodule"} == set()
    assert "lkspec.training.module" in users


@pytest.mark.parametrize("module", within("lkspec.benchmarks"))
def test_benchmarks_need_no_torch(module):
    assert {name for name in reached(module) if "torch" in libraries(name)} == set()


def test_no_architecture_imports_another():
    architectures = set(within("lkspec.drafts")) - NOT_ARCHITECTURES
    assert "lkspec.drafts.eagle3" in architectures
    for module in architectures:
        assert ours(module) & (architectures - {module}) == set()


def test_what_drafts_share_knows_no_architecture():
    architectures = set(within("lkspec.drafts")) - NOT_ARCHITECTURES
    assert all(ours(module) & architectures == set() for module in NOT_ARCHITECTURES)
