"""Every experiment file still composes and trains: one step of it, on tiny parts; sweeps have the jobs they claim."""

import math
from itertools import product
from pathlib import Path

import pytest
import yaml
from command_line import CPU, NO_EVALUATION
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from omegaconf import DictConfig, OmegaConf

from lkspec.app.application import config_dir, resolved
from lkspec.runs.keys import outcome
from lkspec.runs.rows import content_hash

EXPERIMENTS = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))
ABLATIONS = [name for name in EXPERIMENTS if name.startswith("ablation_")]
TINY = (
    *("target=tiny", "data=tiny", "data.max_length=320", "data.max_tokens=768", "trainer.max_epochs=1"),
    *("states_dir=null", "vocab.size=null", "trainer.max_steps=1", "trainer.limit_val_batches=1"),
)


@pytest.fixture
def composed():
    """``composed(*overrides)``: the configuration of ``train`` with Hydra's own in it."""
    state = Singleton.get_state()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):

        def make(*overrides: str) -> DictConfig:
            config = compose("train", overrides=list(overrides), return_hydra_config=True)
            HydraConfig.instance().set_config(config)
            return config

        yield make
    Singleton.set_state(state)


def jobs_of(config: DictConfig) -> list[list[str]]:
    """The overrides of each job of a sweep, in order."""
    params = config.hydra.sweeper.params or {}
    parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    values = [
        [f"{one.key_or_group}={value}" for value in one.sweep_string_iterator()]
        if one.is_sweep_override()
        else [one.input_line]
        for one in parsed
    ]
    return [list(job) for job in product(*values)]


def test_there_are_experiments():
    assert {"quickstart", "duel"} < set(EXPERIMENTS)
    assert {"ablation_loss", "ablation_draft", "ablation_eta", "ablation_vocab"} < set(ABLATIONS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_takes_a_step(lkspec_cli, composed, tmp_path, name):
    first = [setting for setting in jobs_of(composed(f"experiment={name}"))[0] if not setting.startswith("data.train=")]
    no_evaluation = NO_EVALUATION if name in ("quickstart", "drafts") else ()  # others have none of their own
    overrides = (f"experiment={name}", *first, *TINY, *CPU, *no_evaluation, "hydra.mode=RUN")
    outcome = lkspec_cli("train", *overrides)
    assert outcome.code == 0, outcome.err
    assert list(Path(tmp_path).glob("runs/**/checkpoints/step=1.ckpt"))


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_jobs_of_an_ablation_are_all_different_and_begin_at_random(composed, name):
    """Jobs are a product of axes: along each axis from the first job every outcome is another, so all are."""
    sweep = composed(f"experiment={name}")
    assert str(sweep.hydra.mode) == "RunMode.MULTIRUN"
    assert sweep.on_existing == "continue"
    jobs = jobs_of(sweep)
    axes = [list(dict.fromkeys(values)) for values in zip(*jobs, strict=True)]
    assert len(jobs) == math.prod(map(len, axes)) > 1
    first = [axis[0] for axis in axes]
    along = [[*first[:i], value, *first[i + 1 :]] for i, axis in enumerate(axes) for value in axis[1:]]
    hashes = set()
    for job in (first, *along):
        config = composed(f"experiment={name}", *job)
        plain = resolved(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
        hashes.add(content_hash(outcome(plain)))
        if name != "ablation_init":
            assert plain["draft"].get("head_init", "random") == "random"
        assert plain["callbacks"]["acceptance_length"] is None
        assert plain["states_dir"] == (None if name == "ablation_gpu" else "captured/smollm2_135m-embedded")
    assert len(hashes) == 1 + len(along)


def test_the_first_jobs_of_the_main_ablation_are_a_whole_table_of_one_seed(composed):
    jobs = jobs_of(composed("experiment=ablation_loss"))
    assert len(jobs) == 18
    assert all("seed=0" in job for job in jobs[:6])
    assert [job[2] for job in jobs[:3]] == ["loss=kl", "loss=lk_alpha", "loss=lk_lambda"]
    assert [job[1] for job in jobs[:6]] == ["draft=medusa"] * 3 + ["draft=mlp"] * 3


def test_the_default_eta_is_a_job_of_the_eta_ablation(composed):
    """So that it is not trained twice."""

    def job(*overrides: str) -> str:
        config = composed(*overrides, "seed=0", "draft=mlp", "loss=lk_lambda")
        plain = resolved(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
        return content_hash(outcome(plain))

    assert job("experiment=ablation_eta", "loss.eta=3") == job("experiment=ablation_loss")


def test_launchers_name_every_argument_of_their_plugin():
    """Ours stand in place of the plugins' own; what they leave out the plugins would not get."""
    from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf
    from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf

    theirs = {"joblib": JobLibLauncherConf, "submitit_local": LocalQueueConf, "submitit_slurm": SlurmQueueConf}
    for name, schema in theirs.items():
        ours = yaml.safe_load((config_dir() / "hydra" / "launcher" / f"{name}.yaml").read_text())
        expected = OmegaConf.structured(schema)
        assert ours.keys() == expected.keys()
        assert ours["_target_"] == expected._target_
