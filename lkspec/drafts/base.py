"""The Draft contract (contract 2): one architecture a file, trained by ``unroll``, served by ``propose``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lkspec.nn.flash import check_kernel
from lkspec.nn.kv_cache import PositionCache
from lkspec.types import Batch, DraftSampler, FreshStates, LinearHead, TargetStates, check_sharpness
from lkspec.vocab import DraftVocab


@dataclass(frozen=True)
class UnrollOptions:
    """How ``unroll`` runs; what it computes is the same up to rounding.

    Attributes:
        compile: all but the attention goes through torch.compile (minutes at first; on CPUs it needs a C++ compiler).
        checkpoint: only each depth's results are kept, and backward computes the depth again: less memory, more time.
        attention: kernel of the attention over anchors, see ``lkspec.nn.flash.check_kernel``.

    Raises:
        ValueError: an attention kernel that is unknown or not installed; compile or checkpoint that is not a bool.
    """

    compile: bool = False
    checkpoint: bool = False
    attention: str = "auto"

    def __post_init__(self) -> None:
        for name in ("compile", "checkpoint"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"unroll.{name}: expected true or false, got {getattr(self, name)!r}")
        try:
            check_kernel(self.attention)
        except ValueError as error:
            raise ValueError(f"unroll.attention: {error}") from None


class Draft(nn.Module):
    """A draft model.

    Attributes:
        vocab: the tokens it can propose.
        num_depths: depths K that it trains.
        max_depths: most tokens it can draft a round; None when its weights are shared over depths.
        paper_eta: eta of ``lk_lambda`` that the paper uses for this architecture.
        title: the architecture's name for readers; None is the class's.
        paper: who described it, and where.
        served_by: which engines serve this draft with this target and vocabulary today.
        full_vocabulary: whether its usual draft vocabulary is the target's.
        reads_aux: whether it reads the target's auxiliary states.
        unroll_options: how ``unroll`` runs.

    Raises:
        ValueError: num_depths < 1.
    """

    unroll_options: UnrollOptions = UnrollOptions()
    full_vocabulary: ClassVar[bool] = False
    reads_aux: ClassVar[bool] = False
    title: ClassVar[str | None] = None
    paper: ClassVar[str | None] = None
    served_by: str = "research only: no engine is known to serve this draft"

    def __init__(
        self, vocab: DraftVocab, num_depths: int, *, max_depths: int | None = None, paper_eta: float = 3.0
    ) -> None:
        super().__init__()
        if num_depths < 1:
            raise ValueError(f"draft.num_depths: expected at least 1, got {num_depths}")
        self.vocab, self.num_depths, self.max_depths, self.paper_eta = vocab, num_depths, max_depths, paper_eta

    @abstractmethod
    def unroll(self, batch: Batch, states: TargetStates, num_depths: int | None = None) -> Float[Tensor, "K B T H"]:
        """What multiplies ``head(k)`` at every anchor and depth, given the text's own tokens (teacher forcing).

        ``num_depths`` is the trained K unless given; at most ``max_depths``.
        """

    @abstractmethod
    def head(self, depth: int) -> LinearHead:
        """The head of depth k = 1..K, [D, H]; it may be frozen and shared over depths."""

    @abstractmethod
    def observe(self, cache: PositionCache, fresh: FreshStates) -> Float[Tensor, "B S H"]:
        """Enters what the target has newly read into the cache; drafted entries of the last round are overwritten.

        Returns the draft's state at each new anchor, from which ``propose`` goes on.
        """

    @abstractmethod
    def propose(
        self, cache: PositionCache, fresh: FreshStates, sample: DraftSampler, num_draft_tokens: int
    ) -> Int[Tensor, "B K"]:
        """Drafts K tokens (target ids) a row from the last real anchor of ``fresh``.

        ``sample`` is called once a depth, in order, with that depth's draft logits.
        """

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A part of ``unroll``, compiled if the options say so."""
        return torch.compile(function) if self.unroll_options.compile else function

    def checkpointed(self, depth: Callable[..., Any]) -> Callable[..., Any]:
        """A depth of ``unroll``, a function of tensors alone, computed again in backward if the options say so."""
        if not (self.unroll_options.checkpoint and torch.is_grad_enabled()):
            return depth
        return partial(checkpoint, depth, use_reentrant=False, preserve_rng_state=False)

    def freeze(self, patterns: Sequence[str]) -> None:
        """Leaves the parameters whose names match a pattern (``*`` is anything) as they are.

        Raises:
            ValueError: a pattern that matches no parameter, or nothing left to train.
        """
        named = dict(self.named_parameters())
        for pattern in patterns:
            matching = [name for name in named if fnmatchcase(name, pattern)]
            if not matching:
                raise ValueError(
                    f"draft.freeze: {pattern!r} matches no parameter of {type(self).__name__}; it has "
                    + ", ".join(named)
                )
            for name in matching:
                named[name].requires_grad_(False)
        if self.num_trainable == 0:
            raise ValueError(f"draft.freeze={list(patterns)} leaves nothing to train")

    @torch.no_grad()
    def sharpen(self, sharpness: float) -> None:
        """Multiplies its heads: q^sharpness, renormalised, in place of q; the first choices, and T = 0, stay.

        Raises:
            ValueError: sharpness that is not positive and finite, or a head that is the target's.
        """
        check_sharpness(sharpness)
        heads = [self.head(depth) for depth in range(1, self.num_depths + 1)]
        tensors = {t.data_ptr(): t for head in heads for t in (head.weight, head.bias) if t is not None}
        if any(tensor.data_ptr() in tensors for tensor in self.frozen_tensors()):
            raise ValueError(f"sharpness={sharpness:g}: the head of {type(self).__name__} is the target's own")
        assert all(head.soft_cap is None for head in heads)
        for tensor in tensors.values():
            tensor.mul_(sharpness)

    def new_cache(self, num_rows: int) -> PositionCache:
        """An empty cache for ``observe`` and ``propose``."""
        return PositionCache(num_rows)

    def check_num_draft_tokens(self, num_draft_tokens: int) -> None:
        """Refuses more depths than the draft has.

        Raises:
            ValueError: num_draft_tokens < 1 or above ``max_depths``.
        """
        if num_draft_tokens < 1:
            raise ValueError(f"num_draft_tokens: expected at least 1, got {num_draft_tokens}")
        if self.max_depths is not None and num_draft_tokens > self.max_depths:
            raise ValueError(
                f"num_draft_tokens={num_draft_tokens}: this {type(self).__name__} has {self.max_depths} heads; "
                f"use at most {self.max_depths}, or train more by draft.num_depths"
            )

    @property
    def num_trainable(self) -> int:
        """Parameters that training changes."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def num_frozen(self) -> int:
        """Parameters that training leaves as they are, those shared with the target (embedding, head) included."""
        frozen = [*(p for p in self.parameters() if not p.requires_grad), *self.frozen_tensors()]
        return sum({p.data_ptr(): p.numel() for p in frozen}.values())

    def frozen_tensors(self) -> list[Tensor]:
        """Tensors of the target that the draft reads without owning them; they are not in its checkpoint."""
        return []
