"""Which run folders there are, and which of them a user means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lkspec.runs.folder import RunFolder


def list_runs(root: Path) -> list[RunFolder]:
    """The runs directly under a folder, newest first by the creation time they record."""
    runs = [RunFolder(file.parent) for file in Path(root).glob("*/config.yaml")]
    return sorted(runs, key=lambda run: (run.origin.get("created", ""), run.name), reverse=True)


def find_run(name: str, root: Path) -> RunFolder:
    """The run that a user means by ``latest``, by a path, or by the beginning of a folder's name.

    The latest is the newest but for those that failed before they had a checkpoint or a result.

    Raises:
        ValueError: nothing or more than one run fits; the message lists what there is.
    """
    runs = list_runs(root)
    if name == "latest" and runs:
        return next((run for run in runs if run.has_results or not run.has_failed), runs[0])
    if (Path(name).expanduser() / "config.yaml").is_file():
        return RunFolder.open(Path(name).expanduser())
    if not runs:
        raise ValueError(f"run {name!r}: there are no runs under {root} and it is not the path of one; train one first")
    fitting = [run for run in runs if run.name == name] or [run for run in runs if run.name.startswith(name)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(f"run {name!r} is the beginning of {len(fitting)} names; say more of one:{_listing(fitting)}")
    raise ValueError(
        f"run {name!r}: expected 'latest', a path or the beginning of a name; the newest are:{_listing(runs)}"
    )


def _listing(runs: Sequence[RunFolder]) -> str:
    return "".join(f"\n  {run.name}" for run in runs[:5]) + ("\n  ..." if len(runs) > 5 else "")
