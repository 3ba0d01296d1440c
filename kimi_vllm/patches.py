"""Functions of other packages that we replace on CPUs. `intrusions.PATCHES` says why, and when each can go."""

import sys
from functools import wraps
from typing import Any

import torch

_AMX_BLOCK = 32


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


def _sample_with_drafts() -> None:
    from vllm.v1.sample import rejection_sampler

    rejection_sampler.expand_batch_to_tokens = _expanded
    constrain = rejection_sampler.apply_sampling_constraints
    if hasattr(constrain, "__wrapped__"):
        return

    @wraps(constrain)
    def unless_empty(logits: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        constrained: torch.Tensor = constrain(logits, *args, **named) if len(logits) else logits
        return constrained

    rejection_sampler.apply_sampling_constraints = unless_empty


def _draw_only_what_counts() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    # torch.inference_mode() already leaves a __wrapped__ on what is inherited.
    if "sample_tokens" in vars(CPUModelRunner):
        return
    sample = CPUModelRunner.sample_tokens

    @wraps(sample)
    def without_the_discarded(self: Any, grammar_output: Any) -> Any:
        generators: dict[int, torch.Generator] = self.input_batch.generators
        hidden = {row: generators.pop(row) for row in [*generators] if self.discard_request_mask.np[row]}
        try:
            return sample(self, grammar_output)
        finally:
            generators.update(hidden)

    CPUModelRunner.sample_tokens = without_the_discarded


def _expanded(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(x == replace_from, replace_to, x).to(x.dtype)
    return torch.repeat_interleave(replaced, counts, output_size=num_tokens)


def _amx_multiplies(outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    from vllm.model_executor.layers.utils import check_cpu_sgl_kernel

    # Layers are finished with the model's dtype as torch's default.
    if dtype == torch.int8 and (outputs % _AMX_BLOCK or torch.get_default_dtype() != torch.bfloat16):
        return False
    served: bool = check_cpu_sgl_kernel(outputs, inputs, dtype)
    return served


def apply_all() -> None:
    """Make every change; may be called more than once."""
    _give_llvmlite_a_dict()
    _leave_int8_to_onednn()
    _pack_experts_again()
    _keep_int8_scales()
    _sample_with_drafts()
    _draw_only_what_counts()
