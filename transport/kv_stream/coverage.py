"""Which (layer, head, token) of a stream have arrived: each exactly once, or the stream is refused.

Tokens are kept as bits of one integer for each layer and head, so that a slice costs the same however many
runs of tokens it has.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass

import torch

from anabranch.errors import MalformedMessage
from anabranch.parallel.layout import KvLayout
from anabranch.parallel.reshard import tokens_of

Run = tuple[int, int]
# Sets of tokens that are remembered: as many as a chunk has sources and slices of a layer, and then some.
MAX_KNOWN = 64


@dataclass(frozen=True, eq=False, kw_only=True)
class Tokens:
    """Some tokens that a rank must hold; slices of many layers bring the same.

    Attributes:
        bits: bit t is set for token t.
        positions_T: int64, ascending.
    """

    bits: int
    positions_T: torch.Tensor


class Coverage:
    """Tokens per layer and head, against the runs that the rank must hold.

    Args:
        num_cached_tokens: leading tokens that are there already and must not arrive.
        num_tokens: tokens of the whole sequence.
    """

    def __init__(self, layout: KvLayout, rank: int, num_cached_tokens: int, num_tokens: int) -> None:
        cp_rank, tp_rank = divmod(rank, layout.tp)
        self.num_layers = layout.num_layers
        self.heads = layout.heads_of(tp_rank)
        held = tokens_of(layout, cp_rank, range(num_tokens))
        clipped = ((max(run.start, num_cached_tokens), run.stop) for run in held)
        self.needed: list[Run] = [(start, stop) for start, stop in clipped if start < stop]
        self._starts = [start for start, _ in self.needed]
        self._needed_bits = _bits(tuple((start, stop - start) for start, stop in self.needed))
        self._arrived = [dict.fromkeys(self.heads, 0) for _ in range(self.num_layers)]
        self._known: dict[tuple[Run, ...], Tokens] = {}

    def tokens(self, runs: tuple[Run, ...]) -> Tokens:
        """The tokens of (first, count) runs. Raises MalformedMessage unless the rank must hold them all."""
        known = self._known.get(runs)
        if known is not None:
            return known
        stop = 0
        for start, count in runs:
            index = bisect_right(self._starts, start) - 1
            if count < 1 or start < stop or index < 0 or start + count > self.needed[index][1]:
                raise MalformedMessage(f"tokens {start} to {start + count - 1} are not expected here")
            stop = start + count
        if not runs:
            raise MalformedMessage("a slice without tokens")
        if len(self._known) == MAX_KNOWN:
            self._known.clear()
        positions_T = torch.cat([torch.arange(start, start + count) for start, count in runs])
        self._known[runs] = Tokens(bits=_bits(runs), positions_T=positions_T)
        return self._known[runs]

    def check(self, layer: int, num_layers: int, head_start: int, num_heads: int) -> None:
        """Raise MalformedMessage unless the layers and heads are among those that the rank must hold."""
        if layer < 0 or num_layers < 1 or layer + num_layers > self.num_layers:
            raise MalformedMessage(f"layers {layer} to {layer + num_layers - 1} of {self.num_layers}")
        if num_heads < 1 or head_start < self.heads.start or head_start + num_heads > self.heads.stop:
            last = head_start + num_heads - 1
            raise MalformedMessage(f"heads {head_start} to {last}; held here: {self.heads.start} to {self.heads[-1]}")

    def add(self, layer: int, num_layers: int, head_start: int, num_heads: int, tokens: Tokens) -> None:
        """Mark a rectangle that `check` has passed. Raises MalformedMessage where some of it has arrived before."""
        for row in range(layer, layer + num_layers):
            arrived = self._arrived[row]
            for head in range(head_start, head_start + num_heads):
                if arrived[head] & tokens.bits:
                    twice = _words(_runs(arrived[head] & tokens.bits))
                    raise MalformedMessage(f"tokens {twice} of layer {row}, head {head} came twice")
                arrived[head] |= tokens.bits

    @property
    def missing(self) -> str:
        """What has not arrived, in words; empty when everything has."""
        gaps = [
            (layer, head)
            for layer, arrived in enumerate(self._arrived)
            for head, bits in arrived.items()
            if bits != self._needed_bits
        ]
        if not gaps:
            return ""
        layer, head = gaps[0]
        runs = _runs(self._arrived[layer][head])
        came = f"only tokens {_words(runs)} of {_words(self.needed)} came" if runs else "nothing came"
        return (
            f"{len(gaps)} of {self.num_layers * len(self.heads)} layers times heads; layer {layer}, head {head}: {came}"
        )


def _bits(tokens: tuple[Run, ...]) -> int:
    """Bit t is set for each token t of (first, count) runs."""
    if not tokens:
        return 0
    base = tokens[0][0]
    bits = 0
    for start, count in tokens:
        bits |= ((1 << count) - 1) << (start - base)
    return bits << base


def _runs(bits: int) -> list[Run]:
    """The runs (first, stop) of bits that are set."""
    return [found.span() for found in re.finditer("1+", f"{bits:b}"[::-1])]


def _words(runs: list[Run]) -> str:
    return ", ".join(f"{start} to {stop - 1}" for start, stop in runs[:4]) + (" ..." if len(runs) > 4 else "")
