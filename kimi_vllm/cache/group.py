"""The state group on the worker: the modules through which vLLM sees our slots and gives them memory.

vLLM forms cache groups by spec, all of one size. With one member per MLA layer there are exactly two groups: one block
table and one metadata build serve all KDA layers, and no page is enlarged.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec

from kimi_vllm.cache.layout import StateLayout
from kimi_vllm.cache.manager import KDAStateSpec
from kimi_vllm.cache.metadata import KDAStateBackend
from kimi_vllm.cache.pool import StatePool
from kimi_vllm.cache.window import window_of
from kimi_vllm.geometry import KimiGeometry, stages_of
from kimi_vllm.options import KimiOptions
from kimi_vllm.precision import conv_dtype


class StateGroupMember(nn.Module, AttentionLayerBase):
    """Requests a block table of slot ids from vLLM; one stands beside each MLA layer.

    The cache view that vLLM binds to it aliases the MLA layer's pages. Behind it lies the memory of all states.

    Args:
        beside: The MLA layer whose page the spec copies.
        home: The stage's states.
        prefix: A name with exactly one integer, as vLLM's cache binding requires.
    """

    def __init__(self, vllm_config: VllmConfig, beside: AttentionLayerBase, home: "StateHome", prefix: str) -> None:
        super().__init__()
        self._beside = [beside]  # in a list, so that nn.Module does not adopt the layer twice
        self.home = home
        self._view = torch.tensor([])
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """The backend that builds `KDAMetadata`."""
        return KDAStateBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KDAStateSpec:
        """A page like the MLA layer's, and the blocks of a state."""
        attention = cast("AttentionSpec", self._beside[0].get_kv_cache_spec(vllm_config))
        return KDAStateSpec.beside(attention, **self.home.spec_values)

    @property
    def kv_cache(self) -> Tensor:
        """The view that vLLM has bound; empty before, and again after its profiling."""
        return self._view

    @kv_cache.setter
    def kv_cache(self, view: Tensor) -> None:
        self._view = view
        if view.numel():
            self.home.pool.bind(view)
        else:
            self.home.pool.release()


class StateHome:
    """Slots and metadata of the KDA layers of one pipeline stage.

    Args:
        rank: Which of the stages it is.
        prefix: Prefix of the layers, ``model.layers``.

    Attributes:
        pool: The stage's states.
        metadata_name: Name of a group member, under which the metadata is found.
        spec_values: `KDAStateSpec`'s own attributes, equal on all stages: vLLM would form groups of unequal specs.
    """

    def __init__(self, geometry: KimiGeometry, vllm_config: VllmConfig, rank: int, prefix: str) -> None:
        device, options = vllm_config.device_config.device, KimiOptions.of(vllm_config)
        self.prefix = prefix
        stages = stages_of(geometry, vllm_config)
        layouts = [layout for stage in stages if (layout := _layout(geometry, vllm_config, stage, options)) is not None]
        layout = _layout(geometry, vllm_config, stages[rank], options)
        assert layout is not None  # the model asks for a home where a stage has both kinds of layers
        largest = max(each.block_bytes for each in layouts)
        num_host_blocks = int(options.host_memory_gib * 2**30 // largest)
        state_blocks = max(each.blocks for each in layouts)
        self.spec_values: dict[str, Any] = {
            "state_blocks": state_blocks,
            "num_host_blocks": num_host_blocks,
            "checkpoint_interval": options.checkpoint_interval,
            "eviction": options.eviction,
            "window": window_of(vllm_config),
        }
        self.pool = StatePool(layout, state_blocks, device, num_host_blocks)
        self.metadata_name = self.member_name(next(layer for layer in stages[rank] if not geometry.kda[layer]))
        self._num_claimed = 0

    def member_name(self, mla_layer: int) -> str:
        """Name of the group member beside an MLA layer."""
        return f"{self.prefix}.{mla_layer}.kda_state"

    def claim_layer(self) -> int:
        """Which of the pool's layers the next KDA layer is, in order."""
        self._num_claimed += 1
        return self._num_claimed - 1

    def member(self, vllm_config: VllmConfig, mla_layer: int, beside: AttentionLayerBase) -> StateGroupMember:
        """The group member beside an MLA layer."""
        return StateGroupMember(vllm_config, beside, self, self.member_name(mla_layer))


def _layout(geometry: KimiGeometry, vllm_config: VllmConfig, stage: range, options: KimiOptions) -> StateLayout | None:
    num_kda = sum(geometry.kda[layer] for layer in stage)
    if not num_kda or num_kda == len(stage):
        return None
    model, cache = vllm_config.model_config, vllm_config.cache_config
    return StateLayout.of(
        geometry,
        num_kda,
        len(stage) - num_kda,
        tensor_parallel_size=vllm_config.parallel_config.tensor_parallel_size,
        block_size=cache.block_size,
        cache_itemsize=STR_DTYPE_TO_TORCH_DTYPE.get(cache.cache_dtype, model.dtype).itemsize,
        state_dtype=getattr(torch, options.state_dtype),
        conv_dtype=conv_dtype(vllm_config.device_config.device.type, model.dtype),
        window=window_of(vllm_config),
    )
