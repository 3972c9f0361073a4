"""How target checkpoints name and shape their MTP module: DeepSeek-V3 and Qwen3-Next."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lkspec.tensor_folder import TensorFolder
from lkspec.vocab import DraftVocab


@dataclass(frozen=True)
class Layout:
    """One family's conventions.

    Attributes:
        prefix: begins all names of the module; ``{L}`` is the target's number of layers; None: no checkpoint has one.
        names: our name of a tensor beside the decoder layer -> theirs, behind the prefix.
        layer_prefix: begins theirs inside the decoder layer.
        shared: their own copies of the target's embedding and head, if they have them.
        unit_offset: their norms of ``names`` multiply by 1 + weight.
        zero_first_embedding: the embedding read at position 0 is zero.
        served_by: which engines serve the module.
    """

    prefix: str | None
    names: Mapping[str, str]
    layer_prefix: str
    shared: Mapping[str, str]
    unit_offset: bool
    zero_first_embedding: bool
    served_by: str


_DEEPSEEK_V3 = Layout(
    prefix="model.layers.{L}.",
    names={
        "enorm.weight": "enorm.weight",
        "hnorm.weight": "hnorm.weight",
        "eh_proj.weight": "eh_proj.weight",
        "norm.weight": "shared_head.norm.weight",
    },
    layer_prefix="",
    shared={"embedding": "embed_tokens.weight", "head": "shared_head.head.weight"},
    unit_offset=False,
    zero_first_embedding=True,
    served_by="vLLM and SGLang, inside the target's own checkpoint",
)
_QWEN3_NEXT = Layout(
    prefix="mtp.",
    names={
        "enorm.weight": "pre_fc_norm_embedding.weight",
        "hnorm.weight": "pre_fc_norm_hidden.weight",
        "eh_proj.weight": "fc.weight",
        "norm.weight": "norm.weight",
    },
    layer_prefix="layers.0.",
    shared={},
    unit_offset=True,
    zero_first_embedding=False,
    served_by="vLLM and SGLang, inside the target's own checkpoint",
)
_GENERIC = Layout(
    prefix=None,
    names={},
    layer_prefix="",
    shared={},
    unit_offset=False,
    zero_first_embedding=False,
    served_by="research only: no engine serves an MTP module for a target of this kind",
)
_LAYOUTS = {"deepseek_v3": _DEEPSEEK_V3, "qwen3_next": _QWEN3_NEXT}
_OUR_LAYER = "layer.layer."
_EXPERTS = re.compile(r"(?P<before>.*mlp\.experts\.)(?P<which>gate_up_proj|down_proj)")


def layout_of(model_type: str) -> Layout:
    """The conventions of a target architecture; without an MTP module of its own, the plain ones."""
    return _LAYOUTS.get(model_type, _GENERIC)


def read_native(
    folder: TensorFolder,
    layout: Layout,
    shapes: Mapping[str, torch.Size],
    shared: Mapping[str, Tensor],
    vocab: DraftVocab,
) -> dict[str, Tensor]:
    """The module's tensors by our names, read from a target checkpoint.

    Args:
        folder: the checkpoint.
        layout: its conventions.
        shapes: what to read, by our names.
        shared: the target's ``embedding`` [V, H] and ``head`` [D, H], of which the checkpoint may hold copies.
        vocab: the rows of the head.

    Raises:
        ValueError: a target without an MTP module, a tensor that is missing, has another shape or has no place here, a
            copy of the target's embedding or head that is not the target's.
    """
    if layout.prefix is None:
        raise ValueError(
            f"draft.init_from={folder.path}: targets of type {folder.config.get('model_type')} have no MTP module of "
            "their own; use draft=mtp, which builds one from the target's decoder layer"
        )
    prefix = layout.prefix.replace("{L}", str(folder.config.get("num_hidden_layers")))
    if not folder.names(prefix):
        raise ValueError(f"draft.init_from={folder.path}: no tensor {prefix}*: this checkpoint was saved without MTP")
    read: set[str] = set()
    tensors = {}
    for name, shape in shapes.items():
        tensor = _read(folder, layout, prefix, name, shape, read)
        if tensor.shape != shape:
            raise ValueError(
                f"draft.init_from={folder.path}: {name} is {list(tensor.shape)} there, {list(shape)} in this draft"
            )
        tensors[name] = tensor
    for which, theirs in layout.shared.items():
        if prefix + theirs in folder:
            _check_copy(folder, prefix + theirs, shared[which], vocab if which == "head" else None)
            read.update((prefix + theirs, f"{prefix}{theirs}_scale_inv"))
    unread = [name for name in folder.names(prefix) if name not in read]
    if unread:
        raise ValueError(f"draft.init_from={folder.path}: no place for {', '.join(unread[:5])} ({len(unread)} in all)")
    return tensors


def _read(folder: TensorFolder, layout: Layout, prefix: str, name: str, shape: torch.Size, read: set[str]) -> Tensor:
    def get(theirs: str) -> Tensor:
        read.update((theirs, f"{theirs}_scale_inv"))
        return folder.get(theirs)

    if name in layout.names:
        tensor = get(prefix + layout.names[name])
        return tensor.float() + 1.0 if layout.unit_offset and tensor.ndim == 1 else tensor
    theirs = prefix + layout.layer_prefix + name.removeprefix(_OUR_LAYER)
    experts = _EXPERTS.fullmatch(theirs)
    if experts is None:
        return get(theirs)
    # transformers keeps all experts in one tensor, released checkpoints one by one.
    before, stacked = experts["before"], []
    for expert in range(shape[0]):
        parts = ("gate_proj", "up_proj") if experts["which"] == "gate_up_proj" else ("down_proj",)
        stacked.append(torch.cat([get(f"{before}{expert}.{part}.weight") for part in parts]))
    return torch.stack(stacked)


def _check_copy(folder: TensorFolder, name: str, ours: Tensor, vocab: DraftVocab | None) -> None:
    copy = folder.get(name)
    rows = copy if vocab is None or vocab.is_full else copy[vocab.ids.to(copy.device)]
    # In bfloat16, which released weights are rounded to.
    if rows.shape != ours.shape or not torch.equal(rows.to(ours.device, torch.bfloat16), ours.to(torch.bfloat16)):
        raise ValueError(
            f"draft.init_from={folder.path}: {name} is not the target's own, but an MTP draft shares that tensor; was "
            "the checkpoint made for another target?"
        )
