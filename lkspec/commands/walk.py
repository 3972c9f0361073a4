"""``lkspec walk``: a run's acceptance length along text that its target wrote; nothing is decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig

from lkspec.app.application import resolved
from lkspec.app.build import open_data
from lkspec.app.load import TrainedRun, open_run
from lkspec.data.capture_format import MANIFEST
from lkspec.data.captured import CapturedStates
from lkspec.data.chat import Encoded
from lkspec.data.dataset import EncodedStore
from lkspec.data.tokenised import read_tokenised
from lkspec.measure.evaluation import listed
from lkspec.measure.tokens import measure_tokens
from lkspec.measure.walk import walk_answers
from lkspec.reporting.layout import Layout
from lkspec.reporting.measured import print_sharpness
from lkspec.reporting.renderers.text import show
from lkspec.reporting.tables import build_table
from lkspec.reporting.terminal import say
from lkspec.runs.rows import WalkRow
from lkspec.types import Batch, TargetStates, check_sharpness

OWN = "held_out"  # in place of a file: the answers that a run was validated on
_TOKENS_OF = 40  # answers whose tokens are kept one by one


def main(config: DictConfig) -> None:
    """Adds the walk to the run's and shows tau; tokens.parquet then holds the tokens of some answers at T = 1."""
    plain = resolved(config)
    answers, sharpness = listed(plain["answers"]), [float(power) for power in listed(plain["sharpness"])]
    if not sharpness:
        raise ValueError("sharpness: expected a number or several, got none")
    for power in sharpness:
        check_sharpness(power)
    run = open_run(config)
    run.folder.read_walk_table()  # refuses a file that rows cannot be added to before minutes are spent
    rows = _walk(run, answers, sharpness, plain["num_draft_tokens"])
    run.folder.add_walk(rows)
    if sharpness == [1.0]:
        layout = Layout(rows=["draft", "objective"], columns=["temperature"], value="walk")
        show(build_table([run.folder], layout))
    else:
        print_sharpness(run.folder, {row.key for row in rows}, max(row.depth for row in rows))


def _walk(run: TrainedRun, answers: Sequence[str], sharpness: Sequence[float], num_draft_tokens: int) -> list[WalkRow]:
    """The walk with q^s for each s, along files that say at which temperature the target wrote each answer, or OWN.

    Drafts that share their weights over depths go as deep as ``num_draft_tokens``, others as deep as they have heads,
    and none less deep than it was trained.
    """
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
    if warm:
        count = min(_TOKENS_OF, len(warm))
        some = [warm[index * len(warm) // count] for index in range(count)]  # evenly spaced
        run.folder.write_tokens(measure_tokens(run.target, run.draft, some))
    return rows


def _read(path: str, run: TrainedRun) -> EncodedStore:
    target = run.target
    store = read_tokenised(path, target.tokenizer, max_length=target.max_positions, eos_ids=target.eos_ids)
    unknown = [name for name, temperature in zip(store.ids, store.temperatures, strict=True) if temperature is None]
    if unknown:
        raise ValueError(
            f"answers={path}: {unknown[0]!r} does not say at which temperature the target wrote it; `lkspec generate` "
            "writes the field temperature into every row"
        )
    return store


def _own(run: TrainedRun) -> EncodedStore:
    """The conversations that a run was validated on, those of known temperature: validation walks no others."""
    if run.is_pretrained:
        raise ValueError(f"answers={OWN}: {run.folder.name} was not trained here and has none; name a file")
    data = open_data(run.config, run.target)
    store = EncodedStore()
    for one in data.validation_set:
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
