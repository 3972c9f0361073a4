"""The table of configuration keys: complete, and what it says of runs that are the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from omegaconf import OmegaConf

from lkspec.runs.keys import KINDS, Kind, kind, outcome

CONF = Path(__file__).parents[3] / "conf"
CONFIG = {
    "seed": 0,
    "run_root": "runs",
    "resume": None,
    "on_existing": "error",
    "list_jobs": False,
    "journal": None,
    "names": {"draft": "eagle3"},
    "logger": {"tensorboard": {"save_dir": None}},
    "states_dir": None,
    "states_memory_gb": 0,
    "unroll": {"compile": False},
    "target": {"_target_": "T", "device": "auto", "dtype": "float32", "name": None},
    "trainer": {"accelerator": "auto", "devices": 1, "max_epochs": 4, "enable_progress_bar": True},
    "data": {"num_workers": 0, "max_tokens": 512, "validation": "a.jsonl"},
    "callbacks": {"checkpoint": {"every": 50}, "progress": {}, "acceptance_length": {"every_n_epochs": 0}},
    "loss": {"_target_": "lkspec.losses.objectives.LKLambda", "eta": 3.0},
    "loss_options": {"gamma": 0.8, "chunk_size": None},
    "vocab": {"size": 4096},
    "benchmark": {"mini_math": {"num_prompts": 4}},
}


def changed(**changes) -> str:
    """The outcome with dotted keys changed (``__`` for a dot), as text."""
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        *sections, last = key.split("__")
        inner = config
        for section in sections:
            inner = inner[section]
        inner[last] = value
    return json.dumps(outcome(config), sort_keys=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"run_root": "elsewhere"},
        {"on_existing": "continue"},
        {"list_jobs": True},
        {"journal": "somewhere"},
        {"names__draft": "mine"},
        {"logger": {}},
        {"unroll": {"compile": True}},
        {"states_memory_gb": 4},
        {"loss_options__chunk_size": 64},
        {"target__device": "cuda"},
        {"target__name": "mine"},
        {"trainer__accelerator": "cpu"},
        {"trainer__devices": [3]},
        {"trainer__devices": "auto"},
        {"data__num_workers": 4},
        {"callbacks__checkpoint": {"every": 7}},
        {"callbacks__progress": None},
        {"loss__eta": 3},
    ],
    ids=str,
)
def test_paths_devices_and_loggers_do_not_make_another_run(changes):
    assert changed(**changes) == changed()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"target__dtype": "bfloat16"},
        {"target__mine": 1},
        {"trainer__devices": 2},
        {"trainer__max_epochs": 5},
        {"data__max_tokens": 513},
        {"data__validation": "b.jsonl"},
        {"callbacks__acceptance_length": None},
        {"callbacks__mine": {"step": 1}},
        {"loss__eta": 3.5},
        {"loss_options__gamma": 0.9},
        {"states_dir": "captured/x"},
        {"vocab__size": None},
        {"benchmark__mini_math__num_prompts": 5},
        {"my_own_key": 1},
    ],
    ids=str,
)
def test_what_decides_the_outcome_does(changes):
    assert changed(**changes) != changed()


def test_where_a_capture_lies_does_not_count_and_several_devices_count_by_their_number():
    assert changed(states_dir="a") == changed(states_dir="b")
    assert changed(trainer__devices=[0, 1]) == changed(trainer__devices=2) == changed(trainer__devices=[2, 5])


def test_the_configuration_itself_is_left_alone():
    before = json.dumps(CONFIG)
    outcome(CONFIG)
    assert json.dumps(CONFIG) == before


def test_the_longest_entry_counts():
    assert kind("trainer.devices") == Kind.MACHINE
    assert kind("trainer.max_epochs") == kind("trainer") == Kind.TRAINED
    assert kind("callbacks.checkpoint.every_n_train_steps") == Kind.OUTPUT
    assert kind("unknown.key") == Kind.TRAINED


@pytest.fixture(scope="module")
def composed() -> dict:
    """The configuration of ``lkspec train``, not resolved."""
    state = Singleton.get_state()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("train", return_hydra_config=True)
            HydraConfig.instance().set_config(config)
            return OmegaConf.to_container(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
    finally:
        Singleton.set_state(state)


def test_every_key_of_a_training_is_in_the_table(composed):
    assert set(composed) - set(KINDS) == set(), "say in runs/keys.py what these keys decide"
    assert {key for key in KINDS if "." not in key} - set(composed) == set(), "no such keys"


def test_every_key_of_a_section_of_several_kinds_is_known():
    """A new key there must be looked at: it is either in the table or known to decide the draft."""
    decides_the_draft = {
        "target": {
            "_target_", "path", "gguf", "dtype", "attn_implementation", "aux_layer_ids", "revision",
            "trust_remote_code", "kind", "seed", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_size",
            "vocab_size", "max_positions", "logit_std",
        },
        "data": {
            "_target_", "train", "max_length", "max_tokens", "accumulate", "pack", "seed", "on_bad_row", "val_fraction",
            "split_seed", "limit_conversations",
        },
        "trainer": {
            "_target_", "precision", "max_epochs", "max_steps", "max_time", "inference_mode", "use_distributed_sampler",
        },
        "loss_options": {"gamma"},
        "callbacks": set(),
    }  # fmt: skip
    assert set(decides_the_draft) == {key.partition(".")[0] for key in KINDS if "." in key}
    for section, known in decides_the_draft.items():
        given: set[str] = set()
        texts = [file.read_text() for file in (CONF / section).glob("*.yaml")]
        for text in (text for text in texts if "@package _global_" not in text):
            given |= set(yaml.safe_load(text) or {}) - {"defaults"}
        if not given:
            given = set(yaml.safe_load((CONF / "train.yaml").read_text())[section])
        listed = {key.partition(".")[2] for key in KINDS if key.startswith(f"{section}.")}
        assert given - listed - known == set(), f"say in runs/keys.py what these keys of {section} decide"
