"""Small run folders with results, made by code: what decoding and validation would have left behind."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from lkspec.runs import folder as results
from lkspec.runs.folder import RunFolder
from lkspec.runs.rows import ResultRow, RoundRow, TokenRow, WalkRow

CONFIG: dict[str, Any] = {
    "draft": {"_target_": "lkspec.drafts.mlp.MLP", "num_depths": 3},
    "target": {"_target_": "lkspec.targets.tiny.TinyTarget"},
    "data": {"train": "tiny:10", "validation": "tiny:8", "seed": 0},
    "optimizer": {"lr": 0.001},
    "vocab": {"size": 64},
}
LOSSES = {"kl": {}, "tv": {}, "lk_alpha": {}, "lk_lambda": {"eta": 3.0}, "lk_lambda_fixed": {"fixed_lambda": 0.5}}


def make_run(
    root: Path,
    *,
    draft: str = "mlp",
    loss: str = "kl",
    seed: int = 0,
    tag: str = "00000000",
    arguments: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    overrides: Sequence[str] | None = None,
) -> RunFolder:
    """A finished run without results; ``measure`` and ``walk_held_out`` add them."""
    changed = {**CONFIG, **(config or {})}
    data = {**changed["data"], "seed": seed}
    names = {"draft": draft, "loss": loss, "target": "tiny", "data": "tiny"}
    given = LOSSES[loss] if arguments is None else arguments
    of_loss = {"_target_": f"lkspec.losses.objectives.{loss}", **given}
    typed = [f"draft={draft}", f"loss={loss}", f"seed={seed}"] if overrides is None else list(overrides)
    name = f"{draft}-{loss}-tiny-s{seed}-{tag}"
    full = {**changed, "data": data, "names": names, "loss": of_loss, "seed": seed}
    origin = {"commit": "none", "dirty": "none"}
    # Asking git for every run would take most of the time.
    with patch.object(results, "_git_state", lambda: origin):
        return RunFolder.create(root, name, config=full, overrides=typed)


def measure(run: RunFolder, *, with_rounds: bool = True, **options: Any) -> ResultRow:
    """Adds a decoded benchmark; ``options`` as in ``decoded``."""
    row, rounds = decoded(run, **options)
    run.write_results([row])
    if with_rounds:
        run.write_rounds(rounds)
    return row


def decoded(
    run: RunFolder,
    *,
    benchmark: str = "mini_chat",
    temperature: float = 1.0,
    depths: int = 3,
    num_prompts: int = 12,
    gain: float = 0.0,
    protocol: dict[str, Any] | None = None,
    sharpness: float = 1.0,
    **changes: Any,
) -> tuple[ResultRow, list[RoundRow]]:
    """A decoded benchmark: every prompt has its own acceptance rate, raised by ``gain``."""
    config = run.config
    rounds = [
        RoundRow(benchmark, f"{benchmark}-{p}", 0, temperature, depths, "lkspec", sharpness, n, n, accepted, n > 18)
        for p in range(num_prompts)
        for n, accepted in enumerate(_accepted(run, p, depths, gain))
    ]
    accepted = np.array([row.accepted for row in rounds])
    whole = np.array([row.accepted for row in rounds if not row.past_end])
    full = {"name": benchmark, "num_prompts": num_prompts, "max_new_tokens": 32, "batch_size": 4, **(protocol or {})}
    loss_args = {key: value for key, value in config["loss"].items() if key != "_target_"}
    row = ResultRow(
        run=run.name, commit="none", code_hash="ab", draft=config["names"]["draft"], loss=config["names"]["loss"],
        loss_args=json.dumps(loss_args), target="tiny", data_fingerprint="f", seed=config["seed"],
        supervised_tokens=100, steps=10, benchmark=benchmark, temperature=temperature, num_draft_tokens=depths,
        engine="lkspec", sharpness=sharpness, tau=1 + float(accepted.mean()), low=1.0, high=2.0,
        alpha=tuple(float((accepted >= k).mean()) for k in range(1, depths + 1)),
        tau_whole_rounds=1 + float(whole.mean()), walk_tau=None, walk_over_k="[]", tokens_per_second=10.0, speedup=None,
        num_prompts=num_prompts, eta=None, eta_source=None, protocol=json.dumps(full),
    )  # fmt: skip
    return ResultRow(**{**vars(row), **changes}), rounds


def _accepted(run: RunFolder, prompt: int, depths: int, gain: float) -> list[int]:
    """Accepted tokens of 20 rounds; runs of one seed share their random numbers, as paired decoding nearly does."""
    generator = np.random.default_rng((run.config["seed"], prompt))
    rate = np.random.default_rng(prompt).uniform(0.2, 0.6) + gain
    return [int(np.cumprod(generator.random(depths) < rate).sum()) for _ in range(20)]


def walk_held_out(
    run: RunFolder,
    *,
    temperatures: Sequence[float] = (0.0, 1.0),
    num_texts: int = 16,
    depths: int = 3,
    gain: float = 0.0,
    sharpness: float = 1.0,
) -> list[WalkRow]:
    """Adds to walk.parquet."""
    rows = []
    for temperature in temperatures:
        for text in range(num_texts):
            generator = np.random.default_rng((run.config["seed"], text, int(temperature)))
            rate = np.random.default_rng(text).uniform(0.2, 0.6) + 0.01 * generator.standard_normal() + gain
            for depth in range(1, depths + 1):
                rows.append(
                    WalkRow(
                        conversation=f"{('chat', 'code')[text % 2]}-{text:02}",
                        key=f"{temperature:g}-{text:032x}",
                        temperature=temperature,
                        steps=10,
                        depth=depth,
                        sharpness=sharpness,
                        num_tokens=20,
                        alpha=20 * rate * 0.9 ** (depth - 1),
                        rounds=10.0,
                        accepted=10 * float(np.sum(rate ** np.arange(1, depth + 1))),
                        at_least=10 * rate**depth,
                    )
                )
    run.add_walk(rows)
    return rows


def make_study(root: Path, *, seeds: Sequence[int] = (0, 1, 2), gain: float = 0.1) -> Path:
    """Runs of kl and lk_lambda for two drafts: decoded at T = 0 and 1 on two benchmarks, and walked."""
    for draft in ("medusa", "mlp"):
        for loss in ("kl", "lk_lambda"):
            for seed in seeds:
                run = make_run(root, draft=draft, loss=loss, seed=seed)
                better = gain if loss == "lk_lambda" else 0.0
                settings = itertools.product(("mini_chat", "mini_code"), (0.0, 1.0))
                measured = [decoded(run, benchmark=name, temperature=t, gain=better) for name, t in settings]
                run.write_results(row for row, _ in measured)
                run.write_rounds(row for _, rounds in measured for row in rounds)
                walk_held_out(run, gain=better)
                alphas = {f"val/T1/alpha/depth_{k}": 0.3 for k in (1, 2, 3)}
                run.write_metrics({"val/T1/walk_acceptance_length": 1.5, **alphas})
    return root


def store_tokens(run: RunFolder, *, num_texts: int = 4, num_tokens: int = 20) -> list[TokenRow]:
    """Adds tokens.parquet."""
    words = [" the", "ing", ".", "7", "\n", " <"]
    generator = np.random.default_rng(0)
    rows = [
        TokenRow(
            conversation=f"{('chat', 'code')[text % 2]}-{text:02}",
            position=position,
            text=words[position % len(words)],
            depth=depth,
            alpha=float(generator.random()),
            accept_prob=float(generator.random()),
            entropy=float(5 * generator.random()),
            coverage=0.9,
        )
        for text in range(num_texts)
        for depth in (1, 2)
        for position in range(depth, num_tokens)
    ]
    run.write_tokens(rows)
    return rows
