"""How a KDA state is cut into units, several of which lie in one block of the KV cache's memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

RECORD_VECTORS = 3
"""Vectors of a record: u, k and d."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How the heads of a state are cut into units, so that a block of memory holds several whole ones.

    A unit is ``D / pieces`` rows of one head's ``[V, K]`` matrix, followed by ``3·R / pieces`` vectors of its ring, and
    with a window by its share of the head's records. A ring's vectors are the D channels of q, of k and of v for
    column 0, then for column 1, and so on. A record is three float32 vectors, u, k and d (see
    `reference.kda_verify`), and lies in one unit. The units of a state are those of its first layer's first head, that
    head's second piece, ... up to the last layer's last head.

    Attributes:
        H, D, R: Heads of a layer, their size (K == V), and columns of the conv ring.
        state_dtype, conv_dtype: Dtypes of the matrix and of the ring.
        pieces: Units of a head; a power of two that divides ``3·R``.
        block_bytes: Bytes of a block of memory.
        window: Records of a head: tokens that a step may compute before it is known which of them count; 0 where all
            do.
    """

    H: int
    D: int
    R: int
    state_dtype: torch.dtype
    conv_dtype: torch.dtype
    pieces: int
    block_bytes: int
    window: int = 0

    @property
    def rows(self) -> int:
        """Rows of the matrix in a unit."""
        return self.D // self.pieces

    @property
    def vectors(self) -> int:
        """Vectors of the ring in a unit."""
        return 3 * self.R // self.pieces

    @property
    def state_bytes(self) -> int:
        """Bytes of the matrix in a unit; the ring's follow."""
        return self.rows * self.D * self.state_dtype.itemsize

    @property
    def ring_bytes(self) -> int:
        """Bytes of the ring in a unit; the records follow."""
        return self.vectors * self.D * self.conv_dtype.itemsize

    @property
    def records(self) -> int:
        """Records in a unit; the last unit of a head may not fill them all."""
        return -(-self.window // self.pieces)

    @property
    def unit_bytes(self) -> int:
        """Bytes of a unit."""
        return self.state_bytes + self.ring_bytes + self.records * RECORD_VECTORS * self.D * torch.float32.itemsize

    @property
    def flags(self) -> int:
        """Flags of a slot in `Pools.nonfinite`: one for each token of a window."""
        return max(1, self.window)

    @property
    def units(self) -> int:
        """Units of a block."""
        return self.block_bytes // self.unit_bytes

    def blocks(self, num_layers: int) -> int:
        """Blocks of the state of so many layers."""
        return -(-num_layers * self.H * self.pieces // self.units)

    @classmethod
    def possible(
        cls,
        H: int,
        D: int,
        R: int,
        state_dtype: torch.dtype,
        conv_dtype: torch.dtype,
        block_bytes: int = 0,
        window: int = 0,
    ) -> list[Cut]:
        """Return every cut of such heads, the largest units first.

        With a window the ring may get more columns than R: a head can be cut into more pieces then.
        """
        cuts = []
        for columns in range(R, R + 4) if window else (R,):
            pieces = 1
            while pieces <= D and 3 * columns % pieces == 0:
                cuts.append(cls(H, D, columns, state_dtype, conv_dtype, pieces, block_bytes, window))
                pieces *= 2
        return sorted(cuts, key=lambda cut: -cut.unit_bytes)

    @classmethod
    def fewest_blocks(
        cls,
        num_layers: int,
        H: int,
        D: int,
        R: int,
        state_dtype: torch.dtype,
        conv_dtype: torch.dtype,
        block_bytes: int,
        window: int = 0,
    ) -> Cut:
        """Return the cut that needs the fewest blocks; of those, the one with the smallest ring and the largest units.

        Raises:
            ValueError: Not even a small piece of a head fits into a block.
        """
        possible = cls.possible(H, D, R, state_dtype, conv_dtype, block_bytes, window)
        fitting = [cut for cut in possible if cut.units]
        if not fitting:
            raise ValueError(f"a block of {block_bytes} bytes holds no part of a KDA head: use a larger --block-size")
        return min(fitting, key=lambda cut: (cut.blocks(num_layers), cut.R))
