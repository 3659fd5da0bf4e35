"""States of prompt prefixes, kept to be used again: a tree of blocks, the least recently used leaf thrown out first.

A block is what `block` tokens add to a decode state (`state.snapshot`), with everything a layer holds at the border
after them. It is found by the tokens before and in it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

Key = tuple[int, bytes]
"""The number of the block before (0: none) and the tokens in it."""


class PrefixCache:
    """Blocks of `block` tokens within `max_bytes`; 0 bytes keep nothing."""

    def __init__(self, block: int, max_bytes: int):
        self._block, self._max_bytes = block, max_bytes
        self._entries: OrderedDict[Key, tuple[int, Any, int]] = OrderedDict()
        """By key, least recently used first: (own number, snapshot, bytes). Every use of a block is one of all before
        it, which are told after it: so none is thrown out before those that follow it."""
        self._numbers = 0
        self._smallest = 0
        """Bytes of the smallest snapshot that was ever offered."""
        self._no_room: Key | None = None
        """The block that was last thrown out for itself: those before it take all the room."""
        self.bytes = 0
        """Of all snapshots."""

    def find(self, prompt: Sequence[int], blocks: int = 0) -> list[Any]:
        """The snapshots of the longest prefix there is, in order, without the first `blocks`; never the whole prompt:
        its last token must be run for what follows it."""
        most = (len(prompt) - 1) // self._block
        if most <= blocks or not self._entries:
            return []
        keys, before = [], 0
        for key_tokens in self._tokens(prompt, most):
            entry = self._entries.get((before, key_tokens))
            if entry is None:
                break
            keys.append((before, key_tokens))
            before = entry[0]
        self._use(keys)
        return [self._entries[key][1] for key in keys[blocks:]]

    def wants(self, prompt: Sequence[int], blocks: int) -> bool:
        """Whether to give it the snapshot of block number `blocks` (from 1) of the prompt: it holds those before, and
        not this one, and has room for it."""
        if self._smallest > self._max_bytes or not self._max_bytes:
            return False
        last = self._keys(prompt, blocks)[-1]
        return last is not None and last not in self._entries and last != self._no_room

    def add(self, prompt: Sequence[int], blocks: int, snapshot: Any) -> None:
        """Keeps the snapshot of block number `blocks`, and throws out what is then too much."""
        size = sum(x.nbytes for x in jax.tree.leaves(snapshot))
        self._smallest = min(self._smallest or size, size)
        key = self._keys(prompt, blocks)[-1]
        if key is None or key in self._entries or size > self._max_bytes:
            return
        self._numbers += 1
        self._entries[key] = (self._numbers, snapshot, size)
        self.bytes += size
        self._use([key for key in self._keys(prompt, blocks) if key is not None])
        while self.bytes > self._max_bytes:
            thrown, (_, _, freed) = self._entries.popitem(last=False)
            self.bytes -= freed
            if thrown == key:
                self._no_room = key

    def __len__(self) -> int:
        return len(self._entries)

    def _tokens(self, prompt: Sequence[int], blocks: int) -> Iterator[bytes]:
        """Of the first `blocks` blocks, each made when it is asked for: mostly the first is not there."""
        C = self._block
        return (np.asarray(prompt[i : i + C], np.int32).tobytes() for i in range(0, blocks * C, C))

    def _keys(self, prompt: Sequence[int], blocks: int) -> list[Key | None]:
        """Keys of the first `blocks` blocks; None where the block before is not there."""
        keys: list[Key | None] = []
        before: int | None = 0
        for tokens in self._tokens(prompt, blocks):
            key = None if before is None else (before, tokens)
            keys.append(key)
            entry = None if key is None else self._entries.get(key)
            before = entry[0] if entry else None
        return keys

    def _use(self, keys: Sequence[Key]) -> None:
        for key in reversed(keys):  # The first block last: it is needed by the others.
            if key in self._entries:
                self._entries.move_to_end(key)
