"""Traces, what of them can be reused, and what the real schedulers reuse of them. Counts only, never times."""

from functools import cache

import pytest

from serve.bench.cache.reuse import ALIGNED, FITS, THIRD, Workload, aligned_memory, memory_of
from serve.bench.cache.traces import TRACES, Turn, block_keys, prompt_of, reusable_tokens, working_set

SMALL = {
    "chat": {"users": 8, "turns": 16},
    "agent": {"tasks": 8, "steps": 16},
    "rag": {"documents": 24, "requests": 150},
}


@cache
def workload(name):
    return Workload.of(name, seed=1, concurrency=4, **SMALL[name])


@cache
def run(name, regime, policy):
    return workload(name).run(regime, policy)


@pytest.mark.parametrize("name", TRACES)
def test_a_seed_decides_everything(name):
    assert TRACES[name](3) == TRACES[name](3)
    assert TRACES[name](3) != TRACES[name](4)


@pytest.mark.parametrize("name", TRACES)
def test_a_turn_follows_an_earlier_one_and_fits(name):
    turns = TRACES[name]()
    answers = [turn.answer for turn in turns]
    for index, turn in enumerate(turns):
        assert turn.follows is None or turn.follows < index
        prompt = prompt_of(turns, index, answers)
        assert prompt[len(prompt) - len(turn.tokens) :] == turn.tokens
        assert len(prompt) + len(turn.answer) <= 8192


def test_a_prompt_is_what_was_said_before_and_something_more():
    turns = [Turn(None, [1, 2], [3]), Turn(0, [4], [5, 6]), Turn(1, [7], [8])]
    assert prompt_of(turns, 2, [[3], [5, 6], [8]]) == [1, 2, 3, 4, 5, 6, 7]


def brute_force(prompts, answers, block):
    found = []
    for index, prompt in enumerate(prompts):
        longest = 0
        for earlier, answer in zip(prompts[:index], answers[:index], strict=True):
            computed = earlier + answer[:-1]
            shared = 0
            while shared < min(len(prompt), len(computed)) and prompt[shared] == computed[shared]:
                shared += 1
            longest = max(longest, shared)
        found.append(min(longest, len(prompt) - 1) // block * block)
    return found


@pytest.mark.parametrize("block", [1, 4, 7])
def test_reusable_tokens_are_the_longest_shared_prefix(block):
    import random

    draw = random.Random(block)
    for _ in range(60):
        prompts = [draw.choices([0, 1], k=draw.randint(1, 14)) for _ in range(12)]
        answers = [draw.choices([0, 1], k=draw.randint(1, 6)) for _ in prompts]
        assert reusable_tokens(prompts, answers, block) == brute_force(prompts, answers, block)


def test_working_set_counts_states_with_a_use_to_come():
    first, second = [1] * 4, [2] * 4
    prompts = [first, second, [*first, 5], [*second, 6], [*first, 7]]
    answers = [[9]] * 5
    assert working_set(prompts, answers, [0, 0, 4, 4, 4], block=4) == 2
    assert working_set(prompts, answers, [0, 0, 4, 0, 4], block=4) == 1
    assert working_set(prompts, answers, [0] * 5, block=4) == 0


def test_keys_stand_for_whole_prefixes():
    assert len(block_keys([1] * 10, 4)) == 2
    assert block_keys([1] * 4 + [2] * 4, 4)[1] != block_keys([3] * 4 + [2] * 4, 4)[1]


@pytest.mark.parametrize("name", TRACES)
def test_nobody_reuses_more_than_there_is_and_no_slot_stays_live(name):
    work = workload(name)
    answers = [turn.answer for turn in work.turns]
    ceiling = reusable_tokens(work.prompts, answers)
    assert all(hit <= most for hit, most in zip(work.fits.hits, ceiling, strict=True))
    assert sum(work.fits.hits) > 0.6 * work.reusable
    assert (work.fits.held_blocks, work.fits.preemptions) == (0, 0)
    assert work.fits.computed == sum(map(len, work.prompts)) - sum(work.fits.hits) + sum(len(a) - 1 for a in answers)


@pytest.mark.parametrize("name", ["chat", "agent"])
def test_with_memory_for_everything_a_conversation_is_computed_once(name):
    assert run(name, FITS, "value").share >= 0.95


@pytest.mark.parametrize(("name", "least"), [("agent", 1.05), ("rag", 1.3)])
def test_with_a_third_of_the_states_value_saves_more_than_recency(name, least):
    value, recency = (run(name, THIRD, policy) for policy in ("value", "lru"))
    assert value.blocks == recency.blocks < workload(name).fits.most_blocks
    assert value.hit >= least * recency.hit > 0


def test_vllms_own_rules_run_in_the_same_replay():
    row = run("chat", FITS, "align")
    assert 0.2 < row.share < 0.95
    assert row.hit < run("chat", FITS, "value").hit


def test_vllms_own_gets_the_bytes_of_our_blocks():
    slot, page = 43_909_120, 516_096  # of the 48B model: a state in float32, 64 tokens of seven MLA layers in bfloat16
    ours = memory_of(8, pages=2182, states=1536)
    assert ours.blocks == (1536 * slot + 2182 * page) // page
    assert aligned_memory(ours).blocks == ours.blocks // 30


@pytest.mark.parametrize("name", TRACES)
def test_a_finer_prefix_match_unit_is_vllms_better_setting(name):
    plain, *finer = (run(name, FITS, policy) for policy in ALIGNED)
    assert plain.blocks == finer[0].blocks
    assert all(plain.hit < row.hit <= row.reusable for row in finer)
