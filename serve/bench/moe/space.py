"""What there is to choose for vLLM's Triton MoE kernel, what vLLM chooses itself, and the file that it reads."""

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from kimi_vllm.geometry import GeometryError, KimiGeometry

SHARED_MEMORY = 227 * 1024
"""Bytes that a block may use on an H100 or H200."""

Config = dict[str, int]


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of a sparse layer, as one of several GPUs holds them.

    Attributes:
        fp8: Weights in FP8 with a scale per expert, activations quantised as they come (``--quantization fp8``); else
            both in bfloat16.
    """

    number: int
    per_token: int
    hidden: int
    intermediate: int
    fp8: bool = False

    @classmethod
    def of_model(cls, folder: Path, ranks: int = 1, *, fp8: bool = False) -> "Experts":
        """From a folder with a config.json.

        Args:
            ranks: GPUs over which each expert is split (``--tensor-parallel-size``).

        Raises:
            GeometryError: not a model of ours, see `KimiGeometry.from_config`; or its experts cannot be split so.
        """
        geometry = KimiGeometry.from_config(json.loads((folder / "config.json").read_text()))
        if geometry.moe is None:
            raise GeometryError(f"{folder}: all its layers are dense.")
        moe = geometry.moe
        if moe.intermediate_size % ranks:
            raise GeometryError(f"{folder}: experts of {moe.intermediate_size} channels on {ranks} GPUs.")
        inner = moe.intermediate_size // ranks
        return cls(moe.num_experts, moe.num_experts_per_token, geometry.hidden_size, inner, fp8)


def shared_memory(config: Config, *, fp8: bool = False) -> int:
    """Bytes of the tiles in flight."""
    m, n, k = (config[f"BLOCK_SIZE_{axis}"] for axis in "MNK")
    return (1 if fp8 else 2) * config["num_stages"] * k * (m + n)


def candidates(tokens: int, *, fp8: bool = False) -> list[Config]:
    """Configurations worth a try for so many tokens, by how many of them meet in an expert.

    In FP8 tiles are twice as deep, which are as many bytes.
    """
    grids: list[tuple[tuple[int, ...], ...]]  # rows, columns, depth, group, warps, stages
    if tokens <= 64:
        grids = [((16,), (32,), (64, 128, 256), (1,), (4,), (3, 4, 5))]
        grids += [((16,), (64, 128), (64, 128, 256), (1,), (4, 8), (3, 4, 5))]
        if tokens >= 32:
            grids += [((32,), (64, 128), (64, 128), (1,), (4,), (3,))]
    elif tokens <= 512:
        grids = [((16, 32, 64), (64, 128), (64, 128), (1,), (4,), (3, 4))]
        grids += [((64,), (128,), (64, 128), (1,), (8,), (3, 4)), ((16, 32, 64), (256,), (64,), (1,), (8,), (3, 4))]
    else:
        grids = [((64,), (128, 256), (64,), (1, 16), (4, 8), (3, 4)), ((128,), (128,), (64,), (1, 16), (4, 8), (3, 4))]
        grids += [((128,), (256,), (64,), (1, 16), (8,), (3, 4)), ((64,), (128,), (128,), (1, 16), (4, 8), (3,))]
        grids += [((128,), (128,), (128,), (1, 16), (8,), (3,)), ((128,), (64,), (64,), (1,), (4,), (3, 4))]
        grids += [((32,), (128,), (64,), (1,), (4,), (3, 4))]
    keys = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
    configs = [dict(zip(keys, values, strict=True)) for grid in grids for values in product(*grid)]
    if fp8:
        deeper = [config | {"BLOCK_SIZE_K": min(256, 2 * config["BLOCK_SIZE_K"])} for config in configs]
        configs = [config for index, config in enumerate(deeper) if config not in deeper[:index]]
    return [config for config in configs if shared_memory(config, fp8=fp8) <= SHARED_MEMORY]


def vllm_default(experts: Experts, tokens: int) -> Config:
    """What vLLM launches without a file."""
    from vllm.model_executor.layers.fused_moe.fused_moe import get_default_config

    kind = _kind(experts)
    default = get_default_config(
        tokens, experts.number, experts.intermediate, experts.hidden, experts.per_token, kind, None
    )
    return {key: value for key, value in default.items() if key != "SPLIT_K"}  # which the launch sets to 1


def variants(experts: Experts, tokens: list[int]) -> dict[int, int]:
    """Per number of tokens the smallest one that runs the same compiled kernel.

    Triton compiles anew where the number of routed rows is no multiple of 16, vLLM where so few experts are hit that
    rows are not sorted by expert.
    """
    smallest: dict[tuple[bool, bool], int] = {}
    of: dict[int, int] = {}
    for count in sorted(tokens):
        rows = count * experts.per_token
        of[count] = smallest.setdefault((rows % 16 == 0, rows * 4 <= experts.number), count)
    return of


def _kind(experts: Experts) -> str | None:
    """Return what vLLM calls the format of these weights."""
    import torch
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG, fp8_w8a8_moe_quant_config

    scale = torch.ones(1)
    config = fp8_w8a8_moe_quant_config(scale, scale) if experts.fp8 else FUSED_MOE_UNQUANTIZED_CONFIG
    name: str | None = config.config_name(torch.bfloat16)
    return name


def file_name(experts: Experts) -> str:
    """Name of the file that vLLM looks for on the present GPU."""
    from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name

    return str(get_config_file_name(experts.number, experts.intermediate, _kind(experts)))


def write(path: Path, chosen: dict[int, Config]) -> None:
    """Write vLLM's file, making its folder."""
    import triton

    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"triton_version": triton.__version__, **{str(tokens): chosen[tokens] for tokens in sorted(chosen)}}
    path.write_text(json.dumps(content, indent=4) + "\n")
