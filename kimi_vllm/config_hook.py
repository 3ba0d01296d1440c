"""What vLLM asks of a model before anything is built: our entry in its table of per-architecture config hooks.

Runs in the process that parses the arguments. Wrong configs and options are refused here, before weights are read.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from vllm.config import CacheConfig, CompilationConfig, ModelConfig, VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

from kimi_vllm import cpu_quantization, patches
from kimi_vllm.geometry import GeometryError, KimiGeometry
from kimi_vllm.kernels.dispatch import MIN_CAPABILITY
from kimi_vllm.options import KimiOptions, OptionsError
from kimi_vllm.planning import Costs, Demand, cache_bytes, size
from kimi_vllm.quantization import QuantizationError, WeightFormat
from kimi_vllm.refusals import KDA_OPERATION, refuse_unserved

logger = init_logger("vllm.kimi_vllm")

MOE_CONFIGS = Path(__file__).parent / "moe_configs"
"""Launch parameters of vLLM's fused experts where vLLM ships none for a shape; `serve/bench/tune_moe.py` makes them."""

NATURAL_BLOCK_SIZE = 64
"""Tokens per MLA page, and so the grid on which prefixes can be resumed."""

_SCHEDULER = "kimi_vllm.cache.scheduler.KimiScheduler"
_WORKER = "kimi_vllm.cache.worker.KimiWorker"
_GEOMETRY_ATTRIBUTE = "kimi_geometry"
_KV_BYTES_ATTRIBUTE = "kimi_kv_bytes"


class KimiLinearConfigHook(VerifyAndUpdateConfig):
    """Checks the model and the options, and keeps vLLM's defaults for other models away from this one."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Parse config.json as written and hand the geometry to the workers inside the Hugging Face config.

        Raises:
            GeometryError: see `KimiGeometry.from_config`.
        """
        geometry = KimiGeometry.from_config(_config_as_written(model_config))
        setattr(model_config.hf_config, _GEOMETRY_ATTRIBUTE, geometry.to_dict())
        if current_platform.is_cpu():
            # vLLM's reference MLA for CPUs wants 576-wide latents and 16-token blocks and turns chunked prefill and
            # prefix caching off. Ours has no such limits, so this model must not count as one of vLLM's MLA models.
            model_config.model_arch_config.is_deepseek_mla = False
            # For this architecture vLLM trades torch.compile for graphs that only CUDA has.
            os.environ.setdefault("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
            patches.apply_all()
        elif model_config.dtype == torch.float32:
            # Who serves float32 on a GPU checks numbers. Triton would round the operands of vLLM's MoE to TF32.
            os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
        if current_platform.is_cuda() and MOE_CONFIGS.is_dir():
            os.environ.setdefault("VLLM_TUNED_CONFIG_FOLDER", str(MOE_CONFIGS))

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what the state cache cannot do yet, by the name of the option, and size the caches.

        Raises:
            ValueError: an unsupported combination of vLLM options, or a device we have no kernels for.
            OptionsError: see `KimiOptions.from_additional_config`; or more state slots than memory.
            PlanError: see `planning.size`.
        """
        options = KimiOptions.from_additional_config(vllm_config.additional_config)
        _refuse_device()
        refuse_unserved(vllm_config)
        _settle_block_size(vllm_config.cache_config)
        _split_compiled_graphs(vllm_config.compilation_config)
        if current_platform.is_cpu():
            model = vllm_config.model_config
            cpu_quantization.refuse_unserved(vllm_config, geometry_of(model), _quantization_as_written(model))
        if any(geometry_of(vllm_config.model_config).kda):
            _refuse_stages(vllm_config)
            _bring_our_own(vllm_config)
        _size(vllm_config, options)
        logger.info("kimi-vllm serves KimiLinearForCausalLM (KIMI_VLLM_DISABLE=1 leaves it to vLLM).")


def geometry_of(model_config: ModelConfig) -> KimiGeometry:
    """The geometry `KimiLinearConfigHook` found for this model.

    Raises:
        GeometryError: the hook did not run, so the plugin is only half registered.
    """
    values = getattr(model_config.hf_config, _GEOMETRY_ATTRIBUTE, None)
    if values is None:
        raise GeometryError(
            "kimi-vllm's config hook did not run. Is the plugin listed in VLLM_PLUGINS? Run `kimi-vllm doctor`."
        )
    return KimiGeometry.from_dict(values)


def planned_kv_bytes(model_config: ModelConfig) -> int | None:
    """Bytes of the KV cache that a GPU worker is to have; None where vLLM or the user decides."""
    planned: int | None = getattr(model_config.hf_config, _KV_BYTES_ATTRIBUTE, None)
    return planned


def _config_as_written(model_config: ModelConfig) -> dict[str, Any]:
    # vLLM's own config class fills absent keys with the defaults of another model, so absence shows only in the file.
    source = model_config.hf_config_path or model_config.model
    written = get_hf_file_to_dict("config.json", source, model_config.revision)
    if written is None:
        raise GeometryError(f"config.json: not found for {source}.")
    overrides = model_config.hf_overrides
    return {**written, **overrides} if isinstance(overrides, dict) else written


def _quantization_as_written(model_config: ModelConfig) -> dict[str, Any] | None:
    written = _config_as_written(model_config)
    return written.get("quantization_config") or written.get("compression_config")


def _settle_block_size(cache_config: CacheConfig) -> None:
    """Our block size unless the user has another, which CUDA kernels want to be a multiple of it.

    Raises:
        ValueError: it is not.
    """
    if not cache_config.user_specified_block_size:
        cache_config.block_size = NATURAL_BLOCK_SIZE
        # vLLM replaces block sizes that nobody asked for: by 128 on CPUs, by what its backend prefers on GPUs.
        cache_config.user_specified_block_size = True
    if not current_platform.is_cpu() and cache_config.block_size % NATURAL_BLOCK_SIZE:
        raise ValueError(
            f"--block-size {cache_config.block_size}: KDA states on a GPU exist at every {NATURAL_BLOCK_SIZE}th token. "
            f"Use a multiple of {NATURAL_BLOCK_SIZE}, or drop the option."
        )


def _split_compiled_graphs(compilation: CompilationConfig) -> None:
    """Let vLLM's compiler leave KDA out of its graphs, as it leaves out attention.

    Only where the user has switched off the graphs that break at run time, vLLM's choice for this architecture.
    """
    if os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH") != "0" or compilation.splitting_ops is not None:
        return
    if not current_platform.is_cpu():
        compilation.splitting_ops = [*CompilationConfig._attention_ops, KDA_OPERATION]


def _refuse_device() -> None:
    if current_platform.is_cpu():
        return
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    if capability is None or tuple(capability) < MIN_CAPABILITY:
        least = ".".join(map(str, MIN_CAPABILITY))
        raise ValueError(
            f"kimi-vllm serves on CPUs and on NVIDIA GPUs of compute capability {least} or newer; this is "
            f"{current_platform.get_device_name()}. Set KIMI_VLLM_DISABLE=1 to use vLLM's own Kimi Linear."
        )


def _bring_our_own(vllm_config: VllmConfig) -> None:
    """Put our scheduler and worker, thin layers over vLLM's, in their places."""
    for option, config, name, default, ours in (
        ("--scheduler-cls", vllm_config.scheduler_config, "scheduler_cls", None, _SCHEDULER),
        ("--worker-cls", vllm_config.parallel_config, "worker_cls", "auto", _WORKER),
    ):
        if getattr(config, name) not in (default, ours):
            raise ValueError(
                f"{option} {getattr(config, name)}: kimi-vllm needs {ours} there, which swaps and guards KDA state. "
                "Drop the option, or set KIMI_VLLM_DISABLE=1 to use vLLM's own Kimi Linear."
            )
        setattr(config, name, ours)


def _size(vllm_config: VllmConfig, options: KimiOptions) -> None:
    """Divide memory before anything is loaded, and write the outcome where scheduler and workers look for it."""
    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    costs = planned_costs(vllm_config)
    memory, utilization = _memory(vllm_config), cache.gpu_memory_utilization
    if current_platform.is_cpu():
        memory -= int(options.host_memory_gib * 2**30)  # the host's memory is the device's
    if options.state_slots is not None:
        _check_slots(options.state_slots, costs.slot, memory)
    demand = Demand(
        max_num_seqs=scheduler.max_num_seqs,
        max_model_len=vllm_config.model_config.max_model_len,
        block_size=cache.block_size or NATURAL_BLOCK_SIZE,
        prefix_caching=bool(cache.enable_prefix_caching),
        checkpoint_share=options.checkpoint_share,
        state_slots=options.state_slots,
        typical_tokens=options.typical_tokens,
        num_pages=_pages_asked(vllm_config, costs.page),
        fill=not current_platform.is_cpu(),
        any_length=vllm_config.model_config.original_max_model_len == -1,
    )
    sizing = size(costs, demand, cache_bytes(memory, utilization, costs))
    if sizing.live < scheduler.max_num_seqs:
        logger.warning(
            "kimi-vllm: --max-num-seqs %d is lowered to %d: there are no more KDA state slots for running requests. "
            "kimi.state_slots in --additional-config sets their number.",
            scheduler.max_num_seqs,
            sizing.live,
        )
        scheduler.max_num_seqs = sizing.live
        if scheduler.max_num_active_seqs is not None:
            scheduler.max_num_active_seqs = min(scheduler.max_num_active_seqs, sizing.live)
    given = vllm_config.additional_config
    given = given if isinstance(given, dict) else {}
    # A new dictionary: the caller may start another engine with the one it gave us.
    vllm_config.additional_config = {**given, "kimi": {**given.get("kimi", {}), "state_slots": sizing.state_slots}}
    if current_platform.is_cpu() and demand.num_pages is None:
        # vLLM would take nearly all free memory and write zeros to it before it is ready: a minute for 20 GiB, and
        # nothing left for anybody else, whatever the model's size.
        cache.kv_cache_memory_bytes = sizing.kv_bytes
    elif demand.num_pages is None:
        setattr(vllm_config.model_config.hf_config, _KV_BYTES_ATTRIBUTE, sizing.kv_bytes)
    logger.info("%s", sizing.table())


def planned_costs(vllm_config: VllmConfig) -> Costs:
    """What weights, a state slot and a page weigh on the heaviest worker.

    Raises:
        PlanError: see `Costs.of`.
    """
    options = KimiOptions.from_additional_config(vllm_config.additional_config)
    state_dtype = getattr(torch, options.state_dtype)
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    geometry, ranks = geometry_of(model), parallel.tensor_parallel_size
    cached = STR_DTYPE_TO_TORCH_DTYPE.get(cache.cache_dtype, model.dtype)
    quantization = _known_format(vllm_config)
    stages = []
    for stage in range(parallel.pipeline_parallel_size):
        first, end = get_pp_indices(geometry.num_layers, stage, parallel.pipeline_parallel_size)
        layers = slice(first, end)
        part = replace(geometry, kda=geometry.kda[layers], sparse=geometry.sparse[layers])
        # vLLM splits experts over data-parallel ranks too.
        costs = Costs.of(
            part,
            model.dtype.itemsize,
            cache.block_size or NATURAL_BLOCK_SIZE,
            ranks=ranks,
            expert_ranks=ranks * parallel.data_parallel_size,
            state_dtype=state_dtype,
            cache_itemsize=cached.itemsize,
            gpu_dtype=None if current_platform.is_cpu() else model.dtype,
            quantization=quantization,
            first_layer=first,
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
        QuantizationError: it is quantised in a way whose size is unknown.
    """
    model = vllm_config.model_config
    if model.quantization is None:
        return None
    checkpoint = _quantization_as_written(model)
    if checkpoint is not None:
        return WeightFormat.of_checkpoint(checkpoint)
    asked = model.quantization_config
    if asked is None:
        return WeightFormat.online(model.quantization)
    if asked.targets is not None:
        raise QuantizationError(f"quantisation {model.quantization} by --quantization-config.targets")
    linear, experts = (None if spec is None else str(spec) for spec in (asked.linear, asked.moe))
    return WeightFormat.of_specs(model.quantization, linear, experts, asked.ignore)


def checkpoint_format(model_config: ModelConfig) -> WeightFormat | None:
    """How the checkpoint stores the model's linear layers; None if unquantised, or in a way that is not known."""
    config = model_config.hf_config
    written = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    try:
        return None if written is None else WeightFormat.of_checkpoint(written)
    except QuantizationError:
        return None


def _known_format(vllm_config: VllmConfig) -> WeightFormat | None:
    try:
        return weight_format(vllm_config)
    except QuantizationError as error:
        logger.warning(
            "kimi-vllm: %s Memory is divided as if the weights were not quantised, or by the size of the checkpoint's "
            "files. kimi.state_slots with --kv-cache-memory-bytes divides it as you say.",
            error,
        )
        return None


def _memory(vllm_config: VllmConfig) -> int:
    """Bytes that one worker may count on before its share of `gpu_memory_utilization`."""
    if current_platform.is_cpu():
        available: int = psutil.virtual_memory().available
        return available // int(vllm_config.parallel_config.world_size)
    return int(current_platform.get_device_total_memory()) - _reserved_by_driver()


def _reserved_by_driver() -> int:
    """Bytes of the device's memory that CUDA never hands out, and that NVML's total counts all the same."""
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
        return 0  # devices whose memory is the host's; vLLM takes CUDA's total there
    return count


def _pages_asked(vllm_config: VllmConfig, page_bytes: int) -> int | None:
    cache = vllm_config.cache_config
    if cache.num_gpu_blocks_override is not None:
        return int(cache.num_gpu_blocks_override)
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE") if current_platform.is_cpu() else None
    asked = int(space) * 2**30 if space else cache.kv_cache_memory_bytes
    return int(asked) // page_bytes if asked else None


def _check_slots(asked: int, slot_bytes: int, memory: int) -> None:
    # Memory of a CPU is handed out on first touch: too large a pool would end in a kill, long after "ready".
    needed = (1 + asked) * slot_bytes
    if needed > memory:
        raise OptionsError(
            f"kimi.state_slots: {asked} KDA state slots of {slot_bytes / 2**20:.1f} MiB need {needed / 2**30:.1f} GiB, "
            f"and there are {memory / 2**30:.1f} GiB. Lower it, or leave it out: then as many are chosen as fit."
        )


def _refuse_stages(vllm_config: VllmConfig) -> None:
    # Block tables of states come with those of MLA, and the last stage's KDA layers report states that are not finite.
    geometry, stages = geometry_of(vllm_config.model_config), vllm_config.parallel_config.pipeline_parallel_size
    for stage in range(stages):
        first, end = get_pp_indices(geometry.num_layers, stage, stages)
        if len(set(geometry.kda[first:end])) < 2:
            raise ValueError(
                f"--pipeline-parallel-size {stages}: stage {stage} has layers {first} to {end - 1}, and a pipeline "
                "stage needs at least one KDA layer and one MLA layer. Use fewer, or set VLLM_PP_LAYER_PARTITION."
            )
