"""The model card (README.md) of an export, from the run's configuration and results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lkspec.drafts.base import Draft
from lkspec.export.serving import ServeCommand
from lkspec.export.writing import Export
from lkspec.runs.rows import ResultRow
from lkspec.targets.base import Target

_PUBLIC_PATH, _PUBLIC_TARGET = "PATH_OR_ID", "TARGET_PATH_OR_ID"


@dataclass(frozen=True)
class Facts:
    """What a card says of the run.

    Attributes:
        run: its name.
        config: its configuration, plain.
        origin: commit and code hash of its creation.
        info: data fingerprint and supervised tokens seen.
        step: optimiser steps taken.
        rows: its results.
        license: of the weights, in the hub's words; None is not stated.
        target_id: what others call the target; None is where it was loaded from.
        sharpness: what the heads were multiplied by after training.
    """

    run: str
    config: Mapping[str, Any]
    origin: Mapping[str, str]
    info: Mapping[str, Any]
    step: int
    rows: Sequence[ResultRow]
    license: str | None
    target_id: str | None = None
    sharpness: float = 1.0


def model_card(facts: Facts, draft: Draft, target: Target, export: Export) -> str:
    """Markdown with the hub's header."""
    name = draft.title or type(draft).__name__
    public_target = facts.target_id or _public_name(target)
    sections = [
        _header(facts, public_target),
        f"# {name} draft for {public_target}",
        f"A draft model ({', '.join(filter(None, (name, draft.paper)))}) for lossless speculative decoding with "
        f"**{public_target}**, written by lkspec from the run `{facts.run}`. It is of no use without its target.",
        _results(facts),
        _training(facts, draft, target),
        _serving(facts, draft, target, export),
        _checks(export),
        _limits(facts, draft, target),
        _licences(facts, public_target),
        _citation(draft.paper),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _public_name(target: Target) -> str:
    """A hub id as it is; of a folder only its name, which says nothing of somebody's machine."""
    source = target.source
    return source if source is not None and "/" in source and not Path(source).exists() else target.name


def _header(facts: Facts, target: str) -> str:
    header: dict[str, Any] = {"library_name": "lkspec", "tags": ["speculative-decoding", "draft-model"]}
    if "/" in target:
        header["base_model"] = target
    if facts.license is not None:
        header["license"] = facts.license
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---"


def _results(facts: Facts) -> str:
    # At T = 0 the heads may be multiplied by anything.
    rows = [row for row in newest(facts.rows) if row.temperature == 0 or row.sharpness == facts.sharpness]
    if not rows:
        how = "" if facts.sharpness == 1 else f" with sharpness={facts.sharpness:g}"
        why = f"`lkspec evaluate`{how} had not been run when this card was written"
        return f"## Acceptance length\n\nNot measured: {why}."
    width = max(len(row.alpha) for row in rows)
    head = [
        "benchmark",
        "engine",
        "T",
        "K",
        "tau",
        "95 % interval",
        *(f"alpha_{k}" for k in range(1, width + 1)),
        "prompts",
    ]
    lines = [_table_row(head), _table_row(["---"] * len(head))]
    for row in rows:
        shares = [f"{share:.3f}" for share in row.alpha] + [""] * (width - len(row.alpha))
        cells = [row.benchmark, row.engine, f"{row.temperature:g}", str(row.num_draft_tokens), f"**{row.tau:.3f}**"]
        lines.append(_table_row([*cells, f"{row.low:.3f} - {row.high:.3f}", *shares, str(row.num_prompts)]))
    return "\n".join(
        [
            "## Acceptance length",
            "",
            *lines,
            "",
            "tau = 1 + accepted / rounds, pooled over a benchmark: tokens a verification, the bonus token included. "
            "alpha_k: share of the rounds that accepted at least k drafted tokens. Chain drafting; at T > 0 drafts are "
            "sampled from q and verified by the rejection rule, so the text has exactly the target's distribution. "
            "Intervals: bootstrap over prompts.",
            "",
            _protocol(rows),
        ]
    )


def newest(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """The rows after the most steps of training."""
    last = max((row.steps for row in rows), default=0)
    return sorted(
        (row for row in rows if row.steps == last),
        key=lambda row: (row.benchmark, row.engine, row.temperature, row.num_draft_tokens),
    )


def _protocol(rows: Sequence[ResultRow]) -> str:
    """Everything else that tau depends on, once a benchmark."""
    lines = ["Protocol:", ""]
    for text in dict.fromkeys(row.protocol for row in rows):
        protocol = json.loads(text)
        name = protocol.pop("name", "")
        lines.append(f"- {name}: " + ", ".join(f"{key} {json.dumps(value)}" for key, value in sorted(protocol.items())))
    return "\n".join(lines)


def _training(facts: Facts, draft: Draft, target: Target) -> str:
    config = facts.config
    share = draft.num_trainable / target.num_parameters
    lines = [
        "## The draft",
        "",
        f"- parameters: {draft.num_trainable:,} ({share:.1%} of the target's {target.num_parameters:,}), beside "
        f"{draft.num_frozen:,} that are the target's own",
        f"- draft vocabulary: {draft.vocab.size:,} of {draft.vocab.target_size:,} tokens",
    ]
    if facts.sharpness != 1:
        lines.append(f"- sharpness: its heads were multiplied by {facts.sharpness:g} after training")
    if facts.step == 0:
        return "\n".join([*lines, f"- weights: {_named(config['draft'].get('init_from'))}, not trained by lkspec"])
    data = config.get("data") or {}
    loss = {key: value for key, value in config["loss"].items() if key != "_target_"}
    gamma = (config.get("loss_options") or {}).get("gamma")
    lines += [
        f"- data: {_named(data.get('train'))} (fingerprint {facts.info['data_fingerprint']}), "
        f"{facts.info['num_supervised_seen']:,} supervised tokens seen in {facts.step:,} steps",
        f"- objective: {config['names']['loss']} {json.dumps(loss)}, {draft.num_depths} depths, gamma {gamma} "
        "(Samarin et al. 2026, arXiv:2602.23881)",
        f"- optimiser: {json.dumps({key: value for key, value in config['optimizer'].items() if key[0] != '_'})}, "
        f"seed {config['seed']}",
        f"- code: commit {facts.origin.get('commit', 'unknown')}, hash {facts.origin.get('code_hash', 'unknown')[:12]}",
    ]
    if config["draft"].get("init_from"):
        lines.append(f"- started from: {_named(config['draft']['init_from'])}")
    return "\n".join(lines)


def _named(source: Any) -> str:
    """A data set, run or checkpoint; of a path on this machine only its last part."""
    if isinstance(source, list):
        return ", ".join(map(_named, source))
    path = Path(str(source))
    return f"`{path.name if path.is_absolute() or path.exists() else source}`"


def _serving(facts: Facts, draft: Draft, target: Target, export: Export) -> str:
    commands = [_public(command, facts, target, export) for command in export.commands]
    lines = ["## Serving", "", f"Loaded by {export.layout.loaded_by}. For this target: {draft.served_by}."]
    for command in commands:
        lines += [
            "",
            f"{command.engine}:",
            "",
            "```",
            command.command,
            "```",
            "",
            f"Samples from q: {command.options_for_q}.",
        ]
    if commands:
        lines += [
            "",
            "Engines draft greedily unless told otherwise; at T > 0 that measures p(argmax q), another number than the "
            "tau above.",
        ]
    return "\n".join(lines)


def _public(command: ServeCommand, facts: Facts, target: Target, export: Export) -> ServeCommand:
    """The command without paths of this machine."""
    public = {str(export.path.absolute()): _PUBLIC_PATH}
    if facts.target_id is None and _public_name(target) != target.source:
        public[target.source or target.name] = _PUBLIC_TARGET
    words = re.split(r"([ \"]+)", command.command)
    return replace(command, command="".join(public.get(word, word) for word in words))


def _checks(export: Export) -> str:
    return "\n".join(["## Checked when it was written", "", *(f"- {check}" for check in export.checks)])


def _limits(facts: Facts, draft: Draft, target: Target) -> str:
    limits = [
        f"- only for the target it was made for (fingerprint {target.fingerprint}): fine-tuned or quantised variants "
        "accept less, though the text stays theirs",
        "- acceptance depends on language, domain and temperature; what is far from the data above accepts less",
    ]
    if not draft.vocab.is_full:
        limits.append("- tokens outside the draft vocabulary are never proposed")
    if draft.max_depths is not None:
        limits.append(f"- at most {draft.max_depths} drafted tokens a round")
    return "\n".join(["## Limits", "", *limits])


def _licences(facts: Facts, target: str) -> str:
    own = facts.license or "not stated by whoever exported them"
    return "\n".join(
        [
            "## Licences",
            "",
            f"- these weights: {own}",
            f"- the target {target} and the training data have licences of their own, which may bind what is derived "
            "from them (a head or embedding taken from the target, answers that it wrote)",
            "- lkspec: Apache-2.0",
        ]
    )


def _citation(paper: str | None) -> str:
    return "\n".join(
        [
            "## Citation",
            "",
            f"{f'Architecture: {paper}. ' if paper else ''}Objective and protocol:",
            "",
            "```",
            "@inproceedings{samarin2026lk,",
            "  title = {LK Losses: Direct Acceptance Rate Optimization for Speculative Decoding},",
            "  author = {Samarin and others},",
            "  booktitle = {ICML},",
            "  year = {2026},",
            "  eprint = {2602.23881},",
            "  archivePrefix = {arXiv}",
            "}",
            "```",
        ]
    )


def _table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
