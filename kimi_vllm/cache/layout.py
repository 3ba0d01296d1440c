"""Shapes and bytes of a state slot.

A slot is the whole KDA state of one request: for each KDA layer a recurrent matrix ``[H, V, K]`` and a conv ring
``[R, 3·H·D]`` in which token p owns column p mod R. One slot id serves all layers.
"""

from dataclasses import dataclass
from math import prod
from typing import Self

import torch

from kimi_vllm.geometry import KimiGeometry


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """Shapes and dtypes of one slot on one tensor-parallel rank.

    Attributes:
        num_layers: KDA layers on this pipeline stage.
        num_heads, head_dim: Heads on this rank, and K == V.
        ring: Columns of the conv ring, R; at least the conv width.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    ring: int
    state_dtype: torch.dtype = torch.float32
    conv_dtype: torch.dtype = torch.float32

    @property
    def state_shape(self) -> tuple[int, ...]:
        """``[L, H, V, K]``, K contiguous."""
        return self.num_layers, self.num_heads, self.head_dim, self.head_dim

    @property
    def conv_shape(self) -> tuple[int, ...]:
        """``[L, R, 3·H·D]``, channels in the order q | k | v."""
        return self.num_layers, self.ring, 3 * self.num_heads * self.head_dim

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot on this rank."""
        return prod(self.state_shape) * self.state_dtype.itemsize + prod(self.conv_shape) * self.conv_dtype.itemsize

    @classmethod
    def of(cls, geometry: KimiGeometry, num_layers: int, tensor_parallel_size: int = 1, **dtypes: torch.dtype) -> Self:
        """The layout of `num_layers` KDA layers with heads split over ranks; `dtypes` as the attributes.

        Raises:
            ValueError: The heads do not divide over the ranks.
        """
        heads = geometry.linear_num_heads
        if heads % tensor_parallel_size:
            raise ValueError(
                f"--tensor-parallel-size {tensor_parallel_size}: the model's {heads} KDA heads do not divide by it."
            )
        heads //= tensor_parallel_size
        return cls(num_layers, heads, geometry.linear_head_dim, geometry.conv_width, **dtypes)
