"""The ablations on one GPU: answers of the target, the learning rate, sweeps, decoding.

    python experiments/ablations/prompts.py --out answers/prompts                       # needs LKSPEC_DATA
    python experiments/ablations/on_gpu.py answers --processes 4
    python experiments/ablations/on_gpu.py train lr --minutes 20 [--only medusa mlp]
    python experiments/ablations/on_gpu.py sharpness decode --minutes 10

A draft for a small target does not fill a GPU: a step waits for Python, and one process leaves most of the device idle.
So commands run side by side, each a sweep whose jobs share target, data and states. At the end of the minutes what is
still running is stopped; the same command goes on there, as finished runs are kept and half a run begins again. With
`nvidia-cuda-mps-control -d` before, kernels of several processes overlap.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lkspec.files import write_text
from lkspec.runs.find import list_runs

ANSWERS, RUNS, LOGS = Path("answers"), Path("runs/ablation_gpu"), Path("runs/ablation_gpu-logs")
FILES = {"train": 1, "heldout_t1": 1, "heldout_t0": 0}  # prompt file: temperature of its answers
DRAFTS = {
    "eagle3": ("optimizer.lr=2e-3",),
    "mlp": ("optimizer.lr=4e-3",),
    "medusa": ("optimizer.lr=4e-3",),
    "mtp": ("optimizer.lr=2e-3", "~draft.head_init"),  # it has no head of its own
}
MAIN = ("kl", "lk_alpha", "lk_lambda", "tv")
BEYOND = ("expected_length", "greedy_mixed", "temperature_mixed", "expected_length_lambda", "filter_aware")
# Who shares a process, as (drafts, seeds, objectives), what matters most first. A process keeps the target's states, so
# it has one draft, and one seed, whose runs are compared in pairs; slow drafts have two of them a seed.
SWEEPS = (
    *((draft, (seed,), MAIN) for draft in ("eagle3", "mtp") for seed in range(3)),
    *((draft, (seed,), (*MAIN, "lk_lambda_fixed")) for draft in ("mlp", "medusa") for seed in range(3)),
    *((draft, (seed,), ("lk_lambda_fixed",)) for draft in ("eagle3", "mtp") for seed in range(3)),
    *((draft, (seed,), BEYOND) for draft in ("mlp", "eagle3", "medusa") for seed in range(3)),
)
SHARPNESS = "1,1.125,1.25,1.5"
OTHER_RATES = {"eagle3": "1e-3,4e-3", "mlp": "2e-3,8e-3", "medusa": "2e-3,8e-3", "mtp": "1e-3,4e-3"}  # for kl
OTHER_ETAS = {"eagle3": "1,10", "mlp": "1,10", "medusa": "1,3", "mtp": "1,10"}  # for lk_lambda, beside the paper's


@dataclass(frozen=True)
class Lane:
    """A command that runs beside others."""

    name: str
    command: tuple[str, ...]


def lkspec(verb: str, *overrides: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "lkspec.cli", verb, *overrides)


def sweep(name: str, *overrides: str) -> Lane:
    return Lane(name, lkspec("train", "-m", "experiment=ablation_gpu", *overrides))


def run_lanes(lanes: Sequence[Lane], *, processes: int, minutes: float) -> bool:
    """Runs lanes in their order, so many at a time; stops what is left at the end. Whether all of them succeeded."""
    LOGS.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    start, waiting = time.monotonic(), list(lanes)
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    while waiting or running:
        while waiting and len(running) < processes:
            lane = waiting.pop(0)
            with (LOGS / f"{lane.name}.log").open("ab") as log:
                running[lane.name] = subprocess.Popen(lane.command, stdout=log, stderr=log, env=environment)
        time.sleep(0.2)
        seconds = time.monotonic() - start
        for name in [name for name, process in running.items() if process.poll() is not None]:
            status = running.pop(name).returncode
            print(f"{name}: ended with {status} after {seconds:.0f} s", flush=True)
            if status != 0:
                failed.append(name)
                print(f"  {_last_line(LOGS / f'{name}.log')} ({LOGS / f'{name}.log'})", flush=True)
        if seconds > 60 * minutes:
            for name, process in running.items():
                process.send_signal(signal.SIGKILL)
                print(f"{name}: stopped after {seconds:.0f} s", flush=True)
            print(f"not begun: {', '.join(lane.name for lane in waiting) or 'none'}", flush=True)
            return False
    return not failed


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").split("\n") if line.strip()]
    return lines[-1].strip() if lines else "it wrote nothing"


def answers(options: argparse.Namespace) -> None:
    """The target's answers to the prompt files, shard by shard; random numbers belong to a prompt, not to a shard."""
    lanes, shards = [], {}
    for name, temperature in FILES.items():
        rows = _lines(ANSWERS / "prompts" / f"{name}.jsonl")
        if name == "train" and len(rows) > options.train:
            rows = [rows[index * len(rows) // options.train] for index in range(options.train)]  # sorted by source
        count = options.processes if name == "train" else 1
        shards[name] = [ANSWERS / "shards" / f"{name}-{number}.jsonl" for number in range(count)]
        for number, out in enumerate(shards[name]):
            prompts = ANSWERS / "shards" / f"{name}-{number}-prompts.jsonl"
            prompts.parent.mkdir(parents=True, exist_ok=True)
            write_text(prompts, "".join(f"{row}\n" for row in rows[number::count]))
            settings = (f"prompts={prompts}", f"out={out}", f"temperature={temperature}", f"batch_size={options.rows}")
            fixed = ("max_new_tokens=256", "token_ids=true", "seed=0", "target.dtype=bfloat16")
            if not out.exists():
                lanes.append(Lane(out.stem, lkspec("generate", *settings, *fixed)))
    if not run_lanes(lanes, processes=options.processes + 2, minutes=options.minutes):
        sys.exit(f"answers are not complete: see {LOGS}, and start the same command again")
    for name, files in shards.items():
        texts = [line for file in files for line in _lines(file)]
        write_text(ANSWERS / f"{name}.jsonl", "".join(f"{line}\n" for line in sorted(texts, key=_id)))
        tokens = sum(len(json.loads(line)["token_ids"]) for line in texts)
        print(f"{name}: {len(texts):,} answers, {tokens:,} tokens")


def _lines(file: Path) -> list[str]:
    """Not splitlines: a text may hold U+2028 and other line breaks that JSON does not escape."""
    if not file.is_file():
        sys.exit(f"expected prompts at {file}, found nothing there: make them with prompts.py --out {file.parent}")
    return [line for line in file.read_text(encoding="utf-8").split("\n") if line]


def _id(line: str) -> str:
    return str(json.loads(line)["id"])


def lr(options: argparse.Namespace) -> list[Lane]:
    """kl at other learning rates than the one that all objectives train with."""
    shared = ("loss=kl", "seed=0", "run_root=runs/ablation_gpu_lr")
    return [
        sweep(f"lr-{draft}", f"draft={draft}", *DRAFTS[draft], *shared, f"optimizer.lr={OTHER_RATES[draft]}")
        for draft in options.only
    ]


def train(options: argparse.Namespace) -> list[Lane]:
    """Every objective for every draft and seed, then lk_lambda at other etas."""
    lanes = []
    for draft, seeds, objectives in SWEEPS:
        if draft in options.only:
            name = f"{draft}-{objectives[0]}-s{''.join(map(str, seeds))}"
            chosen = (f"seed={','.join(map(str, seeds))}", f"loss={','.join(objectives)}")
            lanes.append(sweep(name, f"draft={draft}", *DRAFTS[draft], *chosen))
    for draft in options.only:
        for seed in range(3):
            chosen = (f"seed={seed}", "loss=lk_lambda", f"loss.eta={OTHER_ETAS[draft]}")
            lanes.append(sweep(f"{draft}-eta-s{seed}", f"draft={draft}", *DRAFTS[draft], *chosen))
    return lanes


def sharpness(options: argparse.Namespace) -> list[Lane]:
    """The main objectives' runs served with q^s, along the answers sampled at T = 1."""
    answers = f"answers={ANSWERS / 'heldout_t1.jsonl'}"
    return _on_runs("walk", options, answers, f"sharpness=[{SHARPNESS}]")


def decode(options: argparse.Namespace) -> list[Lane]:
    """The three benchmarks, for every run of the main objectives that is there."""
    length = ("+benchmark.max_new_tokens=128", "num_draft_tokens=[4]", "batch_size=128")
    return _on_runs("evaluate", options, "benchmark=paper", f"benchmark.num_prompts={options.prompts}", *length)


def _on_runs(verb: str, options: argparse.Namespace, *settings: str) -> list[Lane]:
    """``lkspec VERB`` of the finished runs of the main objectives, each process having its share of them."""
    runs = [run for run in list_runs(RUNS) if run.is_finished and _is_main(run.config)]
    chosen = [
        run for run in runs if run.config["names"]["draft"] in options.only and run.config["seed"] in options.seeds
    ]
    shares = [chosen[number :: options.processes] for number in range(options.processes)]
    return [
        Lane(
            f"{verb}-{number}",
            lkspec(verb, "-m", f"run={','.join(str(run.path) for run in share)}", *settings),
        )
        for number, share in enumerate(shares)
        if share
    ]


def _is_main(config: Mapping[str, Any]) -> bool:
    """Of the main objectives, with the paper's eta where there is one."""
    paper_eta = config["draft"]["paper_eta"]
    return config["names"]["loss"] in MAIN and config["loss"].get("eta", paper_eta) == paper_eta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sweeps = {step.__name__: step for step in (train, lr, sharpness, decode)}
    parser.add_argument("steps", nargs="+", choices=("answers", *sweeps), help="their commands wait in this order")
    parser.add_argument("--processes", type=int, default=12, help="commands that run at a time")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which what still runs is stopped")
    parser.add_argument("--only", nargs="+", choices=DRAFTS, default=list(DRAFTS), help="drafts")
    parser.add_argument("--train", type=int, default=5000, help="answers: prompts to train on, evenly spaced")
    parser.add_argument("--rows", type=int, default=768, help="answers: decoded together by each process")
    parser.add_argument("--prompts", type=int, default=40, help="decode: of each benchmark")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="sharpness, decode: whose runs")
    options = parser.parse_args()
    if options.steps == ["answers"]:
        answers(options)
    elif "answers" in options.steps:
        parser.error("answers come before everything else, in a command of their own")
    else:
        lanes = [lane for step in options.steps for lane in sweeps[step](options)]
        run_lanes(lanes, processes=options.processes, minutes=options.minutes)


if __name__ == "__main__":
    main()
