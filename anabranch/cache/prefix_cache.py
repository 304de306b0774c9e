"""Finds blocks whose KV a new prompt can share, by hash of the block and of all before it.

A block's digest is `xxh3_128(digest of the block before + token ids)`; equal on every machine, so that workers
can be asked by digest who holds a prefix. A hit never rests on the digest alone: the token ids, the salt and the
identity of the entry before are compared as well, so a collision costs a miss, not a wrong answer.

Requests share blocks with those of the same salt alone (no salt is one of them), so how much of a prompt was cached
tells a caller nothing about the prompts of callers who use another salt.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from anabranch.cache.block_pool import BlockPool

_NO_SERIAL = 0


def block_digest(parent_digest: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest (16 bytes) of one full block; the first block's parent digest is `salt_digest`."""
    digest: bytes = xxhash.xxh3_128_digest(parent_digest + struct.pack(f"<{len(token_ids)}I", *token_ids))
    return digest


def salt_digest(salt: str) -> bytes:
    """What stands for the block before a first block; empty without a salt."""
    if not salt:
        return b""
    digest: bytes = xxhash.xxh3_128_digest(salt.encode())
    return digest


@dataclass(frozen=True, kw_only=True)
class PrefixEntry:
    """One findable block.

    Attributes:
        serial: names the entry; never used again.
        parent_serial: entry of the block before; 0 for a first block.
        salt: of the requests that may share the block.
    """

    serial: int
    parent_serial: int
    salt: str
    digest: bytes
    token_ids: tuple[int, ...]
    block_id: int


@dataclass(kw_only=True)
class Chain:
    """How far a request's blocks are findable.

    Attributes:
        num_blocks: leading blocks that have been matched or published.
        digest, serial: of the last of them.
        salt: of the request.
    """

    num_blocks: int = 0
    digest: bytes = b""
    serial: int = _NO_SERIAL
    salt: str = ""

    @classmethod
    def begin(cls, salt: str) -> Chain:
        """Nothing is findable yet."""
        return cls(digest=salt_digest(salt), salt=salt)


class PrefixCache:
    """The index from prefixes to blocks of one pool.

    Args:
        pool: keeps the blocks; tells when one is given out anew.
        block_size: tokens per block.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._by_digest: dict[bytes, PrefixEntry] = {}
        self._by_block: dict[int, PrefixEntry] = {}
        self._last_serial = _NO_SERIAL
        pool.on_reuse = self._on_reuse

    def __len__(self) -> int:
        return len(self._by_digest)

    def match(self, token_ids: Sequence[int], salt: str = "") -> tuple[list[int], Chain]:
        """The longest prefix that requests of this salt have cached: block ids, and the chain to publish on with.

        Never the whole of `token_ids`: at least one token remains to be computed.
        """
        chain = Chain.begin(salt)
        block_ids: list[int] = []
        size = self._block_size
        for end in range(size, len(token_ids), size):
            tokens = tuple(token_ids[end - size : end])
            entry = self._find(chain, block_digest(chain.digest, tokens), tokens)
            if entry is None:
                break
            block_ids.append(entry.block_id)
            chain = Chain(num_blocks=chain.num_blocks + 1, digest=entry.digest, serial=entry.serial, salt=salt)
        return block_ids, chain

    def publish(self, chain: Chain, block_ids: Sequence[int], token_ids: Sequence[int], num_computed: int) -> None:
        """Make the full blocks among the first `num_computed` tokens findable; moves `chain` on.

        A block that equals one that is findable already stays private.
        """
        size = self._block_size
        for place in range(chain.num_blocks, num_computed // size):
            tokens = tuple(token_ids[place * size : (place + 1) * size])
            digest = block_digest(chain.digest, tokens)
            entry = self._find(chain, digest, tokens) or self._add(chain, digest, tokens, block_ids[place])
            chain.num_blocks, chain.digest, chain.serial = place + 1, digest, entry.serial

    def clear(self) -> None:
        """Forget everything; blocks that are in use stay so."""
        for block_id in self._by_block:
            self._pool.forget(block_id)
        self._by_block.clear()
        self._by_digest.clear()

    def check_integrity(self) -> None:
        """Raise AssertionError, saying what is wrong, unless index and pool agree."""
        faults = [
            f"block {block_id} is indexed and not kept" for block_id in self._by_block if not self._pool.kept(block_id)
        ]
        faults += [f"block {b} is kept and not indexed" for b in self._kept_blocks() if b not in self._by_block]
        faults += [
            f"entry {entry.serial} is indexed one way only"
            for entry in self._by_block.values()
            if self._by_digest.get(entry.digest) is not entry
        ]
        if len(self._by_block) != len(self._by_digest):
            faults.append(f"{len(self._by_block)} blocks have {len(self._by_digest)} digests")
        if faults:
            raise AssertionError("prefix cache: " + "; ".join(faults[:10]))

    def _kept_blocks(self) -> list[int]:
        return [block_id for block_id in range(self._pool.num_blocks) if self._pool.kept(block_id)]

    def _find(self, parent: Chain, digest: bytes, tokens: tuple[int, ...]) -> PrefixEntry | None:
        entry = self._by_digest.get(digest)
        if entry is None or (entry.parent_serial, entry.salt) != (parent.serial, parent.salt):
            return None
        return entry if entry.token_ids == tokens else None

    def _add(self, parent: Chain, digest: bytes, tokens: tuple[int, ...], block_id: int) -> PrefixEntry:
        # What else lies under this digest has lost its parent (or collides): it cannot be reached, so it goes.
        unreachable = self._by_digest.get(digest)
        if unreachable is not None:
            self._remove(unreachable)
            self._pool.forget(unreachable.block_id)
        self._last_serial += 1
        entry = PrefixEntry(
            serial=self._last_serial,
            parent_serial=parent.serial,
            salt=parent.salt,
            digest=digest,
            token_ids=tokens,
            block_id=block_id,
        )
        self._by_digest[digest] = entry
        self._by_block[block_id] = entry
        self._pool.keep(block_id)
        return entry

    def _on_reuse(self, block_id: int) -> None:
        self._remove(self._by_block[block_id])

    def _remove(self, entry: PrefixEntry) -> None:
        del self._by_digest[entry.digest]
        del self._by_block[entry.block_id]
