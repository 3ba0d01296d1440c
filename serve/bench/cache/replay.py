"""Traces through vLLM's scheduler without a model: real scheduler, real cache managers, answers made up.

What is not there is the executor: a step's tokens are taken from the trace. So what is counted here, hits and tokens
to compute, is exactly what a server would count, and nothing in it depends on a clock.

Beside our scheduler, vLLM's own with the rules it has for states in pages ("align"). That model cannot be built on
vLLM's CPU package, but its scheduler and `MambaManager` can: they get the cache configuration that vLLM derives for
one attention block per state, of 1920 tokens for the 48B model with float32 states and one GPU.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateDtypeCalculator, MambaStateShapeCalculator
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec, MambaSpec, MLAAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from kimi_vllm.cache.arena import ArenaPool
from kimi_vllm.cache.eviction import Eviction
from kimi_vllm.cache.manager import KDAStateSpec
from kimi_vllm.cache.scheduler import KimiScheduler
from kimi_vllm.cli.plan_data import InTree
from kimi_vllm.geometry import geometry_of
from serve.bench.cache.traces import BLOCK, Tokens, Turn, prompt_of
from serve.common.paths import RECALL

ALIGN_BLOCK = 1920
"""Tokens of vLLM's attention block for the 48B model without drafts, which make a page as large as a layer's state."""
LONGEST = 8192
"""Tokens of the tiny checkpoint's longest sequence, and so of a trace's."""
BLOCK_BYTES, STATE_BYTES = 516_096, 43_909_120
"""Of the 48B model: 64 tokens of seven MLA layers in bfloat16; a state in float32 with its conv rings in bfloat16."""
STATE_BLOCKS = 86
"""Blocks of 64 tokens that such a state takes."""
_ROOM = 2**40


@dataclass(frozen=True, slots=True)
class Memory:
    """What a scheduler may hand out."""

    concurrency: int  # requests at a time
    blocks: int  # of our attention block, or of vLLM's
    state_blocks: int = STATE_BLOCKS  # of a state of ours
    step_tokens: int = 8192  # tokens per step
    longest: int = LONGEST  # tokens of the longest sequence


def our_scheduler(memory: Memory, eviction: Eviction = "value") -> Any:
    """`KimiScheduler` with the cache configuration that the engine would give it."""
    config = configuration(memory, eviction)
    return build(KimiScheduler, config, our_specs(config, memory.state_blocks, eviction))


def our_specs(
    config: VllmConfig, state_blocks: int, eviction: Eviction = "value", **more: int
) -> dict[str, KVCacheSpec]:
    """What our worker tells the engine about its caches: states of so many blocks, and `more` of the spec."""
    specs: dict[str, KVCacheSpec] = {}
    attention = attention_spec(config, BLOCK)
    for layer in (layer for layer, kda in enumerate(geometry_of(config.model_config).kda) if not kda):
        specs[f"model.layers.{layer}.self_attn.attn"] = attention
        specs[f"model.layers.{layer}.kda_state"] = KDAStateSpec.beside(
            attention, state_blocks=state_blocks, eviction=eviction, **more
        )
    return specs


def align_scheduler(memory: Memory, match_unit: int | None = None) -> Any:
    """VLLM's scheduler and managers, with states in pages.

    Args:
        memory: in blocks of 1920 tokens.
        match_unit: --prefix-match-unit, tokens. A hit may end at each multiple of it instead of each block of 1920, and
            the state at the last such place in a prompt is kept too.
    """
    config = configuration(memory, "lru")
    config.cache_config.prefix_match_unit = match_unit
    return in_tree_scheduler(config, block_size=ALIGN_BLOCK)


def in_tree_scheduler(config: VllmConfig, available: int = _ROOM, block_size: int | None = None) -> Any:
    """VLLM's scheduler with the caches that its own model has on a GPU, in so many bytes.

    Args:
        block_size: tokens of an attention block. Default: what vLLM chooses for this model with its drafts; a small
            model that stands in for a large one needs the large one's.
    """
    config.scheduler_config.scheduler_cls = None
    caches, model = config.cache_config, config.model_config
    geometry, itemsize = geometry_of(model), model.dtype.itemsize
    if block_size is None:
        block_size = InTree.of(geometry, itemsize, itemsize, 1, config.num_speculative_tokens).block_size
    attention = attention_spec(config, block_size)
    # As vLLM's MambaModelConfig has it: without prefix caching one "block" is as long as any sequence.
    caching = caches.enable_prefix_caching
    caches.block_size = block_size
    caches.mamba_cache_mode = "align" if caching else "none"
    caches.mamba_block_size = block_size if caching else model.max_model_len
    state = MambaSpec(
        block_size=caches.mamba_block_size,
        shapes=MambaStateShapeCalculator.kda_state_shape(
            1,
            geometry.linear_num_heads,
            geometry.linear_head_dim,
            conv_kernel_size=geometry.conv_width,
            num_spec=config.num_speculative_tokens,
        ),
        dtypes=MambaStateDtypeCalculator.kda_state_dtype(model.dtype, "auto", "auto"),
        page_size_padded=attention.page_size_bytes,
        mamba_cache_mode=caches.mamba_cache_mode,
        num_speculative_blocks=config.num_speculative_tokens,
    )
    specs = {f"model.layers.{layer}.self_attn": state if kda else attention for layer, kda in enumerate(geometry.kda)}
    return build(Scheduler, config, specs, available=available)


def configuration(memory: Memory, eviction: str, **engine: Any) -> VllmConfig:
    """What the engine would have on the tiny checkpoint; `engine`, other options of vLLM."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    config = engine_config(
        RECALL,
        enable_prefix_caching=True,
        hf_overrides={"model_max_length": memory.longest},
        max_model_len=memory.longest,
        max_num_seqs=memory.concurrency,
        max_num_batched_tokens=memory.step_tokens,
        additional_config={"kimi": {"eviction": eviction}},
        **engine,
    )
    config.scheduler_config.max_num_seqs = memory.concurrency
    config.cache_config.num_gpu_blocks_override = memory.blocks
    return config


def engine_config(model: Path, **options: Any) -> VllmConfig:
    """What the engine makes of vLLM's options, without the pages that the hook has sized from this machine's memory."""
    options = {"skip_tokenizer_init": True, "enforce_eager": True, "async_scheduling": False} | options
    config = EngineArgs(model=str(model), **options).create_engine_config()
    config.cache_config.kv_cache_memory_bytes = config.cache_config.num_gpu_blocks_override = None
    return config


def attention_spec(config: VllmConfig, block_size: int) -> MLAAttentionSpec:
    """An MLA layer's pages, of so many tokens."""
    return MLAAttentionSpec(
        block_size=block_size,
        num_kv_heads=1,
        max_tp_shards=1,
        head_size=geometry_of(config.model_config).latent_dim,
        dtype=config.model_config.dtype,
    )


def build(scheduler_class: Any, config: VllmConfig, *specs: dict[str, KVCacheSpec], available: int = _ROOM) -> Any:
    """The scheduler that the engine would build for workers with these caches, each so many bytes for its pages."""
    layouts = [[layout.name for layout in get_supported_kv_cache_layouts([])]]
    resolve_kv_cache_layout(config, layouts, [spec for worker in specs for spec in worker.values()])
    caches = generate_scheduler_kv_cache_config(_cache_configs(config, list(specs), available))
    config.cache_config.num_gpu_blocks = caches.num_blocks
    block_size, hash_block_size = resolve_kv_cache_block_sizes(caches, config)
    return scheduler_class(
        vllm_config=config,
        kv_cache_config=caches,
        structured_output_manager=StructuredOutputManager(config),
        block_size=block_size,
        hash_block_size=hash_block_size,
        log_stats=False,
    )


def _cache_configs(config: VllmConfig, specs: list[dict[str, KVCacheSpec]], available: int) -> list[KVCacheConfig]:
    """What the engine makes of the workers' caches. vLLM 0.33 groups them in a call of its own, in another module."""
    memory = [available] * len(specs)
    if hasattr(kv_cache_utils, "get_kv_cache_configs"):
        return list(kv_cache_utils.get_kv_cache_configs(config, specs, memory))
    from vllm.v1.core.kv_cache_planning import get_global_kv_cache_groups, get_kv_cache_configs

    return list(get_kv_cache_configs(config, specs, memory, get_global_kv_cache_groups(config, specs)))


@cache
def _hash_function(name: str) -> Any:
    function = get_hash_fn_by_name(name)
    init_none_hash(function)
    return function


def make_request(scheduler: Any, name: str, prompt: Tokens, num_answer: int) -> Request:
    """A request as the engine hands it to the scheduler."""
    function = _hash_function(scheduler.cache_config.prefix_caching_hash_algo)
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        sampling_params=SamplingParams(temperature=0, max_tokens=num_answer, ignore_eos=True),
        pooling_params=None,
        block_hasher=get_request_block_hasher(scheduler.hash_block_size, function),
    )


def step(scheduler: Any, answers: dict[str, Tokens]) -> Any:
    """One step: schedule, and hand back the next token of every request whose prompt is through."""
    output = scheduler.schedule()
    names = list(output.num_scheduled_tokens)
    sampled = []
    for name in names:
        request = scheduler.requests[name]
        due = request.num_computed_tokens >= request.num_tokens
        sampled.append([answers[name][request.num_output_tokens]] if due else [])
    scheduler.update_from_output(
        output,
        ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: i for i, name in enumerate(names)}, sampled_token_ids=sampled
        ),
    )
    return output


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a replay counted."""

    hits: list[int]  # per turn, tokens that did not have to be computed
    prompts: list[int]  # per turn, length of the prompt
    computed: int  # tokens of all steps together; with preemptions some are computed twice
    preemptions: int
    most_blocks: int  # most blocks at a time that held something worth keeping: states, and pages in use or kept
    held_blocks: int  # blocks that requests still hold at the end: none, or one is lost


def replay(scheduler: Any, turns: Sequence[Turn]) -> Outcome:
    """Run a trace to its end. Turns start in their order, as soon as there is room and the one they follow is done."""
    arena: ArenaPool | None = getattr(scheduler, "arena", None)
    spoken = [turn.answer for turn in turns]
    answers = {str(index): answer for index, answer in enumerate(spoken)}
    requests: list[Request] = []
    hits = [0] * len(turns)
    computed = most = 0
    while len(requests) < len(turns) or scheduler.requests:
        while len(requests) < len(turns) and len(scheduler.requests) < scheduler.max_num_running_reqs:
            index = len(requests)
            follows = turns[index].follows
            if follows is not None and not requests[follows].is_finished():
                break
            prompt = prompt_of(turns, index, spoken)
            requests.append(make_request(scheduler, str(index), prompt, len(spoken[index])))
            scheduler.add_request(requests[-1])
        output = step(scheduler, answers)
        if not output.total_num_scheduled_tokens:
            raise RuntimeError(f"the scheduler is stuck with {len(scheduler.requests)} requests: too little memory")
        for new in output.scheduled_new_reqs:
            hits[int(new.req_id)] = new.num_computed_tokens
        computed += output.total_num_scheduled_tokens
        if arena is not None:
            most = max(most, arena.num_gpu_blocks - arena.num_worthless)
    scheduler.schedule()  # tells nobody anything any more, but frees what waited for the last step
    if arena is not None:
        scheduler.check_memory()
    pool = scheduler.kv_cache_manager.block_pool
    return Outcome(
        hits=hits,
        prompts=[request.num_prompt_tokens for request in requests],
        computed=computed,
        preemptions=sum(request.num_preemptions for request in requests),
        most_blocks=most,
        held_blocks=pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
    )
