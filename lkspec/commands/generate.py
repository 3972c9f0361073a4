"""``lkspec generate``: the target answers a prompt file, or writes prompts itself."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig

from lkspec.app.application import instantiate, resolved, target_name
from lkspec.data.generation import (
    AnswerFilter,
    Prompt,
    PromptFilter,
    ResumableJsonl,
    bare_user_header,
    prompts_digest,
    read_prompts,
)
from lkspec.decoding.chain import ChainDecoder, Request
from lkspec.decoding.sampling import Sampling
from lkspec.engines.server import ChatRequest, Server
from lkspec.reporting.terminal import console, progress
from lkspec.targets.base import Target

# How fast the rows are made, not what they are.
_NOT_IN_SETTINGS = ("out", "batch_size", "engine")
_MAX_ATTEMPTS = 50  # at a prompt, on average: a target that never writes one must not be asked for ever


class _Answer(NamedTuple):
    prompt_id: str
    text: str
    finish_reason: str
    num_tokens: int
    token_ids: list[int] | None = None


_Answering = Callable[[list[Prompt]], Iterator[_Answer]]


def main(config: DictConfig) -> None:
    """Writes ``config.out``; resumes a partial file made with the same settings."""
    options = resolved(config)
    settings = {key: value for key, value in options.items() if key not in _NOT_IN_SETTINGS}
    is_magpie = config.prompts == "magpie"
    if is_magpie and not config.num_prompts:
        raise ValueError("prompts=magpie: say how many prompts to write by num_prompts=...")
    prompts: list[Prompt] = []
    if not is_magpie:
        prompts = read_prompts(options["prompts"], field_name=config.field, limit=config.num_prompts)
        settings["prompts_sha256"] = prompts_digest(prompts)
    server = None
    if config.get("engine") is not None:
        server = _server(config)
        settings["model"] = server.model
    out = ResumableJsonl(Path(config.out), settings)
    if out.rows:
        console.print(f"resuming {out.partial}: {len(out.rows)} rows are done")
    if server is not None:
        dropped = _answer(prompts, partial(_served, server, config), out, AnswerFilter())
    else:
        target: Target = instantiate(config.target)
        decoder = ChainDecoder(
            target,
            None,
            sampling=Sampling(temperature=config.temperature, top_p=config.top_p),
            num_draft_tokens=0,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        if is_magpie:
            dropped = _write_prompts(config, target, decoder, out)
        else:
            keep = AnswerFilter(target.tokenizer, target.eos_ids)
            dropped = _answer(prompts, partial(_decoded, target, decoder, config), out, keep)
    console.print(f"dropped: {_counts(dropped)}")
    by = "" if server is None else f", answered by {server.model}"
    console.print(f"wrote {len(out.rows)} rows to {out.path}{by}")


def _server(config: DictConfig) -> Server:
    """The server that answers; nothing but its name is checked against the target, which is not loaded."""
    if config.prompts == "magpie" or config.token_ids:
        raise ValueError(
            "engine=server answers prompts as text: prompts=magpie and token_ids=true need the target itself"
        )
    server: Server = instantiate(config.engine)
    path = config.target.get("path")
    server.choose_model([*([path] if path else []), target_name(config.target)])
    return server


def _served(server: Server, config: DictConfig, prompts: list[Prompt]) -> Iterator[_Answer]:
    requests = [ChatRequest(prompt.id, prompt.messages, config.seed) for prompt in prompts]
    sampling = {"temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_new_tokens}
    for answer in server.answers(requests, **sampling):
        yield _Answer(answer.request.id, answer.text, answer.finish_reason, answer.num_tokens)


def _decoded(target: Target, decoder: ChainDecoder, config: DictConfig, prompts: list[Prompt]) -> Iterator[_Answer]:
    requests = [Request(prompt.id, 0, target.prompt_ids(prompt.messages), config.max_new_tokens) for prompt in prompts]
    for completion in decoder.run(requests):
        tokens = completion.tokens
        # At T > 0 a target now and then spells a text in other tokens than its tokenizer would.
        ids = list(tokens) if config.token_ids else None
        text = completion.text(target.tokenizer)
        yield _Answer(completion.request.prompt_id, text, completion.finish_reason, len(tokens), ids)


def _answer(prompts: list[Prompt], answering: _Answering, out: ResumableJsonl, keep: AnswerFilter) -> Counter[str]:
    """Writes a row per prompt that has none yet; returns what was dropped, by reason."""
    done = {row["id"] for row in out.rows}
    waiting = {prompt.id: prompt for prompt in prompts if prompt.id not in done}
    with progress("generating", len(prompts), "rows", done=len(done)) as advance:
        for answer in answering(list(waiting.values())):
            row = {
                "id": answer.prompt_id,
                "messages": [*waiting[answer.prompt_id].messages, {"role": "assistant", "content": answer.text}],
                "temperature": out.settings["temperature"],
                "finish_reason": answer.finish_reason,
                "num_tokens": answer.num_tokens,
            }
            out.append(row if answer.token_ids is None else {**row, "token_ids": answer.token_ids})
            advance(tokens=answer.num_tokens)
    order = {prompt.id: index for index, prompt in enumerate(prompts)}
    out.finish(lambda row: order[row["id"]], keep)
    return keep.dropped


def _write_prompts(config: DictConfig, target: Target, decoder: ChainDecoder, out: ResumableJsonl) -> Counter[str]:
    """Lets the target write prompts until there are enough; returns what was dropped, by reason."""
    header = bare_user_header(target.tokenizer, config.system)
    keep = PromptFilter()
    for row in out.rows:
        keep(row["prompt"], "stop")
    first = max((row["attempt"] for row in out.rows), default=-1) + 1
    with progress("generating", config.num_prompts, "rows", done=len(out.rows)) as advance:
        for attempt in itertools.count(first, config.batch_size):
            if len(out.rows) >= config.num_prompts:
                break
            if attempt >= _MAX_ATTEMPTS * config.num_prompts:
                raise ValueError(
                    f"only {len(out.rows)} of {attempt} attempts made a usable prompt, "
                    f"dropped: {_counts(keep.dropped)}; "
                    "raise max_new_tokens, or use a target that was trained on chats"
                )
            requests = [Request(str(attempt + i), 0, header, config.max_new_tokens) for i in range(config.batch_size)]
            for completion in sorted(decoder.run(requests), key=lambda c: int(c.request.prompt_id)):
                text = completion.text(target.tokenizer).strip()
                if len(out.rows) < config.num_prompts and keep(text, completion.finish_reason):
                    number = int(completion.request.prompt_id)
                    out.append({"id": f"magpie-{config.seed}-{number:06d}", "attempt": number, "prompt": text})
                    advance(tokens=len(completion.tokens))
    out.finish(lambda row: row["attempt"], keep=lambda row: True)
    return keep.dropped


def _counts(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} {why}" for why, count in sorted(dropped.items())) or "none"
