"""Products whose rows do not depend on each other's number, so that a row has the same bits in whatever company.

A library chooses how it adds up a product by the number of rows, so a row that is computed with others differs in its
last bits from the same row alone. With a fixed number of rows it does not, whatever the others hold and wherever it
stands: `tests/unit/anabranch/kernels/test_row_exact.py` shows both. Products that say from how many rows on they are
exact by themselves (`Products.exact_from`) are computed at once, with rows added where there are fewer.

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
    """`Products` in blocks of a fixed number of rows, the last one padded, or at once where that is exact too.

    A row's bits are those of the weights, the row, the number of threads, the CPU and the build alone.

    Args:
        products: compute the blocks.
    """

    def __init__(self, products: Products) -> None:
        self._products = products

    def linear(self, x_TC: torch.Tensor, weight_FC: torch.Tensor, bias_F: torch.Tensor | None) -> torch.Tensor:
        """See `Products.linear`."""
        return self._exact(x_TC, weight_FC, lambda x_BC: self._products.linear(x_BC, weight_FC, bias_F))

    def linear_silu_mul(
        self, x_TC: torch.Tensor, gate_up_FC: torch.Tensor, bias_F: torch.Tensor | None
    ) -> torch.Tensor:
        """See `Products.linear_silu_mul`."""
        return self._exact(x_TC, gate_up_FC, lambda x_BC: self._products.linear_silu_mul(x_BC, gate_up_FC, bias_F))

    def exact_from(self, x_TC: torch.Tensor, weight_FC: torch.Tensor) -> int | None:
        """See `Products.exact_from`."""
        return 0

    def all_reduce(self, x: torch.Tensor, group: Group) -> torch.Tensor:
        """See `Products.all_reduce`: element by element, so exact for rows as it is."""
        return self._products.all_reduce(x, group)

    def _exact(
        self, x_TC: torch.Tensor, weight_FC: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        num_rows = x_TC.shape[0]
        least = self._products.exact_from(x_TC, weight_FC)
        if least is None:
            return _by_block(x_TC, product)
        return product(x_TC) if num_rows >= least else product(_padded(x_TC, least))[:num_rows]


def _padded(x_TC: torch.Tensor, num_rows: int) -> torch.Tensor:
    padded_TC = x_TC.new_zeros((num_rows, x_TC.shape[1]))
    padded_TC[: x_TC.shape[0]] = x_TC
    return padded_TC


def _by_block(x_TC: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    num_rows = x_TC.shape[0]
    padded_TC = _padded(x_TC, max(1, -(-num_rows // NUM_ROWS)) * NUM_ROWS)
    made = [product(_aligned(padded_TC[start : start + NUM_ROWS])) for start in range(0, padded_TC.shape[0], NUM_ROWS)]
    return (made[0] if len(made) == 1 else torch.cat(made))[:num_rows]


def _aligned(x_BC: torch.Tensor) -> torch.Tensor:
    return x_BC.clone() if x_BC.data_ptr() % ALIGNMENT_BYTES else x_BC
