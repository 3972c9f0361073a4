"""Does the gain, of objectives and of sharpness, depend on how well a draft does? Held-out answers in parts by that.

Answers are sorted by the acceptance length of kl's run of one seed into parts of equal number. Gains over kl are told
for the runs of another seed, so that chance in the first is no gain in the second. Reads what validation and
`lkspec walk sharpness=..` have stored.

    python experiments/ablations/by_difficulty.py --runs 'runs/ablation/mlp-*' --sort-by 1 --tell 2
"""

from __future__ import annotations

import argparse
from collections import defaultdict

from lkspec.measure.metrics import paired_difference_interval
from lkspec.reporting.counts import find_runs
from lkspec.reporting.series import Source
from lkspec.runs.folder import RunFolder

Counts = dict[str, tuple[float, float]]  # conversation -> (accepted, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs/ablation/mlp-*", help="of one draft and recipe, two seeds")
    parser.add_argument("--sort-by", type=int, default=1, help="seed of the run of kl that sorts the answers")
    parser.add_argument("--tell", type=int, default=2, help="seed of the runs that are told")
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=1.0)
    options = parser.parse_args()
    walks: dict[tuple[str, int], dict[float, Counts]] = {}
    for run in find_runs(options.runs):
        settings = Source(run).settings
        name = (str(settings["objective"]), int(settings["seed"]))
        if name in walks:
            parser.error(f"--runs: two are {name[0]} of seed {name[1]}; name runs of one draft and recipe")
        walks[name] = read_walk(run, options.temperature)
    for seed in (options.sort_by, options.tell):
        if ("kl", seed) not in walks:
            parser.error(f"--runs: none is kl of seed {seed}")
    parts = sorted_into(walks["kl", options.sort_by][1.0], options.parts)
    plain = walks["kl", options.tell][1.0]
    told = [{key: plain[key] for key in keys} for keys in parts]
    titles = [f"part {number}: {len(part)} answers" for number, part in enumerate(told, start=1)]
    print_row("objective", "s", *titles)
    print_row(*["---"] * (2 + len(parts)))
    print_row("kl", "1", *(f"{tau(part):.3f}" for part in told))
    for (objective, seed), by_sharpness in sorted(walks.items()):
        for sharpness, counts in sorted(by_sharpness.items()):
            if seed == options.tell and counts is not plain:
                print_row(objective, f"{sharpness:g}", *(gain(counts, part) for part in told))


def print_row(*cells: str) -> None:
    """A row of a Markdown table."""
    print(f"| {' | '.join(cells)} |")


def read_walk(run: RunFolder, temperature: float) -> dict[float, Counts]:
    """The walk at the largest K along answers of a temperature, by sharpness."""
    table = run.read_walk_table()
    rows = [] if table is None else [row for row in table.to_pylist() if row["temperature"] == temperature]
    deepest = max((row["depth"] for row in rows), default=0)
    found: dict[float, Counts] = defaultdict(dict)
    for row in rows:
        if row["depth"] == deepest:
            found[row["sharpness"]][row["key"]] = (row["accepted"], row["rounds"])
    return found


def sorted_into(counts: Counts, num_parts: int) -> list[list[str]]:
    """Conversations with a round in parts of equal number, the least accepted first."""
    order = sorted((key for key, (_, rounds) in counts.items() if rounds > 0), key=lambda key: ratio(counts[key]))
    return [order[i * len(order) // num_parts : (i + 1) * len(order) // num_parts] for i in range(num_parts)]


def ratio(count: tuple[float, float]) -> float:
    """Accepted tokens a round."""
    return count[0] / count[1]


def tau(counts: Counts) -> float:
    """1 + accepted / rounds."""
    return 1 + sum(accepted for accepted, _ in counts.values()) / sum(rounds for _, rounds in counts.values())


def gain(ours: Counts, plain: Counts) -> str:
    """The difference in tau over the answers of ``plain``, half of its 95 % interval, bold where that excludes 0."""
    value, low, high = paired_difference_interval({key: ours[key] for key in plain}, plain, confidence=0.95)
    text = f"{value:+.3f}"
    return f"{text if low <= 0 <= high else f'**{text}**'} ±{(high - low) / 2:.3f}"


if __name__ == "__main__":
    main()
