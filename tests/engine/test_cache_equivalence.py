"""Whichever way a request comes by its state, it answers as a plain run does: greedy tokens, log-probabilities to 1e-3.

Cold, whole hit, partial hit, evicted and computed again, preempted and resumed, swapped out and in; each at lengths
around each boundary, chunked at odd sizes, eight requests in flight. Each test proves that its path was taken.
"""

import pytest
from support.engine import RECALL, STATE_BLOCKS, Engine, check_equal, engines, random_prompts

pytestmark = pytest.mark.engine

BLOCK = 64
LENGTHS = [boundary + offset for boundary in (64, 128, 192, 256, 320) for offset in (-1, 0, 1)]
ODD = (97,)  # a chunk passes one boundary or two
ANSWER = 12
HOST_GIB = 0.01  # 40 states of the tiny checkpoint


def options(chunk, states=40, pages=200, kimi=None):
    return {
        "enable_prefix_caching": True,
        "max_num_batched_tokens": chunk,
        "num_gpu_blocks_override": pages + states * STATE_BLOCKS,
        "additional_config": {"kimi": kimi or {}},
    }


@pytest.fixture(scope="module")
def running() -> dict[object, Engine]:
    """The plain engine and one per configuration, all in this process."""
    configurations = {"plain": {"num_gpu_blocks_override": 200 + 8 * STATE_BLOCKS}}
    for chunk in ODD:
        configurations["ample", chunk] = options(chunk)
        configurations["host", chunk] = options(chunk, kimi={"host_memory_gib": HOST_GIB})
        # Eight requests of 321 tokens and an answer take 48 pages and eight states; memory is for fewer.
        configurations["little memory", chunk] = options(chunk, states=9, pages=24)
        configurations["little memory, host", chunk] = options(chunk, 9, 24, {"host_memory_gib": HOST_GIB})
        configurations["little memory, much host", chunk] = options(chunk, 9, 24, {"host_memory_gib": 0.1})
    with engines(RECALL, configurations) as started:
        yield started


@pytest.fixture(params=ODD)
def use(running, request):
    """An engine by its name, at each chunk size, with nothing cached."""

    def find(name):
        found = running[name, request.param]
        assert found.llm.reset_prefix_cache()
        found.counts.clear()
        found.num_preemptions = 0
        return found

    return find


@pytest.fixture(scope="module")
def plain(running):
    """Answers of the plain engine: nothing cached, no prompt in pieces. A prompt is computed once per length."""
    known = {}

    def answer(prompts, max_tokens):
        new = {tuple(prompt) for prompt in prompts if (tuple(prompt), max_tokens) not in known}
        for completion in running["plain"].complete(sorted(new), max_tokens=max_tokens) if new else ():
            known[tuple(completion.prompt), max_tokens] = completion
        return [known[tuple(prompt), max_tokens] for prompt in prompts]

    return answer


@pytest.fixture
def check(plain):
    """Hold completions, all of one length, against the plain ones."""

    def check(completions):
        [length] = {len(completion.tokens) for completion in completions}
        expected = plain([completion.prompt for completion in completions], length)
        for ours, theirs in zip(completions, expected, strict=True):
            check_equal(ours, theirs)

    return check


def last_boundary(length):
    """Where an identical prompt resumes: its last token must be computed."""
    return (length - 1) // BLOCK * BLOCK


def test_cold_and_whole_hit(use, check):
    engine = use("ample")
    prompts = random_prompts(LENGTHS, 100, seed=30)
    cold = engine.complete(prompts, max_tokens=ANSWER)
    hits = engine.complete(prompts, max_tokens=ANSWER)
    assert [completion.cached for completion in cold] == [0] * len(LENGTHS)
    assert [completion.cached for completion in hits] == [last_boundary(length) for length in LENGTHS]
    check([*cold, *hits])


def test_partial_hit_at_every_junction(use, check):
    """Prompts that part at boundary -1, 0 and +1 of another: the second leaves a state there, the third resumes."""
    engine = use("ample")
    [trunk] = random_prompts([400], 100, seed=31)
    tails = random_prompts([BLOCK - 1, BLOCK, BLOCK + 1], 100, seed=32)
    engine.complete([trunk])
    completions = []
    for length in LENGTHS:
        branches = [engine.complete([trunk[:length] + tail], max_tokens=ANSWER)[0] for tail in tails]
        assert branches[-1].cached == length // BLOCK * BLOCK
        completions += branches
    check(completions)


def test_extended_and_answered(use, check):
    """A longer prompt resumes inside a shorter one, and a next turn inside an answer that crossed a boundary."""
    engine = use("ample")
    prompts = random_prompts(LENGTHS, 100, seed=33)
    first = engine.complete(prompts, max_tokens=BLOCK + 3)
    extra = random_prompts([30] * len(LENGTHS), 100, seed=34)
    turns = [done.prompt + done.tokens + more for done, more in zip(first, extra, strict=True)]
    second = engine.complete(turns, max_tokens=ANSWER)
    # The last token of an answer was never computed.
    crossed = [(length + BLOCK + 2) // BLOCK * BLOCK for length in LENGTHS]
    assert [completion.cached for completion in second] == crossed
    check(first)
    check(second)


def test_hit_after_eviction(use, check):
    """More prompts than memory for states: what was evicted is computed again, and is a hit from then on."""
    engine = use("little memory")
    prompts = random_prompts(LENGTHS, 100, seed=35)
    engine.complete(prompts)
    assert engine.counts["evictions"] > 0
    again = engine.complete(prompts, max_tokens=ANSWER)
    assert any(completion.cached < last_boundary(len(completion.prompt)) for completion in again)
    pairs = [engine.complete([prompt], max_tokens=ANSWER)[0] for prompt in prompts for _ in range(2)]
    assert [completion.cached for completion in pairs[1::2]] == [last_boundary(length) for length in LENGTHS]
    check([*again, *pairs])


@pytest.mark.parametrize("name", ["little memory", "little memory, host"])
def test_resumed_after_preemption(use, check, name):
    """Memory runs out while eight requests grow past boundaries: some are preempted and go on later."""
    engine = use(name)
    for seed, lengths in ((36, LENGTHS[:8]), (37, LENGTHS[2:12])):
        engine.num_preemptions = 0
        check(engine.complete(random_prompts(lengths, 100, seed=seed), max_tokens=200))
        assert engine.num_preemptions > 0


def test_swapped_in(use, check):
    """Every state is evicted to host memory: each hit loads its own, and is as long as if it had stayed."""
    engine = use("host")
    prompts = random_prompts(LENGTHS, 100, seed=38)
    engine.complete(prompts)
    pool = engine.manager.block_pool
    while pool.evict():
        pass
    assert pool.slots.num_idle == 0
    again = engine.complete(prompts, max_tokens=ANSWER)
    assert [completion.cached for completion in again] == [last_boundary(length) for length in LENGTHS]
    assert engine.counts["swaps_in"] == sum(completion.cached > 0 for completion in again)
    check(again)


def test_swapped_in_under_pressure(use, check):
    """Memory for nine states and eight requests in flight: loading one evicts another."""
    engine = use("little memory, host")
    prompts = random_prompts(LENGTHS, 100, seed=39)
    engine.complete(prompts)
    before = engine.counts["swaps_out"]
    again = engine.complete(prompts, max_tokens=ANSWER)
    assert engine.counts["swaps_in"] > 0
    assert engine.counts["swaps_out"] > before > 0
    check(again)


def test_prompts_of_three_times_the_memory_are_hits(use, check):
    """States and pages go to host memory and come back: a prompt asked for again is resumed at its last boundary."""
    engine = use("little memory, much host")
    prompts = random_prompts(LENGTHS * 2, 100, seed=40)
    assert sum(len(prompt) // BLOCK for prompt in prompts) > 3 * 24
    for prompt in prompts:
        engine.complete([prompt])
    one_by_one = [engine.complete([prompt], max_tokens=ANSWER)[0] for prompt in prompts]
    at_once = engine.complete(prompts, max_tokens=ANSWER)
    for again in (one_by_one, at_once):
        assert [completion.cached for completion in again] == [last_boundary(len(prompt)) for prompt in prompts]
    assert engine.counts["page_swaps_out"] > 3 * 24
    assert engine.counts["page_swaps_in"] > 3 * 24
    check([*one_by_one, *at_once])
