"""Beside requests that decode, a step has few prompt tokens: theirs come at every step, and prompts still finish."""

import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
from support.engine import ngram
from vllm.config import CUDAGraphMode
from vllm.v1.request import RequestStatus

from kimi_vllm import config_hook
from kimi_vllm.cache.pacing import FEW, for_decodes, graph_sizes, short_step
from kimi_vllm.cache.scheduler import KimiScheduler
from kimi_vllm.options import KimiOptions
from kimi_vllm.refusals import REFUSALS
from serve.bench.cache.replay import Memory, build, configuration, make_request, our_specs, step

ANSWER = list(range(40, 140))
FULL, SHORT = 512, 96


def scheduler_of(given=SHORT, concurrency=100, asynchronous=False, **options):
    memory = Memory(concurrency=concurrency, blocks=2001, state_blocks=8, step_tokens=FULL)
    config = configuration(memory, "value", **options)
    config.additional_config["kimi"]["mixed_step_tokens"] = given
    config.scheduler_config.async_scheduling = asynchronous  # on CPUs vLLM switches it off
    return build(KimiScheduler, config, our_specs(config, memory.state_blocks))


def run(scheduler, names):
    """Play a step; return how many tokens each request had in it."""
    scheduled = {}
    schedule = scheduler.schedule

    def noted(*args, **kwargs):
        output = schedule(*args, **kwargs)
        scheduled.update(output.num_scheduled_tokens)
        return output

    scheduler.schedule = noted
    try:
        step(scheduler, dict.fromkeys(names, ANSWER))
    finally:
        scheduler.schedule = schedule
    return scheduled


def decoding(scheduler, count):
    """Add requests, and run them until all decode."""
    names = [f"decode{i}" for i in range(count)]
    for i, name in enumerate(names):
        scheduler.add_request(make_request(scheduler, name, [i + 3] * 20, len(ANSWER)))
    while any(not request.num_output_tokens for request in scheduler.requests.values()):
        run(scheduler, names)
    return names


def prompt(scheduler, name, length):
    tokens = random.Random(name).choices(range(3, 93), k=length)  # no two prompts begin alike
    scheduler.add_request(make_request(scheduler, name, tokens, len(ANSWER)))
    return name


@pytest.mark.parametrize(("count", "share"), [(1, SHORT - 1), (3, SHORT - 3), (80, SHORT // 4)])
def test_a_prompt_comes_in_short_steps_that_all_decodes_are_in(count, share):
    scheduler = scheduler_of()
    names = decoding(scheduler, count)
    left = 2 * FULL
    long = prompt(scheduler, "long", left)
    while left:
        tokens = run(scheduler, [*names, long])
        assert tokens == dict.fromkeys(names, 1) | {long: min(share, left)}
        left -= tokens[long]
    assert run(scheduler, [*names, long]) == dict.fromkeys([*names, long], 1)


def test_two_prompts_share_a_short_step():
    scheduler = scheduler_of()
    names = decoding(scheduler, 4)
    few, share = 40, SHORT - len(names)
    first, second = prompt(scheduler, "first", share + few), prompt(scheduler, "second", 900)
    every = [*names, first, second]
    assert run(scheduler, every) == dict.fromkeys(names, 1) | {first: share}
    assert run(scheduler, every) == dict.fromkeys(names, 1) | {first: few, second: share - few}


def test_a_prompt_ahead_of_decodes_leaves_them_their_tokens():
    scheduler = scheduler_of()
    names = decoding(scheduler, 8)
    long = prompt(scheduler, "long", 5 * FULL)
    run(scheduler, [*names, long])
    # As a session that got more input: among the running ones, before those that decode.
    scheduler.running.insert(0, scheduler.running.pop())
    assert run(scheduler, [*names, long]) == dict.fromkeys(names, 1) | {long: SHORT - len(names)}


def test_where_nothing_decodes_a_step_is_full():
    scheduler = scheduler_of()
    long, other = prompt(scheduler, "long", 3 * FULL), prompt(scheduler, "other", FULL)
    assert run(scheduler, [long, other]) == {long: FULL}


def test_a_crowd_of_prompts_has_full_steps_until_few_are_left():
    scheduler = scheduler_of()
    names = decoding(scheduler, 2)
    crowd = [prompt(scheduler, f"prompt{i}", FULL - 90) for i in range(FEW + 2)]
    full, short = [], []
    while waiting := [name for name in crowd if not scheduler.requests[name].num_output_tokens]:
        tokens = run(scheduler, [*names, *crowd])
        assert {*names} <= {*tokens}
        (full if len(waiting) > FEW else short).append(sum(tokens.get(name, 0) for name in waiting))
    assert min(full) > FULL - len(names) - len(crowd)
    assert SHORT - len(crowd) <= max(short) <= SHORT


def test_limits_are_as_before_after_each_step():
    scheduler = scheduler_of()
    names = decoding(scheduler, 2)
    prompt(scheduler, "long", 3 * FULL)
    run(scheduler, [*names, "long"])
    assert scheduler.max_num_scheduled_tokens == FULL
    for name in names:
        scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
    assert run(scheduler, ["long"]) == {"long": FULL}


@pytest.mark.parametrize("given", [None, 0])
def test_without_a_limit_steps_are_vllms(given):
    scheduler = scheduler_of(given)  # on a CPU
    names = decoding(scheduler, 2)
    prompt(scheduler, "long", 3 * FULL)
    assert run(scheduler, [*names, "long"]) == dict.fromkeys(names, 1) | {"long": FULL - 2}


def test_drafts_have_their_tokens_too():
    scheduler = scheduler_of(speculative_config=ngram(3))
    names = decoding(scheduler, 3)
    for name in names:
        scheduler.requests[name].spec_token_ids = [5, 6, 7]
    prompt(scheduler, "long", 3 * FULL)
    assert run(scheduler, [*names, "long"]) == dict.fromkeys(names, 4) | {"long": SHORT - 4 * len(names)}


@pytest.mark.parametrize(
    ("decoding", "prompts", "short"),
    [(0, 1, False), (1, 0, False), (1, FEW, True), (1, FEW + 1, False), (64, 16, True), (64, 17, False)],
)
def test_whom_a_step_is_for(decoding, prompts, short):
    assert for_decodes(decoding, prompts) is short


def test_a_prompt_that_decodes_behind_two_others_is_not_kept_waiting():
    scheduler = scheduler_of(speculative_config=ngram(3))
    names = decoding(scheduler, 20)
    first, second = prompt(scheduler, "first", 900), prompt(scheduler, "second", 400)
    third = prompt(scheduler, "third", 20)
    every = [*names, first, second, third]
    # A full step, with chunks of each: the third has its prompt behind it while two before it have not.
    scheduler._short_step, scheduler.scheduler_config.long_prefill_token_threshold = 0, 100
    run(scheduler, every)
    scheduler._short_step, scheduler.scheduler_config.long_prefill_token_threshold = SHORT, 0
    for _ in range(3):
        for name in (*names, third):
            scheduler.requests[name].spec_token_ids = [5, 6, 7]
        tokens = run(scheduler, every)
        assert [tokens[name] for name in (*names, third)] == [4] * 21
        assert tokens[first] == SHORT // 4


@pytest.mark.parametrize("given", [1, 2, 4, 7])
def test_a_small_limit_cuts_no_drafts(given):
    scheduler = scheduler_of(given, speculative_config=ngram(3))
    names = decoding(scheduler, 2)
    for name in names:
        scheduler.requests[name].spec_token_ids = [5, 6, 7]
    prompt(scheduler, "long", 300)
    assert run(scheduler, [*names, "long"]) == dict.fromkeys(names, 4) | {"long": -(-given // 4)}


def test_prompts_without_a_seat_make_no_crowd():
    scheduler = scheduler_of(concurrency=8)
    names = decoding(scheduler, 7)
    every = [*names, *(prompt(scheduler, f"prompt{i}", FULL) for i in range(9))]
    assert run(scheduler, every) == dict.fromkeys(names, 1) | {"prompt0": SHORT - 7}


def test_idle_sessions_make_no_crowd():
    scheduler = scheduler_of()
    names = decoding(scheduler, 8)
    idle = [prompt(scheduler, f"idle{i}", 20) for i in range(FEW + 1)]
    for name in idle:
        scheduler.requests[name].resumable = True
        scheduler.requests[name].max_tokens = 1
    while any(scheduler.requests[name].status != RequestStatus.WAITING_FOR_STREAMING_REQ for name in idle):
        run(scheduler, [*names, *idle])
    long = prompt(scheduler, "long", 4 * FULL)
    assert run(scheduler, [*names, long]) == dict.fromkeys(names, 1) | {long: SHORT - 8}


def test_requests_whose_last_token_is_on_its_way_decode_no_more():
    scheduler = scheduler_of(asynchronous=True)
    scheduler.add_request(make_request(scheduler, "ends", [5] * 20, 1))
    assert scheduler.schedule().num_scheduled_tokens == {"ends": 20}
    long = prompt(scheduler, "long", 4 * FULL)
    assert scheduler.schedule().num_scheduled_tokens == {long: FULL}


def test_with_a_step_in_flight_decodes_are_counted():
    scheduler = scheduler_of(asynchronous=True)
    scheduler.add_request(make_request(scheduler, "decodes", [5] * 20, 50))
    scheduler.schedule()
    long = prompt(scheduler, "long", 4 * FULL)
    assert scheduler.schedule().num_scheduled_tokens == {"decodes": 1, long: SHORT - 1}


GRAPHS = {"cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE, "max_cudagraph_capture_size": 2048}


@pytest.mark.parametrize(
    ("on_cpu", "scheduling", "compilation", "tokens"),
    [
        (False, {}, GRAPHS, 2048),
        (True, {}, GRAPHS, 0),
        (False, {}, GRAPHS | {"max_cudagraph_capture_size": 512}, 0),
        (False, {"max_num_batched_tokens": 512}, GRAPHS | {"max_cudagraph_capture_size": 512}, 2048),
        (False, {}, GRAPHS | {"cudagraph_mode": CUDAGraphMode.FULL_DECODE_ONLY}, 0),
        (False, {}, {"cudagraph_mode": CUDAGraphMode.NONE, "max_cudagraph_capture_size": 0}, 0),
        (False, {"enable_chunked_prefill": False}, GRAPHS, 0),
        (False, {"prefill_schedule_interval": 2}, GRAPHS, 0),
    ],
    ids=["gpu", "cpu", "small-graphs", "small-steps", "decode-graphs", "eager", "whole-prompts", "by-turns"],
)
def test_default(on_cpu, scheduling, compilation, tokens, monkeypatch):
    config = configuration(Memory(concurrency=2, blocks=200, state_blocks=8), "value")
    for part, values in ((config.scheduler_config, scheduling), (config.compilation_config, compilation)):
        for name, value in values.items():
            monkeypatch.setattr(part, name, value)
    assert short_step(config, None, on_cpu=on_cpu) == tokens
    assert short_step(config, 700, on_cpu=on_cpu) == 700


def test_with_whole_prompts_a_limit_is_refused(monkeypatch):
    config = configuration(Memory(concurrency=2, blocks=200, state_blocks=8), "value")
    monkeypatch.setattr(config, "additional_config", {"kimi": {"mixed_step_tokens": 64}})
    [refusal] = [refusal for refusal in REFUSALS if refusal.option.startswith("kimi.mixed_step_tokens")]
    assert not refusal.asked(config)
    monkeypatch.setattr(config.scheduler_config, "enable_chunked_prefill", False)
    assert refusal.asked(config)


@pytest.mark.parametrize(
    ("captured", "most"), [(512, 8192), (512, 2048), (4, 8192), (500, 777), (500, 3000), (1, 3), (512, 512), (512, 0)]
)
def test_graphs_are_captured_up_to_the_largest_step_with_little_padding(captured, most):
    sizes = graph_sizes(captured, most)
    assert sizes == sorted({*sizes})
    if most <= captured:
        assert not sizes
        return
    assert sizes[-1] == most
    assert all(b - a <= a / (8 if a < 2048 else 4) for a, b in pairwise([captured, *sizes]) if a >= 512)
    assert len(sizes) <= 34


@pytest.mark.parametrize(
    ("given", "sizes", "more"),
    [
        ({}, {}, [576, 640, 704, 768]),
        ({"mixed_step_tokens": 0}, {}, [576, 640, 704, 768]),
        ({"mixed_step_tokens": 600}, {}, [576, 640, 704, 768]),
        ({}, {"cudagraph_capture_sizes": [1, 2, 8]}, None),
        ({}, {"max_cudagraph_capture_size": 256}, None),
    ],
    ids=["default", "no-limit", "set", "users-sizes", "users-largest"],
)
@pytest.mark.parametrize("more_gpus", [None, "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"])
def test_capture_sizes_are_vllms_and_those_of_short_steps(given, sizes, more, more_gpus, monkeypatch):
    memory = Memory(concurrency=256, blocks=2001, state_blocks=8, step_tokens=768)
    config = configuration(memory, "value")
    compilation = config.compilation_config
    monkeypatch.setattr(config.model_config, "enforce_eager", False)
    if more_gpus:
        monkeypatch.setattr(config.parallel_config, more_gpus, 2)
        if more_gpus != "data_parallel_size":
            monkeypatch.setattr(config.parallel_config, "world_size", 2)
    for name in ("cudagraph_capture_sizes", "max_cudagraph_capture_size", "cudagraph_mode"):
        monkeypatch.setattr(compilation, name, sizes.get(name))
    monkeypatch.setattr(config_hook, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    config_hook._capture_steps_with_prompts(config, KimiOptions(**given))
    before = sizes.get("cudagraph_capture_sizes")
    if not more or more_gpus not in (None, "tensor_parallel_size"):
        assert compilation.cudagraph_capture_sizes == before
    else:
        assert compilation.cudagraph_capture_sizes[-len(more) :] == more
        config._set_cudagraph_sizes()  # as vLLM does afterwards
        assert compilation.cudagraph_capture_sizes[:3] == [1, 2, 4]
        assert compilation.cudagraph_capture_sizes[-len(more) - 1 :] == [512, *more]
        assert compilation.max_cudagraph_capture_size == more[-1]
