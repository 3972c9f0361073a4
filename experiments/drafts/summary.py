"""Tables of the comparison: acceptance lengths by decoding, the walk over held-out answers, parameters.

python experiments/drafts/summary.py --run-root runs
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lkspec.runs.find import list_runs
from lkspec.runs.folder import RunFolder
from lkspec.runs.rows import ResultRow
from lkspec.runs.tables import write_rows

ORDER = ("eagle3", "mtp", "mlp", "medusa")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-root", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.csv"))
    options = parser.parse_args()
    runs = sorted(list_runs(options.run_root), key=lambda run: (ORDER.index(_first(run).draft), _first(run).loss))
    rows = [row for run in runs for row in run.read_results()]
    write_rows(options.out, ResultRow, rows)
    for temperature in (0.0, 1.0):
        print(f"\nT = {temperature:g}\n")
        print_decoded(runs, temperature)
    print("\nheld-out answers\n")
    print_held_out(runs)


def print_decoded(runs: list[RunFolder], temperature: float) -> None:
    """tau with its interval, a row a benchmark and a column a run."""
    tables = [{row.benchmark: row for row in run.read_results() if row.temperature == temperature} for run in runs]
    print(f"| benchmark | {' | '.join(_title(_first(run)) for run in runs)} |")
    print("|---" * (len(runs) + 1) + "|")
    for benchmark in tables[0]:
        cells = [f"{rows[benchmark].tau:.3f} ({rows[benchmark].low:.2f}-{rows[benchmark].high:.2f})" for rows in tables]
        print(f"| {benchmark} | {' | '.join(cells)} |")
    means = [sum(row.tau for row in rows.values()) / len(rows) for rows in tables]
    print(f"| mean | {' | '.join(f'{mean:.3f}' for mean in means)} |")


def print_held_out(runs: list[RunFolder]) -> None:
    """The walk and mean alpha per depth on the validation answers."""
    print("| run | walk tau T = 0 | walk tau T = 1 | alpha at depths 1..K, T = 1 | alpha on the last training step |")
    print("|---|---|---|---|---|")
    for run in runs:
        metrics = json.loads((run.path / "metrics.json").read_text())
        walks = [metrics[f"val/T{t}/walk_acceptance_length"] for t in (0, 1)]
        print(
            f"| {_title(_first(run))} | {walks[0]:.3f} | {walks[1]:.3f} | {_depths(metrics, 'val/T1/alpha')} "
            f"| {_depths(metrics, 'train/alpha')} |"
        )


def _depths(metrics: dict[str, float], prefix: str) -> str:
    names = sorted(name for name in metrics if name.startswith(f"{prefix}/depth_"))
    return " ".join(f"{metrics[name]:.3f}" for name in names)


def _first(run: RunFolder) -> ResultRow:
    return run.read_results()[0]


def _title(row: ResultRow) -> str:
    return f"{row.draft} {row.loss}"


if __name__ == "__main__":
    main()
