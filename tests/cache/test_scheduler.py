"""Our additions to vLLM's scheduler, driven without a model: sick slots with two steps in flight, statistics."""

from collections import Counter, deque

import pytest
from vllm.v1.metrics.stats import PrefixCacheStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from kimi_vllm.cache.exchange import NEW_PAGES, NONFINITE, OPERATIONS, STATS
from kimi_vllm.cache.scheduler import KimiScheduler, _KimiAsyncScheduler, _KimiScheduler
from serve.bench.cache.replay import Memory, build, configuration, make_request, our_scheduler, our_specs, step

ANSWER = list(range(40, 60))
BLOCKS, STATE = 300, 8


@pytest.fixture
def scheduler():
    scheduler = our_scheduler(Memory(concurrency=4, blocks=1 + BLOCKS, state_blocks=STATE, step_tokens=256))
    yield scheduler
    scheduler.check_memory()


def report(scheduler, output, sick=(), token=7):
    names = list(output.num_scheduled_tokens)
    result = ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: i for i, name in enumerate(names)},
        sampled_token_ids=[[token] if name in done(scheduler) else [] for name in names],
    )
    if sick:
        setattr(result, NONFINITE, [(slot, 0) for slot in sick])
    return scheduler.update_from_output(output, result)


def done(scheduler):
    return {name for name, r in scheduler.requests.items() if r.num_computed_tokens >= r.num_tokens}


def test_who_resumed_from_a_state_that_turns_out_sick_starts_again(scheduler):
    """With a second step scheduled before the first reports, as asynchronous scheduling and pipelines do."""
    prompt = list(range(3, 93)) * 4
    scheduler.add_request(make_request(scheduler, "sick", prompt[:300], 4))
    first = scheduler.schedule()
    sick_slot = scheduler._states.req_to_blocks["sick"][-1].block_id
    scheduler.add_request(make_request(scheduler, "other", [*prompt[:256], 5, 6], len(ANSWER)))
    scheduler.add_request(make_request(scheduler, "unrelated", [9] * 20, len(ANSWER)))
    scheduler.max_num_scheduled_tokens = 512
    second = scheduler.schedule()
    assert second.num_scheduled_tokens["other"] == 2, "it resumes after 256 tokens"

    outputs = report(scheduler, first, sick=[sick_slot])
    [ended] = outputs[0].outputs
    assert (ended.request_id, str(ended.finish_reason)) == ("sick", "error")
    assert "sick" not in scheduler.requests
    assert scheduler.requests["other"].status == RequestStatus.PREEMPTED
    assert scheduler.requests["unrelated"].status == RequestStatus.RUNNING

    report(scheduler, second)
    assert scheduler.requests["other"].num_output_tokens == 0, "a token computed from a sick state"
    assert scheduler.requests["unrelated"].num_output_tokens == 1
    again = scheduler.schedule()
    # The step has room for 256 tokens, one of them is the other request's.
    assert again.num_scheduled_tokens["other"] == 255, "nothing of the sick state is left to resume from"
    report(scheduler, again)
    answers = {"other": ANSWER, "unrelated": ANSWER}
    while scheduler.requests:
        step(scheduler, answers)
    scheduler.check_memory()
    assert scheduler._states.block_pool.slots.num_live == 0


@pytest.mark.parametrize("depth", [1, 2], ids="in-flight{}".format)
@pytest.mark.parametrize("interval", [0, 64], ids="interval{}".format)
def test_checkpoints_of_a_prompt_leave_room_for_its_next_chunk(interval, depth):
    """Beside a request that decodes, in memory that holds both: nobody is preempted, nothing is computed twice."""
    pages, states, growth = (5 + 33), 2 * STATE, 1
    for spare in range(5 * STATE):
        memory = Memory(4, 1 + pages + states + growth + spare, STATE, step_tokens=512, longest=2112)
        config = configuration(memory, "value")
        scheduler = build(KimiScheduler, config, our_specs(config, STATE, checkpoint_interval=interval))
        scheduler.add_request(make_request(scheduler, "decode", [3] * 250, 60))
        scheduler.add_request(make_request(scheduler, "prompt", [4 + i % 90 for i in range(2100)], 10))
        steps, computed, lost = deque(), 0, 0
        while scheduler.requests:
            steps.append(scheduler.schedule())
            computed += steps[-1].total_num_scheduled_tokens
            lost += len(steps[-1].preempted_req_ids or ())
            if len(steps) == depth or not scheduler.requests:
                report(scheduler, steps.popleft())
        assert (spare, lost, computed) == (spare, 0, 250 + 59 + 2100 + 9)


def test_a_report_about_a_slot_that_has_changed_hands_harms_nobody(scheduler):
    scheduler.add_request(make_request(scheduler, "gone", [3] * 20, 4))
    first = scheduler.schedule()
    slot = scheduler._states.req_to_blocks["gone"][-1].block_id
    scheduler.finish_requests("gone", RequestStatus.FINISHED_ABORTED)
    scheduler.add_request(make_request(scheduler, "next", [4] * 20, 4))
    second = scheduler.schedule()
    report(scheduler, first, sick=[slot])
    assert scheduler.requests["next"].status == RequestStatus.RUNNING
    report(scheduler, second)
    assert scheduler.requests["next"].num_output_tokens == 1
    assert scheduler._counts["quarantined"] == 0


@pytest.mark.parametrize("length", [50, 64, 300, 700])
def test_an_answer_tells_how_many_tokens_were_written_to_the_cache(length, scheduler):
    """In chunks of 256 tokens. The same prompt again writes nothing, a longer one what it adds."""
    prompt, boundary = [3 + i % 90 for i in range(length)], length // 64 * 64
    longer = [*prompt, *[5] * 64]
    for asked, hit, created in (
        (prompt, 0, boundary),
        (prompt, (length - 1) // 64 * 64, 0),
        (longer, boundary, len(longer) // 64 * 64 - boundary),
    ):
        scheduler.add_request(make_request(scheduler, "a", asked, 1))
        while scheduler.requests:
            outputs = report(scheduler, scheduler.schedule())
        [stats] = [output.prefill_stats for output in outputs[0].outputs]
        assert (stats.num_cached_tokens, stats.num_cache_creation_tokens) == (hit, created)


def test_statistics_are_changes_and_gauges(scheduler):
    scheduler.log_stats = scheduler.kv_cache_manager.log_stats = True
    scheduler.kv_cache_manager.prefix_cache_stats = PrefixCacheStats()
    scheduler.add_request(make_request(scheduler, "a", [3] * 100, 2))
    stats = report(scheduler, scheduler.schedule())[0].scheduler_stats.running_lora_adapters
    assert stats[f"{STATS}miss_tokens"] == 100
    assert stats[f"{STATS}hit_length:0"] == 1
    blocks = {kind: stats[f"{STATS}blocks_{kind}"] for kind in ("clean", "loose", "kept", "page", "state")}
    slots = {kind: stats[f"{STATS}slots_{kind}"] for kind in ("live", "checkpoint", "host")}
    assert blocks == {"clean": BLOCKS - 2 - 2 * STATE, "loose": 0, "kept": 0, "page": 2, "state": 2 * STATE}
    assert slots == {"live": 2, "checkpoint": 0, "host": 0}
    assert f"{STATS}miss_tokens" not in scheduler.make_stats().running_lora_adapters


@pytest.mark.parametrize("log_stats", [True, False])
def test_statistics_do_not_grow_with_the_lengths_of_hits_so_far(log_stats, scheduler):
    scheduler.log_stats = scheduler.kv_cache_manager.log_stats = log_stats
    scheduler.kv_cache_manager.prefix_cache_stats = PrefixCacheStats()
    request = make_request(scheduler, "a", [3] * 20000, 2)
    for hit in range(0, 20000, 64):
        scheduler._count_hit(request, hit)
        stats = scheduler.make_stats()
        if log_stats:
            lengths = {name for name in stats.running_lora_adapters if "hit_length" in name}
            assert lengths == {f"{STATS}hit_length:{hit}"}
    assert sum(len(value) for value in vars(scheduler).values() if isinstance(value, Counter)) < 16


def test_a_request_is_a_hit_or_a_miss_once_however_often_it_comes_back(scheduler):
    """VLLM's second runner is told of a resumed request as of a new one."""
    scheduler.use_v2_model_runner = True
    request = make_request(scheduler, "a", [3] * 100, 2)
    scheduler.add_request(request)
    report(scheduler, scheduler.schedule())
    scheduler._restart(request)
    again = scheduler.schedule()
    assert [new.req_id for new in again.scheduled_new_reqs] == ["a"]
    assert scheduler._counts["miss_tokens"] == 100
    assert scheduler._counts["hit_tokens"] == 0


def test_what_is_evicted_is_counted_by_kind_and_by_what_it_saved():
    scheduler = our_scheduler(Memory(concurrency=2, blocks=1 + 3 * STATE + 8, state_blocks=STATE, longest=512))
    scheduler.log_stats = scheduler.kv_cache_manager.log_stats = True
    scheduler.kv_cache_manager.prefix_cache_stats = PrefixCacheStats()
    sent = Counter()
    for name in "abc":
        scheduler.add_request(make_request(scheduler, name, [ord(name)] * 450, 2))
        while scheduler.requests:
            outputs = report(scheduler, scheduler.schedule())
            sent.update(outputs[0].scheduler_stats.running_lora_adapters)
            scheduler.check_memory()
    assert sent[f"{STATS}evictions"] == scheduler._states.block_pool.counts["evictions"] > 0
    assert sent[f"{STATS}page_evictions"] == scheduler.arena.page_evictions > 0
    assert sent[f"{STATS}value_lost"] >= 7, "a prompt of seven blocks and a bit was forgotten with its state"


def test_a_swap_is_as_many_bytes_as_the_blocks_of_a_state(scheduler):
    scheduler.log_stats = scheduler.kv_cache_manager.log_stats = True
    scheduler.kv_cache_manager.prefix_cache_stats = PrefixCacheStats()
    scheduler._states.block_pool.counts.update(swaps_out=2, swaps_in=1)
    caches = scheduler.kv_cache_config
    block_bytes = caches.kv_cache_tensors[0].size // caches.num_blocks  # of all MLA layers
    assert scheduler.make_stats().running_lora_adapters[f"{STATS}swap_bytes"] == 3 * STATE * block_bytes


def test_a_step_tells_which_blocks_new_slots_have_and_the_next_tells_nothing(scheduler):
    scheduler.add_request(make_request(scheduler, "a", [3] * 100, 2))
    output = scheduler.schedule()
    assert dict(getattr(output, OPERATIONS)) == scheduler.arena.states.backing
    report(scheduler, output)
    assert not hasattr(scheduler.schedule(), OPERATIONS)


def test_a_step_names_the_pages_that_it_is_the_first_to_use(scheduler):
    scheduler.add_request(make_request(scheduler, "a", [3] * 60, 9))
    outputs = []
    for _ in range(8):
        outputs.append(scheduler.schedule())
        report(scheduler, outputs[-1])
    table = [page.block_id for page in scheduler._page_managers[0].req_to_blocks["a"]]
    assert len(table) == 2
    named = [getattr(output, NEW_PAGES, None) for output in outputs]
    assert [ids for ids in named if ids] == [table[:1], table[1:]], "states are not pages"
    assert named[0]


def test_a_page_that_became_a_state_in_its_step_is_not_cleared(scheduler):
    arena = scheduler.arena
    arena.take_new_pages()
    pages = arena.get_new_blocks(STATE)
    arena.free_blocks(pages)
    state = arena.take_state()
    assert {*state} == {page.block_id for page in pages}
    assert arena.take_new_pages() == []
    arena.give_state(state)
    again = arena.get_new_blocks(2)
    assert sorted(arena.take_new_pages()) == sorted(page.block_id for page in again)
    arena.free_blocks(again)


def test_blocks_of_a_request_that_ended_go_to_another_while_its_last_step_is_in_flight():
    """The step that still writes them is before the new owner's on the device; what is told to workers is in order."""
    scheduler = our_scheduler(Memory(concurrency=3, blocks=1 + 2 * STATE + 16, state_blocks=STATE, longest=1024))
    for name in "abc":
        scheduler.add_request(make_request(scheduler, name, [ord(name)] * 20, 9))
    first = scheduler.schedule()
    had = {block for _, ids in getattr(first, OPERATIONS) for block in ids}
    scheduler.finish_requests(list("abc"), RequestStatus.FINISHED_ABORTED)
    scheduler.check_memory()
    scheduler.add_request(make_request(scheduler, "d", [4] * 1000, 9))
    second = scheduler.schedule()
    scheduler.check_memory()
    assert len(had & {page.block_id for page in scheduler._page_managers[0].req_to_blocks["d"]}) >= STATE
    report(scheduler, first)
    report(scheduler, second)


def test_a_watermark_keeps_new_requests_out_and_running_ones_in():
    def running(watermark):
        limits = Memory(concurrency=8, blocks=101, state_blocks=STATE, step_tokens=4096, longest=512)
        config = configuration(limits, "value", watermark=watermark)
        scheduler = build(KimiScheduler, config, our_specs(config, STATE))
        for name in "abcdefgh":
            scheduler.add_request(make_request(scheduler, name, [ord(name)] * 100, 2))
        scheduler.schedule()
        scheduler.check_memory()
        return len(scheduler.running)

    assert running(0) > running(0.4) >= 1


@pytest.mark.parametrize(("asynchronous", "expected"), [(False, _KimiScheduler), (True, _KimiAsyncScheduler)])
def test_the_scheduler_follows_the_final_configuration(asynchronous, expected, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(expected, "__init__", lambda self, *args, **kwargs: None)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=asynchronous))
    assert type(KimiScheduler(config)) is expected


@pytest.mark.parametrize("asked", ["1", "0"])
def test_a_block_without_an_owner_stops_an_engine_that_is_asked_to_look(monkeypatch, asked):
    monkeypatch.setenv("KIMI_VLLM_CHECK_MEMORY", asked)
    scheduler = our_scheduler(Memory(concurrency=4, blocks=1 + BLOCKS, state_blocks=STATE, step_tokens=256))
    scheduler.add_request(make_request(scheduler, "one", list(range(3, 93)), 4))
    scheduler.arena.free_block_queue.popleft()
    if asked == "1":
        with pytest.raises(AssertionError):
            scheduler.schedule()
    else:
        assert scheduler.schedule().num_scheduled_tokens == {"one": 90}
