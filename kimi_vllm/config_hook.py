"""What vLLM asks of a model before anything is built: our entry in its table of per-architecture config hooks.

Runs in the process that parses the arguments. Wrong configs and options are refused here, before weights are read.
"""

import os
from typing import Any

import psutil
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict
from vllm.utils.math_utils import cdiv

from kimi_vllm import patches
from kimi_vllm.geometry import GeometryError, KimiGeometry
from kimi_vllm.options import KimiOptions

logger = init_logger("vllm.kimi_vllm")

NATURAL_BLOCK_SIZE = 64
"""Tokens per MLA page on the CPU, and so the grid on which prefixes can be resumed."""

_GEOMETRY_ATTRIBUTE = "kimi_geometry"


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

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what the state cache cannot do yet, by the name of the option, and set the block size on CPUs.

        Raises:
            ValueError: an unsupported combination of vLLM options.
            OptionsError: see `KimiOptions.from_additional_config`.
        """
        KimiOptions.from_additional_config(vllm_config.additional_config)
        _refuse_unserved(vllm_config)
        cache_config = vllm_config.cache_config
        if current_platform.is_cpu() and not cache_config.user_specified_block_size:
            cache_config.block_size = NATURAL_BLOCK_SIZE
            # The CPU platform replaces every block size nobody asked for by 128, which would halve the hits.
            cache_config.user_specified_block_size = True
        if current_platform.is_cpu():
            _limit_cpu_cache(vllm_config)
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


def _config_as_written(model_config: ModelConfig) -> dict[str, Any]:
    # vLLM's own config class fills absent keys with the defaults of another model, so absence shows only in the file.
    source = model_config.hf_config_path or model_config.model
    written = get_hf_file_to_dict("config.json", source, model_config.revision)
    if written is None:
        raise GeometryError(f"config.json: not found for {source}.")
    overrides = model_config.hf_overrides
    return {**written, **overrides} if isinstance(overrides, dict) else written


def _limit_cpu_cache(vllm_config: VllmConfig) -> None:
    """Ask for the pages that all sequences at full length can use, where that is less than what vLLM would take.

    vLLM takes nearly all free memory of a CPU and writes zeros to it before it is ready: a minute for 20 GiB, and
    nothing left for anybody else, whatever the model's size.
    """
    cache_config, model_config = vllm_config.cache_config, vllm_config.model_config
    if cache_config.kv_cache_memory_bytes is not None or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return
    geometry = geometry_of(model_config)
    num_mla = geometry.num_layers - sum(geometry.kda)
    page_bytes = cache_config.block_size * geometry.latent_dim * model_config.dtype.itemsize * num_mla
    pages = 1 + vllm_config.scheduler_config.max_num_seqs * cdiv(model_config.max_model_len, cache_config.block_size)
    if pages * page_bytes >= psutil.virtual_memory().available * cache_config.gpu_memory_utilization:
        return
    cache_config.kv_cache_memory_bytes = pages * page_bytes
    logger.info(
        "kimi-vllm: %.2f GiB of KV cache hold %d sequences of %d tokens; --kv-cache-memory-bytes asks for more.",
        pages * page_bytes / 2**30,
        vllm_config.scheduler_config.max_num_seqs,
        model_config.max_model_len,
    )


def _refuse_unserved(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    refusals = {
        "--speculative-config": vllm_config.speculative_config is not None,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "--enable-lora": vllm_config.lora_config is not None,
    }
    for option, asked in refusals.items():
        if asked:
            raise ValueError(
                f"{option}: kimi-vllm does not support it with KDA state yet. Drop the option, or set "
                "KIMI_VLLM_DISABLE=1 to use vLLM's own Kimi Linear."
            )
