"""Linear layers of a decode step of one, two or four rows: our kernel where it beats cuBLAS, vLLM's method elsewhere.

At batch 1 a step of the 48B model is 176 products of one row, most of them so small that cuBLAS needs several times as
long as reading the weights takes (kernels/NOTES.md).
"""

import torch
import vllm.envs as envs
from torch import Tensor, nn
from vllm.config import CompilationMode, VllmConfig
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.platforms import current_platform

from kimi_vllm.kernels import launch


def product(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """``x @ weight.T`` in `dtype`, by default that of `x`; None where another implementation should do it."""
    config = launch.skinny(x.shape[0], *weight.shape)
    if config is None or x.dim() != 2 or x.stride(1) != 1:
        return None
    from kimi_vllm.kernels.skinny import skinny_linear

    return skinny_linear(x, weight, x.new_empty(x.shape[0], weight.shape[0], dtype=dtype or x.dtype), config)


class SkinnyLinearMethod(UnquantizedLinearMethod):
    """vLLM's method for weights that are not quantised, with another kernel for a few rows."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[M, K]`` to ``[M, N]``."""
        weight: Tensor = layer.weight  # type: ignore[assignment]
        out = product(x, weight) if bias is None else None
        return super().apply(layer, x, bias) if out is None else out


def serves(vllm_config: VllmConfig) -> bool:
    """Whether a model may use it: on CUDA, two bytes a number, not compiled by torch, the batch free to matter."""
    half = vllm_config.model_config.dtype in (torch.bfloat16, torch.float16)
    eager = vllm_config.compilation_config.mode in (None, CompilationMode.NONE)
    return current_platform.is_cuda() and half and eager and not envs.VLLM_BATCH_INVARIANT


def warm_up(model: nn.Module, dtype: torch.dtype) -> None:
    """Compile what the linear layers of a model can need: one kernel for each number of rows, inputs and parameters."""
    compiled = set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, LinearBase) or not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        result = torch.float32 if isinstance(module, GateLinear) else dtype
        for rows in launch.SKINNY_ROWS:
            key = (rows, weight.shape[1], launch.skinny(rows, *weight.shape), weight.dtype, result)
            if key not in compiled:
                compiled.add(key)
                product(torch.zeros(rows, weight.shape[1], dtype=dtype, device=weight.device), weight, result)


def install(model: nn.Module) -> None:
    """Let all linear layers of a loaded model use it."""
    for module in model.modules():
        if isinstance(module, LinearBase) and type(module.quant_method) is UnquantizedLinearMethod:
            module.quant_method = SkinnyLinearMethod()
