"""Random schedules against the plain run: prefixes that coincide, arrivals and aborts at any step, everything scarce.

A case is two rounds of a few requests on an engine whose cache is empty at first, so that a failure can be repeated.
Every answer that finishes must be the plain run's, and after every step each block must have exactly one owner.
"""

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.arrivals import LONGEST_ANSWER, rounds
from support.engine import RECALL, STATE_BLOCKS, Completion, check_equal, engines

pytestmark = pytest.mark.engine

CASES = 12  # each of four configurations; without a model there are hundreds (tests/cache/test_schedules.py)
STATE_GIB = STATE_BLOCKS * 32_768 / 2**30


def scarce(sequences, chunk, blocks, kimi=None, **more):
    return {
        "enable_prefix_caching": True,
        "max_model_len": 512,
        "max_num_seqs": sequences,
        "max_num_batched_tokens": chunk,
        "num_gpu_blocks_override": blocks,
        "additional_config": {"kimi": kimi or {}},
    } | more


CONFIGURATIONS = {
    "states": scarce(3, 97, 3 * STATE_BLOCKS + 20),
    "host": scarce(3, 97, 3 * STATE_BLOCKS + 20, kimi={"host_memory_gib": 6.5 * STATE_GIB}),
    "pages": scarce(4, 150, 2 * STATE_BLOCKS + 11),
    "lru-host-pages-priority": scarce(
        4,
        61,
        2 * STATE_BLOCKS + 11,
        scheduling_policy="priority",
        kimi={"host_memory_gib": 4.5 * STATE_GIB, "eviction": "lru", "checkpoint_interval": 128},
    ),
}
PATHS = {
    "states": {"hits", "aborts", "evictions"},
    "host": {"hits", "aborts", "evictions", "swaps_out", "swaps_in"},
    "pages": {"hits", "aborts", "evictions"},
    "lru-host-pages-priority": {"hits", "aborts", "evictions", "swaps_out", "swaps_in"},
}


@pytest.fixture(scope="module")
def running():
    configurations = {"plain": {"max_model_len": 512, "num_gpu_blocks_override": 100}} | CONFIGURATIONS
    with engines(RECALL, configurations) as started:
        yield started


@pytest.fixture(scope="module")
def plain(running):
    """The answer to a prompt without caching, chunks or shortage: computed once, as long as any case asks for."""
    known = {}

    def answer(prompts):
        new = {tuple(prompt) for prompt in prompts} - known.keys()
        for completion in running["plain"].complete(sorted(new), max_tokens=LONGEST_ANSWER) if new else ():
            known[tuple(completion.prompt)] = completion
        return known

    return answer


def play(engine, schedule, seen):
    """Run one round to its end. Returns what finished, by its place in the schedule."""
    from vllm import SamplingParams, TokensPrompt

    core = engine.llm.llm_engine
    prioritised = engine.scheduler.policy.value == "priority"
    waiting, finished, step = set(range(len(schedule))), {}, 0
    while waiting or core.has_unfinished_requests():
        for index in sorted(waiting):
            arrival = schedule[index]
            if arrival.step <= step:
                waiting.remove(index)
                parameters = SamplingParams(
                    temperature=0, max_tokens=arrival.max_tokens, ignore_eos=True, logprobs=0, detokenize=False
                )
                prompt = TokensPrompt(prompt_token_ids=arrival.prompt)
                priority = arrival.priority if prioritised else 0
                core.add_request(str(index), prompt, parameters, priority=priority)
        for index, arrival in enumerate(schedule):
            if arrival.abort_after is not None and step == arrival.step + arrival.abort_after:
                seen["aborts"] += index not in finished
                core.abort_request([str(index)])
        for output in core.step():
            if output.finished:
                finished[int(output.request_id)] = output
        engine.scheduler.check_memory()
        step += 1
        assert step < 2000, "requests that never finish"
    core.step()
    engine.check_idle()
    return finished


def completed(output):
    [answer] = output.outputs
    tokens = list(answer.token_ids)
    return Completion(
        prompt=list(output.prompt_token_ids),
        tokens=tokens,
        logprobs=[entry[token].logprob for entry, token in zip(answer.logprobs, tokens, strict=True)],
        cached=output.num_cached_tokens or 0,
    )


# The last has everything scarce; `tests/cache` plays thousands in each, without a model.
@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in [*CONFIGURATIONS][:-1]), [*CONFIGURATIONS][-1]]
)
def test_every_answer_is_the_plain_one(running, plain, name):
    engine, seen = running[name], Counter()

    @settings(max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(rounds=rounds, reset_between=st.booleans())
    def cases(rounds, reset_between):
        assert engine.llm.reset_prefix_cache()
        seen["cases"] += 1
        for number, schedule in enumerate(rounds):
            if number and reset_between:
                assert engine.llm.reset_prefix_cache()
            expected = plain([arrival.prompt for arrival in schedule])
            finished = play(engine, schedule, seen)
            for index, arrival in enumerate(schedule):
                if index not in finished:
                    assert arrival.abort_after is not None
                    continue
                ours = completed(finished[index])
                theirs = expected[tuple(arrival.prompt)]
                seen["hits"] += ours.cached > 0
                if arrival.abort_after is None:
                    assert len(ours.tokens) == arrival.max_tokens
                count = len(ours.tokens)
                check_equal(ours, Completion(theirs.prompt, theirs.tokens[:count], theirs.logprobs[:count], 0))

    cases()
    seen += engine.counts
    seen["preemptions"] += engine.num_preemptions
    assert seen["cases"] >= CASES
    assert {path for path in PATHS[name] if not seen[path]} == set(), seen
