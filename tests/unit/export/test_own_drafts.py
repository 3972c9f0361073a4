"""Drafts that are a user's own: refused in one sentence, or held by the format of the class that they extend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from export_cases import HALF, reopened, same_q
from helpers.own_draft import OneHead

from lkspec.drafts.eagle3 import Eagle3
from lkspec.drafts.medusa import Medusa
from lkspec.export.base import WriteOptions
from lkspec.export.writing import layout_for, write_export
from lkspec.targets.tiny import TinyTarget

OPTIONS = WriteOptions(num_draft_tokens=2)


@pytest.mark.parametrize("name", [None, "vllm", "medusa"])
def test_an_architecture_without_a_format(name: str | None, tiny_target: TinyTarget) -> None:
    draft = OneHead(tiny_target.spec, HALF)
    assert "no engine is known" in draft.served_by
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # compared as a whole
        layout_for(name, draft)
    assert str(caught.value) == (
        "no format holds drafts of class OneHead; there are vllm (Eagle3), speculators (Eagle3), medusa (Medusa), "
        "mlp_speculator (MLPSpeculator), mtp (MTP). Evaluate the run in process (lkspec evaluate), or describe its "
        "format as a Layout beside those of lkspec/export"
    )


class Renamed(Eagle3):
    """Computes what EAGLE-3 does."""


class Louder(Medusa):
    """Has Medusa's tensors and computes something else."""

    def _all_depths(self, last: torch.Tensor, num_depths: int) -> torch.Tensor:
        return 3.0 * super()._all_depths(last, num_depths)


class Larger(Eagle3):
    """Has a tensor more."""

    def __init__(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*args, **kwargs)
        self.register_buffer("extra", torch.ones(3))


def test_a_subclass_has_the_format_of_what_it_extends(tiny_target: TinyTarget, tmp_path: Path) -> None:
    draft = Renamed(tiny_target.spec, HALF, num_depths=2)
    export = write_export(draft, tiny_target, tmp_path / "out", layout=layout_for(None, draft), options=OPTIONS)
    assert same_q(draft, reopened(export.path, tiny_target), tiny_target)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Louder, r"nothing was written\. format=medusa holds what Medusa computes; if this draft does,"),
        (Larger, r"^format=vllm does not hold a Larger: .*no place for extra \(1 in all\)$"),
    ],
)
def test_a_subclass_that_the_format_does_not_hold(
    made: type[Eagle3] | type[Medusa], message: str, tiny_target: TinyTarget, tmp_path: Path
) -> None:
    draft = made(tiny_target.spec, HALF, num_depths=2)
    with pytest.raises(ValueError, match=message):
        write_export(draft, tiny_target, tmp_path / "out", layout=layout_for(None, draft), options=OPTIONS)
    assert list(tmp_path.iterdir()) == []
