"""Which quantised weights vLLM's kernels for x86-64 CPUs support, by instruction set; the others are refused by name.

vLLM itself fails late, at the first request or after loading, with a missing operator. Its kernels for quantised
experts do not support Kimi Linear's routing, except for FP8 in blocks.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import CpuArchEnum, current_platform

from kimi_vllm.geometry import KimiGeometry
from kimi_vllm.quantization import BLOCK, QuantizationError, WeightFormat

_SERVED = (
    "Any x86-64 CPU serves unquantised checkpoints, and compressed-tensors with int8 (W8A8) or FP8 weights, a scale "
    "per output (FP8_DYNAMIC), without the experts (`ignore`); with AVX-512 also 4 bits (W4A16, AWQ, GPTQ)."
)
_NEVER = "vLLM has no kernel for it on CPUs"
_FOUR_BITS, _BLOCKS = "4-bit weights", "FP8 weights in blocks"
_NEEDED = {_FOUR_BITS: "AVX-512", _BLOCKS: "AMX"}


def instruction_sets() -> frozenset[str]:
    """Instruction sets of this CPU beyond AVX2 that vLLM's kernels require."""
    found = {"AVX-512": torch.cpu._is_avx512_supported(), "AMX": torch.cpu._is_amx_tile_supported()}
    return frozenset(name for name, present in found.items() if present)


def refuse_unserved(vllm_config: VllmConfig, geometry: KimiGeometry, written: Mapping[str, Any] | None) -> None:
    """Refuse a quantisation that would fail on this CPU.

    Args:
        written: The checkpoint's ``quantization_config``; None if vLLM quantises at load time.

    Raises:
        QuantizationError: Names what was asked, what this CPU lacks for it, and what it serves.
    """
    model = vllm_config.model_config
    if model.quantization is None or current_platform.get_cpu_architecture() != CpuArchEnum.X86:
        return
    if current_platform.is_zen_cpu():
        return  # AMD's zentorch brings kernels of its own, and knows what they take
    if written is None:
        raise QuantizationError(f"--quantization {model.quantization}: {_NEVER}. Drop the option. {_SERVED}")
    for asked, kind, lacking in _demands(geometry, written, instruction_sets()):
        if lacking:
            raise QuantizationError(f"quantization_config: {asked}: {lacking}. Take another checkpoint. {_SERVED}")
        if kind == _FOUR_BITS and model.dtype == torch.float32:
            raise QuantizationError(
                f"--dtype float32: vLLM multiplies {asked} with bfloat16 or float16 only. Choose one of the two."
            )


def lacking_for(available: frozenset[str]) -> dict[str, str]:
    """Kinds of quantised weights that other CPUs serve, and the instruction set that is missing for each."""
    return {kind: needed for kind, needed in _NEEDED.items() if needed not in available}


def _demands(
    geometry: KimiGeometry, written: Mapping[str, Any], available: frozenset[str]
) -> Iterator[tuple[str, str, str]]:
    """Weights in the checkpoint, their kind, and why they cannot be served, or an empty string."""
    kinds, lacks = list(_kinds(written)), lacking_for(available)
    for asked, kind in kinds:
        lacking = f"vLLM multiplies it with {lacks[kind]} only, which this CPU lacks" if kind in lacks else ""
        yield asked, kind, lacking if kind else _NEVER
    if geometry.moe is None:
        return
    sparse = geometry.sparse.index(True)
    expert = f"model.layers.{sparse}.block_sparse_moe.experts.0.w1"
    if WeightFormat.of_checkpoint(written).stored(expert, "experts") is not None:
        asked, kind = kinds[0]
        others = "" if kind == _BLOCKS else "vLLM's kernels for quantised experts on CPUs lack Kimi Linear's routing"
        yield f"{asked}, experts", kind, others


def _kinds(written: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Descriptions of the weights in the checkpoint, and their kind; empty if vLLM has no kernel for them."""
    method = str(written.get("quant_method"))
    if method in ("awq", "gptq"):
        bits = written.get("bits") or written.get("w_bit")
        yield f"{method}, {bits}-bit weights", _FOUR_BITS if bits == 4 else ""
    elif method == "fp8":
        block = written.get("weight_block_size")
        asked = "fp8, a scale per tensor" if block is None else f"fp8, a scale per block of {block}"
        yield asked, _BLOCKS if block == [BLOCK, BLOCK] else ""
    elif method == "compressed-tensors":
        for group in written["config_groups"].values():
            yield _compressed(group["weights"], group.get("input_activations"))
    else:
        yield method, ""


def _compressed(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> tuple[str, str]:
    def described(numbers: Mapping[str, Any] | None) -> tuple[int, str, str]:
        numbers = numbers or {"num_bits": 16, "type": "float"}
        return int(numbers["num_bits"]), str(numbers.get("type", "int")), str(numbers.get("strategy", "tensor"))

    (bits, number, strategy), (input_bits, input_number, by) = described(weights), described(inputs)
    asked = f"compressed-tensors, {bits}-bit {number} weights with a scale per {strategy}, {input_bits}-bit inputs"
    match (bits, number, strategy, input_bits, input_number, by):
        case (8, "int", _, 8, "int", _):
            return asked, "int8"
        case (8, "float", "channel", 8, "float", "token"):
            return asked, "FP8 by output"
        case (4, "int", _, 16, _, _):
            return asked, _FOUR_BITS
        case (8, "float", "block", 8, "float", _) if weights.get("block_structure") == [BLOCK, BLOCK]:
            return asked, _BLOCKS
    return asked, ""
