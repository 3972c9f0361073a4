"""``lkspec evaluate answers=...``: a run's walk along answers that are there; nothing is decoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from lkspec.app.build import open_data
from lkspec.app.load import PRETRAINED_KEY, TrainedRun
from lkspec.data.capture_format import MANIFEST
from lkspec.data.captured import CapturedStates
from lkspec.data.chat import Encoded
from lkspec.data.dataset import EncodedStore
from lkspec.data.tokenised import read_tokenised
from lkspec.measure.metrics import paired_difference_interval
from lkspec.measure.tokens import measure_tokens
from lkspec.measure.walk import walk_answers
from lkspec.reporting.terminal import console, say, table
from lkspec.runs.walk_rows import WalkRow
from lkspec.types import Batch, TargetStates, check_sharpness

OWN = "held_out"  # in place of a file: the answers that a run was validated on
_TOKENS_OF = 40  # answers whose tokens are kept one by one


def walk_run(
    run: TrainedRun,
    answers: Sequence[str],
    *,
    num_draft_tokens: int,
    sharpness: Sequence[float],
) -> None:
    """Walks along answers with q^s for each s, adds the rows to the run's and shows tau.

    tokens.parquet then holds the tokens of some of those written at T = 1.

    Args:
        run: draft and target.
        answers: files that say at which temperature the target wrote each answer, or ``held_out``.
        num_draft_tokens: the largest K for a draft that shares its weights over depths; others are walked as deep as
            they have heads, and none less deep than it was trained.
        sharpness: the s.

    Raises:
        ValueError: no s or one that is no exponent; no answers, or ones of unknown temperature.
    """
    if not sharpness:
        raise ValueError("sharpness: expected a number or several, got none")
    for power in sharpness:
        check_sharpness(power)
    run.folder.read_walk_table()  # refuses a file that rows cannot be added to before minutes are spent
    depths = run.draft.num_depths
    if run.draft.max_depths is None:
        depths = max(depths, num_draft_tokens)
    rows: list[WalkRow] = []
    warm: list[Encoded] = []
    for path in answers:
        read, states = (_own(run), _states(run)) if path == OWN else (_read(path, run), run.target.states)
        rows += walk_answers(
            run.target, run.draft, read, states=states, num_draft_tokens=depths, steps=run.step, sharpness=sharpness
        )
        warm += [read[index] for index, temperature in enumerate(read.temperatures) if temperature == 1]
    run.folder.add_walk(rows)
    if warm:
        count = min(_TOKENS_OF, len(warm))
        some = [warm[index * len(warm) // count] for index in range(count)]  # evenly spaced
        run.folder.write_tokens(measure_tokens(run.target, run.draft, some))
    if list(sharpness) == [1.0]:
        _show_run(run)
    else:
        _show_sharpness(run, {row.key for row in rows}, depths)


def _read(path: str, run: TrainedRun) -> EncodedStore:
    target = run.target
    store = read_tokenised(path, target.tokenizer, max_length=target.max_positions, eos_ids=target.eos_ids).store
    unknown = [name for name, temperature in zip(store.ids, store.temperatures, strict=True) if temperature is None]
    if unknown:
        raise ValueError(
            f"answers={path}: {unknown[0]!r} does not say at which temperature the target wrote it; `lkspec generate` "
            "writes the field temperature into every row"
        )
    return store


def _own(run: TrainedRun) -> EncodedStore:
    """The conversations that a run was validated on, those of known temperature: validation walks no others."""
    if PRETRAINED_KEY in run.config:
        raise ValueError(f"answers={OWN}: {run.folder.name} was not trained here and has none; name a file")
    data = open_data(run.config, run.target)
    store = EncodedStore()
    for one in map(data.validation_set.__getitem__, range(len(data.validation_set))):
        if one.temperature is not None:
            store.append(one)
    if not len(store):
        raise ValueError(f"answers={OWN}: {run.folder.name} was validated on none of known temperature; name a file")
    return store


def _states(run: TrainedRun) -> Callable[[Batch], TargetStates]:
    """A run's capture where it has one that is still there, else the target, for the states of its own answers."""
    folder = run.config.get("states_dir")
    if folder is None:
        return run.target.states
    if not (Path(folder) / MANIFEST).is_file():
        say(f"{folder} is not there: the target reads the answers again")
        return run.target.states
    return CapturedStates(Path(folder), run.target)


def _show_run(run: TrainedRun) -> None:
    """All of a run's walk."""
    from lkspec.reporting.layout import Layout  # pandas and all: decoding can do without
    from lkspec.reporting.renderers import rich_table
    from lkspec.reporting.tables import build_table

    layout = Layout(rows=["draft", "objective"], columns=["temperature"], value="walk")
    rich_table.show(build_table([run.folder], layout))


def _show_sharpness(run: TrainedRun, keys: Collection[str], num_draft_tokens: int) -> None:
    """tau of some answers by temperature and every sharpness walked so far, and its gain over q as trained.

    Gains are bold where their interval excludes 0.
    """
    counts: dict[tuple[float, float], dict[str, tuple[float, float]]] = {}
    walked = run.folder.read_walk_table()
    for row in [] if walked is None else walked.to_pylist():
        if row["depth"] == num_draft_tokens and row["key"] in keys:
            place = counts.setdefault((row["temperature"], row["sharpness"]), {})
            place[row["key"]] = (row["accepted"], row["rounds"])
    temperatures, powers = ({key[place]: None for key in sorted(counts)} for place in (0, 1))
    names = ["s", *(f"T = {temperature:g}" for temperature in temperatures)]
    cells = [
        [f"{power:g}", *(_cell(counts, temperature, power) for temperature in temperatures)] for power in sorted(powers)
    ]
    console.print(f"walk with q^s, renormalised, in place of q, K = {num_draft_tokens}", highlight=False)
    table(None, names, cells)
    say(
        "`lkspec report value=walk rows=[draft,objective,sharpness]` joins runs; "
        "`lkspec export sharpness=s` writes such a draft"
    )


def _cell(
    counts: dict[tuple[float, float], dict[str, tuple[float, float]]], temperature: float, sharpness: float
) -> str:
    here, plain = counts.get((temperature, sharpness)), counts.get((temperature, 1.0))
    if here is None:
        return "as 1" if temperature == 0 else "-"
    rounds = sum(number for _, number in here.values())
    tau = f"{1 + sum(accepted for accepted, _ in here.values()) / rounds:.3f}" if rounds > 0 else "-"
    if plain is None or sharpness == 1:
        return tau
    gain, low, high = paired_difference_interval(here, plain, confidence=0.95)
    if math.isnan(low):
        return f"{tau} {gain:+.3f}"
    told = f"{gain:+.3f}" if low <= 0 <= high else f"[bold]{gain:+.3f}[/bold]"
    return f"{tau} {told} ({low:+.3f} to {high:+.3f})"
