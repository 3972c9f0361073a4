"""Tokenised files in the cache folder: 3 ms a conversation would be half an hour for each run on a large data set."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from lkspec.data.dataset import EncodedStore
from lkspec.data.sources import local_files
from lkspec.files import cache_dir, sha256_of

_MIN_CONVERSATIONS = 1000  # fewer are tokenised again
_CODE = (
    "chat.py",
    "conversations.py",
    "dataset.py",
    "sources.py",
)  # beside this file: what a tokenised conversation depends on


class TokenCache:
    """The place of one path's tokens, by the contents of its files, the tokenizer, the settings and our own code.

    Args:
        path: of conversations; hub data sets and made-up ones have no place.
        tokenizer: a fast one, with its chat template.
        max_length, eos_ids: as in ``encode_conversation``.
    """

    def __init__(
        self, path: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int, eos_ids: tuple[int, ...]
    ) -> None:
        self.file: Path | None = None
        files = local_files(path)
        if not files or not tokenizer.is_fast:
            return
        here = Path(__file__).parent
        depends = {
            "files": [(file.stem, sha256_of(file)) for file in files],
            "code": [sha256_of(here / name) for name in _CODE],
            "tokenizer": [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template],
            "settings": [max_length, list(eos_ids)],
        }
        digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
        self.file = cache_dir() / "tokenised" / f"{digest[:32]}.safetensors"

    def load(self) -> EncodedStore | None:
        """What was saved; None before that, or where it cannot be read."""
        if self.file is None or not self.file.is_file():
            return None
        try:
            return EncodedStore.load(self.file)
        except SafetensorError:
            return None

    def save(self, store: EncodedStore) -> None:
        """Keeps a store, if it is large enough to be worth it."""
        if self.file is not None and len(store) >= _MIN_CONVERSATIONS:
            store.save(self.file)
