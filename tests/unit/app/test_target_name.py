"""A target's name is the same before it is built, in run names, and after, in results rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from lkspec.app.application import config_dir, instantiate


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.mark.parametrize("choice", sorted(path.stem for path in (Path(config_dir()) / "target").glob("tiny*.yaml")))
def test_tiny_targets_are_called_as_they_are_chosen(choice):
    config = composed(f"target={choice}", "target.device=cpu")
    assert config.names.target == instantiate(config.target).name == choice


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["target=smollm2_135m"], "smollm2_135m"),
        (["target=smollm2_135m_hub"], "smollm2_135m_hub"),
        (["target=transformers", "target.path=Qwen/Qwen3-8B"], "Qwen3-8B"),
        (["target=transformers", "target.path=/models/Qwen3-8B/"], "Qwen3-8B"),
        (["target=transformers", "target.path=Qwen/Qwen3-8B", "target.name=mine"], "mine"),
        (["target=tiny", "~target.name", "target._target_=mine.Target"], "Target"),
    ],
)
def test_other_targets_are_called_by_their_name_or_path(overrides, name):
    assert composed(*overrides).names.target == name


def test_a_transformers_target_takes_the_last_part_of_its_path(tmp_path):
    instantiate(composed("target=tiny").target).save(tmp_path / "model")
    config = composed("target=transformers", f"target.path={tmp_path}/model", "target.device=cpu")
    assert config.names.target == instantiate(config.target).name == "model"
