"""Random schedules through vLLM's scheduler and our manager: a worker of hashes reads the right prefix everywhere.

As on a CPU, step by step for vLLM's first model runner, and as on a GPU, with two steps in flight for the second.
Everything is scarce. A case is two rounds of a few requests on a new scheduler, so that a failure can be repeated.
"""

from collections import Counter, deque

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.arrivals import BLOCK, rounds
from support.hash_worker import HashWorker, answer
from vllm.v1.request import RequestStatus

from kimi_vllm.bench import replay
from kimi_vllm.bench.replay import Memory
from kimi_vllm.cache.scheduler import KimiScheduler

CASES = 100  # each of eight, so 800


def memory(concurrency, slots, chunk, pages=100):
    return Memory(concurrency=concurrency, pages=pages, slots=slots, step_tokens=chunk, longest=512)


SCARCE = {
    "slots": (memory(3, 4, 97), {}),
    "host": (memory(3, 4, 97), {"num_host_slots": 6}),
    "pages": (memory(4, 12, 150, pages=10), {}),
    "lru-host-pages-priority": (memory(4, 5, 61, pages=10), {"num_host_slots": 4, "checkpoint_interval": 128}),
}
PATHS = {
    "slots": {"hits", "aborts", "evictions"},
    "host": {"hits", "aborts", "evictions", "swaps_out", "swaps_in"},
    "pages": {"hits", "aborts", "preemptions"},
    "lru-host-pages-priority": {"hits", "aborts", "evictions", "swaps_out", "swaps_in", "preemptions"},
}


def eviction(name):
    return "lru" if name.startswith("lru") else "value"


class Server:
    """vLLM's scheduler, a worker, and the loop of the engine between them."""

    def __init__(self, name, config):
        limits, states = SCARCE[name]
        specs = replay.our_specs(config, limits.slots, eviction(name), **states)
        self.scheduler = replay.build(KimiScheduler, config, specs)
        self.manager = self.scheduler._states
        self.worker = HashWorker(self.manager.kv_cache_group_id, BLOCK)
        self.depth = 1 + config.scheduler_config.async_scheduling
        self.answers, self.done, self.in_flight, self.seen = {}, set(), deque(), Counter()

    def add(self, name, arrival):
        request = replay.make_request(self.scheduler, name, arrival.prompt, arrival.max_tokens)
        request.priority = arrival.priority  # looked at by the policy of that name
        self.answers[name] = []
        self.scheduler.add_request(request)

    def abort(self, name):
        self.seen["aborts"] += name in self.scheduler.requests
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def turn(self):
        """As the loop of `EngineCore`: launch while there is room in flight, else wait for the oldest."""
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self.in_flight.append((output, self.worker.execute(output)))
            self.seen["hits"] += sum(new.num_computed_tokens > 0 for new in output.scheduled_new_reqs)
            self.seen["preemptions"] += len(output.preempted_req_ids or ())
            if len(self.in_flight) < self.depth and output.total_num_scheduled_tokens:
                return
        if self.in_flight:
            for outputs in self.scheduler.update_from_output(*self.in_flight.popleft()).values():
                for output in outputs.outputs:
                    self.answers[output.request_id] += output.new_token_ids
                    self.done |= {output.request_id} if output.finish_reason else set()

    def play(self, schedule):
        """Run a round to its end."""
        self.answers, self.done = {}, set()
        waiting, turn = dict(enumerate(schedule)), 0
        while waiting or self.scheduler.has_requests() or self.in_flight:
            for index in [index for index, arrival in waiting.items() if arrival.step <= turn]:
                self.add(str(index), waiting.pop(index))
            for index, arrival in enumerate(schedule):
                if arrival.abort_after is not None and turn == arrival.step + arrival.abort_after:
                    self.abort(str(index))
            self.turn()
            self.manager.block_pool.slots.check()
            self.manager.block_pool.host.check()
            turn += 1
            assert turn < 2000, "requests that never finish"

    def check_idle(self):
        """No request is left, so nothing is held."""
        self.scheduler.schedule()  # frees what waited for the last step
        assert self.manager.block_pool.slots.num_live == 0
        assert not self.manager.req_to_blocks
        pages = self.scheduler.kv_cache_manager.block_pool
        assert pages.get_num_free_blocks() == pages.num_gpu_blocks - 1


@pytest.fixture(params=[False, True], ids=["step-by-step", "two-in-flight"])
def make_server(request, monkeypatch):
    """A server by name, as on a CPU or as on a GPU."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")  # while configuring: the second runner wants a GPU
    configurations = {}
    for name, (limits, _) in SCARCE.items():
        policy = "priority" if name.endswith("priority") else "fcfs"
        configurations[name] = replay.configuration(limits, eviction(name), scheduling_policy=policy)
        configurations[name].scheduler_config.async_scheduling = request.param  # on CPUs vLLM switches it off
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(request.param)))
    return lambda name: Server(name, configurations[name])


def run_cases(make_server, **options):
    """Play random schedules; what was seen of what they are to show."""
    seen = Counter()

    @settings(
        max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], **options
    )
    @given(rounds=rounds, reset_between=st.booleans())
    def cases(rounds, reset_between):
        server = make_server()
        for number, schedule in enumerate(rounds):
            if number and reset_between:
                assert server.scheduler.reset_prefix_cache()
            server.play(schedule)
            server.check_idle()
            for index, arrival in enumerate(schedule):
                ours = server.answers[str(index)]
                assert ours == answer(arrival.prompt, len(ours))
                if str(index) in server.done:
                    assert len(ours) == arrival.max_tokens
                else:
                    assert arrival.abort_after is not None
        seen.update(cases=1, **server.seen, **server.manager.block_pool.counts)

    cases()
    return seen


@pytest.mark.parametrize("name", SCARCE)
def test_every_request_reads_its_own_prefix_and_leaves_nothing_behind(name, make_server):
    seen = run_cases(lambda: make_server(name))
    assert seen["cases"] >= CASES
    assert {path for path in PATHS[name] if not seen[path]} == set(), seen


def hits_at_once(manager, original):
    def change(*args, **kwargs):
        manager._unsettled.clear()
        return original(*args, **kwargs)

    return change


def dropped_too_early(manager, original):
    return lambda name, computed, *rest: original(name, computed + BLOCK, *rest)


def forgotten(manager, original):
    return lambda name: original(name)[1:]


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("get_num_blocks_to_allocate", hits_at_once, "is another prefix's"),
        ("remove_skipped_blocks", dropped_too_early, "write slot . at once"),
        ("pop_blocks_for_free", forgotten, "num_live"),
    ],
)
def test_a_manager_that_errs_is_caught(method, change, message, make_server):
    def broken():
        server = make_server("slots")
        setattr(server.manager, method, change(server.manager, getattr(server.manager, method)))
        return server

    with pytest.raises(AssertionError, match=message):
        run_cases(broken, phases=[Phase.generate])
