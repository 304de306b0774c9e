"""Each layer's rows leave once: what is computed, at first also what the cache gave, nothing that decode has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import pytest
import torch

from anabranch.cache.paged_kv import PagedKv
from anabranch.errors import PeerLost
from anabranch.parallel.context import RankContext
from anabranch.step.plan import SequencePlan, StepPlan
from prefill.export import KvExporter
from transport.kv_stream import KvStreamSender

pytestmark = pytest.mark.unit

LAYERS, SIZE = 2, 4


@dataclass
class Sender:
    """Keeps what is sent: layer -> (first token, values of K) in order."""

    sent: dict[int, list[tuple[int, list[float]]]] = field(default_factory=dict)
    error: PeerLost | None = None

    def send_layer(
        self,
        layer: int,
        head_start: int,
        token_start: int,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        *,
        chunk: range | None = None,
    ) -> None:
        if self.error is not None:
            raise self.error
        assert head_start == 0
        assert torch.equal(v_TKD, -k_TKD)
        assert chunk == range(token_start, token_start + len(k_TKD))
        self.sent.setdefault(layer, []).append((token_start, k_TKD[:, 0, 0].tolist()))


def pool() -> PagedKv:
    """K of slot s in layer l is 1000 l + s, V its negative."""
    kv = PagedKv(
        num_layers=LAYERS,
        num_blocks=8,
        block_size=SIZE,
        num_kv_heads=1,
        head_dim=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    for layer in range(LAYERS):
        k, v = kv.layer(layer).slots()
        k.copy_((1000.0 * layer + torch.arange(8 * SIZE)).view(-1, 1, 1))
        v.copy_(-k)
    return kv


def exporter() -> KvExporter:
    return KvExporter(pool(), RankContext(), 0)


def add(streams: KvExporter, name: str, sender: Sender, first_token: int = 0) -> None:
    streams.add((name, 0), cast(KvStreamSender, sender), first_token)


def run(streams: KvExporter, *parts: tuple[str, int, int, tuple[int, ...]]) -> None:
    """One pass over `(name, start, count, block ids)`."""
    sequences = tuple(
        SequencePlan(request_id=name, epoch=0, token_ids=(0,) * count, start=start, block_ids=blocks)
        for name, start, count, blocks in parts
    )
    streams.begin_pass(StepPlan(step=1, sequences=sequences))
    for layer in range(LAYERS):
        streams.layer_stored(layer)


def test_a_prompt_in_two_chunks() -> None:
    streams, sender = exporter(), Sender()
    add(streams, "a", sender)
    run(streams, ("a", 0, 3, (6, 1)))
    run(streams, ("a", 3, 3, (6, 1)))
    assert sender.sent == {
        0: [(0, [24.0, 25.0, 26.0]), (3, [27.0, 4.0, 5.0])],
        1: [(0, [1024.0, 1025.0, 1026.0]), (3, [1027.0, 1004.0, 1005.0])],
    }


def test_what_the_prefix_cache_gave_leaves_with_the_first_chunk() -> None:
    streams, sender = exporter(), Sender()
    add(streams, "a", sender)
    run(streams, ("a", 4, 1, (2, 5)))
    assert sender.sent[0] == [(0, [8.0, 9.0, 10.0, 11.0, 20.0])]


def test_what_decode_has_already_does_not_leave() -> None:
    streams, sender = exporter(), Sender()
    add(streams, "a", sender, first_token=4)
    run(streams, ("a", 0, 3, (2, 5)))
    assert sender.sent == {}
    run(streams, ("a", 3, 3, (2, 5)))
    assert sender.sent[0] == [(4, [20.0, 21.0])]


def test_each_stream_gets_its_own_rows() -> None:
    streams, first, second = exporter(), Sender(), Sender()
    add(streams, "a", first)
    add(streams, "b", second)
    run(streams, ("a", 0, 1, (3,)), ("stranger", 0, 2, (4,)), ("b", 0, 2, (0,)))
    assert (first.sent[0], second.sent[0]) == ([(0, [12.0])], [(0, [0.0, 1.0])])
    streams.remove(("a", 0))
    streams.remove(("a", 0))
    run(streams, ("a", 1, 1, (3,)), ("b", 2, 1, (0,)))
    assert (len(first.sent[0]), second.sent[0][1:]) == (1, [(2, [2.0])])


def test_a_stream_that_fails_is_told_once_and_stops_no_other() -> None:
    streams, broken, good = exporter(), Sender(error=PeerLost("gone")), Sender()
    add(streams, "broken", broken)
    add(streams, "good", good)
    run(streams, ("broken", 0, 2, (1,)), ("good", 0, 2, (2,)))
    assert good.sent == {0: [(0, [8.0, 9.0])], 1: [(0, [1008.0, 1009.0])]}
    ((key, error),) = streams.take_failed()
    assert (key, str(error)) == (("broken", 0), "gone")
    assert streams.take_failed() == []
    run(streams, ("broken", 2, 1, (1,)), ("good", 2, 1, (2,)))
    assert streams.take_failed() == []
    assert good.sent[0][1:] == [(2, [10.0])]
