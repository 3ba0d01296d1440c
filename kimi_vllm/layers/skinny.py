"""Linear layers and experts for a few rows: our kernels where they are faster, else vLLM's methods.

At batch 1 a decode step of the 48B model has 176 products of one row, for most of which cuBLAS takes several times as
long as reading the weights (kernels/NOTES.md).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import vllm.envs as envs
from torch import Tensor, nn
from vllm.config import CompilationMode, VllmConfig
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.platforms import current_platform

from kimi_vllm.kernels.cuda import launch


def product(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """``x @ weight.T`` in `dtype`, by default that of `x`; None if another implementation is faster."""
    config = launch.skinny(x.shape[0], *weight.shape)
    if config is None or x.dim() != 2 or x.stride(1) != 1:
        return None
    from kimi_vllm.kernels.cuda.skinny import skinny_linear

    return skinny_linear(x, weight, x.new_empty(x.shape[0], weight.shape[0], dtype=dtype or x.dtype), config)


class SkinnyLinearMethod(UnquantizedLinearMethod):
    """The method for unquantised weights, with our kernel for a few rows."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[M, K]`` to ``[M, N]``."""
        weight: Tensor = layer.weight  # type: ignore[assignment]
        out = product(x, weight) if bias is None else None
        return super().apply(layer, x, bias) if out is None else out


class SkinnyExpertsMethod(UnquantizedFusedMoEMethod):
    """The method for unquantised experts, with our kernels for a few tokens."""

    def apply(
        self, layer: RoutedExperts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *shared: Any, **named: Any
    ) -> Tensor:
        """``[M, hidden]`` to ``[M, hidden]``: the weighted sum over each token's experts.

        `_alone` excludes kernels that also compute shared experts.
        """
        config = launch.skinny_experts(x.shape[0], *layer.w2_weight.shape[1:])
        if config is None or x.stride(1) != 1:
            out: Tensor = super().apply(layer, x, topk_weights, topk_ids, *shared, **named)
            return out
        from kimi_vllm.kernels.cuda.skinny_experts import skinny_experts

        return skinny_experts(x, layer.w13_weight, layer.w2_weight, topk_weights, topk_ids, config)


class SkinnyRouter(GroupedTopKRouter):
    """The router for one group of experts with sigmoid scores, with our kernel for a few tokens."""

    def _compute_routing(
        self, hidden_states: Tensor, router_logits: Tensor, *indices_type: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        few = router_logits.shape[0] <= max(launch.SKINNY_ROWS)
        if not few or router_logits.dtype != torch.float32 or not router_logits.is_contiguous():
            chosen: tuple[Tensor, Tensor] = super()._compute_routing(
                hidden_states, router_logits, *indices_type, **named
            )
            return chosen
        from kimi_vllm.kernels.cuda.skinny_experts import choose_experts

        return choose_experts(
            router_logits,
            self.e_score_correction_bias,
            self.top_k,
            normalise=self.renormalize,
            scaling=self.routed_scaling_factor,
        )


def _one_group(router: Any) -> bool:
    """Whether a router selects experts as `KimiMoE` does."""
    return (
        type(router) is GroupedTopKRouter
        and router.num_expert_group == router.topk_group == 1
        and router.scoring_func == "sigmoid"
        and router.e_score_correction_bias is not None
        and router.num_fused_shared_experts == 0
        and not router.skip_padding
    )


def _alone(experts: RoutedExperts) -> bool:
    """Whether this device has all experts of a layer, or a slice of each, in the checkpoint's layout."""
    method = experts.quant_method
    return (
        type(method) is UnquantizedFusedMoEMethod
        and method.unquantized_backend == UnquantizedMoeBackend.TRITON
        and experts.activation == MoEActivation.SILU
        and experts.expert_map is None
        and not experts.apply_router_weight_on_input
        and not method.moe.has_bias
        and not method.moe.moe_parallel_config.use_all2all_kernels
    )


def serves(vllm_config: VllmConfig) -> bool:
    """Whether a model may use these kernels: 16-bit on CUDA, no torch.compile, no batch invariance."""
    half = vllm_config.model_config.dtype in (torch.bfloat16, torch.float16)
    eager = vllm_config.compilation_config.mode in (None, CompilationMode.NONE)
    return current_platform.is_cuda() and half and eager and not envs.VLLM_BATCH_INVARIANT


def warm_up(model: nn.Module, dtype: torch.dtype) -> None:
    """Compile every kernel variant that a decode step of a few rows can need."""
    compiled: set[Any] = set()

    def once(key: Any, call: Callable[[], object]) -> None:
        if key not in compiled:
            compiled.add(key)
            call()

    for module in model.modules():
        if isinstance(module, MoERunner) and type(module.router) is SkinnyRouter:
            bias, compute = module.router.e_score_correction_bias[None], module.router._compute_routing
            once((module.router.top_k, bias.shape[1], module.router.renormalize), partial(compute, bias, bias))
        elif isinstance(module, RoutedExperts) and type(module.quant_method) is SkinnyExpertsMethod:
            hidden, inner = module.w2_weight.shape[1:]
            for tokens in launch.SKINNY_ROWS:
                if config := launch.skinny_experts(tokens, hidden, inner):
                    x = module.w2_weight.new_zeros(tokens, hidden, dtype=dtype)
                    ids = torch.zeros(tokens, module.top_k, dtype=torch.int32, device=x.device)
                    run = partial(module.quant_method.apply, module, x, ids.float(), ids, None, None)
                    once((module.top_k, hidden, inner, config), run)
        elif isinstance(module, LinearBase):
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2:
                result = torch.float32 if isinstance(module, GateLinear) else dtype
                for rows in launch.SKINNY_ROWS:
                    x = weight.new_zeros(rows, weight.shape[1], dtype=dtype)
                    key = (rows, weight.shape[1], launch.skinny(rows, *weight.shape), weight.dtype, result)
                    once(key, partial(product, x, weight, result))


def install(model: nn.Module) -> None:
    """Switch all linear layers, experts and routers of a loaded model to these kernels."""
    for module in model.modules():
        # Methods and routers hold what vLLM has set up for the layer, so only their class changes.
        if isinstance(module, MoERunner) and _one_group(module.router):
            module.router.__class__ = SkinnyRouter
        elif isinstance(module, RoutedExperts) and _alone(module):
            module.quant_method.__class__ = SkinnyExpertsMethod
        elif isinstance(module, LinearBase) and type(module.quant_method) is UnquantizedLinearMethod:
            module.quant_method = SkinnyLinearMethod()
