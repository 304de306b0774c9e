"""Prompts on their way into the cache: first come, first served, in chunks.

    waiting (no blocks) -> admitted (blocks for the whole prompt held) -> chunk -> chunk -> last chunk -> sampled

Prefill workers and colocated workers feed their steps from one of these.
"""

from __future__ import annotations

from collections import deque

from anabranch.cache.kv_manager import KvCacheManager
from anabranch.schedule.sequence import Sequence


class PromptQueue:
    """Prompts that wait for blocks, and those whose chunks are being computed, oldest first."""

    def __init__(self, cache: KvCacheManager) -> None:
        self.cache = cache
        self.waiting: deque[Sequence] = deque()
        self.computing: list[Sequence] = []

    def __len__(self) -> int:
        return len(self.waiting) + len(self.computing)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens still to compute."""
        return sum(s.num_remaining for s in self.waiting) + sum(s.num_remaining for s in self.computing)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queue a preempted sequence again, before all that came later."""
        self.waiting.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence; its blocks are the caller's to release."""
        if sequence in self.computing:
            self.computing.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Go on with a sequence that had left with its blocks, at its place by age."""
        self.computing.append(sequence)
        self.computing.sort(key=lambda s: s.age)

    def next_chunks(
        self, max_tokens: int, max_sequences: int, *, max_admitted: int | None = None
    ) -> list[tuple[Sequence, int]]:
        """Choose what to compute next: `(sequence, number of tokens)`, at most `max_tokens` in all.

        Admits waiting prompts while blocks, tokens and places last; the head of the queue is never passed.

        Args:
            max_admitted: most waiting prompts to admit now; None: as many as fit.
        """
        chunks: list[tuple[Sequence, int]] = []
        for sequence in self.computing:
            if max_tokens <= 0 or len(chunks) >= max_sequences:
                return chunks
            chunks.append((sequence, min(max_tokens, sequence.num_remaining)))
            max_tokens -= chunks[-1][1]
        places = max_sequences if max_admitted is None else min(max_sequences, len(chunks) + max_admitted)
        while self.waiting and max_tokens > 0 and len(chunks) < places:
            sequence = self.waiting[0]
            salt = sequence.request.cache_salt
            if not self.cache.can_admit(sequence.tokens, sequence.num_tokens, cache_salt=salt):
                break
            sequence.hold(self.cache.admit(sequence.key, sequence.tokens, sequence.num_tokens, cache_salt=salt))
            self.waiting.popleft()
            self.computing.append(sequence)
            chunks.append((sequence, min(max_tokens, sequence.num_remaining)))
            max_tokens -= chunks[-1][1]
        return chunks

    def computed(self, sequence: Sequence, num_new: int) -> bool:
        """Note that `num_new` tokens were computed; True once the whole prompt is (it leaves the queue)."""
        assert sequence.table is not None
        sequence.num_computed += num_new
        self.cache.publish(sequence.table, sequence.tokens, sequence.num_computed)
        if sequence.num_remaining == 0:
            self.computing.remove(sequence)
            return True
        return False
