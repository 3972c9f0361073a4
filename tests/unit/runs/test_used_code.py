"""The hash of the code that a class reaches changes with it, and with nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lkspec.runs import used_code as module
from lkspec.runs.used_code import used_code

FILES = {
    "mine/__init__.py": "",
    "mine/objective.py": '''"""An objective."""
import torch
from mine.helpers import scaled
from mine import tables
from . import unused

SCALE = 2

class Base:
    pass

class Mine(Base):
    """Doc."""
    def values(self, x):
        return scaled(x) * SCALE + tables.one()  # a remark

class Other(Base):
    def values(self, x):
        return x
''',
    "mine/helpers.py": """
def scaled(x):
    return _inner(x)

def _inner(x):
    return x * 3

def unrelated(x):
    return x

print("always runs")
""",
    "mine/tables.py": """
def one():
    from mine.late import number
    return number
""",
    "mine/late.py": "number = 1\nnot_it = 2\n",
    "mine/unused.py": "x = 1\n",
}


@pytest.fixture
def hashes(tmp_path, monkeypatch):
    """``hashes(file, old, new)``: the modules whose hash a replacement in a file changes."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    def measured() -> dict[str, str]:
        for cache in (module._read, module._file, module._leads_to, module._digest):
            cache.cache_clear()
        return used_code(["mine.objective.Mine"])

    def changed(name: str, old: str, new: str) -> set[str]:
        before = measured()
        text = (tmp_path / name).read_text()
        assert old in text
        (tmp_path / name).write_text(text.replace(old, new))
        after = measured()
        (tmp_path / name).write_text(text)
        assert measured() == before
        return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}

    yield changed
    for cache in (module._read, module._file, module._leads_to, module._digest):
        cache.cache_clear()
    assert "mine" not in sys.modules, "looking at code imported it"


REACHED = {
    "the class": ("mine/objective.py", "* SCALE", "/ SCALE", "mine.objective"),
    "its base": ("mine/objective.py", "pass", "x = 1", "mine.objective"),
    "a constant": ("mine/objective.py", "SCALE = 2", "SCALE = 3", "mine.objective"),
    "a function of another module": ("mine/helpers.py", "_inner(x)\n", "_inner(x) + 1\n", "mine.helpers"),
    "what that calls": ("mine/helpers.py", "x * 3", "x * 4", "mine.helpers"),
    "a statement that always runs": ("mine/helpers.py", "always", "sometimes", "mine.helpers"),
    "a module's attribute": ("mine/tables.py", "return number", "return -number", "mine.tables"),
    "an import inside a function": ("mine/late.py", "number = 1", "number = 7", "mine.late"),
}


@pytest.mark.parametrize(("file", "old", "new", "changed"), REACHED.values(), ids=REACHED)
def test_what_is_reached_counts(hashes, file, old, new, changed):
    assert hashes(file, old, new) == {changed}


IGNORED = {
    "a remark": ("mine/objective.py", "# a remark", "# another"),
    "a docstring": ("mine/objective.py", '"""Doc."""', '"""Other words."""'),
    "layout": ("mine/objective.py", "scaled(x) * SCALE", "(scaled(x)  *  SCALE)"),
    "another class beside it": ("mine/objective.py", "        return x\n", "        return -x\n"),
    "another function of a used module": ("mine/helpers.py", "    return x\n", "    return -x\n"),
    "another constant of a used module": ("mine/late.py", "not_it = 2", "not_it = 3"),
    "a module that is imported but not used": ("mine/unused.py", "x = 1", "x = 2"),
}


@pytest.mark.parametrize(("file", "old", "new"), IGNORED.values(), ids=IGNORED)
def test_what_is_not_reached_does_not(hashes, file, old, new):
    assert hashes(file, old, new) == set()


def test_other_peoples_code_and_what_is_left_out_are_not_followed():
    assert used_code(["torch.optim.AdamW"]) == {}
    whole = used_code(["lkspec.drafts.mlp.MLPSpeculator"])
    assert {"lkspec.drafts.mlp", "lkspec.drafts.base", "lkspec.types"} <= whole.keys()
    assert not {name for name in whole if name.startswith(("torch", "lkspec.drafts.medusa", "lkspec.drafts.eagle3"))}
    part = used_code(["lkspec.drafts.mlp.MLPSpeculator"], without=("lkspec.drafts",))
    assert part == {}


def test_one_objective_does_not_make_the_others_stale():
    kl, tv = (used_code([f"lkspec.losses.objectives.{name}"]) for name in ("KL", "TV"))
    assert kl["lkspec.losses.objectives"] != tv["lkspec.losses.objectives"]
    assert {name: value for name, value in kl.items() if name != "lkspec.losses.objectives"} == {
        name: value for name, value in tv.items() if name != "lkspec.losses.objectives"
    }


def test_every_file_of_the_package_can_be_read():
    for file in Path(module.__file__).parents[1].rglob("*.py"):
        parts = file.relative_to(Path(module.__file__).parents[2]).with_suffix("").parts
        assert module._read(".".join(parts).removesuffix(".__init__")) is not None
