"""The files of conf/target: each names every argument of its class, the tiny ones build."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

CONF = Path(__file__).parents[3] / "conf"
NAMES = sorted(path.stem for path in (CONF / "target").glob("*.yaml"))


def composed(choice: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(overrides=[f"+target={choice}", *overrides]).target


@pytest.mark.parametrize("choice", NAMES)
def test_every_argument_is_in_the_file(choice):
    config = composed(choice)
    assert set(config) == {"_target_", *inspect.signature(get_class(config._target_)).parameters}


def test_any_model_needs_a_path():
    assert OmegaConf.missing_keys(composed("transformers")) == {"target.path"}
    assert composed("smollm2_135m_hub").path == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("choice", "kind"),
    [
        ("tiny", "llama"),
        ("tiny_gemma3", "gemma3"),
        ("tiny_gpt_oss", "gpt_oss"),
        ("tiny_deepseek_v3", "deepseek_v3"),
    ],
)
def test_tiny_targets_build(choice, kind):
    target = instantiate(composed(choice, "target.device=cpu", "target.aux_layer_ids=[1,3,6]"))
    assert target.name == choice
    assert target.spec.model_type.startswith(kind)
    assert target.aux_layer_ids == (1, 3, 6)
