"""Linear layers and experts for a few rows: our kernels where they are faster, else vLLM's methods.

At batch 1 a decode step of the 48B model has 176 products of one row, for most of which cuBLAS takes several times as
long as reading the weights, and vLLM's FP8 another launch for the activations (kernels/NOTES.md).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import vllm.envs as envs
from torch import Tensor, nn
from vllm.config import CompilationMode, VllmConfig
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger
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
from kimi_vllm.kernels.cuda.scales import Scales
from kimi_vllm.layers.fp8_weights import expert_scales, linear_weights

logger = init_logger(__name__)


def _launch(rows: int, weight: Tensor) -> launch.Skinny | None:
    return launch.skinny(rows, *weight.shape, weight.dtype == torch.float8_e4m3fn)


def _experts_launch(tokens: int, w2: Tensor) -> launch.SkinnyExperts | None:
    return launch.skinny_experts(tokens, *w2.shape[1:], w2.dtype == torch.float8_e4m3fn)


def product(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None, scales: Scales | None = None) -> Tensor | None:
    """``x @ (scales * weight).T`` in `dtype`, by default that of `x`; None if another implementation is faster."""
    config = _launch(x.shape[0], weight)
    if config is None or x.dim() != 2 or x.stride(1) != 1:
        return None
    from kimi_vllm.kernels.cuda.skinny import skinny_linear

    out = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype or x.dtype)
    return skinny_linear(x, weight, out, config, scales)


@cache
def skinny_linear_method(theirs: Any) -> Any:
    """Return a subclass of one of vLLM's methods for linear layers, with our kernel for a few rows."""

    class SkinnyLinear(theirs):  # type: ignore[misc]
        def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            """``[M, K]`` to ``[M, N]``."""
            out: Tensor | None = None
            if bias is None and x.shape[0] in launch.SKINNY_ROWS and (stored := _stored(layer)):
                out = product(x, stored[0], scales=stored[1])
            return super().apply(layer, x, bias) if out is None else out

    return SkinnyLinear


@cache
def skinny_experts_method(theirs: Any) -> Any:
    """Return a subclass of one of vLLM's methods for experts, with our kernels for a few tokens."""

    class SkinnyExperts(theirs):  # type: ignore[misc]
        def apply(
            self, layer: RoutedExperts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *shared: Any, **named: Any
        ) -> Tensor:
            """``[M, hidden]`` to ``[M, hidden]``: the weighted sum over each token's experts.

            `_alone` excludes kernels that also compute shared experts.
            """
            weight = layer.w2_weight
            config = _experts_launch(x.shape[0], weight)
            if config is None or x.stride(1) != 1:
                out: Tensor = super().apply(layer, x, topk_weights, topk_ids, *shared, **named)
                return out
            from kimi_vllm.kernels.cuda.skinny_experts import skinny_experts

            return skinny_experts(x, layer.w13_weight, weight, topk_weights, topk_ids, config, expert_scales(layer))

    # vLLM's loader tells some formats of experts by the method's name, at reloads too.
    return type(theirs.__name__, (SkinnyExperts,), {"__module__": __name__})


def mixture(runner: MoERunner, shared: tuple[Any, Any], x: Tensor, router_logits: Tensor) -> Tensor | None:
    """All experts of a layer, shared ones too, in two launches; None if vLLM's runner is to call them.

    Args:
        runner: What holds the router and the routed experts.
        shared: The linear layers of the shared expert, up and down.
        x: ``[M, hidden]``.
        router_logits: ``[M, E]``.

    Returns:
        ``[M, hidden]``, summed over tensor-parallel ranks.
    """
    if not _ours(runner) or x.stride(1) != 1:
        return None
    experts, router = runner.routed_experts, runner.router
    weight = experts.w2_weight
    config = _experts_launch(x.shape[0], weight)
    if config is None:
        return None
    from kimi_vllm.kernels.cuda.skinny_experts import SharedExpert, skinny_experts

    stored = [_stored(layer) for layer in shared]
    (w13, up), (w2, down) = (each or (None, None) for each in stored)
    if w13 is None or w2 is None:
        return None
    other, scales = SharedExpert(w13, w2, (up, down) if up and down else None), expert_scales(experts)
    if not other.like(experts.w13_weight, weight, scales):
        return None
    weights, ids = router.select_experts(hidden_states=x, router_logits=router_logits)
    out = skinny_experts(x, experts.w13_weight, weight, weights, ids, config, scales, other)
    reduced: Tensor = runner._maybe_reduce_final_output(out, None, output_is_reduced=False)
    return reduced


def _taken(method: object) -> bool:
    return type(method).__module__ == __name__


def _ours(runner: MoERunner) -> bool:
    """Whether a layer's router and routed experts are both ours; if not, the weights can lie in any form of vLLM's."""
    taken = _taken(runner.routed_experts.quant_method) and type(runner.router) is SkinnyRouter
    return taken and bool(runner.routed_scaling_factor == 1.0)


class SkinnyRouter(GroupedTopKRouter):
    """The router for one group of experts with sigmoid scores, with our kernel for steps of decodes.

    A CUDA graph has as many rows as it was captured with; those that no request fills read no expert of their own.
    """

    def _compute_routing(
        self, hidden_states: Tensor, router_logits: Tensor, *indices_type: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        few = router_logits.shape[0] <= launch.routed_tokens()
        if not few or router_logits.dtype != torch.float32 or not router_logits.is_contiguous():
            chosen: tuple[Tensor, Tensor] = super()._compute_routing(
                hidden_states, router_logits, *indices_type, **named
            )
            return chosen
        return self.choose(router_logits, _padding(router_logits.shape[0]))

    def choose(self, router_logits: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Choose by our kernel: ``[M, E]`` to weights and ids ``[M, top_k]``."""
        from kimi_vllm.kernels.cuda.skinny_experts import choose_experts

        return choose_experts(
            router_logits,
            self.e_score_correction_bias,
            self.top_k,
            normalise=self.renormalize,
            scaling=self.routed_scaling_factor,
            padding=padding,
        )


def _padding(rows: int) -> Tensor | None:
    """Return which rows of a step are padding; None if vLLM does not say.

    None also with several data-parallel ranks, which pad to the largest step among them: so many rows on the same few
    experts would wait for each other.
    """
    context = get_forward_context() if envs.VLLM_MOE_SKIP_PADDING and is_forward_context_available() else None
    if context is None or context.is_padding is None or context.dp_metadata is not None:
        return None
    return context.is_padding[:rows] if len(context.is_padding) >= rows else None


def _stored(layer: Any) -> tuple[Tensor, Scales | None] | None:
    if isinstance(layer.quant_method, UnquantizedLinearMethod):
        return layer.weight, None
    return linear_weights(layer)


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
    """Whether this device has all experts of a layer, or a slice of each, in the checkpoint's layout.

    With several data-parallel ranks vLLM's method exchanges tokens inside of `apply`, without expert parallelism too.
    """
    method: Any = experts.quant_method
    if type(method) is UnquantizedFusedMoEMethod:
        in_place = method.unquantized_backend == UnquantizedMoeBackend.TRITON
    else:
        in_place = expert_scales(experts) is not None
    return (
        in_place
        and experts.activation == MoEActivation.SILU
        and experts.expert_map is None
        and not experts.apply_router_weight_on_input
        and not method.moe.has_bias
        and not method.moe.moe_parallel_config.use_all2all_kernels
        and method.moe.moe_parallel_config.dp_size == 1
    )


def serves(vllm_config: VllmConfig) -> bool:
    """Whether a model may use these kernels: 16-bit on CUDA, no torch.compile, no batch invariance."""
    half = vllm_config.model_config.dtype in (torch.bfloat16, torch.float16)
    eager = vllm_config.compilation_config.mode in (None, CompilationMode.NONE)
    return current_platform.is_cuda() and half and eager and not envs.VLLM_BATCH_INVARIANT


def warm_up(model: nn.Module, dtype: torch.dtype) -> None:
    """Compile every kernel variant that a decode step of a few rows can need."""
    compiled: set[Any] = set()
    covered: set[nn.Module] = set()

    def once(key: Any, call: Callable[[], object]) -> None:
        if key not in compiled:
            compiled.add(key)
            call()

    module: Any
    for module in model.modules():
        if hasattr(module, "few_rows"):
            if not _ours(module.experts):
                continue
            experts, bias = module.experts.routed_experts, module.experts.router.e_score_correction_bias
            # In every layer: whether its shared expert is like the others is for the layer to say.
            runs = [module.few_rows(x, bias.new_zeros(len(x), len(bias))) for x, _ in _few_tokens(experts, dtype)]
            if all(run is not None for run in runs):
                covered.add(experts)
        elif isinstance(module, MoERunner) and type(module.router) is SkinnyRouter:
            router, bias = module.router, module.router.e_score_correction_bias[None]
            for padding in (None, torch.zeros(1, dtype=torch.bool, device=bias.device)):
                kind = (router.top_k, bias.shape[1], router.renormalize, padding is None)
                once(kind, partial(router.choose, bias, padding))
        elif isinstance(module, RoutedExperts) and _taken(module.quant_method) and module not in covered:
            for x, kind in _few_tokens(module, dtype):
                ids = torch.zeros(len(x), module.top_k, dtype=torch.int32, device=x.device)
                once(kind, partial(module.quant_method.apply, module, x, ids.float(), ids, None, None))
        elif isinstance(module, LinearBase) and (stored := _stored(module)):
            weight, scales = stored
            result = torch.float32 if isinstance(module, GateLinear) else dtype
            for rows in launch.SKINNY_ROWS:
                x = weight.new_zeros(rows, weight.shape[1], dtype=dtype)
                launched = _launch(rows, weight)
                block = scales.block if scales else None
                once(
                    (rows, weight.shape[1], launched, weight.dtype, block, result),
                    partial(product, x, weight, result, scales),
                )


def _few_tokens(experts: RoutedExperts, dtype: torch.dtype) -> Iterator[tuple[Tensor, Any]]:
    """Return inputs that between them meet all launch parameters for a layer's experts, with what tells them apart."""
    weight = experts.w2_weight
    for tokens in launch.SKINNY_ROWS:
        if config := _experts_launch(tokens, weight):
            x = weight.new_zeros(tokens, weight.shape[1], dtype=dtype)
            forms = [(each.block, each.strides) for each in expert_scales(experts) or ()]
            yield x, (experts.top_k, *weight.shape[1:], weight.dtype, *forms, config)


def install(model: nn.Module) -> None:
    """Switch all linear layers, experts and routers of a loaded model to these kernels."""
    ours, theirs = Counter[str](), Counter[str]()
    for module in model.modules():
        # Methods and routers hold what vLLM has set up for the layer, so only their class changes.
        if isinstance(module, MoERunner) and _one_group(module.router):
            module.router.__class__ = SkinnyRouter
        elif isinstance(module, (RoutedExperts, LinearBase)):
            experts, method = isinstance(module, RoutedExperts), module.quant_method
            if _taken(method):
                continue
            kind: Any = type(method)
            takes = _alone(module) if experts else _stored(module) is not None
            (ours if takes else theirs)[kind.__name__] += 1
            if takes:
                method.__class__ = skinny_experts_method(kind) if experts else skinny_linear_method(kind)
    logger.info_once(
        "Steps of up to %d rows use kimi-vllm's products where they are faster, in the layers of %s%s",
        max(launch.SKINNY_ROWS),
        _counted(ours),
        f"; left to vLLM: {_counted(theirs)}" if theirs else "",
    )


def _counted(methods: Counter[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in methods.items()) or "no method"
