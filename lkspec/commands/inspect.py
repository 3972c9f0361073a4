"""``lkspec inspect``: prints conversations as the target reads them, supervised tokens coloured."""

from __future__ import annotations

import random

from omegaconf import DictConfig
from rich.rule import Rule
from rich.text import Text

from lkspec.app.application import instantiate
from lkspec.app.build import open_data
from lkspec.data.chat import colour_spans
from lkspec.reporting.terminal import console
from lkspec.targets.base import Target


def main(config: DictConfig) -> None:
    """Shows a few conversations of ``data.train``, held-out ones too, and counts what is supervised."""
    target: Target = instantiate(config.target)
    config.data.val_fraction = 0.0  # a few conversations need not leave any to hold out
    data = open_data(config, target)
    conversations = list(data.train_set)
    if config.ids:
        known = {conversation.id: conversation for conversation in conversations}
        missing = [name for name in config.ids if name not in known]
        if missing:
            raise ValueError(f"ids: the training data has no conversation named {', '.join(missing)}")
        chosen = [known[name] for name in config.ids]
    else:
        number = min(config.num_examples, len(conversations))
        chosen = [conversations[i] for i in random.Random(config.seed).sample(range(len(conversations)), number)]
    for conversation in chosen:
        num_tokens = len(conversation.tokens)
        console.print(Rule(Text(f"{conversation.id}: {conversation.num_supervised} of {num_tokens} tokens supervised")))
        console.print(colour_spans(target.tokenizer, conversation))
    console.print(Rule())
    read = data.encoded
    total = sum(len(conversation.tokens) for conversation in conversations)
    console.print(
        f"{len(conversations):,} conversations, {total:,} tokens, {data.num_supervised_tokens:,} supervised "
        f"({data.num_supervised_tokens / total:.0%}); coloured: supervised, dim: read only. {read.num_bad_rows} bad "
        f"rows skipped, {read.num_dropped} conversations without an answer dropped"
    )
