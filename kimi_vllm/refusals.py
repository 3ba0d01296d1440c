"""vLLM's options that are not supported with KDA state. Each is refused by name, before weights are read.

`tests/test_engine_arguments.py` has for every engine argument whether it is refused, served, or without effect.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from vllm import envs
from vllm.config import MambaConfig, VllmConfig
from vllm.platforms import current_platform

from kimi_vllm import ARCHITECTURE, nccl
from kimi_vllm.cache.window import window_of
from kimi_vllm.geometry import geometry_of
from kimi_vllm.kernels.contract import MAX_WINDOW
from kimi_vllm.options import KimiOptions

SESSIONS = "kimi_vllm.cache.sessions"
"""The module of the only connector that is served, which nobody names but our config hook."""

DRAFTS, GPU_DRAFTS = ("ngram",), ("ngram", "ngram_gpu")
"""Methods of speculative decoding that have run, on CPUs and on GPUs."""

OUR_OPERATIONS = ("vllm::kimi_delta_attention", "vllm::kimi_latent_attention")
"""The operators at which vLLM's compiler must split graphs, as at its own attention."""

_DROP = "Drop the option, or set KIMI_VLLM_DISABLE=1 to use vLLM's own Kimi Linear."
_OTHER_CACHE = "it configures vLLM's own state cache, which kimi-vllm replaces."
_DTYPE = "Drop it; kimi.state_dtype in --additional-config sets the dtype of states."
_HALVES = "it splits a step inside a prompt, and the second half needs the state after the first."
_KERNELS = "it selects one of vLLM's kernels, and kimi-vllm has its own."
_UNTRIED = "it moves weights while requests run, which is untested with kimi-vllm."


@dataclass(frozen=True, slots=True)
class Refusal:
    """An option, or one use of it.

    Attributes:
        option: What the user wrote.
        asked: Returns whether a configuration uses it.
        why: What would go wrong; empty if it was never tried.
        instead: What to do.
    """

    option: str
    asked: Callable[[VllmConfig], object]
    why: str = ""
    instead: str = _DROP


def _set(path: str, *unset: object) -> Callable[[VllmConfig], object]:
    """Whether the value at a dotted path is none of `unset` or, without these, true."""
    read = attrgetter(path)
    return (lambda config: read(config) not in unset) if unset else read


def _above_one(path: str) -> Callable[[VllmConfig], bool]:
    read = attrgetter(path)
    return lambda config: bool(read(config) > 1)


def _additional(name: str) -> Callable[[VllmConfig], bool]:
    return lambda config: isinstance(config.additional_config, dict) and name in config.additional_config


def _drafting_option(name: str) -> Callable[[VllmConfig], object]:
    return lambda config: config.speculative_config and getattr(config.speculative_config, name)


def _drafts() -> tuple[str, ...]:
    return DRAFTS if current_platform.is_cpu() else GPU_DRAFTS


def _longer_than_kernels_take(device: str) -> Callable[[VllmConfig], bool]:
    return lambda config: current_platform.is_cpu() == (device == "cpu") and window_of(config) > MAX_WINDOW[device]


def _sessions(config: VllmConfig) -> Any:
    return KimiOptions.of(config).session_dir


def _with_sessions(asked: Callable[[VllmConfig], object]) -> Callable[[VllmConfig], object]:
    return lambda config: _sessions(config) and asked(config)


def _is_ours(config: VllmConfig) -> bool:
    return bool(config.kv_transfer_config.kv_connector_module_path == SESSIONS)


_MAMBA_UNSET = (None, "none", "auto")

REFUSALS = (
    Refusal("--diffusion-config", _set("diffusion_config")),
    Refusal(
        "--speculative-config (method)",
        lambda config: config.speculative_config and config.speculative_config.method not in _drafts(),
        "no other method has run; a draft model or a head would need cache groups beside ours.",
        f"Drop the option, or use {' or '.join(DRAFTS)}, on GPUs {' or '.join(GPU_DRAFTS)}.",
    ),
    Refusal(
        "--speculative-config with the first model runner",
        lambda config: (
            not current_platform.is_cpu()
            and config.speculative_config
            and not config.use_v2_model_runner
            and config.speculative_config.method != "ngram"
        ),
        "there ngram_gpu changes what was scheduled behind the scheduler's back.",
        # Unset, vLLM takes the first runner for options that the second lacks; with 1 its error names them.
        "Use ngram, or set VLLM_USE_V2_MODEL_RUNNER=1 for the second runner.",
    ),
    *(
        Refusal(
            f"--speculative-config (num_speculative_tokens on {devices})",
            _longer_than_kernels_take(device),
            f"a step verifies at most {MAX_WINDOW[device]} tokens of a request there, drafts included.",
            f"Drop the option, or use at most {MAX_WINDOW[device] - 1}.",
        )
        for device, devices in (("cpu", "CPUs"), ("cuda", "GPUs"))
    ),
    Refusal(
        "kimi.least_drafts_accepted with --data-parallel-size",
        lambda config: (
            config.speculative_config
            and config.parallel_config.data_parallel_size > 1
            and KimiOptions.of(config).least_drafts_accepted
        ),
        "replicas step together, and each would leave out drafts on its own.",
        "Drop the option, or set it to 0.",
    ),
    Refusal(
        "kimi.mixed_step_tokens with --no-enable-chunked-prefill",
        lambda config: KimiOptions.of(config).mixed_step_tokens and not config.scheduler_config.enable_chunked_prefill,
        "a longer prompt would wait until nothing decodes.",
        "Drop one of them.",
    ),
    Refusal(
        "--speculative-config (num_speculative_tokens) with --block-size",
        lambda config: window_of(config) > config.cache_config.block_size,
        "a step verifies no more tokens of a request than a block has, drafts included.",
        "Use fewer drafts than --block-size has tokens, or raise it.",
    ),
    *(
        Refusal(
            f"--speculative-config ({option})",
            _drafting_option(option),
            f"{why}, which has not run with KDA state.",
            "Drop it from --speculative-config.",
        )
        for option, why in (
            ("parallel_drafting", "a drafter that is a model guesses several tokens at once"),
            ("enable_adaptive_verification", "requests of one step then verify different numbers of drafts"),
        )
    ),
    Refusal(
        "--speculative-config with --pipeline-parallel-size",
        lambda config: config.speculative_config and config.parallel_config.pipeline_parallel_size > 1,
        "only the last stage knows which drafts were accepted, and slots of all stages fold those; this has not run.",
        "Use --pipeline-parallel-size 1, or drop --speculative-config.",
    ),
    Refusal("--enable-lora", _set("lora_config")),
    # A prompt is cut into chunks where other requests leave room, and another cut is another rounding.
    Refusal("VLLM_BATCH_INVARIANT=1", lambda config: envs.VLLM_BATCH_INVARIANT),
    Refusal("--decode-context-parallel-size", _above_one("parallel_config.decode_context_parallel_size")),
    Refusal("--prefill-context-parallel-size", _above_one("parallel_config.prefill_context_parallel_size")),
    Refusal("--enable-dbo", _set("parallel_config.enable_dbo"), _HALVES),
    Refusal("--ubatch-size", _above_one("parallel_config.ubatch_size"), _HALVES),
    Refusal(
        "--kv-transfer-config",
        lambda config: config.kv_transfer_config and not (_sessions(config) and _is_ours(config)),
        "vLLM's connectors take every cache group's ids for blocks, and those of KDA states are slots.",
        "Drop it; kimi.session_dir in --additional-config keeps sessions on disk.",
    ),
    Refusal(
        "kimi.session_dir",
        lambda config: _sessions(config) and not Path(_sessions(config)).is_dir(),
        "there is no such folder.",
        "Create it.",
    ),
    Refusal(
        "kimi.session_dir without KDA layers",
        lambda config: _sessions(config) and not any(geometry_of(config.model_config).kda),
        "sessions are untested with models that have MLA layers only.",
        "Drop it.",
    ),
    Refusal(
        "kimi.session_dir with --tensor-parallel-size on GPUs",
        lambda config: (
            _sessions(config) and config.parallel_config.tensor_parallel_size > 1 and not current_platform.is_cpu()
        ),
        "sessions are untested with several GPUs.",
        "Drop one of them.",
    ),
    *(
        Refusal(
            f"kimi.session_dir with {option}",
            _with_sessions(asked),
            "sessions are untested with it.",
            "Drop one of them.",
        )
        for option, asked in (
            ("--pipeline-parallel-size", _above_one("parallel_config.pipeline_parallel_size")),
            ("--data-parallel-size", _above_one("parallel_config.data_parallel_size")),
            ("--nnodes", _above_one("parallel_config.nnodes")),
            ("--distributed-executor-backend", _set("parallel_config.distributed_executor_backend", None, "mp", "uni")),
            ("--runner", _set("model_config.runner_type", "generate")),
        )
    ),
    Refusal(
        "kimi.session_gib",
        lambda config: KimiOptions.of(config).session_gib and not _sessions(config),
        "without kimi.session_dir there are no sessions.",
        "Set that, or drop this.",
    ),
    Refusal(
        "kimi.session_prefix_tokens",
        lambda config: (
            KimiOptions.of(config).session_prefix_tokens
            and not (KimiOptions.of(config).session_gib and config.cache_config.enable_prefix_caching)
        ),
        "it saves prefixes that are cached, and without a limit they fill the disk.",
        "Set kimi.session_gib and --enable-prefix-caching, or drop it.",
    ),
    Refusal(
        "--kv-offloading-size",
        _set("cache_config.kv_offloading_size", None),
        "vLLM's connector offloads KV cache pages only, not KDA states.",
        "Drop it; kimi.host_memory_gib in --additional-config keeps states in host memory.",
    ),
    Refusal(
        "--kv-cache-dtype-skip-layers",
        _set("cache_config.kv_cache_dtype_skip_layers"),
        "MLA pages of two sizes would make vLLM pad the attention block.",
    ),
    Refusal("--ec-transfer-config", _set("ec_transfer_config"), "the model has no encoder.", "Drop it."),
    Refusal("--mamba-cache-mode", _set("cache_config.mamba_cache_mode", *_MAMBA_UNSET), _OTHER_CACHE, _DTYPE),
    Refusal("--mamba-block-size", _set("cache_config.mamba_block_size", *_MAMBA_UNSET), _OTHER_CACHE, _DTYPE),
    Refusal("--mamba-cache-dtype", _set("cache_config.mamba_cache_dtype", *_MAMBA_UNSET), _OTHER_CACHE, _DTYPE),
    Refusal(
        "--mamba-ssm-cache-dtype",
        # On CPUs with AVX512-BF16 vLLM itself sets float32, which is what states are in anyway.
        _set("cache_config.mamba_ssm_cache_dtype", *_MAMBA_UNSET, "float32"),
        _OTHER_CACHE,
        _DTYPE,
    ),
    Refusal("--use-replayssm", _set("cache_config.use_replayssm"), _OTHER_CACHE),
    Refusal(
        "--enable-mamba-shared-prefix-checkpoint",
        _set("cache_config.enable_mamba_shared_prefix_checkpoint"),
        _OTHER_CACHE,
        "Drop it: the state where two prompts diverge is kept anyway.",
    ),
    Refusal(
        "--prefix-cache-retention-interval",
        _set("cache_config.prefix_cache_retention_interval", 0),
        _OTHER_CACHE,
        "Drop it; kimi.checkpoint_interval in --additional-config keeps states at an interval.",
    ),
    Refusal(
        "--prefix-match-unit",
        lambda config: config.cache_config.prefix_match_unit not in (None, config.cache_config.block_size),
        "KDA states are kept at block boundaries, so a hit cannot end inside a block.",
        "Drop it, or set it to the block size.",
    ),
    Refusal(
        "--mamba-backend (and --mamba-*, --enable-mamba-cache-stochastic-rounding)",
        lambda config: config.mamba_config != MambaConfig(),
        _KERNELS,
    ),
    Refusal("--kda-prefill-backend", _additional("kda_prefill_backend"), _KERNELS),
    Refusal("--kda-decode-backend", _additional("kda_decode_backend"), _KERNELS),
    Refusal(
        "--attention-backend",
        lambda config: (
            current_platform.is_cpu() and (config.attention_config.backend or config.attention_config.backend_per_kind)
        ),
        "on CPUs kimi-vllm has its own MLA only.",
        "Drop it.",
    ),
    Refusal(
        "--attention-config.use_non_causal",
        _set("attention_config.use_non_causal"),
        "KDA reads a prompt in one direction.",
        "Drop it.",
    ),
    Refusal(
        "--compilation-config.splitting_ops",
        lambda config: (
            not current_platform.is_cpu()
            and config.compilation_config.splitting_ops
            and not {*OUR_OPERATIONS} <= {*config.compilation_config.splitting_ops}
        ),
        "KDA and MLA would be captured in graphs, but their metadata changes with every step.",
        f"Add {' and '.join(OUR_OPERATIONS)} to the list, or drop it.",
    ),
    Refusal(
        "--kv-cache-dtype",
        lambda config: (
            not current_platform.is_cpu()
            and config.cache_config.cache_dtype.startswith("fp8")
            and config.model_config.dtype != torch.bfloat16
        ),
        "vLLM's attention returns bfloat16 from FP8 latents, whatever the model's dtype.",
        "Use --dtype bfloat16, or drop it.",
    ),
    Refusal(
        "--pipeline-parallel-size",
        lambda config: (
            not current_platform.is_cpu() and config.parallel_config.pipeline_parallel_size > 1 and nccl.why_unusable()
        ),
        "vLLM cannot use this NCCL for its own communicator (kimi-vllm doctor tells why), and without that the first "
        "stage stops with an illegal memory access.",
        f"{nccl.REMEDY}, or use --tensor-parallel-size.",
    ),
    Refusal("--cpu-offload-gb", _set("offload_config.uva.cpu_offload_gb"), _UNTRIED),
    Refusal("--offload-group-size", _set("offload_config.prefetch.offload_group_size"), _UNTRIED),
    Refusal(
        "--enable-sleep-mode",
        _set("model_config.enable_sleep_mode"),
        "after level 2 sleep, state slots have undefined contents.",
    ),
    Refusal("--enable-eplb", _set("parallel_config.enable_eplb"), _UNTRIED),
    Refusal("--enable-elastic-ep", _set("parallel_config.enable_elastic_ep"), _UNTRIED),
    Refusal(
        "--enable-fault-tolerance",
        _set("parallel_config.enable_fault_tolerance"),
        "a step that runs twice updates a KDA state twice.",
    ),
    Refusal(
        "--enable-return-routed-experts",
        _set("aux_output_config.enable_return_routed_experts"),
        "kimi-vllm's routing kernel does not report the experts.",
    ),
    Refusal(
        "--model-class-overrides",
        lambda config: ARCHITECTURE in config.model_config.model_class_overrides,
        "the state cache needs kimi-vllm's own class.",
    ),
    Refusal(
        "--hf-overrides",
        lambda config: callable(config.model_config.hf_overrides),
        "the geometry is read from config.json, which a function cannot change.",
        "Give a dictionary.",
    ),
    Refusal(
        "--data-parallel-size",
        lambda config: (
            current_platform.is_cpu() and config.model_config.is_moe and config.parallel_config.data_parallel_size > 1
        ),
        "vLLM for CPUs cannot send tokens to experts of another replica (it lacks all_gatherv) and would fail at the "
        "first request.",
        "Start several servers behind a load balancer.",
    ),
    Refusal(
        "--data-parallel-size with experts",
        lambda config: (
            not current_platform.is_cpu()
            and config.model_config.is_moe
            and config.parallel_config.data_parallel_size > 1
            and nccl.why_unusable()
        ),
        "vLLM cannot use this NCCL for its own communicator (kimi-vllm doctor tells why), by which experts of several "
        "replicas exchange tokens.",
        f"{nccl.REMEDY}, or start several servers behind a load balancer.",
    ),
    Refusal(
        "--enable-expert-parallel",
        lambda config: (
            current_platform.is_cpu()
            and config.parallel_config.enable_expert_parallel
            and config.parallel_config.tensor_parallel_size * config.parallel_config.data_parallel_size > 1
        ),
        "vLLM's experts for CPUs ignore which of them a worker holds, and it crashes at the first request.",
        "Drop the option: --tensor-parallel-size splits every expert instead.",
    ),
)


def refuse_unserved(vllm_config: VllmConfig) -> None:
    """Check a configuration against `REFUSALS`.

    Raises:
        ValueError: The configuration uses a refused option. Names the first, says why, and what to do.
    """
    for refusal in REFUSALS:
        if not refusal.asked(vllm_config):
            continue
        if not refusal.why:
            raise ValueError(f"{refusal.option}: kimi-vllm does not support it with KDA state yet. {refusal.instead}")
        raise ValueError(f"{refusal.option}: {refusal.why} {refusal.instead}")
