"""The arena lends memory for as long as anything looks at it."""

from __future__ import annotations

import pytest
import torch

from anabranch.kernels.arena import ALIGNMENT, CHUNK_BYTES, Arena

pytestmark = pytest.mark.unit


def test_memory_comes_back_with_the_last_view() -> None:
    arena = Arena()
    first = arena.empty((4, 8), torch.float32)
    address = first.data_ptr()
    assert address % ALIGNMENT == 0
    view = first.split_with_sizes([3, 5], dim=-1)[1]
    del first
    second = arena.empty((4, 8), torch.float32)
    assert second.data_ptr() != address
    del view
    third = arena.empty((2, 3), torch.bfloat16)
    assert third.data_ptr() == address
    assert third.shape == (2, 3)
    assert third.is_contiguous()


def test_a_step_again_takes_the_same_memory() -> None:
    arena = Arena()

    def step() -> list[int]:
        addresses, held = [], []
        for rows in (7, 100, 3, 5000, 1):
            held = [*held[-1:], arena.empty((rows, 33), torch.float32)]
            addresses.append(held[-1].data_ptr())
        return addresses

    assert step() == step()
    assert arena.num_bytes < 2 * CHUNK_BYTES


def test_tensors_beyond_a_chunk_get_one_of_their_own() -> None:
    arena = Arena()
    large = arena.empty((3 * CHUNK_BYTES,), torch.uint8)
    large.fill_(7)
    assert arena.holds(large)
    assert not arena.holds(torch.empty(4))


def test_a_borrowed_tensor_is_the_same_memory_but_does_not_keep_it() -> None:
    arena = Arena()
    owner = arena.empty((5, 3), torch.float32)
    borrowed = arena.borrow(owner.fill_(2.0))
    assert torch.equal(borrowed, torch.full((5, 3), 2.0))
    address = owner.data_ptr()
    del owner
    assert arena.empty((5, 3), torch.float32).data_ptr() == address == borrowed.data_ptr()
