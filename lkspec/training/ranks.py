"""Which of several processes this one is."""

from lightning.pytorch.utilities import rank_zero_only


def is_first_rank() -> bool:
    """Whether this process decides, writes and prints; known before any process group is made."""
    return rank_zero_only.rank == 0
