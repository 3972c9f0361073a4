"""The loss of a step is the mean over its tokens, however they are spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from lkspec.losses.fused.token_stats import token_stats
from lkspec.losses.objectives import LKLambda, masked_sums, reduce_loss
from lkspec.types import LinearHead
from lkspec.vocab import DraftVocab

K, T, H, V = 2, 8, 4, 9
VOCAB = DraftVocab(torch.tensor([0, 1, 3, 4, 8]), V)
#: Rows of each rank: unequal in number, in supervised tokens, and with none at depth 2 on rank 1.
ROWS_OF_RANK = ((0, 1, 2), (3,))


@dataclass(frozen=True)
class Result:
    loss: Tensor
    gradient: Tensor


def step(rows: tuple[int, ...], *, distributed: bool) -> Result:
    """Loss and head gradient of one optimiser step, summed over ranks."""

    def summed(tensor: Tensor) -> Tensor:
        if distributed:
            dist.all_reduce(tensor)
        return tensor

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(K, 4, T, H, generator=generator, dtype=torch.float64)[:, list(rows)]
    target_hidden = torch.randn(4, T, H, generator=generator, dtype=torch.float64)[list(rows)]
    target_head = LinearHead(2 * torch.randn(V, H, generator=generator, dtype=torch.float64))
    weight = torch.randn(VOCAB.size, H, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.zeros(K, 4, T, dtype=torch.bool)
    for row, length in enumerate((6, 4, 2, 1)):
        mask[0, row, :length] = mask[1, row, : length - 1] = True
    tokens = torch.zeros(len(rows), T, dtype=torch.int64)
    stats = token_stats(
        hidden, [LinearHead(weight)] * K, target_hidden, target_head, VOCAB, tokens, mask[:, list(rows)]
    )
    sums = masked_sums(stats)
    counts = summed(sums["count"])
    values = LKLambda().values(stats, summed(sums["alpha"]) / counts)
    loss = reduce_loss(values, stats.mask, counts, 0.8)
    loss.backward()
    return Result(summed(loss.detach()), summed(weight.grad))


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    result = step(ROWS_OF_RANK[rank], distributed=True)
    torch.save((result.loss, result.gradient), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_with_uneven_counts_equal_one(tmp_path: Path):
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    alone = step((0, 1, 2, 3), distributed=False)
    for rank in range(2):
        loss, gradient = torch.load(tmp_path / f"rank{rank}.pt")
        assert torch.allclose(loss, alone.loss, rtol=1e-12)
        assert torch.allclose(gradient, alone.gradient, rtol=1e-10, atol=1e-14)
    mean_of_means = (step((0, 1, 2), distributed=False).loss + step((3,), distributed=False).loss) / 2
    assert abs(mean_of_means - alone.loss) > 1e-2, "the rows are such that averaging ranks would show"
