"""Quantised copies of a checkpoint as the usual tools write them, and the same weights dequantised again."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from support.checkpoints import hub_name, to_hub_layout, write_checkpoint

GROUP = 128
LOW_RANK = ("f_b_proj", "g_b_proj")
_LINEAR = re.compile(r".*\.(?:\w+_proj|kv_a_proj_with_mqa|w[123])\.weight")
_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max

Quantised = tuple[dict[str, Tensor], Tensor]
"""Tensors by their suffix, and the weight they stand for, ``[outputs, inputs]``."""


def fp8_block(weight: Tensor) -> Quantised:
    """``fp8`` with a scale per block of 128 x 128, as DeepSeek's checkpoints."""
    outputs, inputs = weight.shape
    rows, columns = -(-outputs // GROUP), -(-inputs // GROUP)
    padded = torch.zeros(rows * GROUP, columns * GROUP)
    padded[:outputs, :inputs] = weight
    blocks = padded.unflatten(1, (columns, GROUP)).unflatten(0, (rows, GROUP))
    scale = blocks.abs().amax((1, 3)).clamp_min(1e-8) / _FP8_MAX
    wide = scale.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)[:outputs, :inputs]
    quantised = (weight / wide).to(torch.float8_e4m3fn)
    return {"weight": quantised, "weight_scale_inv": scale}, quantised.float() * wide


def fp8_channel(weight: Tensor) -> Quantised:
    """compressed-tensors' FP8 with a scale per output, for activations quantised per token."""
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-8) / _FP8_MAX
    quantised = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": quantised, "weight_scale": scale}, quantised.float() * scale


def _four_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integers from -8 to 7, their scales in bfloat16 by output and group, and what they stand for."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(2, keepdim=True).clamp_min(1e-8) / 7).bfloat16()
    integers = (groups / scale.float()).round().clamp(-8, 7)
    return integers.flatten(1).to(torch.int32), scale[..., 0], (integers * scale.float()).flatten(1)


def w4a16(weight: Tensor) -> Quantised:
    """compressed-tensors' packed integers of four bits in groups of 128 inputs."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    integers, scale, dequantised = _four_bits(weight)
    packed = pack_to_int32(integers.to(torch.int8), 4)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}, dequantised


def gptq(weight: Tensor) -> Quantised:
    """GPTQ of four bits in groups of 128 inputs, symmetric: zero points are all 8, and stored as 7."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import pack_cols, pack_rows

    integers, scale, dequantised = _four_bits(weight)
    (outputs, inputs), zeros = weight.shape, torch.full((weight.shape[1] // GROUP, weight.shape[0]), 7)
    return {
        "qweight": pack_rows((integers + 8).T.contiguous(), 4, inputs, outputs),
        "qzeros": pack_cols(zeros.to(torch.int32), 4, inputs // GROUP, outputs),
        "scales": scale.T.to(torch.float16),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
    }, dequantised


def awq(weight: Tensor) -> Quantised:
    """AWQ of four bits in groups of 128 inputs, all zero points 8."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack

    integers, scale, dequantised = _four_bits(weight)
    (outputs, inputs), zeros = weight.shape, torch.full((weight.shape[1] // GROUP, weight.shape[0]), 8)
    return {
        "qweight": awq_pack((integers + 8).T.contiguous(), 4, inputs, outputs),
        "qzeros": awq_pack(zeros.to(torch.int32), 4, inputs // GROUP, outputs),
        "scales": scale.T.to(torch.float16),
    }, dequantised


def _compressed_tensors(form: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head", *(rf"re:.*\.{name}" for name in LOW_RANK), r"re:.*\.gate$"],
        "config_groups": {"group_0": group},
    }


_KEPT = [*LOW_RANK, "lm_head", "gate"]
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False}

SCHEMES: dict[str, tuple[Callable[[Tensor], Quantised], dict[str, Any]]] = {
    "fp8-block": (
        fp8_block,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [GROUP, GROUP]},
    ),
    "compressed-tensors-fp8": (
        fp8_channel,
        _compressed_tensors(
            "float-quantized",
            _FP8 | {"strategy": "channel", "dynamic": False},
            _FP8 | {"strategy": "token", "dynamic": True},
        ),
    ),
    "compressed-tensors-w4a16": (w4a16, _compressed_tensors("pack-quantized", _INT4, None)),
    "gptq": (
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False, "lm_head": False}
        | {"dynamic": {rf"-:.*\.{name}": {} for name in (*LOW_RANK, "gate$")}},
    ),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    ),
}
"""By name: how one weight is quantised, and the checkpoint's ``quantization_config``."""


def quantise(source: Path, folder: Path, scheme: str) -> tuple[Path, Path]:
    """Write a checkpoint quantised, in the hub's layout, and what transformers shall load in its place.

    All linear layers and experts are quantised but the low-rank gates' second factors, the router and the head.

    Returns:
        The folders of the quantised checkpoint and of the dequantised one.
    """
    quantiser, written = SCHEMES[scheme]
    hub, plain_config = to_hub_layout(source, folder / "hub"), json.loads((source / "config.json").read_text())
    tensors = load_file(hub / "model.safetensors")
    config = json.loads((hub / "config.json").read_text())
    names = [name for name in tensors if _LINEAR.fullmatch(name) and not any(f".{low}." in name for low in LOW_RANK)]
    config["quantization_config"] = written
    if "quant_method" in written and written["quant_method"] in ("fp8", "awq"):
        kept = [n.removesuffix(".weight") for n in tensors if any(f"{k}.weight" in n for k in _KEPT)]
        config["quantization_config"] = written | {"modules_to_not_convert": kept}
    quantised, dequantised = dict(tensors), {}
    for name in names:
        parts, dequantised[name] = quantiser(quantised.pop(name).float())
        quantised |= {f"{name.removesuffix('weight')}{suffix}": part for suffix, part in parts.items()}
    plain = load_file(source / "model.safetensors")
    plain = {name: dequantised.get(hub_name(name), tensor) for name, tensor in plain.items()}
    config["dtype"] = "float16" if written["quant_method"] in ("gptq", "awq") else "bfloat16"
    return (
        write_checkpoint(folder / scheme, config, quantised),
        write_checkpoint(folder / f"{scheme}-dequantised", plain_config, plain),
    )
