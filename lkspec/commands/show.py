"""``lkspec show``: generates with a finished run, coloured by who wrote each token."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig
from rich.rule import Rule
from rich.text import Text

from lkspec.app.load import open_run
from lkspec.data.generation import Prompt, read_prompts
from lkspec.decoding.chain import ChainDecoder, Request
from lkspec.decoding.sampling import Sampling
from lkspec.files import write_text
from lkspec.reporting.colouring import acceptance_line, as_html, as_terminal_text, legend, pieces
from lkspec.reporting.terminal import console


def main(config: DictConfig) -> None:
    """Prints the coloured answers and writes them as one HTML file."""
    prompts = _prompts(config.prompt_file, config.system)
    run = open_run(config)
    decoder = ChainDecoder(
        run.target,
        run.draft,
        sampling=Sampling(temperature=config.temperature),
        num_draft_tokens=config.num_draft_tokens,
        batch_size=1,
        seed=config.seed,
    )
    console.print("written by", *(as_terminal_text([mark]) for mark in legend(config.num_draft_tokens)))
    entries = []
    for prompt in prompts:
        request = Request(prompt.id, 0, run.target.prompt_ids(prompt.messages), config.max_new_tokens)
        completion = next(decoder.run([request]))
        text = prompt.messages[-1]["content"]
        entries.append((text, completion))
        console.print(Rule(Text(prompt.id)))
        console.print(text, style="dim", markup=False, highlight=False)
        console.print(as_terminal_text(pieces(run.target.tokenizer, completion)))
        console.print(acceptance_line(completion), style="italic", highlight=False)
    out = Path(config.html) if config.html else run.folder.path / "show.html"
    title = f"{run.folder.name}, T = {config.temperature:g}, K = {config.num_draft_tokens}"
    page = as_html(run.target.tokenizer, entries, title=title, num_draft_tokens=config.num_draft_tokens)
    write_text(out, page)
    console.print(f"page: {out}", soft_wrap=True)


def _prompts(source: str, system: str | None) -> list[Prompt]:
    """The prompts of a .jsonl file, or a whole text as one prompt."""
    before = ({"role": "system", "content": system},) if system else ()
    if source.endswith(".jsonl"):
        return [Prompt(prompt.id, (*before, *prompt.messages)) for prompt in read_prompts(source)]
    if source == "-":
        text, name = sys.stdin.read(), "standard input"
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise ValueError(f"prompt_file: expected a text file, a .jsonl file or -, found nothing at {path}")
        text, name = path.read_text(encoding="utf-8"), path.name
    if not text.strip():
        raise ValueError(f"prompt_file: {name} is empty")
    return [Prompt(name, (*before, {"role": "user", "content": text.strip()}))]
