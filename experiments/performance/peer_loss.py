"""The loss alone against speculators' eager losses, in their environment: from hidden states to gradients.

    python experiments/performance/peer_loss.py [--venv .bench-venv] [--rounds 7] [--threads 2]

Both begin with the same hidden states and heads and end with gradients of the draft's. Theirs is a function of logits,
so its two products belong to it. Values and gradients are compared before anything is timed. lk_lambda has each token's
own lambda here, as theirs has; training's takes the mean alpha of the depth.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from contestants import Case, both_passes, fused, make_case
from measuring import MIB, MIN_ROUNDS, peak_bytes, print_table, write_csv
from peer import HERE, Worker, environment, timed

from lkspec.losses.objectives import KL, LKAlpha, LKLambda, Objective

ROWS, HIDDEN, VOCAB = 512, 512, 32_000
#: objective -> ours, and what speculators calls it
OBJECTIVES: dict[str, tuple[Objective, str]] = {
    "kl": (KL(), "kl_div_loss"),
    "lk_alpha": (LKAlpha(), "neg_log_acceptance_loss"),
    "lk_lambda per token": (LKLambda(per_token=True), "lk_hybrid_loss"),
}


def main() -> None:
    """Prints the table and writes peer_loss.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(".bench-venv"), help="the peers' environment")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    python, case = environment(options.venv), make_case(ROWS, HIDDEN, VOCAB, VOCAB)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.pt"
        torch.save(
            {
                "hidden": case.hidden.detach()[0, 0, :ROWS].clone(),
                "weight": case.weight.detach(),
                "target_hidden": case.target_hidden[0, 1 : ROWS + 1].clone(),
                "target_weight": case.target_weight,
            },
            path,
        )
        worker = Worker(python, "peer_loss_worker.py", threads=options.threads, case=str(path))
        rows = [row(case, worker, name, options.rounds, Path(folder)) for name in OBJECTIVES]
        worker.close()
    print_table(f"loss alone, {ROWS} rows, H {HIDDEN}, V = D = {VOCAB:,}, speculators {worker.version}", rows)
    write_csv(HERE / "peer_loss.csv", rows)


def row(case: Case, worker: Worker, name: str, rounds: int, scratch: Path) -> dict[str, object]:
    """Seconds and peak memory of both, once they agree.

    Raises:
        RuntimeError: the losses or their gradients differ by more than rounding.
    """
    objective, theirs = OBJECTIVES[name]
    loss = fused(case, objective, in_forward=True)
    work = both_passes(case, loss)
    work()
    assert case.hidden.grad is not None
    answer = worker.ask(kind="compare", loss=theirs, path=str(scratch / "gradient.pt"))
    gradient, expected = case.hidden.grad[0, 0, :ROWS], torch.load(scratch / "gradient.pt", weights_only=True)
    # Where p and q are equal up to rounding, the two may take different sides of min(p, q), and slopes differ by q.
    error = float((gradient - expected).norm() / expected.norm())
    if error > 1e-3 or abs(float(loss()) - answer["value"]) > 1e-4:
        raise RuntimeError(f"{name}: {float(loss())} and {answer['value']}, gradients differ by {error:.1e}")

    def ours_seconds() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    seconds = timed({"ours": ours_seconds, "theirs": lambda: worker.ask(kind="seconds", loss=theirs)}, rounds)
    case.forget_gradients()
    peaks = peak_bytes(work) / MIB, worker.ask(kind="peak", loss=theirs) / MIB
    return {
        "objective": name,
        "ours_s": seconds["ours"],
        "speculators_s": seconds["theirs"],
        "speedup": seconds["theirs"] / seconds["ours"],
        "ours_mib": peaks[0],
        "speculators_mib": peaks[1],
        "memory_ratio": peaks[0] / peaks[1],
        "gradients_differ_by": error,
    }


if __name__ == "__main__":
    main()
