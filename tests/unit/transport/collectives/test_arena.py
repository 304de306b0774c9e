"""The arena: blocks that come back when their tensors are gone, and memory that outlives its group for them."""

from __future__ import annotations

import ctypes
import gc
import itertools
import random
from dataclasses import dataclass, field

import pytest
import torch

from transport.collectives.arena import Arena

pytestmark = pytest.mark.unit
PAGE = 4096


@dataclass
class Rig:
    """An arena over ordinary memory."""

    num_pages: int
    populated: list[tuple[int, int]] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = ctypes.create_string_buffer(self.num_pages * PAGE)
        self.start = ctypes.addressof(self.memory)
        self.arena = Arena(
            self.start,
            self.num_pages * PAGE,
            lambda address, length: self.populated.append((address, length)),
            lambda: self.ends.append("empty"),
        )

    def take(self, num_pages: int) -> torch.Tensor | None:
        return self.arena.tensor_like(torch.empty(num_pages * PAGE // 4))


def test_tensors_are_like_the_model_and_apart() -> None:
    rig = Rig(64)
    shapes = [(3, 5), (1,), (2, 7, 64), (40, 100)]
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]
    tensors = [
        rig.arena.tensor_like(torch.empty(shape, dtype=dtype)) for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    for number, tensor in enumerate(tensors):
        assert tensor is not None
        tensor.fill_(number)
    for number, tensor in enumerate(tensors):
        assert tensor is not None
        assert tensor.is_contiguous()
        assert (tuple(tensor.shape), tensor.dtype) == (shapes[number], dtypes[number])
        assert bool((tensor == number).all())
        assert rig.start <= tensor.data_ptr() < rig.start + 64 * PAGE
        assert any(start <= tensor.data_ptr() < start + length for start, length in rig.populated)


def test_a_transposed_model_gives_a_contiguous_buffer() -> None:
    tensor = Rig(4).arena.tensor_like(torch.empty(4, 6).T)
    assert tensor is not None
    assert tuple(tensor.shape) == (6, 4)
    assert tensor.is_contiguous()


def test_a_view_keeps_its_block() -> None:
    rig = Rig(2)
    whole = rig.take(2)
    assert whole is not None
    view = whole[5:9]
    del whole
    assert rig.take(1) is None
    view.fill_(3.0)
    del view
    assert rig.take(2) is not None


def test_holes_join_whatever_the_order() -> None:
    chance = random.Random(7)
    rig = Rig(64)
    held: list[torch.Tensor] = []
    for _ in range(600):
        if held and chance.random() < 0.5:
            held.pop(chance.randrange(len(held)))
        taken = rig.take(chance.randint(1, 9))
        if taken is not None:
            held.append(taken)
        spans = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in held)
        assert all(start + length <= following for (start, length), (following, _) in itertools.pairwise(spans))
        del taken
    held.clear()
    gc.collect()
    assert rig.take(64) is not None


def test_empty_tensors_and_full_arenas_give_none() -> None:
    rig = Rig(1)
    assert rig.arena.tensor_like(torch.empty(0, 4)) is None
    assert rig.take(2) is None


def test_the_end_waits_for_the_last_block() -> None:
    rig = Rig(4)
    held = rig.take(1)
    rig.arena.close()
    assert rig.ends == []
    assert rig.take(1) is None
    del held
    assert rig.ends == ["empty"]
    rig.arena.close()
    assert rig.ends == ["empty"]
