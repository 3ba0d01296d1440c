"""vLLM's scheduler and a worker of hashes under random schedules, as the engine's loop drives them."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.v1.request import RequestStatus

from kimi_vllm.cache.eviction import Eviction
from kimi_vllm.cache.scheduler import KimiScheduler
from kimi_vllm.cache.window import window_of
from serve.bench.cache import replay
from serve.bench.cache.replay import Memory
from support.arrivals import BLOCK, Arrival
from support.drafter import Drafter, Moods
from support.engine import ngram
from support.hash_worker import HashWorker
from support.hashes import SICK

STATE_BLOCKS = 3


def memory(concurrency: int, blocks: int, chunk: int) -> Memory:
    """Limits of an engine; `blocks` without the null block."""
    return Memory(concurrency, 1 + blocks, STATE_BLOCKS, step_tokens=chunk, longest=512)


# A request of the longest kind is 5 pages, and 6 blocks for the state that it reads and the one that it writes.
SCARCE: dict[str, tuple[Memory, dict[str, int]]] = {
    "blocks": (memory(3, 20, 97), {}),
    "host": (memory(3, 20, 97), {"num_host_blocks": 6 * STATE_BLOCKS}),
    "host-pages": (memory(3, 15, 97), {"num_host_blocks": 50}),
    "few-blocks": (memory(4, 14, 150), {}),
    "lru-host-priority": (memory(4, 14, 61), {"num_host_blocks": 4 * STATE_BLOCKS, "checkpoint_interval": 128}),
}

ROOMY: dict[str, tuple[Memory, dict[str, int]]] = {
    "room": (memory(6, 190, 600), {}),
    "few-slots": (memory(6, 50, 600), {"num_host_blocks": 4 * STATE_BLOCKS}),
}
"""What lets many run at once, and read what others have just written."""


def eviction(name: str) -> Eviction:
    """The eviction policy of one of `SCARCE`."""
    return "lru" if name.startswith("lru") else "value"


@dataclass(frozen=True)
class Mode:
    """How an engine runs: steps in flight, which of vLLM's model runners, the most drafts, `mixed_step_tokens`."""

    asynchronous: bool
    second_runner: bool
    drafts: int = 0
    short_step: int = 0

    def server(self, name: str, on_nonfinite: str = "abort", seed: int = 0) -> "Server":
        """A new server with the caches of one of `SCARCE`; `seed` decides the drafts."""
        config = _configuration(self, name, on_nonfinite)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(self.second_runner)))  # the scheduler's half of it
            server = Server(name, config, Drafter(self.drafts, seed))
            if self.drafts:
                server.scheduler._drafting = Moods(seed)
            return server


@cache
def _configuration(mode: Mode, name: str, on_nonfinite: str) -> VllmConfig:
    policy = "priority" if name.endswith("priority") else "fcfs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")  # the second runner wants a GPU
        options = {"speculative_config": ngram(mode.drafts)} if mode.drafts else {}
        config = replay.configuration((SCARCE | ROOMY)[name][0], eviction(name), scheduling_policy=policy, **options)
    config.scheduler_config.async_scheduling = mode.asynchronous  # on CPUs vLLM switches it off
    config.additional_config["kimi"] |= {"on_nonfinite": on_nonfinite, "mixed_step_tokens": mode.short_step}
    return config


MODES = {
    "step-by-step": Mode(asynchronous=False, second_runner=False),
    "two-in-flight": Mode(asynchronous=True, second_runner=True),
    "two-in-flight-first-runner": Mode(asynchronous=True, second_runner=False, short_step=30),
}
"""As on a CPU, as on a GPU, and as on a GPU with ``VLLM_USE_V2_MODEL_RUNNER=0``."""

DRAFTING = {
    "drafts": replace(MODES["step-by-step"], drafts=3),
    "drafts-in-flight": replace(MODES["two-in-flight"], drafts=3, short_step=40),
    "drafts-in-flight-first-runner": replace(MODES["two-in-flight-first-runner"], drafts=15),
}
"""The same with speculative decoding."""


class Server:
    """vLLM's scheduler, a worker, and the loop of the engine between them."""

    def __init__(self, name: str, config: VllmConfig, drafter: Drafter) -> None:
        limits, states = (SCARCE | ROOMY)[name]
        window = window_of(config)
        specs = replay.our_specs(config, limits.state_blocks, eviction(name), window=window, **states)
        self.scheduler = replay.build(KimiScheduler, config, specs)
        self.manager = self.scheduler._states
        fresh_last = not self.scheduler.use_v2_model_runner
        self.worker = HashWorker(self.manager.kv_cache_group_id, BLOCK, window, fresh_last=fresh_last)
        self.worker.drafter = drafter
        self.depth = 1 + config.scheduler_config.async_scheduling
        self.in_flight: deque[Any] = deque()
        self.seen: Counter[str] = Counter()
        self.answers: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}

    def add(self, name: str, arrival: Arrival) -> None:
        """Send a request."""
        request = replay.make_request(self.scheduler, name, arrival.prompt, arrival.max_tokens)
        request.priority = arrival.priority  # looked at by the policy of that name
        self.answers[name] = []
        self.scheduler.add_request(request)

    def abort(self, name: str) -> None:
        """Take a request back, if it is still there."""
        self.seen["aborts"] += name in self.scheduler.requests
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def turn(self, aborted: Sequence[str] = (), *, reset: bool = False) -> None:
        """As the loop of `EngineCore`: launch while there is room in flight, else wait for the oldest.

        Args:
            aborted: Requests taken back while the step runs.
            reset: Whether the prefix cache is reset while the step runs, with all that run started again.
        """
        waits = True
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self.in_flight.append((output, self.worker.execute(output)))
            self.check_accesses()
            self.seen["hits"] += sum(new.num_computed_tokens > 0 for new in output.scheduled_new_reqs)
            self.seen["preemptions"] += len(output.preempted_req_ids or ())
            waits = len(self.in_flight) == self.depth or not output.total_num_scheduled_tokens
        for name in aborted:
            self.abort(name)
        if reset:
            self.seen["resets"] += 1
            self.scheduler.reset_prefix_cache(reset_running_requests=True)
        if self.in_flight and waits:
            output, result = self.in_flight.popleft()
            for outputs in self.scheduler.update_from_output(output, result).values():
                for output in outputs.outputs:
                    self.answers[output.request_id] += output.new_token_ids
                    if output.finish_reason is not None:
                        self.reasons[output.request_id] = str(output.finish_reason)
            if self.depth == 1:  # else the worker alone knows them
                self.scheduler.update_draft_token_ids(self.worker.take_drafts(result))

    def play(self, schedule: Sequence[Arrival], resets: frozenset[int] = frozenset()) -> None:
        """Run a round to its end; `resets` are turns at which the prefix cache is reset."""
        self.answers, self.reasons = {}, {}
        waiting, turn = dict(enumerate(schedule)), 0
        while waiting or self.scheduler.has_requests() or self.in_flight:
            for index in [index for index, arrival in waiting.items() if arrival.step <= turn]:
                self.add(str(index), waiting.pop(index))
            due = [
                str(index)
                for index, arrival in enumerate(schedule)
                if arrival.abort_after is not None and turn == arrival.step + arrival.abort_after
            ]
            if turn % 2:
                for name in due:
                    self.abort(name)
                due = []
            self.turn(due, reset=turn in resets)
            self.scheduler.check_memory()
            turn += 1
            assert turn < 2000, "requests that never finish"

    def check_accesses(self) -> None:
        """Whatever the worker has touched in a step, the scheduler knows of: else a sick state gets away."""
        accesses = self.scheduler._steps[-1][1].accesses
        for name, (read, written, behind, ahead) in self.worker.touched.items():
            access = accesses[name]
            pages_read, pages_written = access.pages()
            assert read in (access.read, *access.written), f"{name} reads slot {read}, and not {access.read}"
            assert written <= {*access.written}, f"{name} writes slots {written}, and not {access.written}"
            assert ahead <= pages_written, f"{name} writes pages {ahead}, and not {pages_written}"
            assert behind <= pages_read | pages_written, f"{name} reads pages {behind}, and not {pages_read}"

    def check_idle(self) -> None:
        """No request is left, so nothing is held."""
        self.scheduler.schedule()  # frees what waited for the last step
        assert self.manager.block_pool.slots.num_live == 0, "slots are lost"
        assert not self.manager.req_to_blocks
        pages = self.scheduler.kv_cache_manager.block_pool
        assert pages.get_num_free_blocks() == pages.num_gpu_blocks - 1

    def check_healthy(self) -> None:
        """Nothing that a later request can find comes from a sick state."""
        pool, pages = self.manager.block_pool, self.scheduler.kv_cache_manager.block_pool
        lengths = {slot: pool.slots.origin(slot)[1] for slot in pool.slots.slots()}
        lengths |= {pool.slots.num_slots + slot: pool.host.origin(slot)[1] for slot in pool.host.slots()}
        for slot, length in lengths.items():
            assert self.worker.state(slot, length * BLOCK) != SICK, f"slot {slot} is published, and sick"
        for page in pages.blocks:
            if page.block_hash is not None:
                assert SICK not in self.worker.page(page.block_id), f"page {page.block_id} can be found, and is sick"
