"""How the KDA state of a request lies in the blocks of vLLM's KV cache.

A state is, for each KDA layer, a recurrent matrix ``[H, V, K]`` and a conv ring ``[R, 3·H·D]`` in which token p owns
column p mod R; with speculative decoding also the records of a window's tokens (`kernels/contract.py`). vLLM keeps
the pages of all MLA layers of a block side by side, so a block is one piece of memory. A
state is cut into units that fit into blocks (`kernels/cut.py`): then any blocks, anywhere, hold it.
"""

from dataclasses import dataclass
from typing import Self

import torch

from kimi_vllm.geometry import KimiGeometry
from kimi_vllm.kernels.cut import Cut


@dataclass(frozen=True, slots=True)
class StateLayout:
    """The state of one request on one tensor-parallel rank of a pipeline stage.

    Attributes:
        cut: Units of a state and of a block.
        num_layers: KDA layers on this stage.
    """

    cut: Cut
    num_layers: int

    @property
    def blocks(self) -> int:
        """Blocks of a state."""
        return self.cut.blocks(self.num_layers)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, all MLA layers of the stage together."""
        return self.cut.block_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes that a state needs; its blocks have a few more."""
        return self.num_layers * self.cut.H * self.cut.pieces * self.cut.unit_bytes

    @classmethod
    def of(
        cls,
        geometry: KimiGeometry,
        num_kda_layers: int,
        num_mla_layers: int,
        *,
        tensor_parallel_size: int = 1,
        block_size: int,
        cache_itemsize: int,
        state_dtype: torch.dtype = torch.float32,
        conv_dtype: torch.dtype = torch.float32,
        window: int = 0,
    ) -> Self:
        """The layout that needs the fewest blocks for a state.

        Args:
            tensor_parallel_size: Ranks over which KDA's heads are split. MLA's latents are whole on each.
            block_size: Tokens of a block.
            cache_itemsize: Bytes of an element of a cached latent.
            state_dtype, conv_dtype: Dtypes of matrix and ring.
            window: See `window.window_of`.

        Raises:
            ValueError: The heads do not divide over the ranks, or a block is too small for any part of a head.
        """
        heads = geometry.linear_num_heads
        if heads % tensor_parallel_size:
            raise ValueError(
                f"--tensor-parallel-size {tensor_parallel_size}: the model's {heads} KDA heads do not divide by it."
            )
        cut = Cut.fewest_blocks(
            num_kda_layers,
            heads // tensor_parallel_size,
            geometry.linear_head_dim,
            ring_columns(geometry.conv_width, window),
            state_dtype,
            conv_dtype,
            block_bytes(geometry, num_mla_layers, block_size, cache_itemsize),
            window,
        )
        return cls(cut, num_kda_layers)


def ring_columns(conv_width: int, window: int) -> int:
    """Fewest columns of a conv ring, R.

    The window after one that began at token p may begin at token p + 1: it needs the W - 2 tokens before p, and this
    window's.
    """
    return max(conv_width, conv_width - 2 + window)


def block_bytes(geometry: KimiGeometry, num_mla_layers: int, block_size: int, cache_itemsize: int) -> int:
    """Bytes of a block: the latents of its tokens, of all MLA layers of a stage."""
    return num_mla_layers * block_size * geometry.latent_dim * cache_itemsize


def num_slots(num_blocks: int, state_blocks: int) -> int:
    """Slot ids, the null slot included: as many states as blocks could hold, if they held nothing else."""
    return 1 + num_blocks // state_blocks
