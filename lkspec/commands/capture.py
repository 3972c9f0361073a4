"""``lkspec capture``: writes the target's states of a data set once, for training to read."""

from __future__ import annotations

import resource
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lkspec.app.application import instantiate
from lkspec.app.build import open_data
from lkspec.data.capture_format import DTYPE, MANIFEST, bytes_per_token
from lkspec.data.captured import CapturedStates, CaptureWriter, capture_writer, store_keys
from lkspec.data.datamodule import SpeculatorDataModule
from lkspec.data.dataset import EncodedStore, collate
from lkspec.losses.fused.head_summary import head_summary
from lkspec.reporting.terminal import facts, progress, say
from lkspec.targets.base import Target
from lkspec.types import TargetStates

_NUM_MEASURED = 8  # conversations that the throughput is measured on, of all lengths
_MEASURED_SECONDS = 10.0


@dataclass(frozen=True)
class _Text:
    """A conversation to capture; its tokens stay in the store."""

    key: str
    store: EncodedStore
    index: int
    num_tokens: int


def main(config: DictConfig) -> None:
    """Fills ``config.out``; continues where an earlier call was killed, or adds to what it wrote."""
    if config.shard_mb <= 0:
        raise ValueError(f"shard_mb: expected a size above 0, got {config.shard_mb}")
    target: Target = instantiate(config.target)
    data = open_data(config, target)
    texts, out, shard_bytes = _distinct_texts(data), Path(config.out), int(config.shard_mb * 1e6)
    if config.plan:
        there = (out / MANIFEST).exists() and not config.overwrite
        captured = CapturedStates(out, target) if there else ()
        _print_plan([text for text in texts if text.key not in captured], texts, target, out, shard_bytes)
        say("plan=true: nothing was written")
        return
    with capture_writer(
        out, target, data=data.fingerprint, shard_bytes=shard_bytes, overwrite=config.overwrite
    ) as writer:
        for reason in writer.repaired:
            say(f"captured anew: {reason}")
        waiting = [text for text in texts if text.key not in writer]
        if waiting:
            _print_plan(waiting, texts, target, out, shard_bytes)
            _refuse_small_disk(waiting, target, out)
            _capture(waiting, target, writer)
    _report(writer, target, out)


def _distinct_texts(data: SpeculatorDataModule) -> list[_Text]:
    """The training and validation conversations, each text once."""
    texts: dict[str, _Text] = {}
    for store in (data.train_set, data.validation_set):
        for index, (key, num_tokens) in enumerate(zip(store_keys(store), store.lengths, strict=True)):
            texts.setdefault(key, _Text(key, store, index, num_tokens))
    return list(texts.values())


def _states(text: _Text, target: Target) -> TargetStates:
    """The states [L, AH] and [L, H] of a conversation and their summary, as they are stored.

    Each by itself: then they depend neither on the order nor on where an earlier call stopped, and no padding is read.
    """
    states = target.states(collate([[text.store[text.index]]]))
    aux, last = (part[0, : text.num_tokens].to(DTYPE) for part in (states.aux, states.last))
    return TargetStates(aux, last, head_summary(target.head, last))


def _capture(waiting: Sequence[_Text], target: Target, writer: CaptureWriter) -> None:
    start, num_tokens = time.monotonic(), _num_tokens(waiting)
    with progress("capturing", num_tokens, "tokens") as advance:
        for text in waiting:
            writer.add(text.key, _states(text, target))
            advance(text.num_tokens)
        writer.flush()
    seconds = time.monotonic() - start
    duration = f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 3600:.2f} hours"
    say(
        f"captured {len(waiting):,} conversations, {num_tokens:,} tokens in {duration}: "
        f"{num_tokens / seconds:,.0f} tokens/s"
    )


def _print_plan(waiting: Sequence[_Text], texts: Sequence[_Text], target: Target, out: Path, shard_bytes: int) -> None:
    """Disk, memory and time; measures the target's speed on some conversations."""
    num_tokens, width = _num_tokens(waiting), bytes_per_token(target)
    lines = {
        "to capture": f"{len(waiting):,} of {len(texts):,} conversations, {num_tokens:,} tokens",
        "disk": f"{_gigabytes(num_tokens * width)} in {out} ({width:,} bytes per token), {_gigabytes(_free(out))} free",
    }
    if waiting:
        speed = _measured_speed(waiting, target)
        lines["memory"] = _memory(target, min(shard_bytes, num_tokens * width))
        lines["hours"] = (
            f"{num_tokens / speed / 3600:.2g} at the {speed:,.0f} tokens/s just measured on {target.device}, "
            f"if the disk takes {speed * width / 1e6:,.0f} MB/s"
        )
    facts(lines)


def _measured_speed(waiting: Sequence[_Text], target: Target) -> float:
    """Tokens per second over conversations of all lengths, after the longest one, which shows the memory needed."""
    by_length = sorted(waiting, key=lambda text: text.num_tokens)
    _states(by_length[-1], target)
    num_tokens, start = 0, time.monotonic()
    for number in range(_NUM_MEASURED):
        text = by_length[(2 * number + 1) * len(by_length) // (2 * _NUM_MEASURED)]
        _states(text, target)
        num_tokens += text.num_tokens
        if time.monotonic() - start > _MEASURED_SECONDS:
            break
    return num_tokens / (time.monotonic() - start)


def _memory(target: Target, shard_bytes: int) -> str:
    """The most that was needed so far, by the longest conversation too, and what a shard takes while it is written."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    text = f"{_gigabytes(peak + 2 * shard_bytes)} (twice a shard of {_gigabytes(shard_bytes)}, and this process)"
    if target.device.type == "cuda":
        text += f", {_gigabytes(torch.cuda.max_memory_allocated(target.device))} on {target.device}"
    return text


def _refuse_small_disk(waiting: Sequence[_Text], target: Target, out: Path) -> None:
    needed, free = _num_tokens(waiting) * bytes_per_token(target), _free(out)
    if needed > free:
        raise ValueError(
            f"{out}: the states take {_gigabytes(needed)}, but only {_gigabytes(free)} are free; name another disk in "
            "out=..., or capture fewer conversations (data.limit_conversations) or shorter ones (data.max_length)"
        )


def _report(writer: CaptureWriter, target: Target, out: Path) -> None:
    """What the folder holds now, and the command that reads it."""
    shards = writer.manifest.shards
    num_conversations, num_tokens, num_bytes = (
        sum(getattr(shard, name) for shard in shards) for name in ("num_conversations", "num_tokens", "num_bytes")
    )
    say(
        f"{out} holds {num_conversations:,} conversations, {num_tokens:,} tokens at {bytes_per_token(target):,} bytes "
        f"in {len(shards)} shards of together {_gigabytes(num_bytes)}; to train from it:"
    )
    chosen = [o for o in HydraConfig.get().overrides.task if o.startswith(("target", "data", "seed"))]
    say(shlex.join(["lkspec", "train", *chosen, f"states_dir={out}"]))


def _num_tokens(texts: Sequence[_Text]) -> int:
    return sum(text.num_tokens for text in texts)


def _free(out: Path) -> int:
    """Free bytes of the disk that a folder lies on or will."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.3g} GB" if num_bytes < 1e12 else f"{num_bytes / 1e12:,.1f} TB"
