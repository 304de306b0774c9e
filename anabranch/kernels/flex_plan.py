"""What one step's attention reads of the pool, as tiles of queries with lists of blocks.

The pool is one long axis of keys, and nothing is copied out of it: a tile of queries names the physical blocks
that it reads. The rows of a tile are (token, query head of a group) pairs, so one tile reads a block of a KV
head once for the whole group, and a decode step's tile is a group alone. A long context is cut into parts,
each a tile of its own, whose results meet by their LSE: so a small batch, too, keeps a whole GPU busy.

All numbers of tiles, parts and blocks are rounded up to powers of two, so that few shapes exist, and none but
that of parts is 1, for which compilers make kernels of their own.

Shape suffixes: L rows of all tiles, N tiles, W blocks of the longest list, B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from anabranch.step.batch import ForwardBatch

# Tokens of a context that are worth a tile of their own.
MIN_PART_TOKENS = 512
# Tiles times KV heads that keep every processor of a large GPU busy; more are not cut off for it.
ENOUGH_PROGRAMS = 1024
# Of a block that a sequence does not have: beyond every query.
NOWHERE = 1 << 30


@dataclass(frozen=True, kw_only=True)
class TileShape:
    """What a model and its pool fix.

    Attributes:
        rows: of a tile; a power of two.
        group: query heads of a KV head.
    """

    rows: int
    group: int
    num_kv_heads: int
    block_size: int
    num_blocks: int


@dataclass(frozen=True, kw_only=True)
class Member:
    """A sequence of the batch that the plan attends for: its index, its first row of q, its lengths."""

    index: int
    first_row: int
    num_tokens: int
    context_len: int


@dataclass(frozen=True, eq=False, kw_only=True)
class TilePlan:
    """Tiles of some sequences of a batch; part p of tile n is tile `p * N / num_parts + n`.

    Attributes:
        num_parts: into how many parts each context is cut.
        source_L: int64, row of `[T * group]` that a row of the first part's tiles is; 0 where it is padding.
        result_T: int64, row of the first part's tiles where a token's group begins.
        oldest_L, newest_L: int32, positions that a row sees in its part; newest is -1 where it sees none.
        sequence_L: int32, row of `position_BN`.
        position_BN: int32 `[B, num_blocks + 1]`, position of a physical block's first token in the sequence;
            NOWHERE if it has none. The last column is no block.
        masked_N, masked_NW: int32, physical blocks of which some rows of a tile see a part: how many, which.
        full_N, full_NW: int32, those that all its rows see whole.
    """

    shape: TileShape
    num_parts: int
    source_L: torch.Tensor
    result_T: torch.Tensor
    oldest_L: torch.Tensor
    newest_L: torch.Tensor
    sequence_L: torch.Tensor
    position_BN: torch.Tensor
    masked_N: torch.Tensor
    masked_NW: torch.Tensor
    full_N: torch.Tensor
    full_NW: torch.Tensor

    @classmethod
    def make(cls, members: Sequence[Member], batch: ForwardBatch, shape: TileShape, window: int | None) -> TilePlan:
        """Lay out the tiles of `members`; small tensors on the host, lists of blocks on the batch's device."""
        device = batch.block_tables_BN.device
        tiles = _Tiles.of(members, shape, window)
        num_parts = _num_parts(tiles, shape)
        parts = tiles.cut(num_parts)
        sequences_B = [member.index for member in members]
        sequences_B += [members[0].index] * (at_least_two(len(members)) - len(members))
        on_device = parts.bounds.to(device, non_blocking=True)
        begin_N, blocks_N, full_begin_N, full_end_N, member_N = on_device.unbind(0)
        tables_BW = batch.block_tables_BN[torch.tensor(sequences_B).to(device, non_blocking=True)]
        order_W = torch.arange(parts.width, dtype=torch.int32, device=device)

        def physical(logical_NW: torch.Tensor) -> torch.Tensor:
            columns_NW = logical_NW.clamp(max=tables_BW.shape[1] - 1).long()
            return tables_BW[member_N.long().unsqueeze(1), columns_NW].to(torch.int32).contiguous()

        # Blocks before the full ones, then those behind them.
        before_N1 = (full_begin_N - begin_N).unsqueeze(1)
        masked_NW = torch.where(
            order_W < before_N1, begin_N.unsqueeze(1) + order_W, full_end_N.unsqueeze(1) + order_W - before_N1
        )
        full_N = full_end_N - full_begin_N
        return cls(
            shape=shape,
            num_parts=num_parts,
            source_L=tiles.source_L.to(device, non_blocking=True),
            result_T=tiles.result_T.to(device, non_blocking=True),
            oldest_L=parts.oldest_L.to(device, non_blocking=True),
            newest_L=parts.newest_L.to(device, non_blocking=True),
            sequence_L=parts.sequence_L.to(device, non_blocking=True),
            position_BN=_positions(tables_BW, [member.context_len for member in members], shape),
            masked_N=blocks_N - full_N,
            masked_NW=physical(masked_NW),
            full_N=full_N,
            full_NW=physical(full_begin_N.unsqueeze(1) + order_W),
        )

    def gather(self, q_THD: torch.Tensor) -> torch.Tensor:
        """Queries as the tiles' rows, for every part: `[1, Hkv, L, D]`."""
        num_kv_heads, group = self.shape.num_kv_heads, self.shape.group
        q_TKGD = q_THD.reshape(-1, num_kv_heads, group, q_THD.shape[2])
        q_KRD = q_TKGD.transpose(0, 1).flatten(1, 2)
        return q_KRD.index_select(1, self.source_L).repeat(1, self.num_parts, 1).unsqueeze(0)

    def scatter(self, x_KL: torch.Tensor) -> torch.Tensor:
        """Results of the tiles' rows `[Hkv, L, ...]`, parts merged, by token and head: `[T, H, ...]`."""
        rows_TG = self.result_T.unsqueeze(1) + torch.arange(self.shape.group, device=self.result_T.device)
        return x_KL[:, rows_TG].movedim(0, 1).flatten(1, 2)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Parts:
    """`bounds` is int32 `[5, N]`: first logical block, their number, first and end of the full ones, member."""

    width: int
    bounds: torch.Tensor
    oldest_L: torch.Tensor
    newest_L: torch.Tensor
    sequence_L: torch.Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class _Tiles:
    """Tiles before contexts are cut; on the host, int64. Rows beyond the last of a member see nothing."""

    shape: TileShape
    source_L: torch.Tensor
    result_T: torch.Tensor
    oldest_L: torch.Tensor
    newest_L: torch.Tensor
    member_N: torch.Tensor
    begin_N: torch.Tensor
    end_N: torch.Tensor

    @property
    def num(self) -> int:
        return self.member_N.shape[0]

    @property
    def max_blocks(self) -> int:
        return int((self.end_N - self.begin_N).max())

    @classmethod
    def of(cls, members: Sequence[Member], shape: TileShape, window: int | None) -> _Tiles:
        group, size = shape.group, shape.block_size
        counts = [-(-member.num_tokens * group // shape.rows) for member in members]
        num_tiles = at_least_two(sum(counts))
        source, token_rows, oldest, newest, owners = [], [], [], [], []
        first_row = 0
        for position, (member, count) in enumerate(zip(members, counts, strict=True)):
            row = torch.arange(count * shape.rows)
            real = row < member.num_tokens * group
            at = member.context_len - member.num_tokens + row // group
            source.append((member.first_row * group + row).masked_fill(~real, 0))
            newest.append(at.masked_fill(~real, -1))
            oldest.append((at - window + 1).clamp(min=0) if window is not None else torch.zeros_like(at))
            token_rows.append(first_row + torch.arange(member.num_tokens) * group)
            owners.append(torch.full((count,), position))
            first_row += count * shape.rows
        padding = num_tiles * shape.rows - first_row
        source.append(torch.zeros(padding, dtype=torch.int64))
        oldest.append(torch.zeros(padding, dtype=torch.int64))
        newest.append(torch.full((padding,), -1))
        owners.append(torch.zeros(num_tiles - sum(counts), dtype=torch.int64))
        oldest_L, newest_L = torch.cat(oldest), torch.cat(newest)
        real_NR = (newest_L >= 0).view(num_tiles, shape.rows)
        first_N = oldest_L.view(num_tiles, -1).masked_fill(~real_NR, NOWHERE).amin(1)
        last_N = newest_L.view(num_tiles, -1).amax(1)
        used_N = last_N >= 0
        return cls(
            shape=shape,
            source_L=torch.cat(source),
            result_T=torch.cat(token_rows),
            oldest_L=oldest_L,
            newest_L=newest_L,
            member_N=torch.cat(owners),
            begin_N=torch.where(used_N, first_N // size, 0),
            end_N=torch.where(used_N, last_N // size + 1, 0),
        )

    def cut(self, num_parts: int) -> _Parts:
        """Each tile's blocks in `num_parts` even parts; rows are bounded to their part's tokens."""
        rows, size = self.shape.rows, self.shape.block_size
        width = at_least_two(-(-self.max_blocks // num_parts))
        length_N = -(-(self.end_N - self.begin_N) // num_parts)
        part_P1 = torch.arange(num_parts).unsqueeze(1)
        begin_PN = torch.minimum(self.begin_N + part_P1 * length_N, self.end_N)
        end_PN = torch.minimum(begin_PN + length_N, self.end_N)
        oldest_PL = torch.maximum(self.oldest_L, (begin_PN * size).repeat_interleave(rows, 1))
        newest_PL = torch.minimum(self.newest_L, (end_PN * size - 1).repeat_interleave(rows, 1))
        newest_PL = newest_PL.masked_fill(newest_PL < oldest_PL, -1)
        # Full: all that the latest beginning and the earliest end of the tile's real rows leave.
        real_L = self.newest_L >= 0
        latest_N = self.oldest_L.masked_fill(~real_L, 0).view(-1, rows).amax(1)
        earliest_N = self.newest_L.masked_fill(~real_L, NOWHERE).view(-1, rows).amin(1)
        full_begin_PN = torch.maximum((latest_N + size - 1) // size, begin_PN)
        full_end_PN = torch.minimum((earliest_N + 1) // size, end_PN)
        # None: an empty span at the part's end leaves every block masked.
        none_PN = full_end_PN <= full_begin_PN
        full_begin_PN, full_end_PN = (
            torch.where(none_PN, end_PN, bound_PN) for bound_PN in (full_begin_PN, full_end_PN)
        )
        bounds = (begin_PN, end_PN - begin_PN, full_begin_PN, full_end_PN, self.member_N.expand_as(begin_PN))
        return _Parts(
            width=width,
            bounds=torch.stack([bound_PN.flatten() for bound_PN in bounds]).to(torch.int32),
            oldest_L=oldest_PL.flatten().to(torch.int32),
            newest_L=newest_PL.flatten().to(torch.int32),
            sequence_L=self.member_N.repeat_interleave(rows).repeat(num_parts).to(torch.int32),
        )


def round_up(count: int) -> int:
    """The next power of two."""
    return 1 << max(0, count - 1).bit_length()


def at_least_two(count: int) -> int:
    """The next power of two from 2 on."""
    return max(2, round_up(count))


def _num_parts(tiles: _Tiles, shape: TileShape) -> int:
    useful = -(-tiles.max_blocks * shape.block_size // MIN_PART_TOKENS)
    wanted = -(-ENOUGH_PROGRAMS // (tiles.num * shape.num_kv_heads))
    return round_up(min(useful, wanted))


def _positions(tables_BW: torch.Tensor, context_lens: list[int], shape: TileShape) -> torch.Tensor:
    """`TilePlan.position_BN`; rows beyond the members' have no blocks."""
    device, num_rows = tables_BW.device, tables_BW.shape[0]
    blocks = [-(-context_len // shape.block_size) for context_len in context_lens]
    num_B1 = torch.tensor([*blocks, *[0] * (num_rows - len(blocks))]).to(device, non_blocking=True).unsqueeze(1)
    order_W = torch.arange(tables_BW.shape[1], device=device)
    # What a table has behind its context is padding, which may name any block: it goes to the last column.
    columns_BW = torch.where(order_W < num_B1, tables_BW.long(), shape.num_blocks)
    position_BN = torch.full((num_rows, shape.num_blocks + 1), NOWHERE, dtype=torch.int32, device=device)
    starts_W = (order_W * shape.block_size).to(torch.int32)
    position_BN.scatter_(1, columns_BW, starts_W.expand(num_rows, -1))
    position_BN[:, -1] = NOWHERE
    return position_BN
