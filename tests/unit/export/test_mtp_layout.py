"""MTP modules written back into the layouts that targets are released in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.mtp_checkpoints import MODULE_SHARD, TARGET_SHARD, Checkpoint, V, load_native, made
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lkspec.drafts.mtp import MTP
from lkspec.export.base import WriteOptions
from lkspec.export.mtp import NativeMTP
from lkspec.export.reading import Pretrained
from lkspec.targets.tiny import TinyTarget
from lkspec.vocab import DraftVocab

FULL = DraftVocab.full(V)
ALONE, STITCHED = WriteOptions(), WriteOptions(target_copy=True)
MTP_FILE = "model-mtp.safetensors"


def as_target(kind: str, source: Path | None = None) -> Any:
    """What writing reads of a target; a real one cannot be made of linear attention or fp8 weights here."""
    checkpoint, spec = made(kind)
    return SimpleNamespace(
        name="tiny",
        spec=spec,
        source=None if source is None else str(source),
        model_config={**checkpoint.config.to_dict(), "architectures": [type(checkpoint.model).__name__]},
        num_layers=checkpoint.config.num_hidden_layers,
        vocab_size=V,
    )


def new_draft(kind: str) -> MTP:
    return MTP(made(kind)[1], FULL, layer_init="random")


def trained_draft(kind: str, folder: Path) -> MTP:
    """The released module, moved a little, as by training."""
    draft = new_draft(kind)
    load_native(draft, made(kind)[0].write(folder))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in draft.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return draft


def assert_same(first: MTP, second: MTP, tolerance: float = 1e-6) -> None:
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


def read_back(kind: str, folder: Path) -> MTP:
    draft = new_draft(kind)
    load_native(draft, str(folder))
    return draft


@pytest.fixture(params=["deepseek", "deepseek_without_q_lora", "qwen3_next"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every shard, as engines read them; none may be there twice."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            assert name not in tensors, name
            tensors[name] = tensor
    return tensors


def test_the_module_alone(kind: str, tmp_path: Path) -> None:
    """The released module comes out as it went in: names, shapes, values."""
    checkpoint, _ = made(kind)
    draft = new_draft(kind)
    load_native(draft, checkpoint.write(tmp_path / "released"))
    (tmp_path / "out").mkdir()
    NativeMTP().write(tmp_path / "out", draft, as_target(kind), ALONE)
    written = all_tensors(tmp_path / "out")
    assert set(written) == set(checkpoint.stored)
    for name, tensor in checkpoint.stored.items():
        torch.testing.assert_close(written[name], tensor.float(), rtol=1e-6, atol=1e-6, msg=name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    assert config["model_type"] == checkpoint.config.model_type


def test_there_and_back(kind: str, tmp_path: Path) -> None:
    draft = trained_draft(kind, tmp_path / "released")
    (tmp_path / "out").mkdir()
    NativeMTP().write(tmp_path / "out", draft, as_target(kind), ALONE)
    assert_same(draft, read_back(kind, tmp_path / "out"))


def stitched(
    kind: str, folder: Path, *, without_module: bool = False, one_file: bool = False
) -> tuple[MTP, Path, Path]:
    """A trained draft, the target's folder and the copy with the module in it."""
    source, out = folder / "target", folder / "out"
    draft = trained_draft(kind, folder / "released")
    checkpoint: Checkpoint = made(kind)[0]
    checkpoint.write(source, without=tuple(checkpoint.stored) if without_module else ())
    if one_file:
        whole = all_tensors(source)
        for file in (TARGET_SHARD, MODULE_SHARD, "model.safetensors.index.json"):
            (source / file).unlink()
        save_file(whole, source / "model.safetensors")
    (source / "tokenizer.json").write_text("{}")
    (source / "README.md").write_text("the target's own card")
    out.mkdir()
    NativeMTP().write(out, draft, as_target(kind, source), STITCHED)
    return draft, source, out


@pytest.mark.parametrize(
    "options", [{}, {"without_module": True}, {"one_file": True}], ids=["shards", "no module", "one file"]
)
def test_a_copy_of_the_target(options: dict[str, bool], kind: str, tmp_path: Path) -> None:
    draft, source, out = stitched(kind, tmp_path, **options)
    checkpoint = made(kind)[0]
    old, new = all_tensors(source), all_tensors(out)
    assert set(new) == set(old) | set(checkpoint.stored)
    for name, tensor in new.items():  # the target is as it was
        assert name in checkpoint.stored or torch.equal(tensor, old[name]), name
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(new)
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert {name for name, where in index["weight_map"].items() if where == file.name} == set(opened.keys())
    assert index["metadata"]["total_size"] > 0
    assert {index["weight_map"][name] for name in checkpoint.stored} == {MTP_FILE}
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert after == {**before, "num_nextn_predict_layers": 1}
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not (out / "README.md").exists()
    assert_same(draft, read_back(kind, out))


def test_a_target_in_fp8_gets_an_fp8_module(tmp_path: Path) -> None:
    """What was quantised is quantised again, with scales in blocks; the rest keeps its precision."""
    draft, source, out = stitched("deepseek_yarn_fp8", tmp_path)
    old, new = all_tensors(source), all_tensors(out)
    assert {
        name: (tensor.dtype, tensor.shape) for name, tensor in new.items() if tensor.dtype == torch.float8_e4m3fn
    } == {name: (tensor.dtype, tensor.shape) for name, tensor in old.items() if tensor.dtype == torch.float8_e4m3fn}
    assert {name: tensor.shape for name, tensor in new.items() if name.endswith("_scale_inv")} == {
        name: tensor.shape for name, tensor in old.items() if name.endswith("_scale_inv")
    }
    again = read_back("deepseek_yarn_fp8", out)
    for name, tensor in draft.state_dict().items():
        # e4m3 keeps 4 significant bits; a block's smallest entries are rounded to its grid.
        atol = 0.002 * float(tensor.abs().max())
        torch.testing.assert_close(again.state_dict()[name].float(), tensor.float(), rtol=2**-4, atol=atol, msg=name)
    assert torch.equal(again.eh_proj.weight, draft.eh_proj.weight)
    assert not torch.equal(
        again.state_dict()["layer.layer.self_attn.o_proj.weight"],
        draft.state_dict()["layer.layer.self_attn.o_proj.weight"],
    )


def test_the_module_alone_of_an_fp8_target_is_not_quantised(tmp_path: Path) -> None:
    draft = trained_draft("deepseek_yarn_fp8", tmp_path / "released")
    target = as_target("deepseek_yarn_fp8")
    target.model_config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "out").mkdir()
    NativeMTP().write(tmp_path / "out", draft, target, ALONE)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert_same(draft, read_back("deepseek_yarn_fp8", tmp_path / "out"))


@pytest.mark.parametrize(("kind", "method"), [("deepseek", "fp8"), ("deepseek_yarn_fp8", "awq")])
def test_a_quantisation_that_says_nothing_of_the_module(kind: str, method: str, tmp_path: Path) -> None:
    draft, source, out = stitched(kind, tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    shutil.rmtree(out)
    out.mkdir()
    with pytest.raises(ValueError, match=r"needs block-wise fp8 and a module in it already.*target_copy=false"):
        NativeMTP().write(out, draft, as_target(kind, source), STITCHED)


def test_a_target_in_memory_cannot_be_copied(tmp_path: Path) -> None:
    draft = trained_draft("deepseek", tmp_path / "released")
    with pytest.raises(ValueError, match="target_copy=true needs a target that was loaded from a folder or the hub"):
        NativeMTP().write(tmp_path, draft, as_target("deepseek"), STITCHED)


def test_a_truncated_vocabulary_is_refused(tmp_path: Path) -> None:
    draft = MTP(made("deepseek")[1], DraftVocab(torch.arange(0, V, 2), V))
    with pytest.raises(ValueError, match=r"proposes all 264 tokens, this run's draft vocabulary has 132; train with"):
        NativeMTP().write(tmp_path, draft, as_target("deepseek"), ALONE)


def test_a_family_without_modules_is_refused(tiny_target: TinyTarget, tmp_path: Path) -> None:
    draft = MTP(tiny_target.spec, DraftVocab.full(V))
    with pytest.raises(
        ValueError, match=r"targets of type llama have no MTP module of their own, and no engine serves"
    ):
        NativeMTP().write(tmp_path, draft, tiny_target, ALONE)


def test_what_is_checked(tmp_path: Path) -> None:
    draft, _, out = stitched("deepseek", tmp_path)
    folder, target = Pretrained.open(str(out)).folder, as_target("deepseek")
    lines = NativeMTP().checks(folder, draft, target)
    assert lines[1] == (
        f"module: {len(made('deepseek')[0].stored)} tensors model.layers.3.*, beside the target's 3 layers"
    )
    target.num_layers = 4
    with pytest.raises(ValueError, match=r"config\.json says 3 layers, the target has 4"):
        NativeMTP().checks(folder, draft, target)


def test_how_it_is_served(tmp_path: Path) -> None:
    draft = new_draft("deepseek")
    assert NativeMTP().serve_commands(draft, "org/target", "out", ALONE) == []
    vllm, sglang = NativeMTP().serve_commands(
        draft, "org/target", "out", WriteOptions(num_draft_tokens=2, target_copy=True)
    )
    assert vllm.command == (
        'vllm serve out --speculative-config \'{"method": "mtp", "num_speculative_tokens": 2, '
        '"draft_sample_method": "probabilistic"}\''
    )
    assert sglang.command == (
        "python -m sglang.launch_server --model-path out --speculative-algorithm NEXTN --speculative-num-steps 2 "
        "--speculative-eagle-topk 1 --speculative-num-draft-tokens 3 --speculative-use-rejection-sampling"
    )
