"""What a run is built of: trainers with the user's own callbacks, data and states shared by the jobs of a sweep."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
from omegaconf import OmegaConf

from lkspec.app.build import build_trainer, eta_source
from lkspec.runs.folder import RunFolder
from lkspec.training.callbacks import AcceptanceLength


class EarlyAcceptanceLength(AcceptanceLength):
    """A user's subclass, of another name and in another module."""


@pytest.fixture
def mine(monkeypatch) -> str:
    """The dotted name of the subclass in a module of the user's."""
    module = ModuleType("my_callbacks")
    module.Early = EarlyAcceptanceLength
    monkeypatch.setitem(sys.modules, "my_callbacks", module)
    return "my_callbacks.Early"


def trainer_config(callbacks: dict) -> object:
    trainer = {"_target_": "lightning.Trainer", "accelerator": "cpu", "precision": "32-true", "max_steps": 1}
    logger = {"csv": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "{run_dir}", "name": "csv"}}
    return OmegaConf.create({"trainer": trainer, "callbacks": callbacks, "logger": logger})


def test_a_subclass_of_acceptance_length_is_checked_like_it(tmp_path, mine):
    checked = []
    evaluation = SimpleNamespace(options=SimpleNamespace(check=checked.append))
    config = trainer_config({"mine": {"_target_": mine, "every_n_epochs": 2}, "off": None})
    trainer = build_trainer(config, RunFolder(tmp_path / "run"), evaluation, "the draft")
    assert any(isinstance(callback, EarlyAcceptanceLength) for callback in trainer.callbacks)
    assert checked == ["the draft"]
    build_trainer(trainer_config({"off": None}), RunFolder(tmp_path / "run"), evaluation, "the draft")
    assert checked == ["the draft"], "nothing will be decoded, so nothing is refused"


def test_the_run_folder_takes_its_place(tmp_path):
    trainer = build_trainer(trainer_config({}), RunFolder(tmp_path / "run"), SimpleNamespace(), None)
    assert trainer.logger.save_dir == str(tmp_path / "run")


def test_float16_and_what_lightning_refuses_have_one_line(tmp_path):
    config = trainer_config({})
    config.trainer.precision = "16-mixed"
    with pytest.raises(ValueError, match=r"trainer\.precision: float16"):
        build_trainer(config, RunFolder(tmp_path), SimpleNamespace(), None)
    config = trainer_config({})
    config.trainer.val_check_interval = -1.0
    with pytest.raises(ValueError, match="trainer: "):
        build_trainer(config, RunFolder(tmp_path), SimpleNamespace(), None)


def test_who_chose_eta():
    def chosen(loss: dict) -> str | None:
        names, draft = {"draft": "eagle3"}, {"paper_eta": 3.0}
        return eta_source(OmegaConf.create({"loss": loss, "draft": draft, "names": names}))

    assert chosen({}) is None
    assert chosen({"eta": None}) is None
    assert chosen({"eta": 3.0}) == "the paper's for eagle3"
    assert chosen({"eta": 10.0}) == "set by the configuration"
