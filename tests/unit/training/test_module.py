"""Training steps against the loss written out token by token in float64."""

from __future__ import annotations

import copy
import random

import lightning
import numpy as np
import pytest
import torch
from torch import Tensor

from lkspec.data.datamodule import SpeculatorDataModule
from lkspec.data.dataset import collate
from lkspec.decoding.walk import walk_turns
from lkspec.drafts.eagle3 import Eagle3
from lkspec.losses.objectives import KL, TV, LKAlpha, LKLambda, Objective
from lkspec.losses.wrapping import TemperatureMixed
from lkspec.targets.tiny import TinyTarget
from lkspec.training.module import SpeculatorModule, restore_rng_state, rng_state
from lkspec.training.statistics import draft_stats
from lkspec.types import Batch
from lkspec.vocab import DraftVocab

pytestmark = pytest.mark.filterwarnings("ignore")

K, GAMMA = 3, 0.8


@pytest.fixture(scope="module")
def target() -> TinyTarget:
    sizes = {"num_layers": 3, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "ffn_size": 64}
    return TinyTarget(**sizes, aux_layer_ids=(0, 1, 2), device="cpu")


@pytest.fixture
def draft(target) -> Eagle3:
    """Proposes three quarters of the vocabulary, so that p is truncated."""
    torch.manual_seed(3)
    return Eagle3(target.spec, DraftVocab(torch.arange(0, 198), target.vocab_size), num_depths=K)


@pytest.fixture(scope="module")
def batches(target) -> list[Batch]:
    """Micro-batches of different sizes: 2 rows, 1 row, 1 packed row of 2 conversations, 1 row."""
    data = SpeculatorDataModule(train="tiny:6", max_length=300, max_tokens=600)
    data.bind(target.tokenizer, eos_ids=target.eos_ids, max_positions=target.max_positions)
    data.adopt(data.read())
    one = [data.train_set[index] for index in range(6)]
    return [collate([one[:1], one[1:2]]), collate([one[2:3]]), collate([one[3:5]]), collate([one[5:6]])]


class Loader:
    """Lightning takes a plain list for a collection of loaders."""

    def __init__(self, steps: list[list[Batch]]) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self):
        return iter(self.steps)


class Steps(lightning.LightningDataModule):
    """The micro-batches of each step, and of each validation temperature."""

    def __init__(
        self, steps: list[list[Batch]], validation: dict[float | None, list[list[Batch]]] | None = None
    ) -> None:
        super().__init__()
        self.steps, self.validation = steps, validation or {}
        self.val_temperatures = list(self.validation)

    def train_dataloader(self):
        return Loader(self.steps)

    def val_dataloader(self):
        return [Loader(steps) for steps in self.validation.values()]

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


class Recorder(lightning.Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *_) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def make_module(draft: Eagle3, target: TinyTarget, objective: Objective, **options) -> SpeculatorModule:
    settings = {
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        "scheduler": lambda optimizer, num_steps: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
        "gamma": GAMMA,
        "gradient_clip": 1e9,
    }
    return SpeculatorModule(
        draft, objective, target_states=target.states, target_head=target.head, **{**settings, **options}
    )


def fit(module: SpeculatorModule, data: Steps, **limits) -> tuple[lightning.Trainer, list[dict[str, float]]]:
    recorder = Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[recorder],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        inference_mode=False,
        **{"max_epochs": 1, **limits},
    )
    trainer.fit(module, datamodule=data)
    return trainer, recorder.steps


def naive_rows(draft: Eagle3, target: TinyTarget, batch: Batch) -> list[list[tuple[Tensor, Tensor]]]:
    """[K] lists of (log p over the draft vocabulary with p's full denominator, log q) of each supervised token."""
    hidden = draft.unroll(batch, target.states(batch)).double()
    target_logits = target.head.logits(target.states(batch).last).double()
    log_p = target_logits.log_softmax(-1)[..., draft.vocab.ids]
    rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(K)]
    num_rows, width = batch.tokens.shape
    for k in range(1, K + 1):
        log_q = (hidden[k - 1] @ draft.head(k).weight.double().T).log_softmax(-1)
        for b in range(num_rows):
            for t in range(width - 1 - k):
                turn = batch.turns[b, t + 1 : t + 2 + k].tolist()
                if turn[0] > 0 and len(set(turn)) == 1:
                    rows[k - 1].append((log_p[b, t + k], log_q[b, t]))
    return rows


def naive_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    renormed = log_p.log_softmax(-1)
    return (renormed.exp() * (renormed - log_q)).sum()


def naive_alpha(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.minimum(log_p.exp(), log_q.exp()).sum()


def naive_loss(draft: Eagle3, target: TinyTarget, batches: list[Batch], value) -> Tensor:
    per_batch = [naive_rows(draft, target, batch) for batch in batches]
    loss = torch.zeros((), dtype=torch.float64)
    for k in range(K):
        rows = [row for found in per_batch for row in found[k]]
        loss = loss + GAMMA**k * sum(value(*row) for row in rows) / len(rows)
    return loss


VALUES = {
    "kl": (KL(), naive_kl),
    "tv": (TV(), lambda p, q: 1 - naive_alpha(p, q)),
    "lk_alpha": (LKAlpha(), lambda p, q: -naive_alpha(p, q).log()),
    "fixed": (
        LKLambda(fixed_lambda=0.3),
        lambda p, q: 0.3 * naive_kl(p, q) + 0.7 * (1 - naive_alpha(p, q)),
    ),
}


@pytest.mark.parametrize("options", [{}, {"chunk_size": 50}], ids=["usual", "small chunks"])
@pytest.mark.parametrize("name", VALUES)
def test_a_step_is_the_gradient_of_the_mean_over_all_its_micro_batches(draft, target, batches, name, options):
    objective, value = VALUES[name]
    expected = naive_loss(draft, target, batches, value)
    parameters = {name: p for name, p in draft.named_parameters() if p.requires_grad}
    gradients = dict(zip(parameters, torch.autograd.grad(expected, list(parameters.values())), strict=True))
    before = {name: p.detach().clone() for name, p in parameters.items()}
    _, (logged,) = fit(make_module(draft, target, objective, **options), Steps([batches]))
    assert logged["train/loss"] == pytest.approx(float(expected), rel=1e-5)
    for name, parameter in parameters.items():
        step = before[name] - parameter.detach()
        torch.testing.assert_close(step, gradients[name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    assert logged["train/grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_the_gradient_is_clipped_but_the_whole_norm_logged(draft, target, batches):
    before = torch.nn.utils.parameters_to_vector(draft.parameters()).detach().clone()
    _, (logged,) = fit(make_module(draft, target, KL(), gradient_clip=0.01), Steps([batches[:1]]))
    moved = torch.nn.utils.parameters_to_vector(draft.parameters()).detach() - before
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)
    assert logged["train/grad_norm"] > 0.1


def test_a_step_forgets_the_gradient_of_the_one_before(draft, target, batches):
    twin = copy.deepcopy(draft)
    fit(make_module(draft, target, KL()), Steps([batches[:1]]))
    expected = torch.autograd.grad(
        naive_loss(draft, target, batches[1:2], naive_kl), [p for p in draft.parameters() if p.requires_grad]
    )
    _, steps = fit(make_module(twin, target, KL()), Steps([batches[:1], batches[1:2]]))
    norm = torch.cat([gradient.flatten() for gradient in expected]).norm()
    assert steps[1]["train/grad_norm"] == pytest.approx(float(norm), rel=1e-3)


def test_what_is_logged_are_means_over_the_tokens_of_the_step(draft, target, batches):
    with torch.no_grad():
        per_batch = [naive_rows(draft, target, batch) for batch in batches[:2]]
    _, steps = fit(make_module(draft, target, LKLambda(eta=2.0)), Steps([batches[:2], batches[2:]]))
    for k in range(K):
        rows = [row for found in per_batch for row in found[k]]
        alpha = sum(float(naive_alpha(*row)) for row in rows) / len(rows)
        kl = sum(float(naive_kl(*row)) for row in rows) / len(rows)
        assert steps[0][f"train/alpha/depth_{k + 1}"] == pytest.approx(alpha, rel=1e-5)
        assert steps[0][f"train/kl/depth_{k + 1}"] == pytest.approx(kl, rel=1e-5)
        # lambda belongs to a micro-batch (the paper's definition where nothing is accumulated): the last one is shown.
        of_last = [float(naive_alpha(*row)) for row in per_batch[1][k]]
        expected = np.exp(-2.0 * np.mean(of_last))
        assert steps[0][f"train/lambda/depth_{k + 1}"] == pytest.approx(expected, rel=1e-5)
    coverage = [float(p.exp().sum()) for found in per_batch for p, _ in found[0]]
    assert steps[0]["train/coverage"] == pytest.approx(np.mean(coverage), rel=1e-5)
    counts = [int(batch.depth_mask(K)[0].sum()) for batch in batches]
    assert steps[0]["train/supervised_tokens"] == sum(counts[:2]) == len(coverage)
    assert steps[1]["train/supervised_tokens"] == sum(counts)
    assert [step["train/lr"] for step in steps] == [1.0, 0.5]


def test_training_compares_at_the_temperature_of_the_objective(draft, target, batches):
    with torch.no_grad():
        rows = [row for found in naive_rows(draft, target, batches[0]) for row in found]
    expected = [((p / 0.5).log_softmax(-1), (q / 0.5).log_softmax(-1)) for p, q in rows]
    kl = sum(float((p.exp() * (p - q)).sum()) for p, q in expected)
    _, steps = fit(make_module(draft, target, TemperatureMixed(KL(), low=0.5, high=0.5)), Steps([batches[:1]]))
    counts = batches[0].depth_mask(K).sum((1, 2)).tolist()
    logged = sum(steps[0][f"train/kl/depth_{k + 1}"] * count for k, count in enumerate(counts))
    assert logged == pytest.approx(kl, rel=1e-5)


class Spy(KL):
    scope = "batch"

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def values(self, stats, mean_alpha):
        self.seen.append(mean_alpha)
        return super().values(stats, mean_alpha)


def test_an_objective_sees_the_mean_alpha_of_its_own_micro_batch(draft, target, batches):
    spy = Spy()
    with torch.no_grad():
        expected = [
            [np.mean([float(naive_alpha(*row)) for row in rows]) for rows in naive_rows(draft, target, batch)]
            for batch in batches[:2]
        ]
    fit(make_module(draft, target, spy), Steps([batches[:2]]))
    assert [seen.tolist() for seen in spy.seen] == [pytest.approx(values, rel=1e-5) for values in expected]
    assert not any(seen.requires_grad for seen in spy.seen)


def test_only_what_is_trained_reaches_the_optimizer(draft, target, batches):
    draft.fc.weight.requires_grad_(False)
    given: list[Tensor] = []

    def optimizer(parameters):
        given[:] = parameters
        return torch.optim.SGD(parameters, lr=0.1)

    frozen = draft.fc.weight.clone()
    fit(make_module(draft, target, KL(), optimizer=optimizer), Steps([batches[:1]]))
    assert len(given) == len(list(draft.parameters())) - 1
    assert all(p is not draft.fc.weight for p in given)
    assert torch.equal(draft.fc.weight, frozen)
    assert not any(p.requires_grad for p in target.model.parameters())


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_epochs": 3}, 12),
        ({"max_epochs": 3, "max_steps": 5}, 5),
        ({"max_epochs": -1, "max_steps": 7}, 7),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 4),
        ({"max_epochs": 1, "limit_train_batches": 99}, 4),
    ],
)
def test_a_schedule_is_as_long_as_the_run(draft, target, batches, limits, expected):
    told: list[int] = []

    def scheduler(optimizer, num_steps):
        told.append(num_steps)
        return torch.optim.lr_scheduler.ConstantLR(optimizer)

    trainer, _ = fit(
        make_module(draft, target, KL(), scheduler=scheduler, chunk_size=4096), Steps([batches[1:2]] * 4), **limits
    )
    assert told[-1] == expected  # the first was the trial that refuses bad arguments
    assert trainer.global_step == expected


def test_a_run_without_an_end_is_refused(draft, target, batches):
    with pytest.raises(ValueError, match=r"trainer\.max_epochs, trainer\.max_steps"):
        fit(make_module(draft, target, KL()), Steps([batches[:1]]), max_epochs=-1, max_time="00:00:00:01")


def test_validation_means_count_tokens_and_the_walk_is_pooled(draft, target, batches):
    data = Steps(
        [batches[:1]],
        {
            0.0: [[batches[0]], [batches[1]]],
            0.7: [[batches[2]]],
            1.0: [[batches[3]], [batches[2]]],
            None: [[batches[1]]],
        },
    )
    module = make_module(draft, target, TV(), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    trainer, _ = fit(module, data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for temperature, tag in ((0.0, "T0"), (0.7, "T0.7"), (1.0, "T1"), (None, "text")):
        used = [batch for step in data.validation[temperature] for batch in step]
        with torch.no_grad():
            per_batch = [naive_rows(draft, target, batch) for batch in used]
        for k in range(K):
            alphas = [float(naive_alpha(*row)) for found in per_batch for row in found[k]]
            kls = [float(naive_kl(*row)) for found in per_batch for row in found[k]]
            assert logged[f"val/{tag}/alpha/depth_{k + 1}"] == pytest.approx(np.mean(alphas), rel=1e-5)
            assert logged[f"val/{tag}/kl/depth_{k + 1}"] == pytest.approx(np.mean(kls), rel=1e-5)
            assert logged[f"val/{tag}/objective/depth_{k + 1}"] == pytest.approx(1 - np.mean(alphas), rel=1e-5)
        name = f"val/{tag}/walk_acceptance_length"
        if temperature is None:  # nobody knows what p the text was sampled from
            assert name not in logged
        else:
            assert logged[name] == pytest.approx(pooled_walk(draft, target, used, temperature), rel=1e-6)


@torch.no_grad()
def pooled_walk(draft: Eagle3, target: TinyTarget, batches: list[Batch], temperature: float) -> float:
    rounds = accepted = 0.0
    for batch in batches:
        stats = draft_stats(draft, batch, target.states(batch), target.head, temperature=temperature or 1.0)
        accept = stats.hit if temperature == 0 else stats.accept_prob
        walks = walk_turns(accept, batch.turns)
        rounds, accepted = rounds + walks.rounds[:, -1].sum(), accepted + walks.at_least[:, -1].sum()
    return 1 + accepted / rounds


class Nan(KL):
    def values(self, stats, mean_alpha):
        return super().values(stats, mean_alpha) * float("nan")


def test_a_loss_that_is_not_finite_changes_no_weight(draft, target, batches):
    before = {name: value.clone() for name, value in draft.state_dict().items()}
    with pytest.raises(ValueError, match=r"nan .* step 0 on conversations tiny-00000, tiny-00001, tiny-00002\."):
        fit(make_module(draft, target, Nan()), Steps([batches[:2]]))
    assert all(torch.equal(value, before[name]) for name, value in draft.state_dict().items())


def test_a_checkpoint_holds_the_draft_plain_facts_and_random_states(draft, target, batches, tmp_path):
    module = make_module(draft, target, KL(), checkpoint_info={"config": {"seed": 3}, "data_fingerprint": "abc"})
    trainer, (logged,) = fit(module, Steps([batches[:1]]))
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    drawn = draws()
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {f"draft.{name}" for name in draft.state_dict()}
    assert saved["lkspec"]["config"] == {"seed": 3}
    assert saved["lkspec"]["num_supervised_seen"] == logged["train/supervised_tokens"]
    again = make_module(draft, target, KL())
    again.on_load_checkpoint(saved)
    assert again.num_supervised_seen == module.num_supervised_seen > 0
    assert draws() == drawn


def draws() -> tuple[float, ...]:
    return float(torch.randn(())), float(np.random.normal()), random.gauss(0, 1)


def test_random_states_survive_a_half_used_pair_of_normal_numbers(tmp_path):
    np.random.normal()
    random.gauss(0, 1)
    torch.save(rng_state(), tmp_path / "rng.pt")
    drawn = [draws() for _ in range(3)]
    restore_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert [draws() for _ in range(3)] == drawn


def test_bad_arguments_of_the_optimizer_are_found_before_training(draft, target):
    with pytest.raises(ValueError, match="learning rate"):
        make_module(draft, target, KL(), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=-1.0))
