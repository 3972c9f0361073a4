"""P4: a whole EAGLE-3 training step against SpecForge 0.2.0's own model; the same weights and inputs, turns taken.

    python experiments/performance/peer.py [--venv .bench-venv] [--slots 256 1024] [--rounds 7] [--threads 2]

A step is the target's logits from its given hidden states, the unroll over K = 7 depths, the loss and backward, without
an optimiser on either side; ``kept`` is ours with the target's normalisers given as well, as a capture has them, or
every epoch but the first with ``states_memory_gb``. Depth 1's hidden states and every depth's alpha are compared before
anything is timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measuring import MIB, MIN_ROUNDS, peak_bytes, print_table, write_csv
from torch import Tensor

from lkspec.drafts.base import UnrollOptions
from lkspec.drafts.eagle3 import Eagle3
from lkspec.losses.fused.head_summary import head_summary
from lkspec.losses.fused.in_forward import InForward
from lkspec.losses.objectives import KL, LKLambda, Objective, masked_sums, reduce_loss
from lkspec.training.statistics import draft_stats
from lkspec.types import Batch, DecoderDims, LinearHead, TargetSpec, TargetStates
from lkspec.vocab import DraftVocab

HERE = Path(__file__).parent
H, N, M, FFN, V, D, K = 256, 8, 2, 688, 32_000, 8_000, 7
PEER_SIZES = {
    "hidden_size": H, "num_attention_heads": N, "num_key_value_heads": M, "intermediate_size": FFN,
    "vocab_size": V, "draft_vocab_size": D, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
}  # fmt: skip
GAMMA, ETA = 0.8, 3.0
OBJECTIVES: dict[str, Objective] = {"kl": KL(), "lk_lambda": LKLambda(ETA)}
# Outside specforge's own pins, which ask for a GPU stack; none of what is left out is used on this path.
PACKAGES = (
    "torch==2.13.0", "transformers==5.8.1", "datasets", "tqdm", "accelerate", "pydantic", "psutil", "pyyaml",
    "safetensors", "requests", "tensorboard", "numpy", "wandb", "openai-harmony", "triton",
)  # fmt: skip
WITHOUT_DEPENDENCIES = ("specforge==0.2.0", "yunchang", "speculators==0.9.0")


class Case:
    """Our draft, and a batch of one conversation whose last K + 1 positions are not supervised."""

    def __init__(self, num_slots: int) -> None:
        torch.manual_seed(0)
        dims = DecoderDims(
            hidden_size=H, num_heads=N, num_kv_heads=M, head_dim=H // N, ffn_size=FFN, rms_norm_eps=1e-6,
            max_positions=2048, inv_freq=10_000.0 ** (-torch.arange(H // N // 2) / (H // N // 2)),
            rope_attention_factor=1.0, rope_parameters={},
        )  # fmt: skip
        self.target_head = LinearHead(2 * H**-0.5 * torch.randn(V, H))
        spec = TargetSpec(dims, torch.randn(V, H), self.target_head, 3, "llama", lambda copied: torch.nn.Identity())
        self.draft = Eagle3(spec, DraftVocab(torch.arange(D) * (V // D), V), num_depths=K)
        with torch.no_grad():
            for parameter in self.draft.midlayer.parameters():  # at their first values depths hardly differ
                parameter.add_(0.05 * torch.randn_like(parameter))
        tokens = torch.randint(V, (1, num_slots))
        turns = torch.ones_like(tokens)
        turns[:, num_slots - K + 1 :] = 0  # SpecForge masks by target row, counted from the shifted start
        self.batch = Batch(tokens, torch.arange(num_slots)[None], torch.ones_like(tokens), turns, (("p4",),))
        self.states = TargetStates(torch.randn(1, num_slots, 3 * H), torch.randn(1, num_slots, H))
        self.kept = replace(self.states, summary=head_summary(self.target_head, self.states.last))

    def step(self, name: str, *, kept: bool = False) -> None:
        """Forward and backward, as ``SpeculatorModule.training_step`` runs them."""
        self.draft.zero_grad(set_to_none=True)
        objective, mask = OBJECTIVES[name], self.batch.depth_mask(K)
        counts = mask.sum((1, 2))
        in_forward = InForward.of(objective, counts, GAMMA)
        states = self.kept if kept else self.states
        stats = draft_stats(self.draft, self.batch, states, self.target_head, in_forward=in_forward)
        values = stats.value
        if values is None:
            sums = masked_sums(stats)
            values = objective.values(stats, sums["alpha"] / sums["count"])
        reduce_loss(values, stats.mask, counts, GAMMA).backward()

    def save(self, path: Path) -> None:
        """What the peer needs, in its words."""
        loss_mask = torch.ones(*self.batch.tokens.shape, 1, dtype=torch.int64)
        loss_mask[:, -(K + 1) :] = 0
        weights = {name: value for name, value in self.draft.state_dict().items() if name != "vocab.ids"}
        case = {
            "weights": weights, "vocab_ids": self.draft.vocab.ids, "embedding": self.draft.embedding,
            "target_head": self.target_head.weight, "tokens": self.batch.tokens, "aux": self.states.aux,
            "last": self.states.last, "loss_mask": loss_mask, "num_depths": K, "gamma": GAMMA, "eta": ETA,
        }  # fmt: skip
        torch.save(case, path)

    @torch.no_grad()
    def alphas(self) -> tuple[Tensor, list[float]]:
        """Depth 1's hidden states; mean alpha of each depth over rows whose top token is in the draft vocabulary."""
        stats = draft_stats(self.draft, self.batch, self.states, self.target_head)
        top = self.target_head.logits(self.states.last).argmax(-1)[0]
        inside = self.draft.vocab.to_draft(top) >= 0
        means = []
        for depth in range(1, K + 1):
            counted = stats.mask[depth - 1, 0, :-depth] & inside[depth:]
            means.append(float(stats.log_alpha[depth - 1, 0, :-depth][counted].exp().mean()))
        return self.draft.unroll(self.batch, self.states, 1)[0], means


class Worker:
    """The peer in its own process and environment."""

    def __init__(self, python: Path, script: str, **settings: Any) -> None:
        command = [str(python), str(HERE / script)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self.ask(**settings)["version"]

    def ask(self, **job: Any) -> Any:
        """Its answer to one request."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the peer's process ended with {self.process.wait()}; what it said stands above")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def environment(folder: Path) -> Path:
    """The Python of the peer's virtual environment, which is made when it is not there yet."""
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        print(f"making {folder}: about 3 GB, some minutes", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *PACKAGES], check=True)
        subprocess.run([*pip, "--no-deps", *WITHOUT_DEPENDENCIES], check=True)
        (folder / "complete").touch()
    return python


def compare(case: Case, worker: Worker, scratch: Path) -> None:
    """Refuses to time two models that do not compute the same.

    Raises:
        RuntimeError: depth 1's hidden states or any depth's alpha differ by more than rounding.
    """
    hidden, ours = case.alphas()
    theirs = worker.ask(kind="compare", path=str(scratch / "hidden.pt"))["alpha"]
    # Its last slot reads the token behind the text, ours token 0.
    error = float((hidden - torch.load(scratch / "hidden.pt", weights_only=True))[:, :-1].abs().max())
    rows = [{"depth": k, "ours": a, "theirs": b} for k, (a, b) in enumerate(zip(ours, theirs, strict=True), start=1)]
    print_table(f"mean alpha (depth 1's hidden states differ by at most {error:.1e})", rows)
    if error > 1e-4 or any(abs(row["ours"] - row["theirs"]) > 1e-4 for row in rows):
        raise RuntimeError("the two models do not compute the same: there is nothing to time")


def floor_seconds(num_slots: int, options: argparse.Namespace) -> float:
    """The step's matrix products alone, into memory that is there already.

    Forward, and twice that for gradients, of each depth's projections and head; once the target's head; both products
    of causal attention forward and five backward, halved. Nothing is computed twice.
    """
    pairs = [(2 * H, H), (2 * H, M * H // N), (2 * H, M * H // N), (H, H), (H, FFN), (H, FFN), (FFN, H), (H, D)]
    rows = num_slots - K - 1
    shapes = [(rows if size == D else num_slots, wide, size, 3 * K) for wide, size in pairs]
    shapes += [(num_slots, 3 * H, H, 2), (rows + K, H, V, 1)]
    work = [(torch.randn(r, i), torch.randn(i, o), torch.empty(r, o), times) for r, i, o, times in shapes]
    heads = [torch.randn(N, num_slots, H // N) for _ in range(2)]
    scores = torch.empty(N, num_slots, num_slots)

    def run() -> None:
        for left, right, out, times in work:
            for _ in range(times):
                torch.mm(left, right, out=out)
        for _ in range(7 * K // 2):
            torch.bmm(heads[0], heads[1].transpose(1, 2), out=scores)

    clock = getattr(time, options.clock)

    def seconds() -> float:
        start = clock()
        run()
        return clock() - start

    return timed({"floor": seconds}, options.rounds)["floor"]


def timed(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Minimum of what each contestant says its step took; turns as in ``interleaved_seconds``."""
    best = dict.fromkeys(contestants, float("inf"))
    for number in range(rounds + 2):  # the peer's first steps compile
        for name, contestant in contestants.items():
            gc.collect()
            seconds = contestant()
            if number > 1:
                best[name] = min(best[name], seconds)
    return best


def contest(num_slots: int, python: Path, options: argparse.Namespace) -> list[dict[str, object]]:
    """One row an objective."""
    case = Case(num_slots)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        case.save(scratch / "case.pt")
        worker = Worker(
            python, "peer_worker.py", threads=options.threads, case=str(scratch / "case.pt"), sizes=PEER_SIZES
        )
        compare(case, worker, scratch)
        floor = floor_seconds(num_slots, options)
        rows = [contest_row(case, worker, objective, options) for objective in OBJECTIVES]
        worker.close()
    return [{"slots": num_slots, **row, "floor_s": floor} for row in rows]


def contest_row(case: Case, worker: Worker, objective: str, options: argparse.Namespace) -> dict[str, object]:
    """Seconds and peak memory of ours, of ours compiled when asked for, and of the better of the peer's two paths."""

    clock = getattr(time, options.clock)

    def ours(*, compile: bool = False, kept: bool = False) -> float:
        case.draft.unroll_options = UnrollOptions(compile=compile)
        start = clock()
        case.step(objective, kept=kept)
        return clock() - start

    def theirs(compact: bool) -> float:
        return worker.ask(kind="seconds", objective=objective, compact=compact, clock=options.clock)

    contestants: dict[str, Callable[[], float]] = {
        "ours": ours, "kept": lambda: ours(kept=True),
        "logits": lambda: theirs(False), "compact": lambda: theirs(True),
    }  # fmt: skip
    if options.compile:
        contestants["ours_compiled"] = lambda: ours(compile=True)
    seconds = timed(contestants, options.rounds)
    case.draft.unroll_options = UnrollOptions()
    path = min(("logits", "compact"), key=seconds.__getitem__)
    peak = peak_bytes(lambda: case.step(objective)) / MIB
    peer_peak = worker.ask(kind="peak", objective=objective, compact=path == "compact") / MIB
    num_slots = case.batch.tokens.shape[1]
    row: dict[str, object] = {
        "objective": objective,
        "ours_s": seconds["ours"],
        "peer_s": seconds[path],
        "peer_path": path,
        "ours_tokens_per_s": num_slots / seconds["ours"],
        "speedup": seconds[path] / seconds["ours"],
        "kept_speedup": seconds[path] / seconds["kept"],
        "ours_mib": peak,
        "peer_mib": peer_peak,
        "memory_ratio": peak / peer_peak,
    }
    if options.compile:
        row["compiled_speedup"] = seconds[path] / seconds["ours_compiled"]
    return row


def main() -> None:
    """Prints the table and writes peer.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--venv", type=Path, default=Path(".bench-venv"), help="the peer's environment, made if missing"
    )
    parser.add_argument("--slots", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock",
        choices=("perf_counter", "process_time"),
        default="perf_counter",
        help="process_time with --threads 1 compares processor time, where others use the machine as well",
    )
    parser.add_argument("--compile", action="store_true", help="time ours under unroll.compile=true as well")
    parser.add_argument("--out", type=Path, default=HERE / "peer.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    python = environment(options.venv)
    rows = [row for num_slots in options.slots for row in contest(num_slots, python, options)]
    write_csv(options.out, rows)
    print_table(f"P4: one training step, {options.threads} threads, {options.clock}, torch {torch.__version__}", rows)


if __name__ == "__main__":
    sys.exit(main())
