"""A cache of the states of prompt prefixes: a tree of blocks, of which the least recently used leaf is removed first.

A block is what `block` tokens add to a decode state (`state.snapshot`), with everything that a layer holds after them.
Its key is the tokens before it and in it, and whose weights computed it: 0 for those of the model, another number for
those of an adapter.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

Key = tuple[int, bytes]
"""The number of the block before it, or, of a first one, minus that of whose weights; and its tokens."""


class PrefixCache:
    """Holds blocks of `block` tokens within `max_bytes`; with 0 bytes it holds nothing."""

    def __init__(self, block: int, max_bytes: int):
        self._block, self._max_bytes = block, max_bytes
        self._entries: OrderedDict[Key, tuple[int, Any, int]] = OrderedDict()
        """(own number, snapshot, bytes) by key, least recently used first. A use of a block counts as a later use of
        the blocks before it, so that none of them is removed before it."""
        self._numbers = 0
        self._smallest = 0
        """Bytes of the smallest snapshot seen so far."""
        self._no_room: Key | None = None
        """The last block that was removed as soon as it was added: the blocks before it fill the cache."""
        self.bytes = 0
        """Bytes of all snapshots."""

    def find(self, prompt: Sequence[int], blocks: int = 0, of: int = 0) -> list[Any]:
        """Returns the snapshots of the longest prefix cached of these weights, in order, without the first `blocks`.

        The prefix is never the whole prompt, whose last token must be run for the logits after it.
        """
        most = (len(prompt) - 1) // self._block
        if most <= blocks or not self._entries:
            return []
        keys, before = [], -of
        for key_tokens in self._tokens(prompt, most):
            entry = self._entries.get((before, key_tokens))
            if entry is None:
                break
            keys.append((before, key_tokens))
            before = entry[0]
        self._use(keys)
        return [self._entries[key][1] for key in keys[blocks:]]

    def wants(self, prompt: Sequence[int], blocks: int, of: int = 0) -> bool:
        """Returns whether the cache would keep the snapshot of block number `blocks` (from 1) of the prompt: it holds
        the blocks before it but not this one, and has room for it."""
        if self._smallest > self._max_bytes or not self._max_bytes:
            return False
        last = self._keys(prompt, blocks, of)[-1]
        return last is not None and last not in self._entries and last != self._no_room

    def add(self, prompt: Sequence[int], blocks: int, snapshot: Any, of: int = 0) -> None:
        """Adds the snapshot of block number `blocks`, and removes blocks until all fit."""
        size = sum(x.nbytes for x in jax.tree.leaves(snapshot))
        self._smallest = min(self._smallest or size, size)
        key = self._keys(prompt, blocks, of)[-1]
        if key is None or key in self._entries or size > self._max_bytes:
            return
        self._numbers += 1
        self._entries[key] = (self._numbers, snapshot, size)
        self.bytes += size
        self._use([key for key in self._keys(prompt, blocks, of) if key is not None])
        while self.bytes > self._max_bytes:
            thrown, (_, _, freed) = self._entries.popitem(last=False)
            self.bytes -= freed
            if thrown == key:
                self._no_room = key

    def clear(self) -> None:
        """Removes all blocks."""
        self._entries.clear()
        self.bytes = self._smallest = 0
        self._no_room = None

    def __len__(self) -> int:
        return len(self._entries)

    def _tokens(self, prompt: Sequence[int], blocks: int) -> Iterator[bytes]:
        """Yields the tokens of the first `blocks` blocks, as needed: mostly the first is not cached."""
        C = self._block
        return (np.asarray(prompt[i : i + C], np.int32).tobytes() for i in range(0, blocks * C, C))

    def _keys(self, prompt: Sequence[int], blocks: int, of: int) -> list[Key | None]:
        """Returns the keys of the first `blocks` blocks, None where the block before is not cached."""
        keys: list[Key | None] = []
        before: int | None = -of
        for tokens in self._tokens(prompt, blocks):
            key = None if before is None else (before, tokens)
            keys.append(key)
            entry = None if key is None else self._entries.get(key)
            before = entry[0] if entry else None
        return keys

    def _use(self, keys: Sequence[Key]) -> None:
        for key in reversed(keys):  # The first block last: the others need it.
            if key in self._entries:
                self._entries.move_to_end(key)
