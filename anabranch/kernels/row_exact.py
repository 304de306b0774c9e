"""Products whose rows do not depend on each other's number, so that a row has the same bits in whatever company.

A library chooses how it adds up a product by the number of rows, so a row that is computed with others differs in its
last bits from the same row alone. With a fixed number of rows it does not, whatever the others hold and wherever it
stands. Measured on a CPU with AVX2: `tests/unit/anabranch/kernels/test_row_exact.py` shows both.

Shape suffixes: T rows, B rows of a block, C input, F output features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from anabranch.kernels.base import Products
from anabranch.parallel.group import Group

# On a CPU, 64 rows cost 1.4 times as much in blocks of 16 as at once, one row 4 times; with 32 it is 1.3 and 5.
NUM_ROWS = 16
# Libraries look at this too: blocks of an odd width would lie differently.
ALIGNMENT_BYTES = 64


class RowExact:
    """`Products` in blocks of a fixed number of rows, the last one padded.

    A row's bits are those of the weights, the row, the number of threads, the CPU and the build alone.

    Args:
        products: compute the blocks.
    """

    def __init__(self, products: Products) -> None:
        self._products = products

    def linear(self, x_TC: torch.Tensor, weight_FC: torch.Tensor, bias_F: torch.Tensor | None) -> torch.Tensor:
        """See `Products.linear`."""
        return _by_block(x_TC, lambda x_BC: self._products.linear(x_BC, weight_FC, bias_F))

    def linear_silu_mul(
        self, x_TC: torch.Tensor, gate_up_FC: torch.Tensor, bias_F: torch.Tensor | None
    ) -> torch.Tensor:
        """See `Products.linear_silu_mul`."""
        return _by_block(x_TC, lambda x_BC: self._products.linear_silu_mul(x_BC, gate_up_FC, bias_F))

    def all_reduce(self, x: torch.Tensor, group: Group) -> torch.Tensor:
        """See `Products.all_reduce`: element by element, so exact for rows as it is."""
        return self._products.all_reduce(x, group)


def _by_block(x_TC: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    num_rows, width = x_TC.shape
    padded_TC = x_TC.new_zeros((max(1, -(-num_rows // NUM_ROWS)) * NUM_ROWS, width))
    padded_TC[:num_rows] = x_TC
    made = [product(_aligned(padded_TC[start : start + NUM_ROWS])) for start in range(0, padded_TC.shape[0], NUM_ROWS)]
    return (made[0] if len(made) == 1 else torch.cat(made))[:num_rows]


def _aligned(x_BC: torch.Tensor) -> torch.Tensor:
    return x_BC.clone() if x_BC.data_ptr() % ALIGNMENT_BYTES else x_BC
