"""The losses on a GPU: correct first, then times and memory beside their limits, one table last.

    PYTHONPATH=. python3 experiments/performance/gpu.py [--tune] [--speculators .../speculators/losses/fused.py]
    TRITON_INTERPRET=1 python experiments/performance/gpu.py --tiny --device cpu      # does the script itself run?

Contestants take turns; a time is what lies between two CUDA events, minimum and median of the rounds after a first one
that does not count. Logits are restored before each round, outside the events. bfloat16 logits, float32 statistics.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lkspec.drafts.eagle3 import Eagle3
from lkspec.losses.divergences import logit_stats
from lkspec.losses.fused import torch_rows, triton_rows
from lkspec.losses.fused.in_forward import InForward
from lkspec.losses.fused.logits import Logits, Scratch
from lkspec.losses.fused.token_stats import token_stats
from lkspec.losses.objectives import LKAlpha, LKLambda, masked_sums, reduce_loss
from lkspec.losses.target_filter import TargetFilter
from lkspec.types import Batch, DecoderDims, LinearHead, TargetSpec, TargetStates
from lkspec.vocab import DraftVocab

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}  # dense bfloat16, by a part of the device's name
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    rows: int = 4096
    hidden: int = 4096
    small: int = 32_000
    large: int = 151_936
    heads: tuple[int, int] = (32, 8)
    ffn: int = 14_336
    slots: int = 2048
    depths: int = 7
    rounds: int = 9
    num_tiles: int = 16


TINY = Sizes(rows=6, hidden=16, small=40, large=72, heads=(2, 1), ffn=24, slots=12, depths=2, rounds=2, num_tiles=1)


class Contestant(NamedTuple):
    """Something to time: ``prepare`` runs before each round, outside the events."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


class Timing(NamedTuple):
    """Milliseconds."""

    best: float
    median: float


@dataclass
class Report:
    """The table, a row a measurement; limits are of full sizes on a GPU."""

    has_limits: bool
    lines: list[tuple[str, str, str, str]] = field(default_factory=list)

    def add(self, name: str, value: float, unit: str, limit: float | None, *, note: str = "") -> None:
        limit = limit if self.has_limits else None
        bound = "" if limit is None else f"<= {limit:g} {'yes' if value <= limit else 'NO'}"
        self.lines.append((name, f"{value:.4g} {unit}", bound, note))
        print("  ".join(self.lines[-1]), flush=True)

    def missing(self, name: str, why: str) -> None:
        self.lines.append((name, "-", "", why))
        print(f"{name}: {why}", flush=True)

    def print(self, title: str) -> None:
        widths = [max(len(line[i]) for line in self.lines) for i in range(4)]
        print(f"\n{title}")
        for line in self.lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


class Bench:
    """Sizes, a device, and how to time on it."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = BF16, std: float = 1.0) -> Tensor:
        return (
            torch.randn(*shape, generator=self.generator, device=self.device, dtype=torch.float32).mul_(std).to(dtype)
        )

    def vocab(self, size: int, target_size: int) -> DraftVocab:
        """Every so-manyth token."""
        return DraftVocab(torch.arange(size) * target_size // size, target_size).to(self.device)

    def tokens(self, *shape: int, below: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator, device=self.device)

    def interleaved(self, contestants: Mapping[str, Contestant]) -> dict[str, Timing]:
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(self.sizes.rounds + 1):
            for name, contestant in contestants.items():
                contestant.prepare()
                milliseconds = self.milliseconds(contestant.run)
                if number > 0:
                    times[name].append(milliseconds)
        return {name: Timing(min(each), statistics.median(each)) for name, each in times.items()}

    def milliseconds(self, run: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def peak_mib(self, run: Callable[[], object]) -> float:
        """Above what is allocated before; 0 on a CPU."""
        if self.device.type != "cuda":
            run()
            return 0.0
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


# The row kernels.


class RowCase:
    """Logits of some rows, kept so that each round starts from them."""

    def __init__(self, bench: Bench, vocab: DraftVocab, num_rows: int, dtype: torch.dtype = BF16) -> None:
        self.vocab, self.num_rows = vocab, num_rows
        self.pristine = bench.normal(num_rows, vocab.size, dtype=dtype, std=2.0)
        self.draft = self.pristine.clone()
        self.target = bench.normal(num_rows, vocab.target_size, dtype=dtype, std=2.0)
        self.tokens = bench.tokens(num_rows, below=vocab.target_size)
        self.scratch = Scratch(bench.device, torch.float32)
        self.slopes = {name: torch.rand(num_rows, device=bench.device) for name in ("kl", "log_alpha", "reverse_kl")}
        self.head = LinearHead(torch.empty(0, 0))

    def restore(self) -> None:
        self.draft.copy_(self.pristine)

    def run(
        self, names: tuple[str, ...], *, rows: types.ModuleType = triton_rows, in_one: bool = False, **options: Any
    ) -> dict[str, Tensor]:
        """Target, statistics and slopes; ``in_one`` as backward asks for them, without the text's statistics."""
        target = rows.read_target(
            Logits(self.target, self.head, 1.0), self.vocab, TargetFilter(), self.scratch, **options
        )
        draft = Logits(self.draft, self.head, 1.0)
        stats = {} if in_one else rows.row_stats(draft, target, self.tokens, self.vocab, self.scratch, **options)
        slopes = {name: self.slopes[name] for name in names}
        rows.d_logits(draft, target, stats, slopes, self.scratch, **options)
        return stats


def check(bench: Bench) -> None:
    """Kernels against the definition in float64, at sizes that are then timed; exits where they differ."""
    sizes = bench.sizes
    names = ("kl", "log_alpha", "reverse_kl")
    for shape, dtype in product(
        ((sizes.small, sizes.small), (sizes.large, sizes.large), (sizes.small, sizes.large), (37, 131)),
        (torch.float32, BF16),
    ):
        case = RowCase(bench, bench.vocab(*shape), 33, dtype)
        leaf = case.pristine.double().requires_grad_()
        truth = logit_stats(leaf, case.target.double(), case.tokens, case.vocab)
        (d_truth,) = torch.autograd.grad(sum((truth[name] * case.slopes[name]).sum() for name in names), leaf)
        for in_one in (False, True):
            case.restore()
            stats = case.run(names, in_one=in_one)
            errors = {name: float((stats[name] - truth[name]).abs().max()) for name in stats}
            errors["gradient"] = float((case.draft.double() - d_truth).norm() / d_truth.norm())
            limits = dict.fromkeys(errors, 2e-5) | {"gradient": 1e-5 if dtype == torch.float32 else 8e-3}
            print(f"check {shape} {dtype} in_one={in_one}: " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))
            if not all(errors[name] <= limits[name] for name in errors):
                raise SystemExit(f"wrong: {errors}")
            again = case.draft.clone()
            case.restore()
            case.run(names, in_one=in_one)
            if not torch.equal(again, case.draft):
                raise SystemExit("two runs differ")


def row_kernels(bench: Bench, report: Report) -> None:
    """P8."""
    small, large = bench.sizes.small, bench.sizes.large
    for size, target_size, limit in ((small, small, 0.30), (large, large, 1.4), (small, large, None)):
        row_kernels_at(bench, report, RowCase(bench, bench.vocab(size, target_size), bench.sizes.rows), limit)


def row_kernels_at(bench: Bench, report: Report, case: RowCase, limit: float | None) -> None:
    copied = torch.empty_like(case.target)
    times = bench.interleaved(
        {
            "lk": Contestant(lambda: case.run(("kl", "log_alpha")), case.restore),
            "kl": Contestant(lambda: case.run(("kl",)), case.restore),
            "lk in one": Contestant(lambda: case.run(("kl", "log_alpha"), in_one=True), case.restore),
            "kl in one": Contestant(lambda: case.run(("kl",), in_one=True), case.restore),
            "torch": Contestant(lambda: case.run(("kl", "log_alpha"), rows=torch_rows), case.restore),
            "copy": Contestant(lambda: copied.copy_(case.target)),
        }
    )
    least = times["copy"].best * (case.target.numel() + 2 * case.draft.numel()) / (2 * case.target.numel())
    where = f"{case.num_rows} rows, D {case.vocab.size}, V {case.vocab.target_size}"
    for name in ("lk", "lk in one", "torch"):
        note = f"median {times[name].median:.3f}; reading all and writing slopes once at a copy's speed {least:.3f}"
        report.add(f"P8 {name}: {where}", times[name].best, "ms", limit if name != "torch" else None, note=note)
    for name in ("", " in one"):
        report.add(f"P8 lk/kl{name}: {where}", times[f"lk{name}"].best / times[f"kl{name}"].best, "x", 1.02)


def tune(bench: Bench) -> None:
    """Every plausible tile at both widths, each kernel by itself."""
    tiles = [
        triton_rows.Tile(1, lanes, warps)
        for lanes, warps in product((128, 256, 512, 1024), (4, 8, 16, 32))
        if 1 <= lanes // (32 * warps) <= 4
    ][: bench.sizes.num_tiles]
    for size in (bench.sizes.small, bench.sizes.large):
        case = RowCase(bench, bench.vocab(size, size), bench.sizes.rows)
        for name, kernel in kernels(case).items():
            runs = {str(tuple(tile)): Contestant(partial(kernel, tile=tile), case.restore) for tile in tiles}
            times = sorted((timing.best, tile) for tile, timing in bench.interleaved(runs).items())
            print(f"tune {name} at {size}: " + ", ".join(f"{tile} {best:.3f}" for best, tile in times), flush=True)


def kernels(case: RowCase) -> dict[str, Callable[..., object]]:
    """Each kernel alone."""
    logits, draft = Logits(case.target, case.head, 1.0), Logits(case.draft, case.head, 1.0)
    slopes = {name: case.slopes[name] for name in ("kl", "log_alpha")}
    target = triton_rows.read_target(logits, case.vocab, TargetFilter(), case.scratch)
    stats = triton_rows.row_stats(draft, target, case.tokens, case.vocab, case.scratch)
    return {
        "target": partial(triton_rows.read_target, logits, case.vocab, TargetFilter(), case.scratch),
        "stats": partial(triton_rows.row_stats, draft, target, case.tokens, case.vocab, case.scratch),
        "slopes": partial(triton_rows.d_logits, draft, target, stats, slopes, case.scratch),
        "in one": partial(triton_rows.d_logits, draft, target, {}, slopes, case.scratch),
    }


# From hidden states.


class LinearCase:
    """Hidden states of an unpadded row at K depths, one head for all of them."""

    def __init__(self, bench: Bench, num_depths: int, num_slots: int, vocab_size: int, *, head_learns: bool) -> None:
        width = bench.sizes.hidden
        length = num_slots + num_depths + 1
        self.mask = torch.zeros(num_depths, 1, length, dtype=torch.bool, device=bench.device)
        self.mask[:, :, :num_slots] = True
        self.hidden = bench.normal(num_depths, 1, length, width).requires_grad_()
        self.weight = bench.normal(vocab_size, width, std=width**-0.5).requires_grad_(head_learns)
        self.target_hidden = bench.normal(1, length, width)
        self.target_weight = bench.normal(vocab_size, width, std=2 * width**-0.5)
        self.vocab = DraftVocab.full(vocab_size).to(bench.device)
        self.tokens = bench.tokens(1, length, below=vocab_size)
        self.counts = self.mask.sum((1, 2))

    def forget(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def step(self, *, in_forward: bool) -> None:
        """Forward and backward: lk_alpha in forward, adaptive lk_lambda by recomputation."""
        stats = token_stats(
            self.hidden,
            [LinearHead(self.weight)] * len(self.mask),
            self.target_hidden,
            LinearHead(self.target_weight),
            self.vocab,
            self.tokens,
            self.mask,
            in_forward=InForward.of(LKAlpha(), self.counts) if in_forward else None,
        )
        if in_forward:
            assert stats.value is not None
            loss = reduce_loss(stats.value, self.mask, self.counts)
        else:
            sums = masked_sums(stats)
            loss = reduce_loss(LKLambda().values(stats, sums["alpha"] / sums["count"]), self.mask, self.counts)
        loss.backward()


def fused_linear(bench: Bench, report: Report) -> None:
    """P9."""
    sizes = bench.sizes
    case = LinearCase(bench, 1, sizes.rows, sizes.small, head_learns=True)
    hidden, target_hidden = case.hidden.detach()[0, 0, : sizes.rows], case.target_hidden[0, : sizes.rows]
    weight, d_logits = case.weight.detach(), bench.normal(sizes.rows, sizes.small)
    logits, d_hidden, d_weight = torch.empty_like(d_logits), torch.empty_like(hidden), torch.empty_like(weight)

    def products() -> None:
        torch.mm(target_hidden, case.target_weight.T, out=logits)
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(d_logits, weight, out=d_hidden)
        torch.mm(d_logits.T, hidden, out=d_weight)

    times = bench.interleaved(
        {
            "products": Contestant(products),
            "in forward": Contestant(lambda: case.step(in_forward=True), case.forget),
            "recompute": Contestant(lambda: case.step(in_forward=False), case.forget),
        }
    )
    flops = 8 * sizes.rows * sizes.hidden * sizes.small
    speed = f"{flops / times['products'].best / 1e9:.0f} TFLOP/s"
    report.add(f"P9 the 4 products: {sizes.rows} x {sizes.hidden}", times["products"].best, "ms", None, note=speed)
    for name, limit in (("in forward", 1.15), ("recompute", 1.75)):
        note = f"{times[name].best:.3f} ms, median {times[name].median:.3f}"
        report.add(f"P9 {name} / products", times[name].best / times["products"].best, "x", limit, note=note)


def memory(bench: Bench, report: Report) -> None:
    """P10."""
    sizes = bench.sizes
    for size, limit in ((sizes.small, 1024), (sizes.large, 2048)):
        for in_forward in (True, False):
            case = LinearCase(bench, sizes.depths, sizes.slots, size, head_learns=False)
            case.step(in_forward=in_forward)  # what is allocated once, by cuBLAS for instance
            case.forget()
            peak = bench.peak_mib(lambda case=case, in_forward=in_forward: case.step(in_forward=in_forward))
            how = "in forward" if in_forward else "recompute"
            report.add(f"P10 peak, K {sizes.depths}, {sizes.slots} slots, V {size}, {how}", peak, "MiB", limit)


# A training step.


class Training:
    """EAGLE-3 of a target's shape, random weights, bfloat16 autocast over float32 weights, AdamW."""

    def __init__(self, bench: Bench) -> None:
        sizes, device = bench.sizes, bench.device
        head_dim = sizes.hidden // sizes.heads[0]
        dims = DecoderDims(
            hidden_size=sizes.hidden,
            num_heads=sizes.heads[0],
            num_kv_heads=sizes.heads[1],
            head_dim=head_dim,
            ffn_size=sizes.ffn,
            rms_norm_eps=1e-5,
            max_positions=sizes.slots,
            inv_freq=10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim),
            rope_attention_factor=1.0,
            rope_parameters={},
        )
        head = LinearHead(bench.normal(sizes.small, sizes.hidden, std=2 * sizes.hidden**-0.5))

        def new_layer(copied: bool) -> nn.Module:
            raise NotImplementedError("EAGLE-3 takes no layer of the target")

        spec = TargetSpec(dims, bench.normal(sizes.small, sizes.hidden), head, 3, "llama", new_layer)
        self.draft = Eagle3(spec, DraftVocab.full(sizes.small), num_depths=sizes.depths).to(device)
        self.head, self.device = head, device
        shape = (1, sizes.slots)
        whole = torch.ones(shape, dtype=torch.int64, device=device)
        positions = torch.arange(sizes.slots, device=device)[None]
        self.batch = Batch(bench.tokens(*shape, below=sizes.small), positions, whole, whole, (("one",),))
        self.states = TargetStates(bench.normal(*shape, 3 * sizes.hidden), bench.normal(*shape, sizes.hidden))
        self.optimizer = torch.optim.AdamW(self.draft.parameters(), lr=1e-5, fused=device.type == "cuda")
        self.flops = self._flops(sizes, head_dim)

    def _flops(self, sizes: Sizes, head_dim: int) -> float:
        """Of products that the mathematics asks for: forward, and twice that in backward; no recomputation.

        A product with a weight of n numbers takes 2 n a token. Attention at depth k: scores and mixture over the slots
        up to its own and k - 1 own entries. The target's head has no backward.
        """
        heads = sum(p.numel() for p in self.draft.lm_head.parameters())
        fused = sum(p.numel() for p in self.draft.fc.parameters())
        every = sum(p.numel() for p in self.draft.parameters() if p.ndim == 2) - heads - fused
        entries = sum(sizes.slots * ((sizes.slots + 1) / 2 + depth) for depth in range(sizes.depths))
        attention = 4 * entries * sizes.heads[0] * head_dim
        forward = 2 * sizes.slots * (fused + sizes.depths * (every + heads)) + attention
        return 3 * forward + 2 * sizes.slots * heads

    def step(self, objective: LKAlpha | LKLambda) -> None:
        self.optimizer.zero_grad()
        mask = self.batch.depth_mask(self.draft.num_depths)
        counts = mask.sum((1, 2))
        with torch.autocast(self.device.type, BF16):
            hidden = self.draft.unroll(self.batch, self.states)
            heads = [self.draft.head(depth) for depth in range(1, len(mask) + 1)]
            stats = token_stats(
                hidden, heads, self.states.last, self.head, self.draft.vocab, self.batch.tokens, mask,
                in_forward=InForward.of(objective, counts),
            )  # fmt: skip
        values = stats.value
        if values is None:
            values = objective.values(stats, masked_sums(stats)["alpha"] / counts)
        reduce_loss(values, mask, counts).backward()
        nn.utils.clip_grad_norm_(self.draft.parameters(), 0.5)
        self.optimizer.step()


def training(bench: Bench, report: Report) -> None:
    """P11."""
    train = Training(bench)
    times = bench.interleaved(
        {
            "lk_alpha, in forward": Contestant(lambda: train.step(LKAlpha())),
            "lk_lambda, recompute": Contestant(lambda: train.step(LKLambda())),
            "unroll alone, forward": Contestant(lambda: _unrolled(train)),
        }
    )
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    for what, timing in times.items():
        note = f"median {timing.median:.1f}"
        if not what.startswith("unroll"):
            rate = train.flops / timing.best * 1e3
            share = f"peak of {name!r} unknown" if peak is None else f"MFU {rate / peak:.1%}"
            note += f"; {train.flops / 1e12:.4g} TFLOP, {rate / 1e12:.4g} TFLOP/s, {share}"
        report.add(f"P11 EAGLE-3 step, {what}", timing.best, "ms", None, note=note)


def _unrolled(train: Training) -> None:
    with torch.no_grad(), torch.autocast(train.device.type, BF16):
        train.draft.unroll(train.batch, train.states)


# Beside another code base.


def speculators_losses(path: Path | None) -> types.ModuleType | str:
    """The fused losses of speculators: installed, or one file of it; otherwise why not."""
    if path is None:
        try:
            return importlib.import_module("speculators.losses.fused")
        except ImportError as error:
            return f"speculators is not here ({error}); give --speculators the file losses/fused.py of its wheel"
    # The file needs one function of its package, whose import needs much more.
    util = types.ModuleType("speculators.utils.util")
    util.is_npu_available = lambda: False  # type: ignore[attr-defined]
    packages = {name: types.ModuleType(name) for name in ("speculators", "speculators.utils")}
    sys.modules.update({**packages, "speculators.utils.util": util})
    spec = importlib.util.spec_from_file_location("speculators_fused", path)
    assert spec is not None, f"{path} is no Python file"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["speculators_fused"] = module
    spec.loader.exec_module(module)
    return module


def beside_speculators(bench: Bench, report: Report, path: Path | None) -> None:
    """P12: loss and d loss / dz from logits; theirs computes one loss, ours all statistics."""
    found = speculators_losses(path)
    if isinstance(found, str):
        report.missing("P12", found)
        return
    if bench.device.type == "cpu":
        report.missing("P12", "speculators' kernels are autotuned, which needs a GPU")
        return
    for size in (bench.sizes.small, bench.sizes.large):
        beside_speculators_at(bench, report, RowCase(bench, bench.vocab(size, size), bench.sizes.rows), found)


def beside_speculators_at(bench: Bench, report: Report, case: RowCase, found: types.ModuleType) -> None:
    leaf = case.pristine.clone()[None].requires_grad_()

    def theirs(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        leaf.grad = None
        loss(leaf, case.target[None]).sum().backward()

    times = bench.interleaved(
        {
            "kl": Contestant(lambda: case.run(("kl",)), case.restore),
            "lk": Contestant(lambda: case.run(("kl", "log_alpha")), case.restore),
            "their kl": Contestant(lambda: theirs(found.fused_kl_div_loss)),
            "their nla": Contestant(lambda: theirs(found.fused_nla_loss)),
            "their lk_hybrid": Contestant(lambda: theirs(found.fused_lk_hybrid_loss)),
        }
    )
    for ours, other in (("kl", "their kl"), ("lk", "their nla"), ("lk", "their lk_hybrid")):
        note = f"{times[ours].best:.3f} and {times[other].best:.3f} ms"
        report.add(
            f"P12 {ours} / {other}, V {case.vocab.size}", times[ours].best / times[other].best, "x", 1.0, note=note
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that run anywhere, to try the script")
    parser.add_argument("--tune", action="store_true", help="try the tiles of the row kernels before the rest")
    parser.add_argument("--only", nargs="*", default=["P8", "P9", "P10", "P11", "P12"])
    parser.add_argument("--speculators", type=Path, help="losses/fused.py of an unpacked speculators wheel")
    options = parser.parse_args()
    device = torch.device(options.device)
    bench, report = Bench(TINY if options.tiny else Sizes(), device), Report(has_limits=not options.tiny)
    if device.type == "cpu":  # the package itself chooses Triton on a GPU alone
        from lkspec.losses.fused import token_stats as module

        module.row_functions = lambda chunks, device: triton_rows  # type: ignore[assignment]
    check(bench)
    if options.tune:
        tune(bench)
    parts: dict[str, Callable[[], None]] = {
        "P8": lambda: row_kernels(bench, report),
        "P9": lambda: fused_linear(bench, report),
        "P10": lambda: memory(bench, report),
        "P11": lambda: training(bench, report),
        "P12": lambda: beside_speculators(bench, report, options.speculators),
    }
    for name in options.only:
        try:
            parts[name]()
        except torch.OutOfMemoryError as error:  # the rest of a lent GPU's minutes is still worth having
            report.missing(name, str(error).splitlines()[0])
        gc.collect()
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    report.print(f"{where}, torch {torch.__version__}, {'tiny sizes' if options.tiny else 'full sizes'}")


if __name__ == "__main__":
    main()
