"""The hashes of the code behind a run change with that code, and with nothing else."""

from __future__ import annotations

import json
import sys

import pytest

from lkspec.runs import identity as module
from lkspec.runs.identity import Identity, code_hash, measured_by, trained_by

FILES = {
    "mine/__init__.py": "",
    "mine/objective.py": '''"""An objective."""
import torch
from mine.helpers import scaled
from mine import tables

class Mine:
    """Doc."""
    def values(self, x):
        return scaled(x) + tables.one()  # a remark
''',
    "mine/helpers.py": "def scaled(x):\n    return x * 3\n",
    "mine/tables.py": "def one():\n    from .late import number\n    return number\n",
    "mine/late.py": "number = 1\n",
    "mine/other.py": "x = 1\n",
}
CONFIG = {
    "draft": {"_target_": "lkspec.drafts.mlp.MLPSpeculator"},
    "loss": {"_target_": "lkspec.losses.objectives.KL"},
    "optimizer": {"_target_": "torch.optim.AdamW"},
    "target": {"_target_": "lkspec.targets.tiny.TinyTarget"},
    "data": {"_target_": "lkspec.data.datamodule.SpeculatorDataModule"},
    "benchmark": {"mini_math": {"_target_": "lkspec.benchmarks.mini.Mini"}, "num_prompts": 3},
    "callbacks": {"progress": {"_target_": "lkspec.training.callbacks.TrainingProgress"}, "acceptance_length": None},
}


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """``changed(file, old, new)``: the files whose hash a replacement changes."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    def hashes() -> dict[str, str]:
        module._read.cache_clear()
        module._file.cache_clear()
        return trained_by({"loss": {"_target_": "lkspec.losses.x.Y", "base": {"_target_": "mine.objective.Mine"}}})

    def replaced(name: str, old: str, new: str) -> set[str]:
        before, text = hashes(), (tmp_path / name).read_text()
        assert old in text
        (tmp_path / name).write_text(text.replace(old, new))
        after = hashes()
        return {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)}

    yield replaced
    module._read.cache_clear()
    module._file.cache_clear()
    assert "mine" not in sys.modules, "looking at code imported it"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("mine/objective.py", "scaled(x) +", "scaled(x) -"),
        ("mine/helpers.py", "x * 3", "x * 4"),
        ("mine/tables.py", "return number", "return -number"),
        ("mine/late.py", "number = 1", "number = 7"),
    ],
    ids=["the class", "what it imports", "a module out of its package", "an import inside a function"],
)
def test_what_a_class_imports_counts(changed, file, old, new):
    assert changed(file, old, new) == {file}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("mine/objective.py", "# a remark", "# another"),
        ("mine/objective.py", '"""Doc."""', '"""Other words."""'),
        ("mine/objective.py", "scaled(x) + tables", "(scaled(x)  +  tables"),
        ("mine/other.py", "x = 1", "x = 2"),
    ],
    ids=["a remark", "a docstring", "layout", "a file that nothing imports"],
)
def test_other_text_and_other_files_do_not(changed, file, old, new):
    if "(scaled" in new:
        old, new = f"{old}.one()", f"{new}.one())"
    assert changed(file, old, new) == set()


def test_a_run_is_trained_by_what_it_chose_and_what_all_share():
    files = set(trained_by(CONFIG))
    shared = {"types", "vocab", "training/module", "losses/objectives", "drafts/base", "nn/kv_cache", "data/dataset"}
    assert {f"lkspec/{name}.py" for name in shared | {"drafts/mlp", "targets/tiny"}} <= files
    others = ("lkspec/drafts/eagle3", "lkspec/drafts/medusa", "lkspec/targets/smollm2")
    assert not [file for file in files if file.startswith(others)]
    rooms = {file.split("/")[1].removesuffix(".py") for file in files}
    assert rooms == {"nn", "training", "targets", "data", "vocab", "types", "losses", "drafts"}


def test_a_run_is_measured_by_decoding_and_its_benchmarks():
    files = set(measured_by(CONFIG))
    assert {"lkspec/decoding/chain.py", "lkspec/decoding/walk.py", "lkspec/benchmarks/mini.py"} <= files
    assert "lkspec/benchmarks/gsm8k.py" not in files
    assert {file.split("/")[1] for file in files} == {"decoding", "measure", "benchmarks"}


def test_changes_are_named_apart():
    one = Identity("t", "d", {"a.py": "1", "b.py": "2"}, {"m.py": "1"})
    other = Identity("t", "e", {"a.py": "1", "b.py": "3", "c.py": "4"}, {"m.py": "2"})
    recorded = json.loads(json.dumps(one.as_dict()))
    assert one.training_changes(recorded) == one.measuring_changes(recorded) == []
    assert other.training_changes(recorded) == ["data", "code b.py", "code c.py"]
    assert one.training_changes(other.as_dict()) == ["data", "code b.py", "code c.py"]
    assert other.measuring_changes(recorded) == ["code m.py"]
    assert one.training_changes(None) == ["no identity was recorded"]


def test_one_hash_for_all_files():
    assert code_hash({"a.py": "1", "b.py": "2"}) == code_hash({"b.py": "2", "a.py": "1"})
    assert len({code_hash(files) for files in ({}, {"a.py": "1"}, {"a.py": "2"}, {"b.py": "1"})}) == 4
