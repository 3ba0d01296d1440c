"""The memory of one engine: what can be known of it before anything is loaded.

On a GPU vLLM measures what is left after loading and makes blocks of all of it. On a CPU it would take nearly all free
memory and zero it before it is ready, a minute for 20 GiB; there it is told to take no more than sequences can fill.
"""

import os
from dataclasses import replace

import psutil
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

from kimi_vllm.cache.capacity import Capacity
from kimi_vllm.cache.window import window_of
from kimi_vllm.geometry import KimiGeometry, geometry_of, stages_of
from kimi_vllm.options import KimiOptions
from kimi_vllm.planning import Costs, Demand, afforded, cache_bytes, check_one_fits, least_block_size
from kimi_vllm.quantization import QuantizationError, WeightFormat

logger = init_logger("vllm.kimi_vllm")


def settle_memory(vllm_config: VllmConfig, options: KimiOptions) -> None:
    """Check before anything is loaded that one request fits, where that can be known; on CPUs, set the cache's size.

    Raises:
        PlanError: It does not fit, or see `Costs.of`.
        ValueError: See `Costs.of`.
    """
    cache, model = vllm_config.cache_config, vllm_config.model_config
    demand = Demand(
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        # With --max-model-len auto, vLLM lowers it to what fits.
        max_model_len=1 if model.original_max_model_len == -1 else model.max_model_len,
        block_size=cache.block_size,
        prefix_caching=bool(cache.enable_prefix_caching),
    )
    on_cpu = current_platform.is_cpu()
    stages = _stages(vllm_config, options, None)
    largest = max(costs.block for costs in stages)
    if (asked := _asked(vllm_config, largest)) is not None:
        blocks, option = asked
        capacity = Capacity(blocks, cache.block_size, max(costs.state_blocks for costs in stages))
        check_one_fits(capacity, demand, largest, f"raise {option}")
    elif on_cpu:
        stages = planned_costs(vllm_config, options)
        memory = psutil.virtual_memory().available // vllm_config.parallel_config.world_size
        memory -= int(options.host_memory_gib * 2**30)  # the host's memory is the device's
        left = [cache_bytes(memory, cache.gpu_memory_utilization, costs.weights) for costs in stages]
        capacity = afforded(stages, left, cache.block_size)
        remedy = "raise --gpu-memory-utilization or --tensor-parallel-size"
        remedy += ", or set --kv-cache-memory-bytes if this estimate is wrong"
        check_one_fits(capacity, demand, largest, remedy, max(costs.weights for costs in stages))
        most = replace(demand, max_model_len=model.max_model_len).most(capacity.state_blocks)
        cache.kv_cache_memory_bytes = min(capacity.blocks, most) * largest


def natural_block_size(vllm_config: VllmConfig, options: KimiOptions, least: int) -> int:
    """Tokens per block where the user set none: `least`, or what `least_block_size` says of any pipeline stage."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    sizes = [least]
    for stage in _parts(vllm_config).values():
        # A stage with layers of one kind is refused later, by name.
        if len(set(stage.kda)) == 2:
            itemsize = STR_DTYPE_TO_TORCH_DTYPE.get(cache.cache_dtype, model.dtype).itemsize
            gpu_dtype = None if current_platform.is_cpu() else model.dtype
            state_dtype, window = getattr(torch, options.state_dtype), window_of(vllm_config)
            sizes.append(least_block_size(stage, least, itemsize, state_dtype, gpu_dtype, window))
    return max(sizes)


def planned_costs(vllm_config: VllmConfig, options: KimiOptions) -> list[Costs]:
    """What a worker of each pipeline stage needs; weights as the checkpoint stores them.

    Raises:
        PlanError: See `Costs.of`.
        ValueError: See `Costs.of`.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    quantization = _known_format(vllm_config)
    stages = _stages(vllm_config, options, quantization)
    if model.quantization is None or quantization is not None:
        return stages
    index = get_hf_file_to_dict("model.safetensors.index.json", model.model, model.revision) or {}
    total = index.get("metadata", {}).get("total_size")
    if total is None:
        return stages
    most = int(total) // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    return [replace(costs, weights=min(costs.weights, most)) for costs in stages]


def _stages(vllm_config: VllmConfig, options: KimiOptions, quantization: WeightFormat | None) -> list[Costs]:
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size
    stages = []
    for first_layer, part in _parts(vllm_config).items():
        costs = Costs.of(
            part,
            model.dtype.itemsize,
            cache.block_size,
            ranks=ranks,
            # vLLM splits experts over data-parallel ranks too.
            expert_ranks=ranks * parallel.data_parallel_size,
            state_dtype=getattr(torch, options.state_dtype),
            cache_itemsize=STR_DTYPE_TO_TORCH_DTYPE.get(cache.cache_dtype, model.dtype).itemsize,
            gpu_dtype=None if current_platform.is_cpu() else model.dtype,
            quantization=quantization,
            first_layer=first_layer,
            window=window_of(vllm_config),
        )
        stages.append(costs)
    return stages


def _parts(vllm_config: VllmConfig) -> dict[int, KimiGeometry]:
    """The pipeline stages, each as a geometry of fewer layers, by the number of its first."""
    geometry = geometry_of(vllm_config.model_config)
    parts = {}
    for stage in stages_of(geometry, vllm_config):
        layers = slice(stage.start, stage.stop)
        parts[stage.start] = replace(geometry, kda=geometry.kda[layers], sparse=geometry.sparse[layers])
    return parts


def weight_format(vllm_config: VllmConfig) -> WeightFormat | None:
    """How the model's linear layers are stored; None if in the model's dtype.

    Raises:
        QuantizationError: The size of weights quantised this way is unknown.
    """
    model = vllm_config.model_config
    if model.quantization is None:
        return None
    if (checkpoint := WeightFormat.of_config(vars(model.hf_config))) is not None:
        return checkpoint
    asked = model.quantization_config
    if asked is None:
        return WeightFormat.online(model.quantization)
    if asked.targets is not None:
        raise QuantizationError(f"quantisation {model.quantization} by --quantization-config.targets")
    linear, experts = (None if spec is None else str(spec) for spec in (asked.linear, asked.moe))
    return WeightFormat.of_specs(model.quantization, linear, experts, asked.ignore)


def _known_format(vllm_config: VllmConfig) -> WeightFormat | None:
    try:
        return weight_format(vllm_config)
    except QuantizationError as error:
        logger.warning(
            "kimi-vllm: %s Memory is planned for unquantised weights, or by the size of the checkpoint's files. Set "
            "--kv-cache-memory-bytes to override the plan.",
            error,
        )
        return None


def _asked(vllm_config: VllmConfig, block_bytes: int) -> tuple[int, str] | None:
    """Blocks that the user has asked for, and by which option."""
    cache = vllm_config.cache_config
    if cache.num_gpu_blocks_override is not None:
        return int(cache.num_gpu_blocks_override), "--num-gpu-blocks-override"
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE") if current_platform.is_cpu() else None
    if space:
        return int(space) * 2**30 // block_bytes, "VLLM_CPU_KVCACHE_SPACE"
    asked = cache.kv_cache_memory_bytes
    return (int(asked) // block_bytes, "--kv-cache-memory-bytes") if asked else None
