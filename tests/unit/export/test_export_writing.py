"""What appears at an export's place, and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import HALF, read_folder, reopened, same_q
from helpers.draft_cases import CASES, make_draft
from safetensors.torch import save_file

from lkspec.drafts.base import Draft
from lkspec.export.base import Layout, WriteOptions
from lkspec.export.eagle3 import PlainEagle3
from lkspec.export.mlp import FmsMLP
from lkspec.export.mtp import NativeMTP
from lkspec.export.writing import FORMATS, Export, layout_for, refuse_existing, write_export
from lkspec.targets.base import Target
from lkspec.targets.tiny import TinyTarget

OPTIONS = WriteOptions(num_draft_tokens=2)
FILES = ["README.md", "config.json", "lkspec_export.json", "model.safetensors"]


@pytest.fixture
def draft(tiny_target: TinyTarget) -> Draft:
    return make_draft(CASES["eagle3"], tiny_target.spec, HALF)


def write(draft: Draft, target: Target, path: Path, **options: Any) -> Export:
    arguments = {"layout": PlainEagle3(), "options": OPTIONS, "card": lambda export: "a card", **options}
    return write_export(draft, target, path, **arguments)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_what_an_export_holds(draft: Draft, tiny_target: TinyTarget, tmp_path: Path) -> None:
    export = write(draft, tiny_target, tmp_path / "deep" / "out")
    assert names(export.path) == FILES
    assert names(tmp_path / "deep") == ["out"]  # nothing temporary is left
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in export.path.iterdir())
    record = json.loads((export.path / "lkspec_export.json").read_text())
    assert record["format"] == "vllm"
    assert record["checks"] == list(export.checks)
    assert [check.partition(":")[0].partition(",")[0] for check in export.checks] == [
        "auxiliary states", "RoPE", "norms", "positions", "vocabulary", "q",
    ]  # fmt: skip
    assert export.checks[-1].endswith("4 rounds of 2 tokens (allowed 1e-05)")
    assert f'"model": "{export.path.absolute()}"' in export.commands[0].command
    assert same_q(draft, reopened(export.path, tiny_target), tiny_target)


def test_no_card_unless_asked(draft: Draft, tiny_target: TinyTarget, tmp_path: Path) -> None:
    write(draft, tiny_target, tmp_path / "out", card=None)
    assert names(tmp_path / "out") == FILES[1:]


def test_nothing_is_overwritten_unless_told(draft: Draft, tiny_target: TinyTarget, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(draft, tiny_target, out)
    before = (out / "model.safetensors").read_bytes()
    other = make_draft(CASES["eagle3"], tiny_target.spec, HALF, seed=5)
    with pytest.raises(ValueError, match=r"^out=.*out: there is an export already; overwrite=true replaces it$"):
        write(other, tiny_target, out)
    assert (out / "model.safetensors").read_bytes() == before
    (out / "stale").write_text("")
    write(other, tiny_target, out, overwrite=True)
    assert names(out) == FILES
    assert same_q(other, reopened(out, tiny_target), tiny_target)
    assert names(tmp_path) == ["out"]


def test_only_exports_are_overwritten(draft: Draft, tiny_target: TinyTarget, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"there is something else than an export of lkspec; choose another place"):
            write(draft, tiny_target, tmp_path, overwrite=overwrite)
        with pytest.raises(ValueError, match="something else than an export"):
            refuse_existing(tmp_path / "thesis.tex", overwrite=overwrite)
    assert names(tmp_path) == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    write(draft, tiny_target, tmp_path / "empty")
    assert names(tmp_path / "empty") == FILES


class Interrupted(PlainEagle3):
    """Stops after the weights."""

    def write(self, folder: Path, draft: Draft, target: Target, options: WriteOptions) -> None:
        super().write(folder, draft, target, options)
        raise KeyboardInterrupt


class Wrong(PlainEagle3):
    """Writes a head that is not the draft's."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def write(self, folder: Path, draft: Draft, target: Target, options: WriteOptions) -> None:
        super().write(folder, draft, target, options)
        tensors, _ = read_folder(folder)
        save_file({**tensors, "lm_head.weight": self.factor * tensors["lm_head.weight"]}, folder / "model.safetensors")


@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_write_leaves_nothing(
    existing: bool, draft: Draft, tiny_target: TinyTarget, tmp_path: Path
) -> None:
    """And what was there stays."""
    out = tmp_path / "out"
    if existing:
        write(draft, tiny_target, out)
    with pytest.raises(KeyboardInterrupt):
        write(draft, tiny_target, out, layout=Interrupted(), overwrite=True)
    assert names(tmp_path) == (["out"] if existing else [])
    if existing:
        assert same_q(draft, reopened(out, tiny_target), tiny_target)


@pytest.mark.parametrize("factor", [1.01, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_q_is_no_success(
    dtype: torch.dtype, factor: float, draft: Draft, tiny_target: TinyTarget, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"read back, proposes another q than the run.*nothing was written"):
        write(draft, tiny_target, tmp_path / "out", layout=Wrong(factor), options=WriteOptions(dtype, 2))
    assert names(tmp_path) == []


def test_a_card_that_fails_leaves_nothing(draft: Draft, tiny_target: TinyTarget, tmp_path: Path) -> None:
    def fail(export: Export) -> str:
        raise ValueError("no card")

    with pytest.raises(ValueError, match="no card"):
        write(draft, tiny_target, tmp_path / "out", card=fail)
    assert names(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_weights(dtype: torch.dtype, draft: Draft, tiny_target: TinyTarget, tmp_path: Path) -> None:
    """The format is checked before rounding; what rounding does to q is said."""
    export = write(draft, tiny_target, tmp_path / "out", options=WriteOptions(dtype, 2))
    tensors, config = read_folder(export.path)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype, torch.int64, torch.bool}
    name = str(dtype).removeprefix("torch.")
    assert config["torch_dtype"] == name
    assert export.checks[-1].startswith("q, read back in float32: at most ")
    moved = float(export.checks[-1].rpartition(" ")[2])
    assert f"the weights as saved ({name}) move q by at most" in export.checks[-1]
    assert 1e-5 < moved < 0.05
    assert names(tmp_path) == ["out"]


def test_more_drafted_tokens_than_heads(tiny_target: TinyTarget, tmp_path: Path) -> None:
    medusa = make_draft(CASES["medusa"], tiny_target.spec, HALF)
    layout = layout_for(None, medusa)
    with pytest.raises(ValueError, match="num_draft_tokens=4: this Medusa has 3 heads"):
        write(medusa, tiny_target, tmp_path / "out", layout=layout, options=WriteOptions(num_draft_tokens=4))


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("eagle3", ["vllm", "speculators"]),
        ("medusa", ["medusa"]),
        ("mlp", ["mlp_speculator"]),
        ("mtp", ["mtp"]),
    ],
)
def test_formats_of_a_draft(name: str, formats: list[str], tiny_target: TinyTarget) -> None:
    draft = make_draft(CASES[name], tiny_target.spec)
    assert layout_for(None, draft).format == formats[0]
    for chosen in FORMATS:
        if chosen in formats:
            assert layout_for(chosen, draft).format == chosen
        else:
            with pytest.raises(ValueError, match=rf"^format={chosen} is not for drafts of .* use format={formats[0]}"):
                layout_for(chosen, draft)
    for unknown in ("gguf", "medusa_original"):
        with pytest.raises(ValueError, match=rf"^format: expected one of vllm, .*, got '{unknown}'$"):
            layout_for(unknown, draft)


def test_all_formats() -> None:
    assert set(FORMATS) == {"vllm", "speculators", "medusa", "mlp_speculator", "mtp"}


@pytest.mark.parametrize(("name", "layout"), [("mlp", FmsMLP()), ("mtp", NativeMTP())])
def test_other_architectures_come_back_too(name: str, layout: Layout, tmp_path: Path) -> None:
    target = TinyTarget(kind="deepseek_v3" if name == "mtp" else "llama", device="cpu")
    draft = make_draft(CASES[name], target.spec)
    export = write(draft, target, tmp_path / "out", layout=layout)
    assert same_q(draft, reopened(export.path, target), target)
    assert export.commands == ()
