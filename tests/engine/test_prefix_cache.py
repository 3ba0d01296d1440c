"""Prefix caching: prompts resume from a kept state, say how many tokens were cached, and answer as a cold run does."""

import pytest
from support.engine import RECALL, check_cold, engine, random_prompts

pytestmark = pytest.mark.engine

BLOCK = 64


@pytest.fixture(scope="module")
def warm():
    with engine(RECALL, enable_prefix_caching=True, max_num_batched_tokens=256) as running:
        yield running


@pytest.fixture
def cached(warm):
    assert warm.llm.reset_prefix_cache()
    return warm


def test_identical_prompt_resumes_at_its_last_boundary(cached):
    for length, hit in [(63, 0), (64, 0), (65, 64), (128, 64), (129, 128), (200, 192), (700, 640)]:
        [prompt] = random_prompts([length], 100, seed=length)
        first, second = (cached.complete([prompt])[0] for _ in range(2))
        assert (first.cached, second.cached) == (0, hit), length
        check_cold(cached, [first, second])


def test_extended_prompt_resumes_where_the_shorter_one_ended(cached):
    [long] = random_prompts([500], 100, seed=3)
    completions = []
    for length, hit in [(70, 0), (200, 64), (257, 192), (500, 256)]:
        completions.append(cached.complete([long[:length]])[0])
        assert completions[-1].cached == hit
    check_cold(cached, completions)


def test_next_turn_resumes_inside_the_answer(cached):
    [prompt] = random_prompts([100], 100, seed=4)
    answer = cached.complete([prompt], max_tokens=120)[0].tokens
    turn = [*prompt, *answer, *random_prompts([30], 100, seed=5)[0]]
    completion = cached.complete([turn])[0]
    assert completion.cached == 192  # of 220: the last boundary the answer crossed
    check_cold(cached, [completion])


def test_shared_prefix_is_kept_at_its_junction(cached):
    shared, *tails = random_prompts([150, 80, 90, 100, 110], 100, seed=6)
    prompts = [shared + tail for tail in tails]
    completions = [cached.complete([prompt])[0] for prompt in prompts]
    # The first knows of no sharing, the second finds pages but no state and leaves one at the junction.
    assert [completion.cached for completion in completions] == [0, 0, 128, 128]
    check_cold(cached, completions)


def test_same_prompts_in_one_batch(cached):
    [prompt] = random_prompts([300], 100, seed=7)
    completions = cached.complete([prompt] * 6)
    # Whoever arrives while the first one writes its states waits a step and then resumes from them.
    assert completions[-1].cached > 0
    check_cold(cached, completions[:1] + completions[-1:])


def test_hits_are_whole_blocks_and_change_nothing(cached):
    stems = random_prompts([64, 130, 333], 100, seed=8)
    tails = random_prompts([1, 40, 64, 100], 100, seed=9)
    prompts = [stem + tail for _ in range(2) for stem in stems for tail in tails]
    completions = cached.complete(prompts)
    assert all(completion.cached % BLOCK == 0 for completion in completions)
    assert sum(completion.cached for completion in completions) > 0
    check_cold(cached, completions[-12:])


def test_long_answer_leaves_one_boundary(cached):
    [prompt] = random_prompts([10], 100, seed=13)
    cached.complete([prompt], max_tokens=500)
    assert cached.slots.num_idle == 1


def test_salted_prompts_share_nothing(cached):
    from vllm import SamplingParams, TokensPrompt

    [prompt] = random_prompts([200], 100, seed=14)
    parameters = SamplingParams(temperature=0, max_tokens=2, detokenize=False)
    hits = []
    for salt in ("a", "b", "a"):
        inputs = TokensPrompt(prompt_token_ids=prompt, cache_salt=salt)
        hits.append(cached.llm.generate(inputs, parameters, use_tqdm=False)[0].num_cached_tokens)
    assert hits == [0, 0, 192]


def test_kv_events_tell_of_pages_as_ever():
    """Routers follow them to know which prefixes a server holds."""
    from vllm.config import KVEventsConfig
    from vllm.distributed.kv_events import AllBlocksCleared, BlockStored

    [prompt] = random_prompts([200], 100, seed=15)
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    with engine(RECALL, enable_prefix_caching=True, kv_events_config=events) as running:
        published = []
        running.scheduler.kv_event_publisher.publish = lambda batch: published.extend(batch.events)
        running.complete([prompt], max_tokens=2)
        stored = [event for event in published if isinstance(event, BlockStored)]
        assert [token for event in stored for token in event.token_ids] == prompt[:192]
        assert running.llm.reset_prefix_cache()
        running.complete([prompt[:10]], max_tokens=2)
        assert any(isinstance(event, AllBlocksCleared) for event in published)
