"""Every argument of a vLLM engine: a test serves with it, it cannot touch the states, or it is refused by name.

States lie in vLLM's memory beside its pages and know only what the scheduler's steps tell them. So each argument that a
release brings has to be thought about; here is where the thought is kept, and a new argument fails the first test.
"""

import dataclasses
import re
from functools import reduce
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.version import Version
from support.engine import RECALL
from vllm.config import AttentionConfig, CompilationConfig, KernelConfig, KVEventsConfig, PoolerConfig
from vllm.config.aux_output import AuxOutputConfig
from vllm.distributed.device_communicators import pynccl_wrapper
from vllm.engine.arg_utils import AsyncEngineArgs

from kimi_vllm._vllm import installed_vllm
from kimi_vllm.refusals import OUR_OPERATIONS, REFUSALS, refuse_unserved

TESTS = Path(__file__).parent

SERVED = {
    "engine/test_engine_options.py": (
        "disable_cascade_attn disable_hybrid_kv_cache_manager enable_prompt_embeds hf_overrides "
        "kv_sharing_fast_prefill long_prefill_token_threshold long_prefill_token_threshold_adaptive "
        "max_num_scheduled_tokens prefill_schedule_interval prefix_caching_hash_algo "
        "scheduler_reserve_full_isl stream_interval swa_bounded_replay use_fp64_gumbel watermark "
        "worker_extension_cls"
    ),
    "engine/test_bad_input.py": "load_format max_model_len",
    "engine/test_compile.py": "compilation_config enforce_eager",
    "engine/test_cuda.py": "async_scheduling gpu_memory_utilization kernel_config kv_cache_memory_bytes max_logprobs",
    "engine/test_cuda_parallel.py": "data_parallel_size enable_expert_parallel",
    "engine/test_cuda_quantised.py": "kv_cache_dtype",
    "engine/test_equivalence.py": "enable_chunked_prefill num_gpu_blocks_override max_num_batched_tokens max_num_seqs",
    "engine/test_parallel.py": "pipeline_parallel_size tensor_parallel_size",
    "engine/test_pooling.py": "convert runner",
    "engine/test_prefix_cache.py": "enable_prefix_caching kv_events_config",
    "engine/test_quantized.py": "quantization_config skip_tokenizer_init",
    "engine/test_random_schedules.py": "scheduling_policy",
    "engine/test_slot_pressure.py": "additional_config",
    "engine/test_state_cache.py": "block_size",
    "engine/test_weight_updates.py": "enable_ep_weight_filter weight_transfer_config",
    "../serve/common/engine.py": "disable_log_stats dtype seed",
    "../serve/common/server.py": "served_model_name",
    "test_memory_settled.py": "max_num_active_seqs",
    "test_serve_profiles.py": "override_generation_config performance_mode reasoning_parser shutdown_timeout tokenizer",
}
"""Files, seen from tests/, to the arguments that they serve with."""

HARMLESS = {
    "what is read, and from where": (
        "allow_deprecated_quantization code_revision config_format download_dir hf_config_path hf_token "
        "ignore_patterns model model_loader_extra_config model_weights pt_load_map_location quantization revision "
        "safetensors_load_strategy safetensors_prefetch_block_size safetensors_prefetch_num_threads "
        "trust_remote_code use_tqdm_on_load"
    ),
    "another implementation than ours, or the same by its name": "model_impl",
    "before requests reach the scheduler": (
        "_api_process_count _api_process_rank allowed_local_media_path allowed_media_domains enable_log_requests "
        "fail_on_environ_validation generation_config io_processor_plugin max_num_queued_reqs "
        "max_num_queued_tokens renderer_num_workers tokenizer_mode tokenizer_revision tokens_only"
    ),
    "what is done with logits": (
        "enable_batch_sharded_sampling enable_trace_replay logits_processors logprobs_mode reasoning_config "
        "reasoning_parser_plugin return_sampling_mask structured_outputs_config watermark_config"
    ),
    "what is made of hidden states": "pooler_config",
    "what is logged and measured": (
        "aggregate_engine_logging collect_detailed_traces cudagraph_metrics custom_histogram_buckets "
        "enable_layerwise_nvtx_tracing enable_logging_iteration_details enable_mfu_metrics jit_monitor_mode "
        "jit_monitor_verbose kv_cache_metrics kv_cache_metrics_sample log_config_file log_level logging_config "
        "otlp_traces_endpoint per_request_spec_decode_metrics profiler_config ray_workers_use_nsight "
        "show_hidden_metrics_for_version watchdog_config"
    ),
    "vLLM's own kernels and graphs; KDA's graphs hold decode steps only": (
        "attention_config cudagraph_capture_sizes enable_flashinfer_autotune ir_op_priority linear_backend "
        "max_cudagraph_capture_size moe_backend monokernel optimization_level"
    ),
    "processes, and how they talk": (
        "all2all_backend cpu_distributed_timeout_seconds data_parallel_address data_parallel_backend "
        "data_parallel_external_lb data_parallel_hybrid_lb data_parallel_multi_port_external_lb "
        "data_parallel_rank data_parallel_rpc_port data_parallel_size_local data_parallel_start_rank device_ids "
        "disable_custom_all_reduce disable_nccl_for_dp_synchronization distributed_timeout_seconds "
        "distributed_executor_backend dp_sync_interval enable_shm_tensor_arena expert_placement_strategy master_addr "
        "master_port max_parallel_loading_workers nnodes node_rank numa_bind numa_bind_cpus numa_bind_nodes"
    ),
    "an allocator below torch's": "enable_cumem_allocator",
    "inputs other than text, of which the model has none": (
        "disable_chunked_mm_input ec_manager_config enable_mm_embeds enable_mm_processor_stats "
        "interleave_mm_strings language_model_only limit_mm_per_prompt media_io_kwargs mm_device_do_normalize "
        "mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_margin "
        "mm_encoder_fp8_scale_save_path mm_encoder_only mm_encoder_tp_mode mm_hasher_algorithm "
        "mm_ipc_gpu_memory_gb mm_processor_cache_gb mm_processor_cache_type mm_processor_device "
        "mm_processor_kwargs mm_shm_cache_max_object_size_mb mm_tensor_ipc skip_mm_profiling video_pruning_method "
        "video_pruning_rate"
    ),
    "layers that other models have; vLLM refuses the first two for this one": (
        "disable_sliding_window enable_hc_sp engram_config gdn_prefill_backend sparse_indexer_topk_backend"
    ),
}
"""Why they cannot touch the states, to arguments."""

WITHOUT_EFFECT_ALONE = {
    "speculative_config": "spec_method spec_model spec_tokens",
    "kv_offloading_size": "kv_offloading_backend",
    "decode_context_parallel_size": (
        "cp_kv_cache_interleave_size dcp_comm_backend dcp_kv_cache_interleave_size dcp_q_replicate"
    ),
    "enable_lora": (
        "default_mm_loras enable_mixed_moe_lora_format enable_moe_shared_loras enable_tower_connector_lora "
        "fully_sharded_loras lora_dtype lora_target_modules max_cpu_loras max_lora_cls_labels max_lora_rank "
        "max_loras specialize_active_lora"
    ),
    "enable_dbo": "dbo_decode_token_threshold dbo_prefill_token_threshold",
    "use_replayssm": "replayssm_buffer_len",
    "mamba_backend": "mamba_config",
    "cpu_offload_gb": "cpu_offload_params offload_backend",
    "offload_group_size": "offload_num_in_group offload_params offload_prefetch_step",
    "enable_sleep_mode": (
        "enable_nccl_comm_suspend sleep_mode_backend sleep_mode_offload_cudagraph sleep_preserve_parameter_names"
    ),
    "enable_eplb": "eplb_config",
    "enable_elastic_ep": "elastic_ep_max_dp_size",
    "enable_fault_tolerance": "fault_tolerance_config",
}
"""A refused argument to those that only say how."""

LOOKS_AHEAD = {"method": "ngram", "num_speculative_tokens": 16, "prompt_lookup_max": 3}
IN_TREE = {"KimiLinearForCausalLM": "vllm.model_executor.models.kimi_linear:KimiLinearForCausalLM"}
ASKS_FOR = {
    "attention_backend": "TRITON_MLA",
    "aux_output_config": {"aux_output_config": {"enable_return_routed_experts": True}},
    "cpu_offload_gb": 1,
    "decode_context_parallel_size": {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
    "diffusion_config": {"diffusion_config": {"canvas_length": 4}},
    "ec_transfer_config": {"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_both"}},
    "enable_dbo": True,
    "enable_lora": True,
    "enable_mamba_cache_stochastic_rounding": True,
    "enable_mamba_shared_prefix_checkpoint": True,
    "enable_return_routed_experts": True,
    "kda_decode_backend": "triton",
    "kda_prefill_backend": "triton",
    "kv_cache_dtype_skip_layers": ["3"],
    "kv_offloading_size": 0.5,
    "kv_transfer_config": {"kv_transfer_config": {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}},
    "mamba_backend": "flashinfer",
    "mamba_block_size": 64,
    "mamba_cache_dtype": "float32",
    "mamba_cache_mode": "align",
    "mamba_cache_philox_rounds": 3,
    "mamba_ssm_cache_dtype": "bfloat16",
    "mamba_ssu_algorithm": {"mamba_backend": "flashinfer", "mamba_ssu_algorithm": "simple"},
    "offload_group_size": 2,
    "prefill_context_parallel_size": 2,
    "prefix_cache_retention_interval": 64,
    "prefix_match_unit": 16,
    "speculative_config": {"speculative_config": LOOKS_AHEAD},
    "ubatch_size": 2,
    "use_replayssm": True,
}
"""A refused argument to a value of it, or to this among others that it needs."""

AFTER_VLLMS_CHECKS = {
    "enable_elastic_ep": ("parallel_config.enable_elastic_ep", True),
    "attention-config.use_non_causal": ("attention_config.use_non_causal", True),
    "enable_eplb": ("parallel_config.enable_eplb", True),
    "enable_fault_tolerance": ("parallel_config.enable_fault_tolerance", True),
    "enable_sleep_mode": ("model_config.enable_sleep_mode", True),
    "model_class_overrides": ("model_config.model_class_overrides", IN_TREE),
}
"""Refused too, and vLLM on a CPU refuses them first or remembers them: where they are in the configuration."""

KNOWN_BY_OTHER_NAMES = {
    "aux_output_config": "--enable-return-routed-experts",
    "mamba_ssu_algorithm": "--mamba-",
    "mamba_cache_philox_rounds": "--mamba-",
    "enable_mamba_cache_stochastic_rounding": "--mamba-",
}

ONLY_IN_NEWER = {"monokernel", "sleep_mode_backend", "watchdog_config"}
"""Arguments of vLLM 0.33 that 0.32 does not have."""

IGNORED_BY_NEWER = {"mamba_cache_mode"}
"""Arguments that vLLM 0.33 warns of and ignores."""


NESTED = {
    AttentionConfig: (
        "refused, the first two on CPUs: backend backend_per_kind use_non_causal. vLLM's MLA on GPUs: "
        "flash_attn_version flash_attn_max_num_splits_for_cuda_graph mla_prefill_backend "
        "tokenspeed_mla_min_split_kv tq_max_kv_splits_for_cuda_graph disable_flashinfer_q_quantization "
        "use_prefill_query_quantization use_trtllm_attention trtllm_ragged_backend. Other attention than MLA: "
        "flex_attn_block_m flex_attn_block_n flex_attn_q_block_size flex_attn_kv_block_size hisparse_config "
        "indexer_kv_dtype indexer_sparse_logits indexer_tp_shard_min_rows minimax_m3_indexer_cp "
        "minimax_m3_msa_decode_backend sparse_mla_force_mqa sparse_mla_prefill_workspace_factor."
    ),
    CompilationConfig: (
        "refused without ours: splitting_ops. vLLM asks our metadata builder: cudagraph_mode. How graphs are made: "
        "backend cache_dir compile_cache_save_format compile_ranges_endpoints compile_sizes "
        "cudagraph_capture_sizes cudagraph_copy_inputs cudagraph_num_of_warmups custom_ops debug_dump_path "
        "dynamic_shapes_config fast_moe_cold_start inductor_compile_config inductor_passes ir_enable_torch_wrap "
        "max_cudagraph_capture_size mode pass_config use_inductor_graph_partition. Other models: "
        "compile_mm_encoder cudagraph_decoder_replay cudagraph_mm_encoder cudagraph_specialize_lora "
        "decoder_replay_cudagraph_capture_sizes decoder_replay_trim_threshold "
        "encoder_cudagraph_max_frames_per_batch encoder_cudagraph_max_vision_items_per_batch "
        "encoder_cudagraph_token_budgets."
    ),
    KernelConfig: (
        "vLLM's kernels: ir_op_priority enable_flashinfer_autotune enable_rocm_segmented_attn_autotune "
        "enable_cutedsl_warmup moe_backend sparse_indexer_topk_backend linear_backend linear_backend_per_quant "
        "monokernel. Ours too: enable_jit_warmup."
    ),
    KVEventsConfig: (
        "events of pages: enable_kv_cache_events publisher endpoint replay_endpoint buffer_steps hwm "
        "max_queue_size topic."
    ),
    AuxOutputConfig: "refused: enable_return_routed_experts. Without effect alone: max_bytes.",
    PoolerConfig: (
        "what is made of hidden states: task pooling_type seq_pooling_type tok_pooling_type use_activation "
        "dimensions enable_chunked_processing enable_flash_late_interaction logit_mean logit_sigma max_embed_len "
        "returned_token_ids step_tag_id."
    ),
}
"""Configurations that an argument carries, neither refused as a whole nor out of reach, and their fields."""


def listed(table):
    return [name for names in table.values() for name in names.split()]


@pytest.fixture(scope="module")
def create():
    def create(**options):
        return AsyncEngineArgs(
            str(RECALL), skip_tokenizer_init=True, max_model_len=1024, **options
        ).create_engine_config()

    return create


def test_every_argument_of_this_vllm_is_known():
    known = [*listed(SERVED), *listed(HARMLESS), *listed(WITHOUT_EFFECT_ALONE), *ASKS_FOR]
    known += [name for name in AFTER_VLLMS_CHECKS if "." not in name]
    # A class to put in vLLM's place is taken or refused by its value: tests/engine/test_bad_input.py.
    known += ["scheduler_cls", "worker_cls"]
    twice = {name for name in known if known.count(name) > 1}
    assert twice == set()
    arguments = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert arguments - set(known) == set(), "new in this vLLM: what would it do to state slots beside the pages?"
    assert set(known) - arguments <= ONLY_IN_NEWER
    assert set(WITHOUT_EFFECT_ALONE) <= {*ASKS_FOR, *AFTER_VLLMS_CHECKS}


@pytest.mark.parametrize("config", NESTED, ids=lambda config: config.__name__)
def test_every_field_of_what_an_argument_carries_is_known(config):
    fields = {field.name for field in dataclasses.fields(config) if field.init}
    assert fields - set(re.findall(r"\w+", NESTED[config])) == set(), (
        "new in this vLLM: what would it do to state slots?"
    )


@pytest.mark.parametrize(("file", "names"), SERVED.items(), ids=list(SERVED))
def test_what_is_called_served_is_in_a_test(file, names):
    text = (TESTS / file).read_text()
    missing = [name for name in names.split() if not re.search(rf"\b{name}\b|--{name.replace('_', '-')}\b", text)]
    assert missing == []


@pytest.mark.parametrize("name", ASKS_FOR)
def test_what_is_not_served_is_refused_by_name(name, create):
    if name in IGNORED_BY_NEWER and Version(installed_vllm()[1]) >= Version("0.33"):
        pytest.skip("vLLM ignores it")
    asked = ASKS_FOR[name]
    options = asked if isinstance(asked, dict) else {name: asked}
    option = KNOWN_BY_OTHER_NAMES.get(name, f"--{name.replace('_', '-')}")
    with pytest.raises(ValueError, match=rf"Value error, {option}.*: .*(Drop|Set)"):
        create(**options)


@pytest.mark.parametrize("name", AFTER_VLLMS_CHECKS)
def test_what_vllm_checks_first_is_refused_where_it_passes(name, create, monkeypatch):
    path, value = AFTER_VLLMS_CHECKS[name]
    option = f"--{name}" if "." in name else f"--{name.replace('_', '-')}"
    config = create()
    refuse_unserved(config)
    *owners, last = path.split(".")
    monkeypatch.setattr(reduce(getattr, owners, config), last, value)
    with pytest.raises(ValueError, match=rf"^{option}: .* Drop"):
        refuse_unserved(config)


def test_float32_which_vllm_sets_itself_on_some_cpus_is_no_request(create):
    refuse_unserved(create(mamba_ssm_cache_dtype="float32"))


def test_a_match_unit_of_one_block_is_what_states_have(create):
    assert create(prefix_match_unit=64).cache_config.prefix_match_unit == 64


def test_overrides_by_a_function_would_be_ignored(create):
    with pytest.raises(ValueError, match=r"--hf-overrides: .* Give a dictionary"):
        create(hf_overrides=lambda config: config)


@pytest.mark.parametrize(
    "operations", [["vllm::unified_mla_attention"], ["vllm::kimi_delta_attention"], [*OUR_OPERATIONS], [], None]
)
def test_compiled_graphs_on_a_gpu_leave_our_layers_out(operations, create, monkeypatch):
    config = create()
    monkeypatch.setattr(config.compilation_config, "splitting_ops", operations)
    refuse_unserved(config)
    monkeypatch.setattr("kimi_vllm.refusals.current_platform", SimpleNamespace(is_cpu=lambda: False))
    if operations and len(operations) == 1:
        with pytest.raises(ValueError, match=r"splitting_ops: .* Add vllm::kimi_delta_attention and vllm::kimi_latent"):
            refuse_unserved(config)
    else:
        refuse_unserved(config)


def test_every_operator_of_ours_splits_compiled_graphs():
    sources = [path.read_text() for path in (TESTS.parent / "kimi_vllm" / "layers").glob("*.py")]
    registered = re.findall(r'op_name="(\w+)"', "".join(sources))
    assert {*OUR_OPERATIONS} == {f"vllm::{name}" for name in registered}


@pytest.mark.parametrize("parallel", ["pipeline", "data"])
def test_stages_and_replicas_on_gpus_want_an_nccl_that_vllm_can_use(parallel, create, monkeypatch):
    config = create()
    monkeypatch.setattr("kimi_vllm.refusals.current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr(pynccl_wrapper, "find_nccl_library", lambda: "libnccl-of-nobody.so")
    refuse_unserved(config)  # one worker asks for no NCCL
    monkeypatch.setattr(config.parallel_config, f"{parallel}_parallel_size", 2)
    with pytest.raises(ValueError, match=rf"--{parallel}-parallel-size.* VLLM_NCCL_SO_PATH .*, or "):
        refuse_unserved(config)
    monkeypatch.setattr(pynccl_wrapper, "NCCLLibrary", lambda: SimpleNamespace(ncclGetVersion=lambda: "2.30.7"))
    refuse_unserved(config)


def test_each_refusal_has_one_name():
    options = [refusal.option for refusal in REFUSALS]
    assert len(options) == len(set(options))
