"""The embedded conversations that the ablations train on: their prompts, and their answers, sampled at T = 1.

    python experiments/ablations/training_prompts.py --out answers
    lkspec generate prompts=answers/embedded_prompts.jsonl out=answers/embedded_t0.jsonl temperature=0 \
        max_new_tokens=256 batch_size=96 target.dtype=bfloat16
    make ablation-answers

Writes embedded_prompts.jsonl and embedded_t1.jsonl; generate adds greedy answers to the same prompts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from lkspec.app.application import config_dir, instantiate
from lkspec.app.build import open_data
from lkspec.data.sources import embedded_path
from lkspec.files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    options = parser.parse_args()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("train", overrides=["experiment=ablation"])
    data = open_data(config, instantiate(config.target))
    trained_on = set(data.train_set.ids)
    lines = embedded_path(config.data.train.removeprefix("embedded:")).read_text(encoding="utf-8").split("\n")
    answers = [row for row in map(json.loads, filter(None, lines)) if row["id"] in trained_on]
    prompts = [{"id": row["id"], "prompt": row["messages"][0]["content"]} for row in answers]
    options.out.mkdir(parents=True, exist_ok=True)
    _write(options.out / "embedded_prompts.jsonl", prompts)
    _write(options.out / "embedded_t1.jsonl", answers)


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{file}: {len(rows)} rows")


if __name__ == "__main__":
    main()
