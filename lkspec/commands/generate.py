"""``lkspec generate``: the target answers a prompt file, or writes prompts itself."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lkspec.app.application import entry_point, instantiate, resolved, target_name
from lkspec.data.generation import (
    AnswerFilter,
    Prompt,
    PromptFilter,
    ResumableJsonl,
    bare_user_header,
    prompts_digest,
    read_prompts,
)
from lkspec.decoding.chain import ChainDecoder, Completion, Request
from lkspec.decoding.sampling import Sampling
from lkspec.engines.server import ChatRequest, Server
from lkspec.reporting.terminal import console, progress
from lkspec.targets.base import Target

# How fast the rows are made, not what they are.
_NOT_IN_SETTINGS = ("out", "batch_size", "engine", "base_url", "concurrency")
_MAX_ATTEMPTS = 50  # at a prompt, on average: a target that never writes one must not be asked for ever


@entry_point("generate")
def main(config: DictConfig) -> None:
    """Writes ``config.out``; resumes a partial file made with the same settings."""
    options = resolved(config)
    settings = {key: value for key, value in options.items() if key not in _NOT_IN_SETTINGS}
    prompts: list[Prompt] = []
    if config.prompts != "magpie":
        prompts = read_prompts(options["prompts"], field_name=config.field, limit=config.num_prompts)
        settings["prompts_sha256"] = prompts_digest(prompts)
    elif not config.num_prompts:
        raise ValueError("prompts=magpie: say how many prompts to write by num_prompts=...")
    if config.get("engine") is not None:
        _answer_by_server(config, prompts, settings)
        return
    out = ResumableJsonl(Path(config.out), settings)
    target: Target = instantiate(config.target)
    decoder = ChainDecoder(
        target,
        None,
        sampling=Sampling(temperature=config.temperature, top_p=config.top_p),
        num_draft_tokens=0,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    if out.rows:
        console.print(f"resuming {out.partial}: {len(out.rows)} rows are done")
    if config.prompts == "magpie":
        _write_prompts(config, target, decoder, out)
    else:
        _answer(prompts, options, target, decoder, out)
    console.print(f"wrote {len(out.rows)} rows to {out.path}")


def _answer(
    prompts: list[Prompt], options: dict[str, Any], target: Target, decoder: ChainDecoder, out: ResumableJsonl
) -> None:
    done = {row["id"] for row in out.rows}
    waiting = {prompt.id: prompt for prompt in prompts if prompt.id not in done}
    requests = [
        Request(prompt.id, 0, target.prompt_ids(prompt.messages), options["max_new_tokens"])
        for prompt in waiting.values()
    ]
    with progress("generating", len(prompts), "rows", done=len(done)) as advance:
        for completion in decoder.run(requests):
            out.append(_row(waiting[completion.request.prompt_id], completion, target, options))
            advance(tokens=len(completion.tokens))
    order = {prompt.id: index for index, prompt in enumerate(prompts)}
    keep = AnswerFilter(target.tokenizer, target.eos_ids)
    out.finish(lambda row: order[row["id"]], keep)
    _report_dropped(keep.dropped)


def _answer_by_server(config: DictConfig, prompts: list[Prompt], settings: dict[str, Any]) -> None:
    """A server answers; nothing but its name is checked against the target, which is not loaded."""
    if config.prompts == "magpie" or config.token_ids:
        raise ValueError(
            "engine=server answers prompts as text: prompts=magpie and token_ids=true need the target itself"
        )
    server: Server = instantiate(config.engine)
    path = config.target.get("path")
    model = server.choose_model([*([path] if path else []), target_name(config.target)])
    out = ResumableJsonl(Path(config.out), {**settings, "model": model})
    if out.rows:
        console.print(f"resuming {out.partial}: {len(out.rows)} rows are done")
    done = {row["id"] for row in out.rows}
    waiting = {prompt.id: prompt for prompt in prompts if prompt.id not in done}
    requests = [ChatRequest(prompt.id, prompt.messages, config.seed) for prompt in waiting.values()]
    sampling = {"temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_new_tokens}
    with progress("generating", len(prompts), "rows", done=len(done)) as advance:
        for answer in server.answers(requests, **sampling):
            reply = {"role": "assistant", "content": answer.text}
            out.append(
                {
                    "id": answer.request.id,
                    "messages": [*waiting[answer.request.id].messages, reply],
                    "temperature": config.temperature,
                    "finish_reason": answer.finish_reason,
                    "num_tokens": answer.num_tokens,
                }
            )
            advance(tokens=answer.num_tokens)
    order = {prompt.id: index for index, prompt in enumerate(prompts)}
    out.finish(lambda row: order[row["id"]], keep=lambda row: bool(row["messages"][-1]["content"].strip()))
    console.print(f"wrote {len(out.rows)} rows to {out.path}, answered by {model}")


def _row(prompt: Prompt, completion: Completion, target: Target, options: dict[str, Any]) -> dict[str, Any]:
    answer = {"role": "assistant", "content": completion_text(completion, target)}
    row = {
        "id": prompt.id,
        "messages": [*prompt.messages, answer],
        "temperature": options["temperature"],
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.tokens),
    }
    # At T > 0 a target now and then spells a text in other tokens than its tokenizer would.
    return {**row, "token_ids": list(completion.tokens)} if options["token_ids"] else row


def _report_dropped(dropped: Counter[str]) -> None:
    console.print(f"dropped: {_counts(dropped)}")


def _counts(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} {why}" for why, count in sorted(dropped.items())) or "none"


def completion_text(completion: Completion, target: Target) -> str:
    """The answer without its end-of-text token."""
    tokens = completion.tokens[:-1] if completion.finish_reason == "stop" else completion.tokens
    return target.tokenizer.decode(tokens)


def _write_prompts(config: DictConfig, target: Target, decoder: ChainDecoder, out: ResumableJsonl) -> None:
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
            completions = sorted(decoder.run(requests), key=lambda c: int(c.request.prompt_id))
            for completion in completions:
                text = completion_text(completion, target).strip()
                if len(out.rows) < config.num_prompts and keep(text, completion.finish_reason):
                    number = int(completion.request.prompt_id)
                    out.append({"id": f"magpie-{config.seed}-{number:06d}", "attempt": number, "prompt": text})
                    advance(tokens=len(completion.tokens))
    out.finish(lambda row: row["attempt"], keep=lambda row: True)
    _report_dropped(keep.dropped)


if __name__ == "__main__":
    main()
