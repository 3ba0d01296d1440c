"""vLLM's scheduler, with what happens to states between steps: swaps, quarantine, statistics.

Scheduling itself is untouched. What is added: the copies to and from host memory go out with a step; a step's report of
slots that are not finite ends or restarts the requests that wrote them; counters leave with vLLM's own statistics.
"""

import time
from collections import Counter
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.sched.utils import remove_all
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from kimi_vllm.cache.exchange import MOVES, NONFINITE, STATS
from kimi_vllm.cache.manager import KDAStateManager
from kimi_vllm.options import KimiOptions

logger = init_logger("vllm.kimi_vllm")

QUARANTINED = (
    "kimi-vllm: the request's KDA state became NaN or infinite. The request was ended and its saved states were "
    "withdrawn; no other request is affected. Try again, or start the server with "
    '--additional-config \'{"kimi": {"on_nonfinite": "resume"}}\'.'
)
"""`stop_reason` of a request that the guard ended, with the finish reason ``error``."""


class _StateScheduling:
    """Mixed into vLLM's synchronous and asynchronous schedulers; the names below are theirs."""

    vllm_config: Any
    kv_cache_manager: Any
    requests: dict[str, Request]
    running: list[Request]
    finish_requests: Any
    _preempt_request: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self._states: KDAStateManager = next(m for m in managers if isinstance(m, KDAStateManager))
        self._page_managers = [m for m in managers if m is not self._states]
        self._on_nonfinite = KimiOptions.from_additional_config(self.vllm_config.additional_config).on_nonfinite
        self._first_tokens: dict[int, dict[str, int]] = {}
        self._resumed: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._hits: Counter[str] = Counter()
        self._sent: Counter[str] = Counter()

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """A step of vLLM's, with the copies to make before it."""
        output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if moves := self._states.block_pool.take_moves():
            setattr(output, MOVES, moves)
        self._first_tokens[id(output)] = {
            name: self.requests[name].num_computed_tokens - count for name, count in output.num_scheduled_tokens.items()
        }
        for new in output.scheduled_new_reqs:
            if not (request := self.requests[new.req_id]).num_preemptions:
                self._count_hit(request, new.num_computed_tokens)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take sick requests out of the step, then let vLLM handle the others."""
        first_tokens = self._first_tokens.pop(id(scheduler_output), {})
        ended: list[Request] = []
        if sick := getattr(model_runner_output, NONFINITE, None):
            ended = self._quarantine(set(sick), first_tokens)
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

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Statistics of vLLM's and ours: slots now, and what happened since the last call."""
        stats: SchedulerStats | None = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        # Lengths are as many as there are prompts: only those since the last call, which nobody may have asked for.
        hits, self._hits = self._hits, Counter()
        if stats is None:
            return None
        pool = self._states.block_pool
        now = self._counts + pool.counts
        now["swap_bytes"] = (now["swaps_out"] + now["swaps_in"]) * self._states.kv_cache_spec.slot_bytes
        changes = {name: now[name] - self._sent[name] for name in now if now[name] != self._sent[name]}
        self._sent = Counter(now)
        gauges = {
            "slots_live": pool.slots.num_live,
            "slots_checkpoint": pool.slots.num_idle,
            "slots_free": pool.slots.num_free,
            "slots_host": pool.host.num_held,
        }
        stats.running_lora_adapters = {STATS + name: value for name, value in (gauges | changes | hits).items()}
        return stats

    def _count_hit(self, request: Request, hit: int) -> None:
        self._counts["hit_tokens"] += hit
        self._counts["miss_tokens"] += request.num_tokens - hit
        self._hits[f"hit_length:{hit}"] += 1

    def _quarantine(self, sick: set[int], first_tokens: dict[str, int]) -> list[Request]:
        """End or restart the requests that wrote the sick slots in the step that began at `first_tokens`.

        Returns:
            Those that ended.
        """
        ended = []
        for name, first in first_tokens.items():
            request = self.requests.get(name)
            # One that was aborted or preempted while the step ran has given its slots up, and published nothing sick.
            if request is None or request.status != RequestStatus.RUNNING:
                continue
            if sick.isdisjoint(self._states.written_slots(name, first)):
                continue
            self._counts["quarantined"] += 1
            infected = self._states.quarantine(name, first)
            pages = {
                block.block_id
                for manager in self._page_managers
                for block in manager.req_to_blocks[name][first // manager.block_size :]
                if not block.is_null
            }
            self.kv_cache_manager.evict_blocks(pages)
            if self._on_nonfinite == "resume" and name not in self._resumed:
                self._resumed.add(name)
                self._restart(request)
                logger.warning("KDA state of request %s is not finite: computed again from its last good state.", name)
            else:
                ended += self.finish_requests(name, RequestStatus.FINISHED_ERROR)
                logger.error("KDA state of request %s is not finite: the request ends with an error.", name)
            for other in infected:
                # It resumed from a state that nobody knew to be sick yet, so it is not to blame.
                if (victim := self.requests.get(other)) is not None and victim.status == RequestStatus.RUNNING:
                    self._restart(victim)
        self._resumed &= self.requests.keys()
        return ended

    def _restart(self, request: Request) -> None:
        self.running = remove_all(self.running, {request})
        self._preempt_request(request, time.monotonic(), drop_stale_output=True)


class _KimiScheduler(_StateScheduling, Scheduler):
    """The synchronous one."""


class _KimiAsyncScheduler(_StateScheduling, AsyncScheduler):
    """The asynchronous one."""


class KimiScheduler:
    """Named in vLLM's configuration before it is known whether scheduling will be asynchronous."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the scheduler that the final configuration asks for."""
        chosen = _KimiAsyncScheduler if vllm_config.scheduler_config.async_scheduling else _KimiScheduler
        return chosen(vllm_config, *args, **kwargs)
