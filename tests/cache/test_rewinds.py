"""Where vLLM takes computed tokens back: pages are overwritten, but a live state has gone on.

Each place must have a state to return to, start again, or belong to a feature that is refused.
"""

import ast
import inspect

import pytest
from support.arrivals import BLOCK
from support.drafter import Drafter
from support.hash_worker import HashWorker
from support.hashes import answer
from support.schedules import DRAFTING, MODES, Server
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched import async_scheduler
from vllm.v1.core.sched import scheduler as vllm_scheduler
from vllm.v1.request import Request, RequestStatus

from kimi_vllm.cache.scheduler import KimiScheduler
from serve.bench.cache import replay
from serve.bench.cache.replay import Memory

WAYS = {
    "schedule": "sets it to the length of a prefix hit, at whose end a state was kept",
    "_preempt_request": "sets it to 0",
    "_update_after_schedule": "adds what the step computes",
    "update_from_output": "takes rejected drafts back: a slot holds the state before them, and records",
    "_update_request_with_output": "takes drafts behind a stop back: likewise",
    "_handle_stopped_request": "takes the tokens of steps in flight back: ours starts such a session again",
    "_update_waiting_for_remote_kv": "takes the last token back if all were loaded: a session that long is a miss",
    "_handle_failed_recving": "sets it to 0, after a load that failed",
    "_update_requests_with_invalid_blocks": "after a load that failed by blocks; ours fails by requests",
}
"""vLLM's methods that set the number of a request's computed tokens, and why none leaves a state too far."""


@pytest.mark.parametrize("module", [vllm_scheduler, async_scheduler])
def test_every_place_that_changes_the_number_of_computed_tokens_is_known(module):
    found = set()
    for function in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                if any(isinstance(t, ast.Attribute) and t.attr == "num_computed_tokens" for t in targets):
                    found.add(function.name)
    assert found <= WAYS.keys()


def session(server: Server, prompt, max_tokens, stop=0):
    parameters = SamplingParams(temperature=0, max_tokens=max_tokens, stop_token_ids=[stop])
    kept = replay.make_request(server.scheduler, "session", prompt, max_tokens)
    request = Request("session", list(prompt), parameters, None, resumable=True, block_hasher=kept._block_hasher)
    server.answers["session"] = []
    server.scheduler.add_request(request)


def until(server: Server, happened):
    for _ in range(200):
        if happened():
            return
        server.turn()
    raise AssertionError("it never happens")


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("length", [5, 60, 64, 70, 200])
@pytest.mark.parametrize("stops_after", [1, 3, 4, 5])
@pytest.mark.parametrize("mode", MODES | DRAFTING)
def test_a_session_goes_on_from_the_tokens_that_vllm_keeps(mode, stops_after, length, full):
    """At a stop token the next step is in flight: it has put that token into the live slot, and vLLM takes it back.

    Drafts behind that token may have counted, too. In a full memory a session takes its slot along over a boundary.
    """
    server = (MODES | DRAFTING)[mode].server("blocks")
    server.worker.drafter = Drafter((MODES | DRAFTING)[mode].drafts, luck=[0.9, 1])
    prompt = [3 + (7 * i) % 80 for i in range(length)]
    first = answer(prompt, stops_after)
    if first[-1] in first[:-1]:
        pytest.skip("the stop token comes earlier")
    session(server, prompt, 50, stop=first[-1])
    until(server, lambda: server.worker.touched)
    if full:  # two pages, and no state
        arena = server.scheduler.arena
        arena.get_new_blocks(arena.get_num_free_blocks() - 2)
    until(server, lambda: server.scheduler.requests["session"].status == RequestStatus.WAITING_FOR_STREAMING_REQ)
    assert server.answers["session"] == first
    session(server, [5, 6, 7], 4)
    until(server, lambda: len(server.answers["session"]) == 4)
    assert server.answers["session"] == answer([*prompt, *first[:-1], 5, 6, 7], 4)


def test_pages_of_a_request_preempted_in_the_step_that_was_to_write_them_cannot_be_found():
    """Pages are published when they are scheduled, and with priorities vLLM may change its mind within the step."""
    limits = Memory(concurrency=2, blocks=31, state_blocks=3, step_tokens=200, longest=512)
    config = replay.configuration(limits, "value", scheduling_policy="priority", long_prefill_token_threshold=100)
    scheduler = replay.build(KimiScheduler, config, replay.our_specs(config, limits.state_blocks, "value"))
    worker = HashWorker(scheduler._states.kv_cache_group_id, BLOCK)

    def add(name, length, priority):
        request = replay.make_request(scheduler, name, [3 + (priority + i) % 80 for i in range(length)], 50)
        request.priority = priority
        scheduler.add_request(request)

    def step(leave=None):
        if leave is not None:
            scheduler.arena.get_new_blocks(scheduler.arena.get_num_free_blocks() - leave)
        output = scheduler.schedule()
        scheduler.update_from_output(output, worker.execute(output))
        return output

    add("low", 500, priority=2)
    step()
    add("high", 63, priority=0)
    assert step().num_scheduled_tokens == {"low": 100, "high": 63}
    assert step(leave=1).num_scheduled_tokens == {"low": 100, "high": 1}
    output = step(leave=1)
    assert output.num_scheduled_tokens == {"high": 1}, "it needs a page, and takes one of those just given to the other"
    assert output.preempted_req_ids == {"low"}
    pages = scheduler.kv_cache_manager.block_pool
    found = [page.block_id for page in pages.blocks if page.block_hash is not None]
    assert found
    assert all(len(worker.page(page)) == BLOCK for page in found)
