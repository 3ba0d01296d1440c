"""The ledger: everything we change in other people's modules, or use of them although it is private. Empty is the goal.

`tests/test_intrusions.py` checks that every target still exists, and that no file here touches one that is not listed.
Names that we override or call are in `_vllm.py`, with their signatures. Pure data: nothing is imported.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Intrusion:
    """One change, or one use of something private.

    Attributes:
        what: What we do.
        targets: Where: ``module:dotted.name``, or ``env:NAME`` for an environment variable.
        why: What breaks without it.
        check: How to see that it is still needed.
        exit: What must be true upstream for it to go.
    """

    what: str
    targets: tuple[str, ...]
    why: str
    check: str
    exit: str


_EXPERTS = "vllm.model_executor.layers.fused_moe"
_SCALED_MM = "vllm.model_executor.kernels.linear.scaled_mm.cpu"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_REQUEST = "vllm.v1.request:Request"
_GPU_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_CACHE_CONFIG = "vllm.config.cache:CacheConfig"
_SCHEDULER_CONFIG = "vllm.config.scheduler:SchedulerConfig"

PATCHES = (
    Intrusion(
        "give llvmlite's library handle a __dict__",
        ("llvmlite.binding.ffi:lib._fntab",),
        "vLLM's CPU worker reads __dict__ of all objects of all modules (triton_utils.dispatcher._rebind_kernels). "
        "llvmlite's library handle answers any attribute with a function, so a second engine in a process that has "
        "used numba fails with \"'_lib_fn_wrapper' object has no attribute 'get'\".",
        "tests/test_patches.py::test_vllm_still_trips_over_llvmlite",
        "_rebind_kernels no longer calls vars() on objects that only pretend to have a __dict__",
    ),
    Intrusion(
        "replace check_cpu_sgl_kernel for int8",
        (f"{_SCALED_MM}:check_cpu_sgl_kernel",),
        "On CPUs with AMX vLLM sends int8 weights of 16, 48, ... outputs to a kernel that packs blocks of 32 and fails "
        'with "Expected N == BLOCK_N to be true", and those of float32 and float16 models to one that multiplies '
        "bfloat16 only. oneDNN, which serves all other CPUs, takes both.",
        "tests/test_patches.py::test_vllm_still_sends_half_blocks_of_int8_to_amx",
        "check_cpu_sgl_kernel asks of int8 for a multiple of 32 outputs and for the activations' dtype",
    ),
    Intrusion(
        "wrap UnquantizedFusedMoEMethod._setup_kernel",
        (f"{_EXPERTS}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod._setup_kernel",),
        "On CPUs vLLM packs experts for its kernel when it sets the kernel up, which it does once. After a reload of "
        "weights the kernel reads experts that are not packed, and silently answers other tokens.",
        "tests/test_patches.py::test_vllm_still_packs_experts_once",
        "_setup_kernel also calls fused_experts.process_weights_after_loading when weights are updated",
    ),
    Intrusion(
        "wrap CPUInt8ScaledMMLinearKernel.process_weights_for_onednn",
        (f"{_SCALED_MM}:CPUInt8ScaledMMLinearKernel.process_weights_for_onednn",),
        "oneDNN's handle for an int8 product holds the address of the scales and not the tensor. Reloaded weights get "
        "their handle from a tensor that vLLM then frees, and multiply by whatever is there later.",
        "tests/test_patches.py::test_vllm_still_forgets_the_scales_of_int8",
        "process_weights_for_onednn keeps the scales that it gives to create_onednn_scaled_mm",
    ),
    Intrusion(
        "replace rejection_sampler.expand_batch_to_tokens",
        ("vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",),
        "On CPUs vLLM expands temperature, top_k and top_p of requests to their drafts in a copy as integers, which it "
        "drops. Sampled answers with drafts, and greedy ones beside them, came of what was in memory.",
        "tests/test_patches.py::test_vllm_still_expands_integers_only",
        "cpu_triton_utils._expand_kernel_impl writes to its output in the output's dtype",
    ),
    Intrusion(
        "wrap rejection_sampler.apply_sampling_constraints",
        ("vllm.v1.sample.rejection_sampler:apply_sampling_constraints",),
        "A step with top_k in which nobody has drafts takes the maximum of nothing, and the engine dies.",
        "tests/test_patches.py::test_vllm_still_takes_the_maximum_of_nothing",
        "apply_top_k_only takes no rows",
    ),
    Intrusion(
        "wrap CPUModelRunner.sample_tokens, and keep from it the generators of requests in the middle of their prompt",
        (
            "vllm.v1.worker.cpu_model_runner:CPUModelRunner.sample_tokens",
            f"{_GPU_RUNNER}.discard_request_mask",
            "vllm.v1.utils:CpuGpuBuffer.np",
            f"{_GPU_RUNNER}.input_batch",
            "vllm.v1.worker.gpu_input_batch:InputBatch.generators",
        ),
        "vLLM samples after each chunk of a prompt, drops the token, and sets the request's generator back by an "
        "offset, which CPU generators do not have. A seed and a prompt in chunks end the engine.",
        "tests/test_patches.py::test_vllm_still_sets_an_offset_that_cpus_lack",
        "_bookkeeping_sync restores a CPU generator by its state, or discarded rows do not draw",
    ),
)
"""Functions that `patches.py` replaces, on CPUs only."""

INTRUSIONS = (
    *PATCHES,
    Intrusion(
        "put our entry into the table of per-architecture config hooks",
        ("vllm.model_executor.models.config:MODELS_CONFIG_MAP",),
        "vLLM's hook for Kimi Linear would set up its own hybrid cache; only a hook runs before caches are sized.",
        "vLLM has a register function beside the table",
        "ModelRegistry.register_model accepts a config hook",
    ),
    Intrusion(
        "register vLLM's KV cache specs before ours",
        ("vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered",),
        "vLLM registers its own specs into an empty registry only, and workers never do it explicitly.",
        "_ensure_registered returns early when the registry is not empty",
        "register() registers the in-tree specs first",
    ),
    Intrusion(
        "is_deepseek_mla = False on CPUs",
        ("vllm.config.model_arch:ModelArchitectureConfig.is_deepseek_mla",),
        "For MLA models vLLM's CPU platform turns chunked prefill and prefix caching off and forces 16-token blocks. "
        "Our MLA for CPUs has no such limits.",
        "vllm/platforms/cpu.py reads model_config.use_mla",
        "the CPU platform asks the attention backend instead",
    ),
    Intrusion(
        "set defaults of environment variables",
        ("env:VLLM_USE_BREAKABLE_CUDAGRAPH", "env:TRITON_F32_DEFAULT", "env:VLLM_TUNED_CONFIG_FOLDER"),
        "On CPUs vLLM would trade torch.compile for CUDA graphs; in float32 Triton would round the experts' operands "
        "to TF32; vLLM ships no launch parameters for this model's experts. A variable that is set stays as it is.",
        "vllm/config/vllm.py lists KimiLinearForCausalLM for breakable graphs; moe_configs/ has shapes vLLM lacks",
        "the first is decided by platform, the second an engine option, the third merged upstream",
    ),
    Intrusion(
        "set block size, size of the KV cache (on CPUs), scheduler and worker classes in vLLM's configuration",
        (
            f"{_CACHE_CONFIG}.block_size",
            f"{_CACHE_CONFIG}.user_specified_block_size",
            f"{_CACHE_CONFIG}.kv_cache_memory_bytes",
            f"{_SCHEDULER_CONFIG}.scheduler_cls",
            "vllm.config.parallel:ParallelConfig.worker_cls",
        ),
        "vLLM replaces a block size that nobody asked for, and takes nearly all free memory on CPUs. Scheduler and "
        "worker swap and guard states.",
        "tests/test_sizing.py, tests/engine/test_state_cache.py and test_guard.py fail without them",
        "a model may declare its block size, and a plugin hooks around a step",
    ),
    Intrusion(
        "set the limit of a step while it is scheduled, and have it begin with the requests that decode",
        (f"{_SCHEDULER}.max_num_scheduled_tokens", f"{_SCHEDULER}.running"),
        "Requests that decode wait for all prompt tokens of their step, up to --max-num-batched-tokens.",
        "tests/cache/test_pacing.py fails without them",
        "vLLM limits the prompt tokens of steps in which others decode",
    ),
    Intrusion(
        "ask vLLM for its sizes of CUDA graphs, and add those of short steps with prompts",
        (
            "vllm.config.vllm:VllmConfig._set_cudagraph_sizes",
            "vllm.config.vllm:VllmConfig.compilation_config",
            "vllm.config.compilation:CompilationConfig.cudagraph_capture_sizes",
        ),
        "vLLM captures up to 512 tokens; a step of more waits for its launches, not for the GPU.",
        "python -m serve.bench.engine run --measure mixed, with kimi.mixed_step_tokens and without",
        "vLLM captures graphs of larger steps by default, or takes sizes in addition to its own",
    ),
    Intrusion(
        "set vLLM's configuration of KV transfer to a connector of our own, where an option asks for sessions",
        ("vllm.config.vllm:VllmConfig.kv_transfer_config",),
        "A session is a state and its pages, which vLLM's connectors cannot move, and users should not have to name "
        "ours by its module.",
        "tests/engine/test_sessions.py fails without it",
        "a plugin can add a connector to those configured",
    ),
    Intrusion(
        "add KDA and MLA to the operators that split compiled graphs",
        (
            "vllm.config.compilation:CompilationConfig.splitting_ops",
            "vllm.config.compilation:CompilationConfig._attention_ops",
        ),
        "A captured graph would repeat the state slots and pages of the step in which it was captured.",
        "_attention_ops lacks vllm::kimi_delta_attention",
        "operators can be registered as splitting",
    ),
    Intrusion(
        "set a schedule of drafts by batch size that nobody asked for, where steps may go without drafts on a GPU",
        ("vllm.config.speculative:SpeculativeConfig.num_speculative_tokens_per_batch_size",),
        "vLLM captures full CUDA graphs of steps without drafts only if such a schedule has a size without.",
        "tests/cache/test_drafting.py asks vLLM's function which lengths the schedule has",
        "vLLM captures graphs of one token a request beside those of windows",
    ),
    Intrusion(
        "attach attributes to objects that vLLM passes between processes",
        (
            "vllm.config.model:ModelConfig.hf_config",
            "vllm.v1.core.sched.output:SchedulerOutput",
            "vllm.v1.outputs:ModelRunnerOutput",
        ),
        "Geometry, copies between slots and slots that are not finite have no other way there.",
        "the three classes have no field for plugins",
        "they have one",
    ),
    Intrusion(
        "borrow SchedulerStats.running_lora_adapters for our counters",
        ("vllm.v1.metrics.stats:SchedulerStats.running_lora_adapters",),
        "It is the only open dictionary from the engine to the API servers. LoRA is refused, so it is free.",
        "SchedulerStats has no field for plugins",
        "it has one",
    ),
    Intrusion(
        "replace the coordinator's and the managers' block pools and null blocks",
        (
            "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.block_pool",
            "vllm.v1.core.kv_cache_manager:KVCacheManager.block_pool",
            "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.block_pool",
            "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager._null_block",
            "vllm.v1.core.kv_cache_utils:KVCacheBlock.is_null",
        ),
        "States and pages are evicted by value from one pool, and slots are not blocks of it; a coordinator makes its "
        "pool, and a manager takes it, in their constructors.",
        "the coordinator makes a BlockPool and gives all managers that one",
        "a configuration names the pool's class, and a spec may bring its own pool",
    ),
    Intrusion(
        "override BlockPool, and look into its cache",
        (
            "vllm.v1.core.block_pool:BlockPool._maybe_evict_cached_block",
            "vllm.v1.core.block_pool:BlockHashToBlockMap._cache",
            "vllm.v1.core.kv_cache_utils:KVCacheBlock.ref_cnt",
        ),
        "vLLM evicts pages by recency alone. A page that a kept state needs goes with the state, and of several copies "
        "one is enough.",
        "tests/cache/test_arena.py; BlockPool has one queue of free blocks",
        "BlockPool asks a policy which block to evict",
    ),
    Intrusion(
        "override and call private methods of the scheduler, and set fields of its requests",
        (
            f"{_SCHEDULER}._preempt_request",
            f"{_SCHEDULER}._handle_stopped_request",
            f"{_SCHEDULER}._update_request_as_session",
            f"{_SCHEDULER}._free_request_blocks",
            f"{_SCHEDULER}.prev_step_scheduled_req_ids",
            f"{_REQUEST}.num_computed_tokens",
            f"{_REQUEST}.drop_stale_output",
        ),
        "Pages that a preempted request never wrote would be found by others; a session's slot is past its tokens; a "
        "request whose state is not finite must be computed again.",
        "tests/cache/test_scheduler.py, test_rewinds.py and test_schedules.py fail without them",
        "vLLM withdraws unwritten pages itself, and has a call to restart a request",
    ),
    Intrusion(
        "run dummy steps of our own choice",
        (
            "vllm.v1.worker.gpu.model_runner:GPUModelRunner._dummy_run",
            f"{_GPU_RUNNER}._dummy_run",
        ),
        "vLLM warms up a few sizes, and the first requests of other sizes would wait for Triton.",
        "the first request of 8,191 tokens compiles without it",
        "vLLM's JIT warm-up takes sizes",
    ),
    Intrusion(
        "swap the class of routers and of the methods of experts and linear layers; call a runner's reduction",
        (
            f"{_EXPERTS}.router.grouped_topk_router:GroupedTopKRouter._compute_routing",
            f"{_EXPERTS}.fused_moe_method_base:FusedMoEMethodBase.__class__",
            f"{_EXPERTS}.runner.moe_runner:MoERunner._maybe_reduce_final_output",
            "vllm.model_executor.layers.linear:LinearMethodBase.__class__",
        ),
        "They hold what vLLM has set up for a layer, and only one function of each shall change, for a few rows.",
        "kernels/NOTES.md: a decode step of the 48B model at batch 1 without it",
        "the classes can be chosen per layer when it is built",
    ),
    Intrusion(
        "override FlashAttnMLAMetadataBuilder._build_decode",
        ("vllm.v1.attention.backends.mla.flashattn_mla:FlashAttnMLAMetadataBuilder._build_decode",),
        "vLLM bounds the splits of a context by one number for all batch sizes, too few for one long request.",
        "flash_attn_max_num_splits_for_cuda_graph is one number",
        "the number of splits depends on the batch size",
    ),
    Intrusion(
        "pass over prometheus_client's list of collectors",
        ("prometheus_client.registry:CollectorRegistry._collector_to_names",),
        "Engines made one after another in a process would register the same metrics twice.",
        "vLLM's own loggers do the same (unregister_vllm_metrics)",
        "prometheus_client has a public iterator",
    ),
    Intrusion(
        "call private functions of torch",
        (
            "torch.cpu:_is_avx512_supported",
            "torch.cpu:_is_amx_tile_supported",
            "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu",
        ),
        "There is no public test of AMX, and no public flash attention that returns the logarithm of the weights' sum.",
        "torch.backends.cpu.get_cpu_capability() does not name AMX",
        "torch has public functions for both",
    ),
)
