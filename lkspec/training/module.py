"""SpeculatorModule: joins a draft, a target's states and an objective into one LightningModule.

The life of a batch:

1. ``SpeculatorDataModule`` yields the micro-batches of one optimiser step, and ``training_step`` counts their tokens
   that are supervised at each depth (N_k), over all ranks.
2. ``target_states(batch)``: the frozen target reads the text, or a capture or memory gives what it read.
3. ``draft.unroll(batch, states)``: the draft's hidden states at every anchor and depth.
4. ``draft_stats`` multiplies them with the heads, chunk by chunk, and keeps kl, alpha, .. per token and depth.
5. The objective turns statistics into values: in ``training_step``, or, where a value needs nothing but its own row,
   inside step 4 (``InForward``), which forms the gradient while the logits are alive.
6. ``reduce_loss`` weighs depths and divides by N_k; backward, clip and step follow once per list.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from lightning import LightningModule
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lkspec.drafts.base import Draft
from lkspec.losses.fused.in_forward import InForward
from lkspec.losses.objectives import Comparison, Objective, depth_weights, masked_sums, reduce_loss
from lkspec.measure.benchmark import Measurement
from lkspec.measure.walk import walk_rows
from lkspec.runs.rows import WalkRow
from lkspec.training.statistics import draft_stats
from lkspec.types import Batch, LinearHead, TargetStates, TokenStats

CHECKPOINT_KEY = "lkspec"


class SpeculatorModule(LightningModule):
    """Trains a draft on the target's distributions.

    Loss: ``sum_k gamma^(k-1) / N_k * sum_(b,t) mask_k value_k``, where N_k counts the supervised tokens of the whole
    optimiser step over micro-batches and ranks; the gradient is that of this loss whatever the number of either.

    Args:
        draft: trained; the only thing a checkpoint keeps.
        objective: gives the values.
        target_states: computes (or remembers) the frozen target's states of a batch.
        target_head: the target's head.
        optimizer: makes the optimiser from parameters.
        scheduler: makes the schedule, stepped each optimiser step, from the optimiser and the number of steps.
        gamma: weight ratio between depths.
        gradient_clip: largest gradient norm.
        chunk_size: target rows whose logits are alive together; None leaves it to the statistics.
        walk_depths: drafted tokens of the validation walk; the draft's trained depths by default.
        evaluate: measures the draft by decoding at a stage (``before``, ``during`` or ``after`` training) and step.
        checkpoint_info: plain data saved with every checkpoint (the resolved config, the target's fingerprint).

    Raises:
        ValueError: as the optimiser and the schedule: a bad argument is found before training.
    """

    def __init__(
        self,
        draft: Draft,
        objective: Objective,
        *,
        target_states: Callable[[Batch], TargetStates],
        target_head: LinearHead,
        optimizer: Callable[[Iterable[Tensor]], Optimizer],
        scheduler: Callable[[Optimizer, int], LRScheduler],
        gamma: float = 0.8,
        gradient_clip: float = 0.5,
        chunk_size: int | None = None,
        walk_depths: int | None = None,
        evaluate: Callable[[str, int], list[Measurement]] | None = None,
        checkpoint_info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # a step's micro-batches share N_k, so they are seen together
        self.draft = draft
        self.objective = objective
        self._target_states = target_states
        self._target_head = target_head
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        self._refuse_bad_arguments(gamma, chunk_size)
        self.gamma, self.gradient_clip = gamma, gradient_clip
        self._chunk_size = chunk_size
        self._walk_depths = walk_depths or draft.num_depths
        self.evaluate = evaluate
        self._checkpoint_info = checkpoint_info or {}
        self._validation: dict[str, _ValidationSums] = {}
        self.walk_rows: list[WalkRow] = []  # of the last validation, over all ranks
        self.validated_step: int | None = None  # optimiser steps taken before it
        self._last_time: float | None = None
        self.num_supervised_seen = 0

    def configure_optimizers(self) -> Any:
        optimizer = self._make_optimizer(self._trainable())
        return {"optimizer": optimizer, "lr_scheduler": self._make_scheduler(optimizer, self._num_steps())}

    def _refuse_bad_arguments(self, gamma: float, chunk_size: int | None) -> None:
        """What the first step would refuse: by then a run folder is there."""
        self._make_scheduler(self._make_optimizer(self._trainable()), 1)
        depth_weights(self.draft.num_depths, gamma)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size: expected at least 1 target row, got {chunk_size}")

    def _trainable(self) -> list[Tensor]:
        return [parameter for parameter in self.draft.parameters() if parameter.requires_grad]

    def _num_steps(self) -> int:
        """Optimiser steps of the whole run.

        Not ``trainer.estimated_stepping_batches``: it makes the loader before a resumed run's place in the epoch is
        known, and Lightning then never restores that place.
        """
        trainer = self.trainer
        limit, num_steps = trainer.limit_train_batches, len(trainer.datamodule.train_dataloader())
        per_epoch = min(limit, num_steps) if isinstance(limit, int) else int(limit * num_steps)
        limits = [trainer.max_steps, trainer.max_epochs * per_epoch]
        if max(limits) < 0:
            raise ValueError("trainer.max_epochs, trainer.max_steps: set one of them, schedules need the run's length")
        return min(steps for steps in limits if steps >= 0)

    def stats(
        self, batch: Batch, *, comparison: Comparison | None = None, in_forward: InForward | None = None
    ) -> TokenStats:
        """Statistics of every supervised token of a batch at every trained depth."""
        return draft_stats(
            self.draft,
            batch,
            self._target_states(batch),
            self._target_head,
            row_value=self.objective.row_value,
            in_forward=in_forward,
            chunk_size=self._chunk_size,
            **(comparison or Comparison())._asdict(),
        )

    def forward(self, batch: Batch) -> TokenStats:
        return self.stats(batch)

    def training_step(self, batches: list[Batch], batch_idx: int) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        counts = torch.stack([batch.depth_mask(self.draft.num_depths).sum((1, 2)) for batch in batches]).sum(0)
        counts = self._summed(counts.to(self.device))
        sums: dict[str, Tensor] = {}
        loss_sum = torch.zeros((), device=self.device)
        scalars: dict[str, Tensor] = {}
        optimizer.zero_grad()
        in_forward = self._in_forward(counts)
        for batch in batches:
            comparison = self.objective.comparison(batch.tokens.shape)
            stats = self.stats(batch.to(self.device), comparison=comparison, in_forward=in_forward)
            batch_sums = {name: self._summed(value) for name, value in masked_sums(stats).items()}
            mean_alpha = batch_sums["alpha"] / batch_sums["count"].clamp(min=1)
            values = self.objective.values(stats, mean_alpha) if stats.value is None else stats.value
            loss = reduce_loss(values, stats.mask, counts, self.gamma)
            # DDP averages gradients over ranks; the loss is already divided by the count over all of them.
            self.manual_backward(loss * self.trainer.world_size)
            loss_sum += loss.detach()
            sums = {name: sums.get(name, 0) + value for name, value in batch_sums.items()}
            scalars = self.objective.scalars(mean_alpha)
        loss_sum = self._summed(loss_sum)
        norm = torch.nn.utils.clip_grad_norm_(self.draft.parameters(), self.gradient_clip)
        # All that a step tells, in one wait for the device.
        loss, gradient_norm, num_tokens = torch.stack([t.double() for t in (loss_sum, norm, counts[0])]).tolist()
        self._refuse_non_finite(loss, gradient_norm, batches)
        self._log_step(loss_sum, norm, int(num_tokens), sums, scalars, scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()

    def _in_forward(self, counts: Int[Tensor, " K"]) -> InForward | None:
        """How gradients are formed in the forward pass, where the objective allows it."""
        if self.objective.scope == "depth" and self.trainer.world_size > 1:
            return None  # its mean alpha is that of all ranks
        return InForward.of(self.objective, counts, self.gamma)

    def _refuse_non_finite(self, loss: float, norm: float, batches: list[Batch]) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        ids = [name for batch in batches for row in batch.ids for name in row]
        raise ValueError(
            f"the loss became {loss:g} (gradient norm {norm:g}) at step {self.global_step} on "
            f"conversations {', '.join(ids)}. The last checkpoint holds the state before. Try a lower optimizer.lr, "
            "trainer.precision=32-true or target.dtype=float32, or look at these conversations with lkspec inspect"
        )

    def _log_step(
        self,
        loss: Tensor,
        norm: Tensor,
        num_tokens: int,
        sums: dict[str, Tensor],
        scalars: dict[str, Tensor],
        lr: float,
    ) -> None:
        count = sums["count"].clamp(min=1)
        self.num_supervised_seen += num_tokens
        values: dict[str, Any] = {
            "train/loss": loss,
            "train/grad_norm": norm,
            "train/lr": lr,
            "train/coverage": sums["coverage"][0] / count[0],
            "train/supervised_tokens": float(self.num_supervised_seen),
        }
        for name in ("alpha", "kl", "top1"):
            values |= _per_depth(f"train/{name}", sums[name] / count)
        for name, per_depth in scalars.items():
            values |= _per_depth(f"train/{name}", per_depth)
        now = time.monotonic()
        if self._last_time is not None:
            values["train/tokens_per_second"] = num_tokens / (now - self._last_time)
        self._last_time = now
        self.log_dict(values)
        self.log("loss", loss, prog_bar=True, logger=False)
        self.log("alpha_1", values["train/alpha/depth_1"], prog_bar=True, logger=False)
        if "train/tokens_per_second" in values:
            self.log("tokens/s", values["train/tokens_per_second"], prog_bar=True, logger=False)

    def on_validation_epoch_start(self) -> None:
        self._validation = {}

    def validation_step(self, batches: list[Batch], batch_idx: int, dataloader_idx: int = 0) -> None:
        temperature = self.trainer.datamodule.val_temperatures[dataloader_idx]
        tag = "text" if temperature is None else f"T{temperature:g}"
        total = self._validation.setdefault(tag, _ValidationSums(self.draft.num_depths, self._walk_depths))
        for batch in batches:
            batch = batch.to(self.device)
            stats = self.stats(batch)
            mean_alpha = masked_sums(stats)["alpha"] / masked_sums(stats)["count"].clamp(min=1)
            total.add(stats, self.objective.values(stats, mean_alpha))
            if temperature is not None:
                if temperature not in (0, 1):
                    stats = self.stats(batch, comparison=Comparison(temperature=temperature))
                total.walked += walk_rows(
                    batch, stats, temperature=temperature, num_depths=total.walk_depths, steps=self.global_step
                )

    def on_validation_epoch_end(self) -> None:
        self.validated_step = self.global_step
        self.walk_rows = self._gathered([row for total in self._validation.values() for row in total.walked])
        for tag, total in self._validation.items():
            sums = {name: self._summed(value.to(self.device)) for name, value in total.all_sums().items()}
            count = sums["count"].clamp(min=1)
            values = {f"val/{tag}/coverage": sums["coverage"][0] / count[0]}
            for name in ("alpha", "kl", "top1", "objective"):
                values |= _per_depth(f"val/{tag}/{name}", sums[name] / count)
            if float(sums["walk"][0]) > 0:
                values[f"val/{tag}/walk_acceptance_length"] = 1 + sums["walk"][1] / sums["walk"][0]
            # Sums are over ranks already: every rank logs the same number.
            self.log_dict(values, add_dataloader_idx=False, rank_zero_only=False)
        self._last_time = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = {
            **self._checkpoint_info,
            "num_supervised_seen": self.num_supervised_seen,
            "rng": rng_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint[CHECKPOINT_KEY]
        self.num_supervised_seen = saved["num_supervised_seen"]
        restore_rng_state(saved["rng"])

    def _summed(self, value: Tensor) -> Tensor:
        """The sum over ranks."""
        if self.trainer.world_size == 1:
            return value
        return self.trainer.strategy.reduce(value.clone(), reduce_op="sum")

    def _gathered(self, rows: list[WalkRow]) -> list[WalkRow]:
        """The rows of all ranks."""
        if self.trainer.world_size == 1:
            return rows
        parts: list[list[WalkRow]] = [[]] * self.trainer.world_size
        torch.distributed.all_gather_object(parts, rows)
        return [row for part in parts for row in part]


class _ValidationSums:
    """Sums of one validation set on this rank."""

    def __init__(self, num_depths: int, walk_depths: int) -> None:
        self.walk_depths = min(walk_depths, num_depths)
        names = ("alpha", "kl", "top1", "coverage", "accept_prob", "count", "objective")
        self.sums: dict[str, Tensor] = {name: torch.zeros(num_depths, dtype=torch.float64) for name in names}
        self.walked: list[WalkRow] = []

    def add(self, stats: TokenStats, values: Float[Tensor, "K B T"]) -> None:
        for name, value in masked_sums(stats).items():
            self.sums[name] += value.double().cpu()
        self.sums["objective"] += values.masked_fill(~stats.mask, 0.0).sum((1, 2)).double().cpu()

    def all_sums(self) -> dict[str, Tensor]:
        """Those over tokens, and ``walk``: expected rounds and accepted tokens at the largest K."""
        rows = [(row.rounds, row.accepted) for row in self.walked if row.depth == self.walk_depths]
        return {**self.sums, "walk": torch.tensor([[0.0, 0.0], *rows], dtype=torch.float64).sum(0)}


def _per_depth(prefix: str, values: Float[Tensor, " K"]) -> dict[str, Tensor]:
    return {f"{prefix}/depth_{depth}": value for depth, value in enumerate(values, start=1)}


def rng_state() -> dict[str, Any]:
    """The random states of torch, numpy and Python, as plain data and tensors."""
    version, words, position, has_gauss, cached = np.random.get_state(legacy=True)
    python = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(version), torch.from_numpy(np.asarray(words).astype(np.int64)), position, has_gauss, cached],
        "python": [python[0], list(python[1]), python[2]],
    }


def restore_rng_state(state: dict[str, Any]) -> None:
    """Restores what ``rng_state`` saved."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    version, words, position, has_gauss, cached = state["numpy"]
    np.random.set_state((version, words.numpy().astype(np.uint32), position, has_gauss, cached))
    python = state["python"]
    random.setstate((python[0], tuple(python[1]), python[2]))
