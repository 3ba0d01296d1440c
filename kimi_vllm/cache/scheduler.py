"""vLLM's scheduler, extended by what happens to states between steps; the other end of `worker.py`.

Scheduling itself is unchanged. Copies to and from host memory are sent with a step; requests that wrote slots reported
as not finite are ended or restarted; counters are sent with vLLM's own statistics.
"""

import os
import time
from collections import Counter, deque
from functools import partial
from typing import Any
from weakref import WeakSet

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.sched.utils import remove_all
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus, StreamingUpdate

from kimi_vllm.cache.arena import install
from kimi_vllm.cache.arena_check import check_arena
from kimi_vllm.cache.capacity import Capacity
from kimi_vllm.cache.contagion import Access, Step, spread
from kimi_vllm.cache.drafting import Drafting, both_lengths
from kimi_vllm.cache.exchange import NEW_PAGES, NONFINITE, OPERATIONS, STATS, Sick
from kimi_vllm.cache.manager import KDAStateManager
from kimi_vllm.cache.pacing import paced, short_step
from kimi_vllm.cache.sessions import SessionConnector
from kimi_vllm.options import KimiOptions

logger = init_logger("vllm.kimi_vllm")

QUARANTINED = (
    "kimi-vllm: the request's KDA state became NaN or infinite. The request was ended and its checkpoints were "
    "withdrawn; no other request is affected. Try again, or start the server with "
    '--additional-config \'{"kimi": {"on_nonfinite": "resume"}}\'.'
)
"""`stop_reason` of a request whose state is not finite; its finish reason is ``error``."""


class _StateScheduling:
    """Mixed into vLLM's synchronous and asynchronous schedulers, whose attributes are declared here."""

    vllm_config: Any
    kv_cache_config: Any
    kv_cache_manager: Any
    requests: dict[str, Request]
    running: list[Request]
    max_num_scheduled_tokens: int
    finish_requests: Any
    connector: Any
    prev_step_scheduled_req_ids: set[str]
    _free_request_blocks: Any
    deferred_frees: deque[tuple[int, list[KVCacheBlock]]]
    num_spec_tokens: int
    dynamic_sd_lookup: list[int] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self._states: KDAStateManager = next(m for m in managers if isinstance(m, KDAStateManager))
        self._page_managers = [m for m in managers if m is not self._states]
        [pages] = self._page_managers
        num_host_blocks = self._states.block_pool.num_host_blocks
        self.arena = install(self.kv_cache_manager, pages.kv_cache_group_id, num_host_blocks)
        self._states.share(self.arena, pages)
        self._states.scheduling = False
        options = KimiOptions.of(self.vllm_config)
        self._drafting = None
        if self._states.kv_cache_spec.window:
            most = self.vllm_config.scheduler_config.max_num_seqs + 1
            # Without a schedule by batch size, vLLM fills a prompt of one token up with drafts of -1, for CUDA graphs,
            # and orders it as what it is: behind longer prompts, where all tokens count.
            by_batch_size = self.vllm_config.speculative_config.num_speculative_tokens_per_batch_size
            if by_batch_size in (None, both_lengths(most - 1, self.num_spec_tokens)):
                self.dynamic_sd_lookup = [self.num_spec_tokens] * most
            assert self.dynamic_sd_lookup is not None
            self._drafts, self._no_drafts = self.dynamic_sd_lookup, [0] * most
            # Replicas of experts step together, and each would rest on its own.
            if self.vllm_config.parallel_config.data_parallel_size == 1:
                least = options.least_accepted(on_cpu=current_platform.is_cpu())
                self._drafting = Drafting(least)
        spec = self._states.kv_cache_spec
        # A page is one MLA layer's, a block all of theirs.
        layers = self.kv_cache_config.kv_cache_groups[self._states.kv_cache_group_id].layer_names
        self._block_bytes = spec.page_size_bytes * len(layers)
        capacity = Capacity(self.arena.num_gpu_blocks, spec.block_size, spec.state_blocks)
        scheduled, model = self.vllm_config.scheduler_config, self.vllm_config.model_config
        logger.info("%s", capacity.table(scheduled.max_num_seqs, model.max_model_len))
        self._short_step = short_step(self.vllm_config, options.mixed_step_tokens, on_cpu=current_platform.is_cpu())
        self._on_nonfinite = options.on_nonfinite
        self._checked = os.environ.get("KIMI_VLLM_CHECK_MEMORY") == "1"
        self._steps: deque[tuple[SchedulerOutput, Step]] = deque()
        self._overrun: WeakSet[Request] = WeakSet()
        self._resumed: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._hits: Counter[str] = Counter()
        self._sent: Counter[str] = Counter()

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule a step, and attach the copies to make before it."""
        with paced(self, self._short_step):
            output = self._schedule(*args, **kwargs)
        if not output.total_num_scheduled_tokens and not self.running and isinstance(self.connector, SessionConnector):
            self.connector.rest()
        return output

    def _schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        # With steps in flight, more may be computed than is known.
        left = sum([more for r in self.running if (more := r.num_tokens - r.num_computed_tokens) > 0])
        self._states.expect(left, self.max_num_scheduled_tokens)
        if self._drafting:
            # By the schedule, and none in the middle of a prompt.
            can_draft = bool(self._drafts[len(self.running)]) and any(not r.is_prefill_chunk for r in self.running)
            wanted = self._drafting.wanted(can_draft)
            self._counts["steps_without_drafts"] += can_draft and not wanted
            self.dynamic_sd_lookup = self._drafts if wanted else self._no_drafts
        self._states.scheduling = True
        output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self._states.scheduling = False
        if operations := self._states.block_pool.take_operations():
            setattr(output, OPERATIONS, operations)
        if pages := self.arena.take_new_pages():
            setattr(output, NEW_PAGES, pages)
        self._steps.append((output, Step(operations, self._accesses(output))))
        for new in output.scheduled_new_reqs:
            self._show_slot(new.req_id, new.block_ids, new.num_computed_tokens)
            if not (request := self.requests[new.req_id]).num_preemptions:
                self._count_hit(request, new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for name, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if name in cached.resumed_req_ids:
                self._show_slot(name, blocks, computed)
        if self._checked:
            # What the step before gave back is gone, and what this one needs is taken.
            self.check_memory()
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take requests whose state is not finite out of the step, then let vLLM handle the others."""
        ended: list[Request] = []
        if sick := getattr(model_runner_output, NONFINITE, None):
            ended = self._quarantine(sick, scheduler_output, model_runner_output)
        while self._steps and self._steps.popleft()[0] is not scheduler_output:
            pass  # a step without a result
        if isinstance(self.connector, SessionConnector):
            self.connector.see(scheduler_output, model_runner_output, self.requests)
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )
        for request in ended:
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    stop_reason=QUARANTINED,
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
        return outputs

    def make_spec_decoding_stats(
        self, spec_decoding_stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Learn whether drafts are worth it; vLLM calls this for each request of a step that had drafts.

        Those that a grammar or a drafter left out and vLLM filled up count as wrong: verifying them costs as much.
        """
        if self._drafting:
            self._drafting.saw(num_draft_tokens, num_accepted_tokens)
        return super().make_spec_decoding_stats(  # type: ignore[misc]
            spec_decoding_stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs
        )

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Statistics of vLLM and ours: slots now, and what happened since the last call."""
        stats: SchedulerStats | None = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        # Hit lengths grow with prompts: only those since the last call are kept, whether or not they are sent.
        hits, self._hits = self._hits, Counter()
        if stats is None:
            return None
        pool = self._states.block_pool
        now = self._counts + pool.counts
        blocks = (now["swaps_out"] + now["swaps_in"]) * pool.state_blocks
        now["swap_bytes"] = (blocks + now["page_swaps_out"] + now["page_swaps_in"]) * self._block_bytes
        now["page_evictions"] = self.arena.page_evictions
        now["value_lost"] += pool.host.value_lost
        if isinstance(self.connector, SessionConnector):
            now += self.connector.counts
        changes = now - self._sent
        self._sent = now
        gauges = {
            "slots_live": pool.slots.num_live,
            "slots_checkpoint": pool.slots.num_idle,
            "slots_host": pool.host.num_idle,
        } | {f"blocks_{kind}": count for kind, count in self.arena.counts().items()}
        gauges |= {f"host_blocks_{kind}": count for kind, count in self.arena.host_counts().items()}
        stats.running_lora_adapters = {STATS + name: value for name, value in (gauges | changes | hits).items()}
        return stats

    def check_memory(self) -> None:
        """Verify that each block and each slot has one kind and its owners, and that counts add up; AssertionError."""
        pool = self._states.block_pool
        waiting = [blocks for _, blocks in self.deferred_frees]
        pages = [table for manager in self._page_managers for table in manager.req_to_blocks.values()]
        pages += [[block for block in blocks if block.pool is self.arena] for blocks in waiting]
        states = list(self._states.req_to_blocks.values())
        states += [[block for block in blocks if block.pool is pool] for blocks in waiting]
        if isinstance(self.connector, SessionConnector):
            states += [[block] for block in self.connector.held.values()]
        pool.check(states)
        check_arena(self.arena, pages)
        assert sum(self.arena.counts().values()) == self.arena.num_gpu_blocks - 1

    def _show_slot(self, name: str, block_ids: Any, num_computed: int) -> None:
        """Put the slot that is read into a table that is new to the worker.

        What has taken its slot along, input for a session or what a connector has loaded, comes with a table that has
        it in its new place only.
        """
        if num_computed:
            slots = block_ids[self._states.kv_cache_group_id]
            slots[(num_computed - 1) // self._states.block_size], _ = self._states.accessed_slots(name, num_computed)

    def _count_hit(self, request: Request, hit: int) -> None:
        self._counts.update(hit_tokens=hit, miss_tokens=request.num_tokens - hit)
        self._hits[f"hit_length:{hit}"] += 1

    def _accesses(self, output: SchedulerOutput) -> dict[str, Access]:
        tables = [(manager.req_to_blocks, manager.block_size) for manager in self._page_managers]
        accesses = {}
        for name, count in output.num_scheduled_tokens.items():
            request = self.requests[name]
            end = request.num_computed_tokens
            # At the earliest: drafts in flight may be rejected.
            first = end - count - self._drafts_in_flight(request)
            read, written = self._states.accessed_slots(name, first)
            # A table only grows, and outlives its request while it is referenced here.
            pages = partial(_pages, [(table[name], size) for table, size in tables], first, end)
            accesses[name] = Access(read, written, pages, request.num_preemptions)
        return accesses

    def _drafts_in_flight(self, request: Request) -> int:
        name, preemptions = request.request_id, request.num_preemptions
        return sum(
            [
                len(drafts)
                for output, step in self._steps
                if (drafts := output.scheduled_spec_decode_tokens.get(name))
                and step.accesses[name].preemptions == preemptions
                and name not in step.blameless  # of a session that has started again
            ]
        )

    def _handle_stopped_request(self, request: Request) -> bool:
        """Publish the boundaries of a last window, and note a session whose slot is ahead of its tokens.

        The latter gets more input while steps are in flight.
        """
        if self._states.kv_cache_spec.window:
            # Drafts beyond an answer's end may have counted.
            if request.resumable:  # vLLM takes the placeholders off
                most = request.num_tokens - 1 + request.num_output_placeholders
                request.num_computed_tokens = min(request.num_computed_tokens, most)
            else:  # vLLM publishes when it schedules, and no step follows
                known = min(request.num_computed_tokens, request.num_tokens)
                self.kv_cache_manager.cache_blocks(request, known)
        if request.resumable and request.num_in_flight_tokens:
            self._overrun.add(request)
            for _, step in self._steps:
                step.blameless.add(request.request_id)
        return bool(super()._handle_stopped_request(request))  # type: ignore[misc]

    def _update_request_as_session(self, session: Request, update: StreamingUpdate) -> None:
        """Take more input; where the live state has a token too many, resume from the last checkpoint."""
        super()._update_request_as_session(session, update)  # type: ignore[misc]
        if session in self._overrun:
            self._overrun.discard(session)
            self._free_request_blocks(session)
            session.num_computed_tokens = 0

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Withdraw pages that the step being scheduled was to write: with priorities it may lose its request.

        vLLM leaves them published, although they are never written.
        """
        for manager in self._page_managers:
            unwritten = manager.req_to_blocks[request.request_id][request.num_computed_tokens // manager.block_size :]
            self.kv_cache_manager.evict_blocks({block.block_id for block in unwritten})
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]

    def _quarantine(
        self, sick: list[Sick], scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> list[Request]:
        """Withdraw all that came from the slots a step left sick, and end or restart the requests concerned.

        Returns:
            The requests that ended.
        """
        reported = next((i for i, (output, _) in enumerate(self._steps) if output is scheduler_output), None)
        if reported is None:
            return []
        steps = [step for _, step in list(self._steps)[reported:]]
        found = spread(_that_count(sick, steps[0], scheduler_output, model_runner_output), steps)
        self._states.block_pool.withdraw_slots(found.slots)
        self.kv_cache_manager.evict_blocks(found.pages)
        ended = []
        for request in self._still_there(found.origins):
            name = request.request_id
            self._counts["quarantined"] += 1
            if self._on_nonfinite == "resume" and name not in self._resumed:
                self._resumed.add(name)
                self._restart(request)
                logger.warning("KDA state of request %s is not finite: recomputed from its last good checkpoint.", name)
            else:
                ended += self.finish_requests(name, RequestStatus.FINISHED_ERROR)
                logger.error("KDA state of request %s is not finite: the request ends with an error.", name)
        for request in self._still_there(found.victims):
            self._restart(request)
        self._resumed &= self.requests.keys()
        return ended

    def _still_there(self, sick: dict[str, int]) -> list[Request]:
        """The requests that are still running, or whose tokens from the sick step are still to be delivered.

        Args:
            sick: Requests, and the preemptions of each when it was sick.
        """
        found = []
        for name, preemptions in sick.items():
            request = self.requests.get(name)
            if request is None or request.is_finished():  # what has ended is only being saved
                continue
            # vLLM delivers what a preempted request has in flight, unless `drop_stale_output` is set.
            if request.num_preemptions == preemptions or not request.drop_stale_output:
                found.append(request)
        return found

    def _restart(self, request: Request) -> None:
        """Recompute a request from its last checkpoint, and drop what its steps in flight sample."""
        if request.status != RequestStatus.RUNNING:
            request.drop_stale_output = True
            return
        self.running = remove_all(self.running, {request})
        self._preempt_request(request, time.monotonic(), drop_stale_output=True)
        # If it is back in the next step, the first model runner needs all its tokens, not only the last.
        self.prev_step_scheduled_req_ids.discard(request.request_id)


def _that_count(
    sick: list[Sick], step: Step, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
) -> set[int]:
    """The slots that are sick with a token of their sequence, and not only with a draft that was rejected."""
    counted: dict[int, int] = {}
    for name in scheduler_output.scheduled_spec_decode_tokens:
        sampled = model_runner_output.sampled_token_ids[model_runner_output.req_id_to_index[name]]
        # As many tokens are sampled as count: the last comes from the last draft that was accepted.
        counted.update(dict.fromkeys(step.accesses[name].written, max(1, len(sampled))))
    return {slot for slot, token in sick if token < counted.get(slot, token + 1)}


def _pages(tables: list[tuple[list[KVCacheBlock], int]], first: int, end: int) -> tuple[set[int], set[int]]:
    """The pages that a step only reads, and those that it writes; `tables` come with their block sizes."""
    read: set[int] = set()
    written: set[int] = set()
    for table, size in tables:
        read.update(block.block_id for block in table[: first // size] if not block.is_null)
        written.update(block.block_id for block in table[first // size : cdiv(end, size)] if not block.is_null)
    return read, written


class _KimiScheduler(_StateScheduling, Scheduler):
    """Synchronous."""


class _KimiAsyncScheduler(_StateScheduling, AsyncScheduler):
    """Asynchronous."""


class KimiScheduler:
    """Chosen in vLLM's configuration before it is known whether scheduling will be asynchronous."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        """The scheduler that the final configuration asks for."""
        chosen = _KimiAsyncScheduler if vllm_config.scheduler_config.async_scheduling else _KimiScheduler
        return chosen(vllm_config, *args, **kwargs)
