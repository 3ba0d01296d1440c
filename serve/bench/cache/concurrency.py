"""How many requests of the 48B model run at once in a fixed memory: ours and vLLM's own, by admission.

vLLM's real scheduler and cache managers run without a model, as in `replay`. Prompts that share nothing are offered
without end; they are prefilled in chunks, and every request then decodes for ever. Once nothing has been admitted
for `STEADY` steps in which all that run decode, those are counted. If memory runs out before that and a request is
preempted, nothing new is offered, it may try once more, and those are counted that go on for `STEADY` steps.

Ours has states and pages in two pools. *Default* is the division that `planning.size` makes for ``--max-num-seqs``,
*best* the better of two for this very length of prompt. vLLM's own keeps states in pages of 1920 tokens, one for seven
KDA layers.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.request import RequestStatus

from kimi_vllm.cache.scheduler import KimiScheduler
from kimi_vllm.geometry import KimiGeometry
from kimi_vllm.options import KimiOptions
from kimi_vllm.planning import Costs, Demand, Sizing, best_concurrency, size
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
GROWTH = (64, 256)
"""Tokens beyond the prompt for which *best* has pages: while the last prompts arrive the first requests decode."""
_ROOM_TO_DECODE = 4096
_QUEUE = 16


@dataclass(frozen=True, slots=True)
class Admission:
    """One variant with prompts of one length. `running` is the result; `preemptions` were seen before it."""

    variant: str
    division: str  # "default", "best", or "shared" for vLLM's own, which has but one pool
    prefix_caching: bool
    max_num_seqs: int
    prompt: int
    cache_bytes: int  # for states and pages together
    running: int
    preemptions: int
    # slots, pages: slots without the null slot, 0 for vLLM's own; pages with the null page
    slots: int
    pages: int
    page_tokens: int


class _Endless(list[int]):
    """An answer that never ends."""

    def __getitem__(self, index: Any) -> Any:
        return VOCABULARY[0]


def rows(prompts: Sequence[int], ours: int, in_tree: int) -> Iterator[Admission]:
    """Every variant with every length, with so many bytes for the caches."""
    longest = max(prompts)
    for prompt, caching in product(prompts, (True, False)):
        for seqs in MAX_NUM_SEQS:
            yield run_ours(default_sizing(ours, seqs, longest, caching), prompt, ours, "default")
        divisions = [best_sizing(ours, prompt, longest, caching, growth) for growth in GROWTH]
        yield max((run_ours(one, prompt, ours, "best") for one in divisions), key=lambda row: row.running)
        for seqs in MAX_NUM_SEQS:
            yield run_in_tree(in_tree, seqs, prompt, longest, caching)


def default_sizing(num_bytes: int, max_num_seqs: int, longest: int, caching: bool) -> Sizing:
    """The division that the plugin makes of itself."""
    return size(costs(), _demand(max_num_seqs, longest, caching), num_bytes)


def best_sizing(num_bytes: int, prompt: int, longest: int, caching: bool, growth: int) -> Sizing:
    """As many slots as requests of `prompt` + `growth` tokens fit, and the rest for pages."""
    demand = _demand(max(MAX_NUM_SEQS), longest, caching)
    fitting = best_concurrency(costs(), demand, num_bytes, prompt + growth)
    return size(costs(), _demand(max(2, fitting), longest, caching, max(2, fitting)), num_bytes)


@cache
def costs() -> Costs:
    """What a state and a page of the 48B model weigh on one GPU, in bfloat16."""
    geometry = KimiGeometry.from_config(json.loads((LARGE / "config.json").read_text()))
    return Costs.of(geometry, torch.bfloat16.itemsize, BLOCK, gpu_dtype=torch.bfloat16)


def _demand(max_num_seqs: int, longest: int, caching: bool, state_slots: int | None = None) -> Demand:
    return Demand(max_num_seqs, longest + _ROOM_TO_DECODE, BLOCK, caching, KimiOptions().checkpoint_share, state_slots)


def run_ours(sizing: Sizing, prompt: int, num_bytes: int, division: str) -> Admission:
    """Count with our scheduler and this division."""
    demand, slots = sizing.demand, sizing.state_slots
    config = _configure(demand.max_model_len - _ROOM_TO_DECODE, demand.prefix_caching, sizing.live)
    scheduler = build(KimiScheduler, config, our_specs(config, slots), available=num_bytes - sizing.state_bytes)
    return _run(scheduler, OURS, division, demand.max_num_seqs, prompt, num_bytes, slots)


def run_in_tree(num_bytes: int, max_num_seqs: int, prompt: int, longest: int, caching: bool) -> Admission:
    """Count with vLLM's scheduler and states in pages."""
    scheduler = in_tree_scheduler(_configure(longest, caching, max_num_seqs), num_bytes)
    return _run(scheduler, IN_TREE, "shared", max_num_seqs, prompt, num_bytes, 0)


def _configure(longest: int, caching: bool, max_num_seqs: int) -> VllmConfig:
    config = deepcopy(_config(caching, longest))
    config.scheduler_config.max_num_seqs = max_num_seqs
    return config


@cache
def _config(caching: bool, longest: int) -> VllmConfig:
    return engine_config(
        LARGE,
        enable_prefix_caching=caching,
        max_model_len=longest + _ROOM_TO_DECODE,
        max_num_seqs=2,
        max_num_batched_tokens=STEP_TOKENS,
        # For the plugin, which would divide this machine's memory; replaced by what is asked for.
        num_gpu_blocks_override=(longest + _ROOM_TO_DECODE) // BLOCK + 2,
        additional_config={"kimi": {"state_slots": 2}},
    )


def _run(
    scheduler: Any, variant: str, division: str, max_num_seqs: int, prompt: int, num_bytes: int, slots: int
) -> Admission:
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
        variant=variant,
        division=division,
        prefix_caching=scheduler.cache_config.enable_prefix_caching,
        max_num_seqs=max_num_seqs,
        prompt=prompt,
        cache_bytes=num_bytes,
        running=running,
        preemptions=preemptions,
        slots=slots,
        pages=scheduler.cache_config.num_gpu_blocks,
        page_tokens=scheduler.cache_config.block_size,
    )


@cache
def _prompt(number: int, length: int) -> list[int]:
    return random.Random(number).choices(VOCABULARY, k=length)


def report(found: Sequence[Admission], env: Row) -> None:
    """Print a table."""
    small, large = MAX_NUM_SEQS
    names = ["prompt", "prefix caching", f"ours, {small}", f"ours, {large}", "ours, best", f"in-tree, {small}"]
    counts: defaultdict[tuple[int, bool], dict[Any, int]] = defaultdict(dict)
    for row in found:
        key = row.division if row.division == "best" else (row.variant, row.max_num_seqs)
        counts[row.prompt, row.prefix_caching][key] = row.running
    cells = []
    for (prompt, caching), count in counts.items():
        ours = [count[OURS, small], count[OURS, large], count["best"]]
        own = [count[IN_TREE, small], count[IN_TREE, large]]
        ratios = [f"{mine / its:.2f}" for mine, its in zip(ours, [*own, own[-1]], strict=True)]
        cells.append([f"{prompt:,}", "on" if caching else "off", *map(str, ours + own), *ratios])
    title = f"requests that run at once, {env['vllm']}'s scheduler, commit {env['commit']}"
    columns = [*names, f"in-tree, {large}", f"ratio at {small}", f"at {large}", "best"]
    ResultTable(title, columns, cells, words=2).show()
