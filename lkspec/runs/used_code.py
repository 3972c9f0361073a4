"""Which code a run used: a hash of those definitions that some classes and functions reach, directly or not.

A run is reused only while the code behind its numbers is the same. Hashing whole files would call every run of ``kl``
stale as soon as a new objective is added beside it; so the names that a definition mentions are followed, within its
file and through imports, and only what is reached counts. Comments, docstrings and layout do not: what is hashed is the
syntax tree without them.

What is reached by a name that is only made at run time (``getattr`` with a computed string) is not seen.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parents[1]
_INSTALLED = tuple(
    Path(sysconfig.get_paths()[key]).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib")
)  # where other people's code lies


def used_code(names: Iterable[str], *, without: Collection[str] = ()) -> dict[str, str]:
    """``module -> 8 hex digits`` over the definitions in it that are used.

    Args:
        names: dotted names of classes and functions to begin with; those of other people's packages add nothing.
        without: modules and packages that are not followed, because something else stands for them.
    """
    reached: dict[str, set[str]] = {}
    waiting = [_place(name) for name in names]
    while waiting:
        module, name = waiting.pop()
        if _excluded(module, without) or _read(module) is None or name in reached.get(module, ()):
            continue
        reached.setdefault(module, set()).add(name)
        waiting.extend(_leads_to(module, name))
    return {module: _digest(module, frozenset(used)) for module, used in sorted(reached.items())}


def _place(dotted: str) -> tuple[str, str]:
    """Splits ``package.module.Name``; a class inside a class counts as its outer one."""
    parts = dotted.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        if _file(module) is not None:
            return module, parts[end]
    return parts[0], parts[-1]  # other people's


def _excluded(module: str, without: Collection[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in without)


@dataclass(frozen=True)
class _Source:
    """A module: its definitions by name, what its imports are called here, and statements that always run."""

    module: str
    definitions: dict[str, list[ast.stmt]]
    imports: dict[str, tuple[str, str | None]]
    always: list[ast.stmt]

    def statements(self, name: str) -> list[ast.stmt]:
        return [*self.definitions.get(name, []), *self.always]

    def leads_to(self, name: str) -> Iterator[tuple[str, str]]:
        """(module, name) of everything that a definition mentions."""
        mentioned = {node.id for node in _nodes(self.statements(name)) if isinstance(node, ast.Name)}
        for other in mentioned | {name}:  # the name itself may be imported, for others to import it from here
            if other in self.definitions and other != name:
                yield self.module, other
            elif other in self.imports:
                yield from self._imported(*self.imports[other])

    def _imported(self, module: str, name: str | None) -> Iterator[tuple[str, str]]:
        if name is not None and _file(f"{module}.{name}") is None:
            yield module, name
            return
        whole = module if name is None else f"{module}.{name}"
        source = _read(whole)
        if source is not None:  # `module.function` may mean any of them
            yield from ((whole, defined) for defined in source.definitions)


@functools.cache
def _leads_to(module: str, name: str) -> tuple[tuple[str, str], ...]:
    """``_Source.leads_to``, walked once for all jobs of a process."""
    source = _read(module)
    assert source is not None
    return tuple(source.leads_to(name))


@functools.cache
def _read(module: str) -> _Source | None:
    """A module of ours; None for other people's."""
    file = _file(module)
    if file is None:
        return None
    tree = ast.parse(file.read_text(encoding="utf-8"))
    definitions: dict[str, list[ast.stmt]] = {}
    always = []
    for statement in tree.body:
        names = list(_defined(statement))
        for name in names:
            definitions.setdefault(name, []).append(statement)
        if not names and not isinstance(statement, ast.Import | ast.ImportFrom) and not _is_text(statement):
            always.append(statement)
    imports = dict(_imports(tree, module, is_package=file.name == "__init__.py"))
    return _Source(module, definitions, imports, always)


def _defined(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def _imports(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """What each imported name stands for: (module, None) or (module, name in it); those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], (alias.name, None)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")
            kept = len(parents) - node.level + is_package
            base = ".".join([*(parents[:kept] if node.level else []), *([node.module] if node.module else [])])
            for alias in node.names:
                yield alias.asname or alias.name, (base, alias.name)


@functools.cache
def _file(module: str) -> Path | None:
    """The source file of a module that is ours: of this package, or not among what is installed.

    Found by its path, since the import system would import the packages above it.
    """
    top, *rest = module.split(".")
    spec = find_spec(top)
    if spec is None or spec.origin is None or not _is_ours(Path(spec.origin)):
        return None
    folder = Path(spec.origin).parent if spec.submodule_search_locations else None
    if not rest or folder is None:
        return None if rest else Path(spec.origin)
    place = folder.joinpath(*rest)
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def _is_ours(file: Path) -> bool:
    if not file.is_file():  # built in, frozen
        return False
    return file.is_relative_to(_PACKAGE) or not any(file.resolve().is_relative_to(folder) for folder in _INSTALLED)


@functools.cache
def _digest(module: str, names: frozenset[str]) -> str:
    source = _read(module)
    assert source is not None
    used = {name: [_plain(s) for s in source.definitions[name]] for name in names if name in source.definitions}
    content = json.dumps([used, [_plain(statement) for statement in source.always]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def _nodes(statements: Iterable[ast.stmt]) -> Iterator[ast.AST]:
    for statement in statements:
        yield from ast.walk(statement)


def _plain(node: Any) -> Any:
    """A syntax tree as plain data, without docstrings and empty fields (which differ between versions of Python)."""
    if isinstance(node, ast.AST):
        fields = {name: _plain(value) for name, value in ast.iter_fields(node) if value not in (None, [])}
        return {"": type(node).__name__, **fields}
    if isinstance(node, list):
        return [_plain(entry) for entry in node if not _is_text(entry)]
    return node if isinstance(node, str | int | float | bool) else repr(node)


def _is_text(node: Any) -> bool:
    """Whether a statement is a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
