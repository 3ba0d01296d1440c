"""The feed-forward half of a layer: a dense gated MLP, or a mixture of experts on vLLM's fused MoE."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.platforms import current_platform

from kimi_vllm.geometry import KimiGeometry, MoEGeometry
from kimi_vllm.layers import skinny
from kimi_vllm.precision import router_dtype


class KimiMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``.

    Args:
        reduce_results: Sum over tensor-parallel ranks here; shared experts leave that to the fused MoE.
    """

    def __init__(
        self, hidden: int, intermediate: int, vllm_config: VllmConfig, prefix: str, *, reduce_results: bool = True
    ) -> None:
        super().__init__()
        linear: dict[str, Any] = {"bias": False, "quant_config": vllm_config.quant_config}
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [intermediate] * 2, prefix=f"{prefix}.gate_up_proj", **linear
        )
        self.down_proj = RowParallelLinear(
            intermediate, hidden, reduce_results=reduce_results, prefix=f"{prefix}.down_proj", **linear
        )
        self.activation = SiluAndMul()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[T, hidden]`` to ``[T, hidden]``."""
        gate_up, _ = self.gate_up_proj(hidden_states)
        down: Tensor = self.down_proj(self.activation(gate_up))[0]
        return down


class KimiMoE(nn.Module):
    """Experts selected by biased sigmoid scores and weighted by unbiased ones, plus shared experts.

    The router's logits are fp32; `e_score_correction_bias` takes part in the selection only; the weights are normalised
    over the chosen experts and scaled.
    """

    def __init__(self, geometry: KimiGeometry, moe: MoEGeometry, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        hidden = geometry.hidden_size
        held = router_dtype(current_platform.device_type, vllm_config.model_config.dtype)
        self.gate = GateLinear(
            hidden,
            moe.num_experts,
            out_dtype=torch.float32,
            params_dtype=held,
            force_fp32_compute=held == torch.float32,
            prefix=f"{prefix}.gate",
        )
        self.skinny = skinny.serves(vllm_config)  # the gate multiplies by itself, so it has no method to replace
        self.gate.e_score_correction_bias = nn.Parameter(
            torch.empty(moe.num_experts, dtype=torch.float32), requires_grad=False
        )
        self.shared_experts: KimiMLP | None = None
        if moe.num_shared_experts:
            inner, name = moe.intermediate_size * moe.num_shared_experts, f"{prefix}.shared_experts"
            self.shared_experts = KimiMLP(hidden, inner, vllm_config, name, reduce_results=False)
        self.experts = FusedMoEFactory(
            num_experts=moe.num_experts,
            top_k=moe.num_experts_per_token,
            hidden_size=hidden,
            intermediate_size=moe.intermediate_size,
            renormalize=moe.renormalize,
            quant_config=vllm_config.quant_config,
            use_grouped_topk=True,
            num_expert_group=1,
            topk_group=1,
            prefix=f"{prefix}.experts",
            ckpt_names=("w1", "w2", "w3"),  # by which a quantised checkpoint's config may name them
            scoring_func="sigmoid",
            routed_scaling_factor=moe.routed_scaling_factor,
            e_score_correction_bias=self.gate.e_score_correction_bias,
            router_logits_dtype=torch.float32,
            shared_experts=self.shared_experts,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[T, hidden]`` to ``[T, hidden]``."""
        router_logits = skinny.product(hidden_states, self.gate.weight, torch.float32) if self.skinny else None
        if router_logits is None:
            router_logits, _ = self.gate(hidden_states)
        few = self.few_rows(hidden_states, router_logits) if self.skinny else None
        mixed: Tensor = self.experts(hidden_states=hidden_states, router_logits=router_logits) if few is None else few
        return mixed

    def few_rows(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor | None:
        """All experts by our kernels for a few rows; None where vLLM's runner is to call them."""
        if self.shared_experts is None:
            return None
        shared = self.shared_experts.gate_up_proj, self.shared_experts.down_proj
        return skinny.mixture(self.experts, shared, hidden_states, router_logits)
