"""Is what an objective gains more than sharpness? Finished runs, walked with q^s, renormalised, in place of q.

Verification is lossless for any q, so a draft may be sharpened after training: its logits times s. For each run, s is
chosen on held-out answers (by tau of the walk), and tau is told on others, at s = 1 and at the s chosen.

    python experiments/ablations/sharpness.py --runs runs/ablation/mlp-*-s0-* --states captured/smollm2_135m-embedded
    python experiments/ablations/sharpness.py --draw        # the picture again, from the file

The confirmation, by decoding the three benchmarks (LKSPEC_DATA) at T = 1, 20 prompts each, at most 64 tokens a turn:

    python experiments/ablations/sharpness.py --runs runs/ablation/mlp-kl-*-s0-* --decode 20 --sharpness 1 1.5
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from matplotlib import rc_context
from matplotlib.figure import Figure

from lkspec.acceptance import draft_stats, walk_rows
from lkspec.assemble import TrainedRun, load_run
from lkspec.builders import build_benchmarks
from lkspec.config import config_dir, instantiate, quiet_libraries
from lkspec.data.captured import CapturedStates
from lkspec.data.chat import Encoded
from lkspec.data.dataset import collate
from lkspec.evaluation import Setting, measure
from lkspec.figure_style import DPI, STYLE, WIDTH_INCHES, line_colour, line_marker, save
from lkspec.files import atomic_path
from lkspec.metrics import group_counts, paired_difference_interval
from lkspec.reporting.series import about_run
from lkspec.results import RunFolder

Counts = Mapping[str, tuple[float, float]]  # conversation -> (accepted, rounds)
Walks = Mapping[tuple[float, int], Counts]  # (sharpness, K)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", help="their folders")
    parser.add_argument("--states", type=Path, help="a capture of their data")
    parser.add_argument("--sharpness", type=float, nargs="+", default=[1.0, 1.25, 1.5, 1.75, 2.0, 2.5])
    parser.add_argument("--conversations", type=int, default=100, help="to choose on, and as many to tell tau on")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("sharpness.csv"))
    parser.add_argument("--draw", action="store_true", help="only draw what --out holds")
    parser.add_argument("--decode", type=int, help="only decode so many prompts of each benchmark, with each sharpness")
    options = parser.parse_args()
    if options.draw:
        draw(options.out)
        return
    if options.runs is None or (options.states is None and options.decode is None):
        parser.error("--runs with --states or --decode, or --draw")
    quiet_libraries()
    if options.decode is not None:
        for path in options.runs:
            decode(path, options.decode, options.sharpness)
        return
    if 1.0 not in options.sharpness:
        parser.error("--sharpness: 1 is what the others are compared with")
    names = [
        tuple(about_run(RunFolder.open(path)).settings[k] for k in ("draft", "objective", "seed"))
        for path in options.runs
    ]
    if twice := next((name for name in names if names.count(name) > 1), None):
        parser.error(f"--runs: two are {', '.join(map(str, twice))}; name runs of one recipe")
    rows: list[dict[str, object]] = []
    told: dict[str, Walks] = {}
    for path in options.runs:
        run = load_run(RunFolder.open(path))
        chosen_on, told_on = split(run, options.conversations)
        states, depths = CapturedStates(options.states, run.target), run.draft.num_depths
        choice = walks(run, states, chosen_on, options.sharpness)
        best = max(options.sharpness, key=lambda s: tau(choice[s, depths]))
        told[path.name] = own = walks(run, states, told_on, options.sharpness)
        settings = about_run(run.folder).settings
        for (sharpness, depth), counts in own.items():
            rows.append(
                {
                    "run": path.name, "draft": settings["draft"], "objective": settings["objective"],
                    "seed": settings["seed"], "sharpness": sharpness, "is_chosen": sharpness == best,
                    "num_draft_tokens": depth, "tau": round(tau(counts), 5),
                    "tau_where_chosen": round(tau(choice[sharpness, depth]), 5), "conversations": len(counts),
                }
            )  # fmt: skip
        plain, sharp = own[1.0, depths], own[best, depths]
        print(f"{path.name}: tau {tau(plain):.3f}, at sharpness {best:g} {tau(sharp):.3f}, gain {gain(sharp, plain)}")
    with atomic_path(options.out) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    draw(options.out)
    compare(rows, told)


def draw(file: Path) -> None:
    """tau over sharpness beside the file: a panel a draft, a line an objective, its choice filled."""
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    deepest = {row["run"]: max(int(r["num_draft_tokens"]) for r in rows if r["run"] == row["run"]) for row in rows}
    rows = [row for row in rows if int(row["num_draft_tokens"]) == deepest[row["run"]]]
    drafts, objectives = (list(dict.fromkeys(row[key] for row in rows)) for key in ("draft", "objective"))
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 3.4), dpi=DPI, layout="constrained")
        panels = figure.subplots(1, len(drafts), squeeze=False)[0]
        for panel, draft in zip(panels, drafts, strict=True):
            panel.set_title(draft)
            panel.set_xlabel("sharpness s")
            for index, objective in enumerate(objectives):
                line = [row for row in rows if (row["draft"], row["objective"]) == (draft, objective)]
                points = sorted((float(r["sharpness"]), float(r["tau"]), r["is_chosen"] == "True") for r in line)
                look = {"color": line_colour(index), "marker": line_marker(index)}
                if points:
                    panel.plot(*zip(*(p[:2] for p in points), strict=True), label=objective, mfc="white", **look)
                    panel.plot(*zip(*(p[:2] for p in points if p[2]), strict=True), linestyle="none", **look)
        panels[0].set_ylabel(f"acceptance length (walk, T = 1, K = {max(deepest.values())})")
        handles = {text: h for panel in panels for h, text in zip(*panel.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside right upper")
        save(figure, file.with_suffix(".png"))


def decode(path: Path, num_prompts: int, grid: Sequence[float]) -> None:
    """tau by real decoding with each sharpness, and its gain over the first, the prompts of all benchmarks pooled."""
    limits = [f"benchmark.num_prompts={num_prompts}", "++benchmark.max_new_tokens=64"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        benchmarks = build_benchmarks(compose("evaluate", overrides=["benchmark=paper", *limits]).benchmark)
    first: Counts | None = None
    for sharpness in grid:
        run = load_run(RunFolder.open(path))
        run.draft.sharpen(sharpness)
        counts: dict[str, tuple[float, float]] = {}
        for benchmark in benchmarks:
            setting = Setting(temperature=1.0, num_draft_tokens=run.draft.num_depths)
            measured = measure(run.target, run.draft, benchmark, setting, batch_size=20)
            here = group_counts(measured.prompt_rounds())
            print(f"{path.name}, sharpness {sharpness:g}: {benchmark.name} tau {tau(here):.3f}", flush=True)
            counts |= {f"{benchmark.name} {group}": sums for group, sums in here.items()}
        over = "" if first is None else f", over the first {gain(counts, first)}"
        first = first or counts
        print(f"{path.name}, sharpness {sharpness:g}: tau {tau(counts):.3f}{over}", flush=True)


def split(run: TrainedRun, count: int) -> tuple[list[Encoded], list[Encoded]]:
    """Held-out answers sampled at T = 1: some to choose on, others to tell tau on, both evenly spaced."""
    data = instantiate(run.config.data)
    data.bind(run.target.tokenizer, eos_ids=run.target.eos_ids, max_positions=run.target.max_positions)
    data.setup()
    answers = data.val_conversations(1.0)
    if len(answers) < 2 * count:
        raise ValueError(f"--conversations {count}: {run.folder.path} has {len(answers)} held-out answers at T = 1")
    spaced = [answers[index * len(answers) // (2 * count)] for index in range(2 * count)]
    return spaced[::2], spaced[1::2]


@torch.inference_mode()
def walks(run: TrainedRun, states: CapturedStates, answers: Sequence[Encoded], grid: Sequence[float]) -> Walks:
    """The walk along answers with each sharpness."""
    found: dict[tuple[float, int], dict[str, tuple[float, float]]] = defaultdict(dict)
    for answer in answers:
        batch = collate([[answer]])
        known = states(batch)
        for sharpness in grid:
            stats = draft_stats(run.draft, batch, known, run.target.head, sharpness=sharpness)
            for row in walk_rows(batch, stats, temperature=1.0, num_depths=run.draft.num_depths, steps=run.step):
                found[sharpness, row.depth][row.key] = (row.accepted, row.rounds)
    return dict(found)


def tau(counts: Counts) -> float:
    """1 + accepted / rounds."""
    return 1 + sum(accepted for accepted, _ in counts.values()) / sum(rounds for _, rounds in counts.values())


def gain(first: Counts, second: Counts) -> str:
    """The difference in tau and its 95 % interval."""
    difference, low, high = paired_difference_interval(first, second, confidence=0.95)
    return f"{difference:+.3f} ({low:+.3f} to {high:+.3f})"


def compare(rows: Sequence[dict[str, object]], told: Mapping[str, Walks]) -> None:
    """Each run against kl of its draft and seed, both as they are and both sharpened."""
    depths = {row["run"]: max(int(str(r["num_draft_tokens"])) for r in rows if r["run"] == row["run"]) for row in rows}
    best = {row["run"]: float(str(row["sharpness"])) for row in rows if row["is_chosen"]}
    about = {row["run"]: (row["draft"], row["seed"], row["objective"]) for row in rows}
    for name, (draft, seed, objective) in about.items():
        base = next((other for other, what in about.items() if what == (draft, seed, "kl")), None)
        if base is None or base == name:
            continue
        ours, theirs, depth = told[str(name)], told[str(base)], depths[name]
        plain = gain(ours[1.0, depth], theirs[1.0, depth])
        sharp = gain(ours[best[name], depth], theirs[best[base], depth])
        print(f"{draft} seed {seed}, {objective} over kl: as trained {plain}, both sharpened {sharp}")


if __name__ == "__main__":
    main()
