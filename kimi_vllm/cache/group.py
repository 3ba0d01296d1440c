"""The state group on the worker: the modules through which vLLM sees our slots, and the pool behind them.

vLLM forms cache groups by spec, all of one size. With one member per MLA layer there are exactly two groups: one block
table and one metadata build serve all KDA layers, and no page is enlarged.
"""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec

from kimi_vllm.cache.exchange import PlannedMemory
from kimi_vllm.cache.layout import SlotLayout
from kimi_vllm.cache.manager import KDAStateSpec
from kimi_vllm.cache.metadata import KDAStateBackend
from kimi_vllm.cache.pool import StatePool
from kimi_vllm.geometry import KimiGeometry, stages_of
from kimi_vllm.options import KimiOptions
from kimi_vllm.precision import conv_dtype


class StateGroupMember(nn.Module, AttentionLayerBase):
    """Requests a block table of slot ids from vLLM; one stands beside each MLA layer.

    The cache view that vLLM binds to it aliases the MLA pages. It is never read or written.

    Args:
        beside: The MLA layer whose page the spec copies.
        values: `KDAStateSpec`'s own attributes.
        prefix: A name with exactly one integer, as vLLM's cache binding requires.
    """

    def __init__(
        self, vllm_config: VllmConfig, beside: AttentionLayerBase, values: dict[str, Any], prefix: str
    ) -> None:
        super().__init__()
        self._beside = [beside]  # in a list, so that nn.Module does not adopt the layer twice
        self._values = values
        self.kv_cache = torch.tensor([])
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """The backend that builds `KDAMetadata`."""
        return KDAStateBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KDAStateSpec:
        """A page like the MLA layer's, and the sizes of the pool."""
        attention = cast("AttentionSpec", self._beside[0].get_kv_cache_spec(vllm_config))
        return KDAStateSpec.beside(attention, **self._values)


class StateHome:
    """Slots and metadata of the KDA layers of one pipeline stage.

    Args:
        num_layers: KDA layers on this stage.
        mla_layer: Index of an MLA layer on this stage, under whose group member the metadata is found.
        prefix: Prefix of the layers, ``model.layers``.
    """

    def __init__(
        self, geometry: KimiGeometry, vllm_config: VllmConfig, num_layers: int, mla_layer: int, prefix: str
    ) -> None:
        device = vllm_config.device_config.device
        self.prefix = prefix
        self.options = KimiOptions.of(vllm_config)
        layout = SlotLayout.of(
            geometry,
            num_layers,
            vllm_config.parallel_config.tensor_parallel_size,
            state_dtype=getattr(torch, self.options.state_dtype),
            conv_dtype=conv_dtype(device.type, vllm_config.model_config.dtype),
        )
        planned = PlannedMemory.of(vllm_config.model_config)
        assert planned is not None  # the config hook ran, or there would be no geometry
        self.num_slots = 1 + planned.state_slots
        # Equal on all stages: vLLM would form separate groups of unequal specs.
        most_layers = max(sum(geometry.kda[layer] for layer in stage) for stage in stages_of(geometry, vllm_config))
        self.largest_slot = replace(layout, num_layers=most_layers).slot_bytes
        num_host_slots = int(self.options.host_memory_gib * 2**30 // self.largest_slot)
        self.pool = StatePool(layout, self.num_slots, device, num_host_slots)
        self.metadata_name = self.member_name(mla_layer)
        self._num_claimed = 0

    def member_name(self, mla_layer: int) -> str:
        """Name of the group member beside an MLA layer."""
        return f"{self.prefix}.{mla_layer}.kda_state"

    def claim_layer(self) -> tuple[Tensor, Tensor]:
        """The pool's views for the next KDA layer in order: conv ``[S, R, 3·H·D]`` and state ``[S, H, V, K]``."""
        self._num_claimed += 1
        return self.pool.layer(self._num_claimed - 1)

    def member(self, vllm_config: VllmConfig, mla_layer: int, beside: AttentionLayerBase) -> StateGroupMember:
        """The group member beside an MLA layer."""
        values = {
            "num_slots": self.num_slots,
            "slot_bytes": self.largest_slot,
            "num_host_slots": self.pool.num_host_slots,
            "checkpoint_interval": self.options.checkpoint_interval,
            "eviction": self.options.eviction,
        }
        return StateGroupMember(vllm_config, beside, values, self.member_name(mla_layer))
