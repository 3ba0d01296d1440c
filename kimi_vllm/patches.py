"""A row per thing we change outside this package: what, why, and when it goes. Empty is the goal."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

_AMX_BLOCK = 32


@dataclass(frozen=True, slots=True)
class Patch:
    """One change to somebody else's module.

    Attributes:
        target: what is changed.
        why: what breaks without it.
        remove_when: what must be true upstream.
        apply: makes the change; may run more than once.
    """

    target: str
    why: str
    remove_when: str
    apply: Callable[[], None]


def _give_llvmlite_a_dict() -> None:
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is not None:
        ffi.lib._fntab.setdefault("__dict__", {})


def _leave_int8_to_onednn() -> None:
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    cpu.check_cpu_sgl_kernel = _amx_multiplies


def _pack_experts_again() -> None:
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    set_up = UnquantizedFusedMoEMethod._setup_kernel
    if hasattr(set_up, "__wrapped__"):
        return

    @wraps(set_up)
    def from_the_start(self: Any, layer: Any, w13: torch.Tensor, w2: torch.Tensor) -> None:
        self.moe_kernel = None
        set_up(self, layer, w13, w2)

    UnquantizedFusedMoEMethod._setup_kernel = from_the_start


def _keep_int8_scales() -> None:
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel

    process = CPUInt8ScaledMMLinearKernel.process_weights_for_onednn
    if hasattr(process, "__wrapped__"):
        return

    @wraps(process)
    def and_keep_the_scale(self: Any, layer: Any) -> None:
        process(self, layer)
        self.kept_scale = getattr(layer, self.layer_param_names[1])

    CPUInt8ScaledMMLinearKernel.process_weights_for_onednn = and_keep_the_scale


def _amx_multiplies(outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    from vllm.model_executor.layers.utils import check_cpu_sgl_kernel

    # Layers are finished with the model's dtype as torch's default.
    if dtype == torch.int8 and (outputs % _AMX_BLOCK or torch.get_default_dtype() != torch.bfloat16):
        return False
    served: bool = check_cpu_sgl_kernel(outputs, inputs, dtype)
    return served


PATCHES = (
    Patch(
        target="llvmlite.binding.ffi.lib",
        why=(
            "vLLM's CPU worker reads __dict__ of all objects of all modules (triton_utils.dispatcher._rebind_kernels). "
            "llvmlite's library handle answers any attribute, that one too, with a function, so a second engine in a "
            "process that has used numba fails with \"'_lib_fn_wrapper' object has no attribute 'get'\"."
        ),
        remove_when="vLLM's _rebind_kernels no longer calls vars() on objects that only pretend to have a __dict__",
        apply=_give_llvmlite_a_dict,
    ),
    Patch(
        target="vllm.model_executor.kernels.linear.scaled_mm.cpu.check_cpu_sgl_kernel",
        why=(
            "On CPUs with AMX vLLM sends int8 weights of 16, 48, ... outputs to a kernel that packs blocks of 32 and "
            'fails with "Expected N == BLOCK_N to be true", and those of float32 and float16 models to one that '
            "multiplies bfloat16 only. oneDNN, which serves all other CPUs, takes both."
        ),
        remove_when="check_cpu_sgl_kernel asks of int8 for a multiple of 32 outputs and for the activations' dtype",
        apply=_leave_int8_to_onednn,
    ),
    Patch(
        target="vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method.UnquantizedFusedMoEMethod",
        why=(
            "On CPUs vLLM packs experts for its kernel when it sets the kernel up, which it does once. After weights "
            "were reloaded the kernel reads experts that are not packed, and answers other tokens without a word."
        ),
        remove_when="_setup_kernel also calls fused_experts.process_weights_after_loading when weights are updated",
        apply=_pack_experts_again,
    ),
    Patch(
        target="vllm.model_executor.kernels.linear.scaled_mm.cpu.CPUInt8ScaledMMLinearKernel",
        why=(
            "oneDNN's handle for an int8 product holds the address of the scales and not the tensor. Weights that are "
            "reloaded get their handle from a tensor that vLLM then frees, and multiply by whatever comes to be there."
        ),
        remove_when="process_weights_for_onednn keeps the scales it gives to create_onednn_scaled_mm",
        apply=_keep_int8_scales,
    ),
)


def apply_all() -> None:
    """Make every change in `PATCHES`."""
    for patch in PATCHES:
        patch.apply()
