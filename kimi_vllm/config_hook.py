"""Our entry in vLLM's table of per-architecture config hooks.

It runs in the process that parses the arguments, so wrong configs and options are refused before weights are read.
"""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from vllm.config import CompilationConfig, KVTransferConfig, ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from kimi_vllm import cpu_quantization, patches
from kimi_vllm.cache.drafting import both_lengths
from kimi_vllm.cache.pacing import GRAPH_TOKENS, GRAPH_TOKENS_OF_SEVERAL, graph_sizes
from kimi_vllm.geometry import GEOMETRY_ATTRIBUTE, GeometryError, KimiGeometry, geometry_of, stages_of
from kimi_vllm.kernels.dispatch import MIN_CAPABILITY
from kimi_vllm.options import KimiOptions
from kimi_vllm.quantization import as_written
from kimi_vllm.refusals import OUR_OPERATIONS, SESSIONS, refuse_unserved
from kimi_vllm.sizing import natural_block_size, settle_memory

logger = init_logger("vllm.kimi_vllm")

MOE_CONFIGS = Path(__file__).parent / "moe_configs"
"""Launch parameters for vLLM's fused experts in shapes for which vLLM ships none, made by `serve.bench.moe`."""

NATURAL_BLOCK_SIZE = 64
"""Default tokens per block, the spacing of boundaries at which prefixes can be resumed. Tiny models need more."""

_SCHEDULER = "kimi_vllm.cache.scheduler.KimiScheduler"
_WORKER = "kimi_vllm.cache.worker.KimiWorker"


class KimiLinearConfigHook(VerifyAndUpdateConfig):
    """Checks model and options, and sets what vLLM must do differently for this model."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Read config.json as written, and attach the geometry to the Hugging Face config.

        Raises:
            GeometryError: See `KimiGeometry.from_config`.
        """
        geometry = KimiGeometry.from_config(_config_as_written(model_config))
        setattr(model_config.hf_config, GEOMETRY_ATTRIBUTE, geometry.to_dict())
        if current_platform.is_cpu():
            # Ours has none of the limits of vLLM's MLA for CPUs, so this model must not count as one of its MLA models.
            model_config.model_arch_config.is_deepseek_mla = False
            # For this architecture vLLM replaces torch.compile by graphs that only CUDA has.
            os.environ.setdefault("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
            patches.apply_all()
        elif model_config.dtype == torch.float32:
            # float32 on a GPU is for checking numbers; Triton would round the operands of vLLM's MoE to TF32.
            os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
        if current_platform.is_cuda() and MOE_CONFIGS.is_dir():
            os.environ.setdefault("VLLM_TUNED_CONFIG_FOLDER", str(MOE_CONFIGS))

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse options that the state cache does not support, and a memory in which no request fits.

        Raises:
            ValueError: An unsupported combination of vLLM's options, or a device without KDA kernels.
            OptionsError: See `KimiOptions.of`.
            PlanError: See `settle_memory`.
        """
        options = KimiOptions.of(vllm_config)
        _refuse_device()
        _settle_block_size(vllm_config, options)
        refuse_unserved(vllm_config)
        _split_compiled_graphs(vllm_config.compilation_config)
        _capture_steps_without_drafts(vllm_config, options)
        _capture_steps_with_prompts(vllm_config, options)
        if current_platform.is_cpu():
            written = as_written(vars(vllm_config.model_config.hf_config))
            cpu_quantization.refuse_unserved(vllm_config, geometry_of(vllm_config.model_config), written)
        if any(geometry_of(vllm_config.model_config).kda):
            _refuse_stages(vllm_config)
            _bring_our_own(vllm_config)
            if options.session_dir is not None:
                _keep_sessions(vllm_config)
        settle_memory(vllm_config, options)
        logger.info("kimi-vllm serves KimiLinearForCausalLM (KIMI_VLLM_DISABLE=1 leaves it to vLLM).")


def _config_as_written(model_config: ModelConfig) -> dict[str, Any]:
    # vLLM's own config class fills absent keys with the defaults of another model, so absence shows only in the file.
    source = model_config.hf_config_path or model_config.model
    written = get_hf_file_to_dict("config.json", source, model_config.revision)
    if written is None:
        raise GeometryError(f"config.json: not found for {source}.")
    overrides = model_config.hf_overrides
    return {**written, **overrides} if isinstance(overrides, dict) else written


def _settle_block_size(vllm_config: VllmConfig, options: KimiOptions) -> None:
    """Set our block size unless the user set one.

    Raises:
        ValueError: The user's block size is not a multiple of ours, on a GPU.
    """
    cache_config = vllm_config.cache_config
    if not cache_config.user_specified_block_size:
        cache_config.block_size = natural_block_size(vllm_config, options, NATURAL_BLOCK_SIZE)
        # vLLM replaces block sizes that nobody asked for.
        cache_config.user_specified_block_size = True
    if not current_platform.is_cpu() and cache_config.block_size % NATURAL_BLOCK_SIZE:
        raise ValueError(
            f"--block-size {cache_config.block_size}: KDA states on a GPU exist at every {NATURAL_BLOCK_SIZE}th token. "
            f"Use a multiple of {NATURAL_BLOCK_SIZE}, or drop the option."
        )


def _split_compiled_graphs(compilation: CompilationConfig) -> None:
    """Make vLLM's compiler split graphs at our layers if the user switched breakable graphs off."""
    if os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH") != "0" or compilation.splitting_ops is not None:
        return
    if not current_platform.is_cpu():
        compilation.splitting_ops = [*CompilationConfig._attention_ops, *OUR_OPERATIONS]


def _capture_steps_without_drafts(vllm_config: VllmConfig, options: KimiOptions) -> None:
    """Have vLLM capture CUDA graphs of steps with drafts and without, unless the user set the drafts by batch size."""
    speculation, scheduling = vllm_config.speculative_config, vllm_config.scheduler_config
    if current_platform.is_cpu() or speculation is None or not options.least_accepted(on_cpu=False):
        return
    # The first model runner has full graphs of one length only.
    if vllm_config.use_v2_model_runner and speculation.num_speculative_tokens_per_batch_size is None:
        lengths = both_lengths(scheduling.max_num_seqs, speculation.num_speculative_tokens)
        speculation.num_speculative_tokens_per_batch_size = lengths


def _capture_steps_with_prompts(vllm_config: VllmConfig, options: KimiOptions) -> None:
    """Have vLLM capture CUDA graphs of steps with prompts too, unless the user chose sizes."""
    compilation, scheduling = vllm_config.compilation_config, vllm_config.scheduler_config
    chosen = compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size
    parallel = vllm_config.parallel_config
    # Stages and replicas have captured no graphs of such sizes yet.
    untried = parallel.world_size_across_dp != parallel.tensor_parallel_size
    if current_platform.is_cpu() or chosen != (None, None) or untried:
        return
    default = copy.copy(vllm_config)
    default.compilation_config = copy.deepcopy(compilation)
    default._set_cudagraph_sizes()
    sizes = default.compilation_config.cudagraph_capture_sizes
    largest = GRAPH_TOKENS if parallel.tensor_parallel_size == 1 else GRAPH_TOKENS_OF_SEVERAL
    wanted = max(largest, options.mixed_step_tokens or 0)
    if sizes and (more := graph_sizes(sizes[-1], min(wanted, scheduling.max_num_batched_tokens))):
        compilation.cudagraph_capture_sizes = [*sizes, *more]


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
    """Set our scheduler and worker."""
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


def _keep_sessions(vllm_config: VllmConfig) -> None:
    """Have vLLM make our connector, and compute a prompt whose session cannot be loaded."""
    vllm_config.kv_transfer_config = KVTransferConfig(
        kv_connector="SessionConnector",
        kv_connector_module_path=SESSIONS,
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
    )


def _refuse_stages(vllm_config: VllmConfig) -> None:
    # The state group's members stand beside MLA layers, and the last stage reports states that are not finite.
    geometry = geometry_of(vllm_config.model_config)
    stages = stages_of(geometry, vllm_config)
    for stage, layers in enumerate(stages):
        if len({geometry.kda[layer] for layer in layers}) < 2:
            first, last = layers.start, layers.stop - 1
            raise ValueError(
                f"--pipeline-parallel-size {len(stages)}: stage {stage} has layers {first} to {last}, but "
                "needs at least one KDA layer and one MLA layer. Use fewer stages, or set VLLM_PP_LAYER_PARTITION."
            )
