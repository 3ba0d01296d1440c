"""The memory of one engine: what vLLM's configuration asks for, and `planning.size`'s answer, written where it acts."""

import os
from dataclasses import replace

import psutil
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

from kimi_vllm.cache.exchange import PlannedMemory
from kimi_vllm.geometry import geometry_of, stages_of
from kimi_vllm.options import KimiOptions, OptionsError
from kimi_vllm.planning import Costs, Demand, cache_bytes, size
from kimi_vllm.quantization import QuantizationError, WeightFormat

logger = init_logger("vllm.kimi_vllm")


def divide_memory(vllm_config: VllmConfig, options: KimiOptions) -> None:
    """Choose state slots and KV cache before anything is loaded, lower ``--max-num-seqs`` if needed, and log it.

    Raises:
        OptionsError: More state slots were asked for than fit.
        PlanError: See `planning.size`.
    """
    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    costs = planned_costs(vllm_config, options)
    memory = _memory(vllm_config)
    if current_platform.is_cpu():
        memory -= int(options.host_memory_gib * 2**30)  # the host's memory is the device's
    if options.state_slots is not None:
        _check_slots(options.state_slots, costs.slot, memory)
    demand = Demand(
        max_num_seqs=scheduler.max_num_seqs,
        max_model_len=vllm_config.model_config.max_model_len,
        block_size=cache.block_size,
        prefix_caching=bool(cache.enable_prefix_caching),
        checkpoint_share=options.checkpoint_share,
        state_slots=options.state_slots,
        typical_tokens=options.typical_tokens,
        num_pages=_pages_asked(vllm_config, costs.page),
        fill=not current_platform.is_cpu(),
        any_length=vllm_config.model_config.original_max_model_len == -1,
    )
    sizing = size(costs, demand, cache_bytes(memory, cache.gpu_memory_utilization, costs))
    if sizing.live < scheduler.max_num_seqs:
        logger.warning(
            "kimi-vllm: --max-num-seqs %d lowered to %d, the number of KDA state slots for running requests. "
            "Set kimi.state_slots in --additional-config to change it.",
            scheduler.max_num_seqs,
            sizing.live,
        )
        scheduler.max_num_seqs = sizing.live
        if scheduler.max_num_active_seqs is not None:
            scheduler.max_num_active_seqs = min(scheduler.max_num_active_seqs, sizing.live)
    kv_bytes = sizing.kv_bytes if demand.num_pages is None else None
    if current_platform.is_cpu() and kv_bytes is not None:
        # vLLM would take nearly all free memory and zero it before it is ready: a minute for 20 GiB, whatever the
        # model's size.
        cache.kv_cache_memory_bytes, kv_bytes = kv_bytes, None
    PlannedMemory(sizing.state_slots, kv_bytes).attach(vllm_config.model_config)
    logger.info("%s", sizing.table())


def planned_costs(vllm_config: VllmConfig, options: KimiOptions) -> Costs:
    """Bytes of weights, a state slot and a page on the heaviest worker.

    Raises:
        PlanError: See `Costs.of`.
    """
    state_dtype = getattr(torch, options.state_dtype)
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    geometry, ranks = geometry_of(model), parallel.tensor_parallel_size
    cached = STR_DTYPE_TO_TORCH_DTYPE.get(cache.cache_dtype, model.dtype)
    quantization = _known_format(vllm_config)
    stages = []
    for stage in stages_of(geometry, vllm_config):
        layers = slice(stage.start, stage.stop)
        part = replace(geometry, kda=geometry.kda[layers], sparse=geometry.sparse[layers])
        # vLLM splits experts over data-parallel ranks too.
        costs = Costs.of(
            part,
            model.dtype.itemsize,
            cache.block_size,
            ranks=ranks,
            expert_ranks=ranks * parallel.data_parallel_size,
            state_dtype=state_dtype,
            cache_itemsize=cached.itemsize,
            gpu_dtype=None if current_platform.is_cpu() else model.dtype,
            quantization=quantization,
            first_layer=stage.start,
        )
        stages.append(costs)
    heaviest = Costs.heaviest(stages)
    if model.quantization is None or quantization is not None:
        return heaviest
    index = get_hf_file_to_dict("model.safetensors.index.json", model.model, model.revision) or {}
    total = index.get("metadata", {}).get("total_size")
    workers = ranks * parallel.pipeline_parallel_size
    return heaviest if total is None else replace(heaviest, weights=min(heaviest.weights, int(total) // workers))


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
            "kimi.state_slots and --kv-cache-memory-bytes to override the plan.",
            error,
        )
        return None


def _memory(vllm_config: VllmConfig) -> int:
    """Bytes of memory per worker, of which `gpu_memory_utilization` may be used."""
    if current_platform.is_cpu():
        available: int = psutil.virtual_memory().available
        return available // int(vllm_config.parallel_config.world_size)
    return int(current_platform.get_device_total_memory()) - _reserved_by_driver()


def _reserved_by_driver() -> int:
    """Bytes of device memory that NVML counts in its total although CUDA never hands them out."""
    from vllm.platforms.cuda import NvmlCudaPlatform, with_nvml_context
    from vllm.third_party import pynvml

    if not isinstance(current_platform, NvmlCudaPlatform):
        return 0  # then the total is CUDA's own

    @with_nvml_context
    def reserved() -> int:
        handle = pynvml.nvmlDeviceGetHandleByIndex(current_platform.device_id_to_physical_device_id(0))
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).reserved)

    try:
        count: int = reserved()
    except pynvml.NVMLError:
        return 0  # integrated GPUs, which share the host's memory: vLLM takes CUDA's total there
    return count


def _pages_asked(vllm_config: VllmConfig, page_bytes: int) -> int | None:
    cache = vllm_config.cache_config
    if cache.num_gpu_blocks_override is not None:
        return int(cache.num_gpu_blocks_override)
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE") if current_platform.is_cpu() else None
    asked = int(space) * 2**30 if space else cache.kv_cache_memory_bytes
    return int(asked) // page_bytes if asked else None


def _check_slots(asked: int, slot_bytes: int, memory: int) -> None:
    # On CPUs memory is handed out on first touch: a pool too large would get the process killed, long after "ready".
    needed = (1 + asked) * slot_bytes
    if needed > memory:
        raise OptionsError(
            f"kimi.state_slots: {asked} KDA state slots of {slot_bytes / 2**20:.1f} MiB need {needed / 2**30:.1f} GiB, "
            f"and there are {memory / 2**30:.1f} GiB. Lower it, or leave it out to have it sized from memory."
        )
