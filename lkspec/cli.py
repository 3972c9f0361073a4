"""The console script: ``lkspec <verb> [hydra overrides]``."""

from __future__ import annotations

import difflib
import sys

VERBS = {
    "train": "train a draft and measure its acceptance length",
    "evaluate": "measure a finished run by speculative decoding",
    "walk": "measure it along text that the target wrote, without decoding",
    "throughput": "an engine's tokens per second by concurrency and K",
    "duel": "train two objectives alike and say which one gets more accepted",
    "export": "write a draft in the format of vLLM, SGLang, speculators, with a model card",
    "generate": "let the target answer prompts (or write them): training conversations",
    "capture": "write the target's states of a data set, for training to read",
    "inspect": "show what is supervised in a data set",
    "report": "join many runs into one table: means over seeds, intervals, paired gains",
    "show": "generate with a finished run, coloured by who wrote each token",
}


def main() -> None:
    """Runs one verb. Lightning and launchers start further processes by the same ``sys.argv``, so it stays."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        print(usage())
        return
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        meant = f"did you mean {close[0]}? (" if close else "("
        print(f"Error: unknown verb {verb!r}; {meant}expected one of {', '.join(VERBS)})", file=sys.stderr)
        sys.exit(2)
    from lkspec.app.application import launch  # Hydra, which the help above does without

    launch(verb, sys.argv[2:])


def usage() -> str:
    """The help text."""
    lines = [f"  lkspec {verb:<10} {purpose}" for verb, purpose in VERBS.items()]
    return "\n".join(
        [
            "lkspec: draft models for speculative decoding, trained on the acceptance rate itself",
            "",
            "Usage: lkspec VERB [group=choice] [key=value] ...   (Hydra overrides)",
            "",
            *lines,
            "",
            "lkspec VERB --help lists the groups and keys of a verb.",
        ]
    )


if __name__ == "__main__":
    main()
