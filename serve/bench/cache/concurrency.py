"""How many requests of the 48B model run at once in a fixed memory: ours and vLLM's own, by admission.

vLLM's real scheduler and cache managers run without a model, as in `replay`. Prompts that share nothing are offered
without end; they are prefilled in chunks, and every request then decodes for ever. Once nothing has been admitted
for `STEADY` steps in which all that run decode, those are counted. If memory runs out before that and a request is
preempted, nothing new is offered, it may try once more, and those are counted that go on for `STEADY` steps.

Both share one memory between states and pages. Ours has blocks of 64 tokens and a state in 86 of them; vLLM's own keeps
states in pages of 1920 tokens, one for seven KDA layers. *fits* is how many of our requests, as long as they are at the
end on average, would fill the bytes to the last: without a block's padding, and with nothing in reserve.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.request import RequestStatus

from kimi_vllm.cache.scheduler import KimiScheduler
from kimi_vllm.geometry import KimiGeometry
from kimi_vllm.planning import Costs
from serve.bench.cache.replay import build, engine_config, in_tree_scheduler, make_request, our_specs, step
from serve.bench.cache.traces import BLOCK, VOCABULARY
from serve.bench.engine.plan import IN_TREE, OURS
from serve.common.paths import LARGE
from serve.common.rows import Row
from serve.common.tables import ResultTable

MAX_NUM_SEQS = (256, 1024)
"""The second is vLLM's default for GPUs of this size."""
STEP_TOKENS = 8192
STEADY = 32
_ROOM_TO_DECODE = 4096
_QUEUE = 16


@dataclass(frozen=True, slots=True)
class Admission:
    """One provider with prompts of one length. `running` is the result; `preemptions` were seen before it.

    Attributes:
        pages: Blocks that the tokens of those that run take, together.
        fits: Requests of ours, like these, that the bytes allow; None for vLLM's own.
    """

    provider: str
    prefix_caching: bool
    max_num_seqs: int
    prompt: int
    cache_bytes: int  # for states and pages together
    running: int
    pages: int
    preemptions: int
    blocks: int  # with the null block
    block_tokens: int
    fits: float | None = None


class _Endless(list[int]):
    """An answer that never ends."""

    def __getitem__(self, index: Any) -> Any:
        return VOCABULARY[0]


def rows(prompts: Sequence[int], ours: int, in_tree: int) -> Iterator[Admission]:
    """Both providers with every length, with so many bytes for the caches."""
    longest = max(prompts)
    for prompt, caching in product(prompts, (True, False)):
        for seqs in MAX_NUM_SEQS:
            yield run_ours(ours, seqs, prompt, longest, caching)
            yield run_in_tree(in_tree, seqs, prompt, longest, caching)


@cache
def costs() -> Costs:
    """What a state and a block of the 48B model weigh on one GPU, in bfloat16."""
    geometry = KimiGeometry.from_config(json.loads((LARGE / "config.json").read_text()))
    return Costs.of(geometry, torch.bfloat16.itemsize, BLOCK, gpu_dtype=torch.bfloat16)


def fits(row: Admission) -> float:
    """Requests of ours, like those in a row, that its bytes allow."""
    return row.running * row.cache_bytes / (row.running * costs().state + row.pages * costs().block)


def run_ours(num_bytes: int, max_num_seqs: int, prompt: int, longest: int, caching: bool) -> Admission:
    """Count with our scheduler."""
    config = _configure(longest, caching, max_num_seqs)
    scheduler = build(KimiScheduler, config, our_specs(config, costs().state_blocks), available=num_bytes)
    row = _run(scheduler, OURS, max_num_seqs, prompt, num_bytes)
    return replace(row, fits=fits(row))


def run_in_tree(
    num_bytes: int, max_num_seqs: int, prompt: int, longest: int, caching: bool, drafts: int = 0
) -> Admission:
    """Count with vLLM's scheduler and states in pages, and room for so many drafts."""
    scheduler = in_tree_scheduler(_configure(longest, caching, max_num_seqs, drafts), num_bytes)
    return _run(scheduler, IN_TREE, max_num_seqs, prompt, num_bytes)


def _configure(longest: int, caching: bool, max_num_seqs: int, drafts: int = 0) -> VllmConfig:
    config = deepcopy(_config(caching, longest, drafts))
    config.scheduler_config.max_num_seqs = max_num_seqs
    return config


@cache
def _config(caching: bool, longest: int, drafts: int) -> VllmConfig:
    ngram = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 3}
    return engine_config(
        LARGE,
        enable_prefix_caching=caching,
        max_model_len=longest + _ROOM_TO_DECODE,
        max_num_seqs=2,
        max_num_batched_tokens=STEP_TOKENS,
        speculative_config=ngram if drafts else None,
        # For the plugin, which would look at this machine's memory; replaced by what is asked for.
        num_gpu_blocks_override=2**20,
    )


def _run(scheduler: Any, provider: str, max_num_seqs: int, prompt: int, num_bytes: int) -> Admission:
    answers: defaultdict[str, list[int]] = defaultdict(_Endless)
    offered = preemptions = steps = quiet = running = 0
    while quiet < STEADY:
        while not preemptions and len(scheduler.waiting) < _QUEUE:
            scheduler.add_request(make_request(scheduler, str(offered), _prompt(offered, prompt), 2**30))
            offered += 1
        lost = step(scheduler, answers).preempted_req_ids or ()
        steps, preemptions = steps + 1, preemptions + len(lost)
        if lost:
            staying = {request.request_id for request in scheduler.running}
            waiting = [name for name in scheduler.requests if name not in staying]
            leaving = [name for name in waiting if name not in lost or scheduler.requests[name].num_preemptions > 1]
            scheduler.finish_requests(leaving, RequestStatus.FINISHED_ABORTED)
        before, running = running, len(scheduler.running)
        decoding = all(request.num_computed_tokens >= prompt for request in scheduler.running)
        quiet = quiet + 1 if decoding and running == before and not lost else 0
        if steps > _ROOM_TO_DECODE:
            raise RuntimeError(f"after {steps} steps {running} requests of {prompt} tokens have not come to rest")
    return Admission(
        provider=provider,
        prefix_caching=scheduler.cache_config.enable_prefix_caching,
        max_num_seqs=max_num_seqs,
        prompt=prompt,
        cache_bytes=num_bytes,
        running=running,
        pages=sum(cdiv(request.num_tokens, scheduler.cache_config.block_size) for request in scheduler.running),
        preemptions=preemptions,
        blocks=scheduler.cache_config.num_gpu_blocks,
        block_tokens=scheduler.cache_config.block_size,
    )


@cache
def _prompt(number: int, length: int) -> list[int]:
    return random.Random(number).choices(VOCABULARY, k=length)


def report(found: Sequence[Admission], env: Row) -> None:
    """Print a table."""
    counts: defaultdict[tuple[int, bool, int], dict[str, Admission]] = defaultdict(dict)
    for row in found:
        counts[row.prompt, row.prefix_caching, row.max_num_seqs][row.provider] = row
    cells = []
    for (prompt, caching, seqs), count in counts.items():
        ours, in_tree = count[OURS].running, count[IN_TREE].running
        most = min(seqs, count[OURS].fits or seqs)
        ratios = [f"{ours / most:.3f}", f"{ours / in_tree:.3f}"]
        cells.append(
            [f"{prompt:,}", "on" if caching else "off", f"{seqs:,}", *map(str, (ours, in_tree, int(most))), *ratios]
        )
    title = f"requests that run at once, {env['vllm']}'s scheduler, commit {env['commit']}"
    columns = [
        "prompt",
        "prefix caching",
        "--max-num-seqs",
        "ours",
        "in-tree",
        "fits",
        "of what fits",
        "ours / in-tree",
    ]
    ResultTable(title, columns, cells, words=2).show()
