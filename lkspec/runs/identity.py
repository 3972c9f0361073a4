"""What besides its configuration a run's results depend on: its target, its data, and the code that it ran.

Code is hashed file by file, over the syntax tree without docstrings: comments and layout do not count. The files are
those that the run's own classes reach by their imports, so a new draft or objective changes nothing for other runs.
There are two groups, since measuring again is cheap and training again is not.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

from lkspec.runs.keys import Kind, kind

_PACKAGE = Path(__file__).parents[1]
_INSTALLED = tuple(Path(sysconfig.get_paths()[key]).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib"))
_TRAIN = ("nn", "training", "targets", "data", "vocab", "types", "losses", "drafts")
_MEASURE = ("decoding", "measure", "benchmarks")
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_ALWAYS = ("lkspec.training.module", "lkspec.data.captured", "lkspec.targets.memory")


@dataclass(frozen=True)
class Identity:
    """What a run was made from and by.

    Attributes:
        target, data: fingerprints.
        trained_by, measured_by: file -> hash of its code.
    """

    target: str
    data: str
    trained_by: Mapping[str, str]
    measured_by: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as identity.json holds it."""
        return asdict(self)

    def training_changes(self, recorded: Mapping[str, Any] | None) -> list[str]:
        """What would train another draft than the recorded identity's, in words; nothing where it is the same."""
        if recorded is None:
            return ["no identity was recorded"]
        changed = [name for name in ("target", "data") if getattr(self, name) != recorded[name]]
        return changed + _changed_files(self.trained_by, recorded["trained_by"])

    def measuring_changes(self, recorded: Mapping[str, Any]) -> list[str]:
        """The files that measure otherwise now than when the recorded rows were made."""
        return _changed_files(self.measured_by, recorded["measured_by"])


def _changed_files(now: Mapping[str, str], then: Mapping[str, str]) -> list[str]:
    return [f"code {file}" for file in sorted({*now, *then}) if now.get(file) != then.get(file)]


def trained_by(config: Mapping[str, Any]) -> dict[str, str]:
    """``file -> 8 hex digits`` over the code that trains a resolved configuration, classes of the user included."""
    chosen = {key: value for key, value in config.items() if kind(key) == Kind.TRAINED}
    return _reached([*_ALWAYS, *_modules(chosen)], _TRAIN)


def measured_by(config: Mapping[str, Any]) -> dict[str, str]:
    """The same for decoding, the walk and the benchmarks of a configuration."""
    always = [f"lkspec.{room}.{file.stem}" for room in _MEASURE[:2] for file in (_PACKAGE / room).glob("*.py")]
    return _reached([*always, *_modules(config.get("benchmark") or {})], _MEASURE)


def code_hash(hashes: Mapping[str, str]) -> str:
    """8 hex digits for a whole group, for rows and captions."""
    return hashlib.sha256("".join(f"{file} {hashes[file]}\n" for file in sorted(hashes)).encode()).hexdigest()[:8]


def _modules(config: Any) -> Iterator[str]:
    """The modules of all classes that a configuration names."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key == "_target_":
                yield str(value).rpartition(".")[0]
            yield from _modules(value)


def _reached(modules: Iterable[str], rooms: Collection[str]) -> dict[str, str]:
    """The files behind modules and their imports: of some rooms of this package, and of the user's own modules."""
    hashes: dict[str, str] = {}
    waiting, seen = list(modules), set()
    while waiting:
        name = waiting.pop()
        top, *rest = name.split(".")
        if name in seen or (top == "lkspec" and (not rest or rest[0] not in rooms)):
            continue
        seen.add(name)
        if (file := _file(name)) is not None and file.stat().st_size > 0:
            inside = "/__init__" if file.name == "__init__.py" else ""
            hashes[f"{name.replace('.', '/')}{inside}.py"], imports = _read(file, name)
            waiting += imports
    return hashes


@functools.cache
def _read(file: Path, module: str) -> tuple[str, tuple[str, ...]]:
    """The hash of a file's code, and the modules that it may import (also names that are no modules)."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    imports: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else str(node.module)
            imports += [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, _Documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:8], tuple(imports)


@functools.cache
def _file(module: str) -> Path | None:
    """The source of a module of ours or the user's, found by its path; None for installed ones and other names."""
    top, *rest = module.split(".")
    spec = find_spec(top)
    if spec is None or spec.origin is None or not (origin := Path(spec.origin)).is_file():
        return None
    if top != "lkspec" and any(origin.resolve().is_relative_to(folder) for folder in _INSTALLED):
        return None
    if not spec.submodule_search_locations:
        return None if rest else origin
    place = origin.parent.joinpath(*rest)
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)
