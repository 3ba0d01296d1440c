"""Kimi Delta Attention as a layer: projections, one kernel call for decode rows, one for prefill rows.

Equations: arXiv 2510.26692, Eq. 1 and 10; `kernels/reference.py` is their executable form.
"""

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op

from kimi_vllm.cache.group import StateHome
from kimi_vllm.cache.metadata import KDAMetadata
from kimi_vllm.geometry import KimiGeometry
from kimi_vllm.kernels import dispatch


class KimiDeltaAttention(nn.Module):
    """One KDA layer of one tensor-parallel rank; heads, and with them the state, are split over ranks.

    Args:
        geometry: the model.
        home: the slots, and the name of this step's metadata.
        prefix: name in the checkpoint, ``model.layers.{i}.self_attn``.
    """

    def __init__(self, geometry: KimiGeometry, vllm_config: VllmConfig, home: StateHome, prefix: str) -> None:
        super().__init__()
        heads, head_dim, hidden = geometry.linear_num_heads, geometry.linear_head_dim, geometry.hidden_size
        width = heads * head_dim
        ranks = get_tensor_model_parallel_world_size()
        local_heads = heads // ranks
        local_width = local_heads * head_dim
        quant_config = vllm_config.quant_config
        self.prefix = prefix
        self.norm_eps = geometry.rms_norm_eps

        def column(inputs: int, outputs: int, name: str) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                inputs, outputs, bias=False, quant_config=quant_config, prefix=f"{prefix}.{name}"
            )

        # One product for everything that reads the layer's input. The two low-rank gates are whole on every rank:
        # `weights.py` loads them as if each rank had its own copy.
        self.in_proj = MergedColumnParallelLinear(
            hidden,
            [width, width, width, head_dim * ranks, head_dim * ranks, heads],
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.in_proj",
        )
        self.in_proj_splits = [3 * local_width, head_dim, head_dim, local_heads]
        self.f_b_proj, self.g_b_proj = column(head_dim, width, "f_b_proj"), column(head_dim, width, "g_b_proj")
        self.o_proj = RowParallelLinear(width, hidden, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj")
        # What forms the decay stays fp32 whatever the model's dtype: rounding it drifts with context length.
        self.A_log = _fp32_parameter(local_heads, loader=_load_heads)
        self.dt_bias = _fp32_parameter(local_width, loader=sharded_weight_loader(0))
        self.conv_weight = _fp32_parameter(geometry.conv_width, 3 * local_width, loader=_load_conv)
        self.o_norm = nn.Module()
        self.o_norm.weight = _fp32_parameter(head_dim)

        self.metadata_name = home.metadata_name
        self.conv_pool, self.state_pool = home.claim_layer()
        dispatch.prepare(self.state_pool.device.type, head_dim)
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Mix one step's tokens: ``[T, hidden]`` to ``[T, hidden]``, decodes first, then prefills."""
        projected, _ = self.in_proj(hidden_states)
        qkv, low_rank_gate, low_rank_out_gate, beta = projected.split(self.in_proj_splits, dim=-1)
        gate, _ = self.f_b_proj(low_rank_gate.contiguous())
        out_gate, _ = self.g_b_proj(low_rank_out_gate.contiguous())
        out = torch.empty_like(out_gate)
        torch.ops.vllm.kimi_delta_attention(qkv, gate, beta, out_gate, out, self.prefix)
        mixed: Tensor = self.o_proj(out)[0]
        return mixed

    def advance(
        self, qkv: Tensor, gate: Tensor, beta: Tensor, out_gate: Tensor, out: Tensor, step: KDAMetadata
    ) -> None:
        """Run the kernels for one step.

        Args:
            qkv: ``[T, 3·H·D]`` before the convolution.
            gate, out_gate: ``[T, H·D]`` raw outputs of f_b and g_b.
            beta: ``[T, H]`` logits.
            out: ``[T, H·D]``, written.
            step: which rows are decodes and prefills, and their slots.

        Mutates:
            The pool at the step's write slots, and `out`.
        """
        decodes, end = step.num_decodes, step.num_tokens
        weights = (self.conv_weight, self.A_log, self.dt_bias, self.o_norm.weight, self.norm_eps)
        pools = (self.conv_pool, self.state_pool)
        if step.decode is not None:
            inputs = (qkv[:decodes], gate[:decodes], beta[:decodes], out_gate[:decodes])
            rows = step.decode
            torch.ops.kimi_vllm.kda_decode(
                *inputs, *weights, *pools, rows.read_slot, rows.write_slot, rows.position, out[:decodes]
            )
        if step.prefill is not None:
            inputs = (qkv[decodes:end], gate[decodes:end], beta[decodes:end], out_gate[decodes:end])
            packed = step.prefill
            torch.ops.kimi_vllm.kda_prefill(
                *inputs,
                *weights,
                *pools,
                packed.cu_seqlens,
                packed.context_len,
                packed.slot_table,
                step.block_size,
                out[decodes:end],
            )


def _kimi_delta_attention(
    qkv: Tensor, gate: Tensor, beta: Tensor, out_gate: Tensor, out: Tensor, layer_name: str
) -> None:
    # An opaque op, so that a compiled graph holds neither the step's metadata nor the pool.
    context = get_forward_context()
    layer: KimiDeltaAttention = context.no_compile_layers[layer_name]
    if context.attn_metadata is None:
        # vLLM's profiling run: no request, no slots.
        out.zero_()
        return
    layer.advance(qkv, gate, beta, out_gate, out, context.attn_metadata[layer.metadata_name])


def _kimi_delta_attention_fake(
    qkv: Tensor, gate: Tensor, beta: Tensor, out_gate: Tensor, out: Tensor, layer_name: str
) -> None:
    return


def _fp32_parameter(*shape: int, loader: object = None) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(*shape, dtype=torch.float32), requires_grad=False)
    if loader is not None:
        set_weight_attrs(parameter, {"weight_loader": loader})
    return parameter


def _load_heads(parameter: nn.Parameter, loaded: Tensor) -> None:
    """A_log is ``[H]`` in some checkpoints and ``[1, 1, H, 1]`` in others."""
    sharded_weight_loader(0)(parameter, loaded.reshape(-1))


def _load_conv(parameter: nn.Parameter, loaded: Tensor, shard_id: int) -> None:
    """One of q, k, v: ``[H·D, 1, W]`` in the checkpoint, a third of ``[W, 3·H·D]`` here."""
    width = parameter.shape[1] // 3
    first = get_tensor_model_parallel_rank() * width
    taps = loaded.reshape(loaded.shape[0], -1)[first : first + width]
    if taps.shape != (width, parameter.shape[0]):
        raise ValueError(f"conv weight of shape {tuple(loaded.shape)}: expected {parameter.shape[0]} taps per channel.")
    parameter.data[:, shard_id * width : (shard_id + 1) * width].copy_(taps.t())


direct_register_custom_op(
    op_name="kimi_delta_attention",
    op_func=_kimi_delta_attention,
    mutates_args=["out"],
    fake_impl=_kimi_delta_attention_fake,
)
