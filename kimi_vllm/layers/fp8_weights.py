"""FP8 weights of a loaded layer, as our kernels for a few rows read them: by outputs and inputs, with their scales.

Some of vLLM's kernels rearrange the weights that they load. Only those that are known to leave rows and columns in
place are listed here; the weights of all others stay with vLLM's kernel.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear.scaled_mm.cutlass import (
    CutlassFp8BlockScaledMMKernel,
    CutlassFP8ScaledMMLinearKernel,
)
from vllm.model_executor.kernels.linear.scaled_mm.deep_gemm import DeepGemmFp8BlockScaledMMKernel
from vllm.model_executor.kernels.linear.scaled_mm.flashinfer import FlashInferFp8DeepGEMMDynamicBlockScaledKernel
from vllm.model_executor.kernels.linear.scaled_mm.triton import TritonFp8BlockScaledMMKernel
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from kimi_vllm.kernels.cuda.scales import Scales

_IN_PLACE = (
    CutlassFP8ScaledMMLinearKernel,
    CutlassFp8BlockScaledMMKernel,
    DeepGemmFp8BlockScaledMMKernel,
    FlashInferFp8DeepGEMMDynamicBlockScaledKernel,
    TritonFp8BlockScaledMMKernel,
)
_PROGRAM_ROWS = 32
"""A program of our kernels has at most so many outputs, all of one block."""

_EXPERTS_IN_PLACE = (Fp8MoeBackend.TRITON, Fp8MoeBackend.VLLM_CUTLASS)


def linear_weights(layer: Any) -> tuple[Tensor, Scales] | None:
    """Return the weights ``[N, K]`` of a linear layer and their scales; None if they are not FP8 or lie otherwise.

    Args:
        layer: A `LinearBase`, after vLLM's processing of its weights.
    """
    method = layer.quant_method
    kernel = getattr(method, "fp8_linear", None) or getattr(getattr(layer, "scheme", None), "fp8_linear", None)
    weight = getattr(layer, "weight", None)
    if not isinstance(kernel, _IN_PLACE) or weight is None or weight.dtype != torch.float8_e4m3fn:
        return None
    shape = (sum(layer.logical_widths), getattr(layer, "input_size_per_partition", layer.input_size))
    rows = next((each for each in (weight, weight.t()) if each.shape == shape and each.is_contiguous()), None)
    # By this name go the scales of blocks where the format has both.
    values = getattr(layer, "weight_scale_inv", None)
    scales = _scales(layer.weight_scale if values is None else values, shape, getattr(layer, "weight_block_size", None))
    return None if rows is None or scales is None else (rows, scales)


def expert_scales(layer: RoutedExperts) -> tuple[Scales, Scales] | None:
    """Return the scales of a layer's experts, up and down; None if their weights are not FP8 or lie otherwise.

    ``w13_weight`` ``[E, 2 * intermediate, hidden]`` and ``w2_weight`` ``[E, hidden, intermediate]`` go with them.
    """
    method = layer.quant_method
    if getattr(method, "fp8_backend", None) not in _EXPERTS_IN_PLACE:
        return None
    (_, hidden, inner), config = layer.w2_weight.shape, method.moe_quant_config
    weights = (layer.w13_weight, (2 * inner, hidden)), (layer.w2_weight, (hidden, inner))
    found = []
    for (weight, shape), values in zip(weights, (config.w1_scale, config.w2_scale), strict=True):
        lies = weight.dtype == torch.float8_e4m3fn and weight.is_contiguous() and weight.shape[1:] == shape
        scales = _scales(values, shape, config.block_shape, experts=len(weight)) if lies else None
        if scales is None or (scales.block and inner % scales.block):
            return None
        found.append(scales)
    return found[0], found[1]


def _scales(
    values: Tensor | None, shape: tuple[int, int], blocks: list[int] | None, experts: int | None = None
) -> Scales | None:
    """Return scales in the form of `Scales`, whichever form the kernel that they are for takes."""
    if values is None or values.dtype != torch.float32:
        return None
    front = () if experts is None else (experts,)
    each = values.numel() // (experts or 1)
    if blocks is None:
        return Scales(values.reshape(*front, each, 1)) if each in (1, shape[0]) else None
    in_blocks = tuple(-(-size // blocks[0]) for size in shape)
    if blocks[0] != blocks[1] or blocks[0] % _PROGRAM_ROWS or values.shape != (*front, *in_blocks):
        return None
    return Scales(values, blocks[0])
