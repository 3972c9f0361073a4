"""The loss region, from hidden states to gradients of hidden states and head: time, memory, what is kept, products.

python experiments/performance/loss.py
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contestants import Case, both_passes, eager_lk_lambda, four_products, fused, make_case
from measuring import MIB, interleaved_seconds, peak_bytes, print_table, write_csv
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lkspec.losses.objectives import KL, TV, JensenShannon, LKAlpha, LKLambda, Objective

VOCAB = 32_000
NUM_THREADS = 2
SIZES = {"512 rows, H 512": (512, 512), "2048 rows, H 256": (2048, 256)}  # (rows, H)
Row = dict[str, object]

#: name -> objective, and whether its gradient is formed in the forward pass
CONTESTANTS: dict[str, tuple[Objective, bool]] = {
    "kl, in forward": (KL(), True),
    "tv, in forward": (TV(), True),
    "lk_alpha, in forward": (LKAlpha(), True),
    "lk_lambda fixed, in forward": (LKLambda(fixed_lambda=0.5), True),
    "kl, recompute": (KL(), False),
    "lk_alpha, recompute": (LKAlpha(), False),
    "lk_lambda, recompute": (LKLambda(), False),
    "jsd (form b), in forward": (JensenShannon(), True),
    "jsd (form b), recompute": (JensenShannon(), False),
}


def main() -> None:
    torch.set_num_threads(NUM_THREADS)
    rows: list[Row] = []
    for name, (num_rows, hidden_size) in SIZES.items():
        found = measure(make_case(num_rows, hidden_size, VOCAB, VOCAB))
        rows += [{"size": name, **row} for row in found]
    counts = count_over_depths()
    for name in SIZES:
        print_table(f"{name}, V = {VOCAB:,}, float32, {NUM_THREADS} threads", [r for r in rows if r["size"] == name])
    print_table("Kept for backward over 7 depths, and target-head products", counts)
    folder = Path(__file__).parent
    write_csv(folder / "loss.csv", rows)
    write_csv(folder / "loss_counts.csv", counts)


def losses(case: Case) -> dict[str, Callable[[], Tensor]]:
    """The eager loss, and the package's in every objective and mode."""
    ours = {name: fused(case, objective, in_forward=mode) for name, (objective, mode) in CONTESTANTS.items()}
    return {"eager lk_lambda": eager_lk_lambda(case), **ours}


def measure(case: Case) -> list[Row]:
    """Time and peak memory of every contestant, against the eager loss and against KL in the same mode."""
    contestants: dict[str, Callable[[], object]] = {"four products": four_products(case)}
    contestants |= {name: both_passes(case, loss) for name, loss in losses(case).items()}
    seconds = interleaved_seconds(contestants)
    peaks = {}
    for name, contestant in contestants.items():
        case.forget_gradients()
        peaks[name] = peak_bytes(contestant) if name != "four products" else 0
    case.forget_gradients()
    return [
        {
            "contestant": name,
            "seconds": seconds[name],
            "of eager": seconds[name] / seconds["eager lk_lambda"],
            "of four products": seconds[name] / seconds["four products"],
            "of kl in the same mode": seconds[name] / seconds[_kl_of(name)] if _kl_of(name) else "",
            "of fastest kl": seconds[name] / min(seconds["kl, in forward"], seconds["kl, recompute"]),
            "peak MiB": peaks[name] / MIB,
            "peak of eager": peaks[name] / peaks["eager lk_lambda"],
        }
        for name in contestants
    ]


def _kl_of(name: str) -> str | None:
    mode = name.rpartition(", ")[2]
    return f"kl, {mode}" if f"kl, {mode}" in CONTESTANTS else None


def count_over_depths() -> list[Row]:
    """Saved tensors of [tokens, V] and saved bytes over 7 depths; rows that the target's head multiplies per token."""
    case = make_case(96, 32, 2_000, 2_000, num_depths=7)
    num_rows = int(case.mask[0].sum()) + case.num_depths - 1
    rows: list[Row] = []
    for name, loss in losses(case).items():
        saved = saved_tensors(loss, case)
        wide = [tensor for tensor in saved if tensor.ndim > 1 and tensor.shape[-1] == case.vocab.size]
        with HeadProducts(case.target_weight) as products:
            both_passes(case, loss)()
        rows.append(
            {
                "contestant": name,
                "kept [tokens, V]": len(wide),
                "kept KiB": sum(tensor.numel() * tensor.element_size() for tensor in saved) / 1024,
                "target products a token": products.num_rows / num_rows,
                "passes": 2 if "recompute" in name else 1,
            }
        )
    return rows


class Holder:
    """What the graph holds in a saved tensor's place."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_tensors(loss: Callable[[], Tensor], case: Case) -> list[Tensor]:
    """What the graph holds when forward ends, each memory once, besides the tensors that were given."""
    holders: weakref.WeakSet[Holder] = weakref.WeakSet()

    def hold(tensor: Tensor) -> Holder:
        holders.add(holder := Holder(tensor))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda holder: holder.tensor):
        value = loss()
    by_memory = {holder.tensor.untyped_storage().data_ptr(): holder.tensor for holder in holders}
    given = {tensor.untyped_storage().data_ptr() for tensor in (case.hidden, case.weight, case.target_hidden)}
    del value
    return [tensor for memory, tensor in by_memory.items() if memory not in given]


class HeadProducts(TorchDispatchMode):
    """Counts the rows that are multiplied with a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._memory = weight.untyped_storage().data_ptr()
        self.num_rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            factors = [arg for arg in args if isinstance(arg, Tensor)]
            if any(factor.untyped_storage().data_ptr() == self._memory for factor in factors):
                self.num_rows += factors[0].shape[0]
        return func(*args, **(kwargs or {}))


if __name__ == "__main__":
    main()
