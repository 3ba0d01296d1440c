"""The engine says what transformers says: same greedy tokens, same log-probabilities, whatever the schedule."""

import pytest
from support.checkpoints import GEOMETRIES
from support.engine import DRAFTS, RECALL, STATE_BLOCKS, Completion, engine, random_prompts

pytestmark = pytest.mark.engine

LENGTHS = [1, 2, 3, 15, 31, 63, 64, 65, 100, 127, 128, 129, 200, 321, 512, 700]
CASES = [("recall", "hub"), ("odd-pattern", "hub"), *((name, "transformers") for name in ("recall", *GEOMETRIES))]
TWICE = {"recall-transformers", "odd-pattern-transformers"}
"""The same weights as in the hub's layout: any prompt shows whether they were read."""


@pytest.mark.parametrize(("name", "layout"), CASES, ids=["-".join(case) for case in CASES])
def test_engine_equals_transformers(name, layout, checkpoints, oracles, record_property):
    record_property("covers", "float32")
    oracle = oracles[name]
    lengths = LENGTHS[::5] if f"{name}-{layout}" in TWICE else LENGTHS
    prompts = random_prompts(lengths, oracle.model.config.vocab_size)
    with engine(checkpoints[name, layout]) as running:
        for completion in running.complete(prompts):
            oracle.check(completion)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(LENGTHS, 100, seed=1)


@pytest.fixture(scope="module")
def expected(prompts) -> list[Completion]:
    """Each prompt alone, in one piece, with memory to spare."""
    with engine(RECALL, max_num_seqs=1) as running:
        return [running.complete([prompt], max_tokens=24)[0] for prompt in prompts]


def same(completions, expected, tolerance=1e-3):
    for ours, theirs in zip(completions, expected, strict=True):
        assert ours.tokens == theirs.tokens, f"prompt of {len(theirs.prompt)} tokens"
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=tolerance)


def test_alone_equals_transformers(expected, oracles):
    for completion in expected:
        oracles["recall"].check(completion)


def test_eight_at_once(prompts, expected):
    with engine(RECALL, max_num_seqs=8) as running:
        same(running.complete(prompts, max_tokens=24), expected)


@pytest.mark.parametrize("budget", [17, 64, 100])
def test_chunked_prefill(budget, prompts, expected):
    with engine(RECALL, max_num_batched_tokens=budget, enable_chunked_prefill=True) as running:
        same(running.complete(prompts, max_tokens=24), expected)


@pytest.fixture(scope="module")
def growing():
    """Requests that fit when admitted and need one or two more pages each while they decode."""
    prompts = random_prompts([63, 64, 127, 128, 62, 126, 190, 191, 5, 61, 125, 189], 100, seed=2)
    with engine(RECALL, max_num_seqs=len(prompts)) as running:
        return running.complete(prompts, max_tokens=80)


@pytest.mark.parametrize("caching", [False, True], ids=["nocache", "cache"])
def test_preemption(caching, growing):
    options = {"num_gpu_blocks_override": 44, "enable_prefix_caching": caching, "max_num_batched_tokens": 256}
    with engine(RECALL, max_model_len=320, **options) as running:
        same(running.complete([completion.prompt for completion in growing], max_tokens=80), growing)
        assert running.num_preemptions > 0 or DRAFTS  # which let fewer run at once, for shorter


def test_what_preemption_is_compared_with_equals_transformers(growing, oracles):
    for completion in growing:
        oracles["recall"].check(completion)


@pytest.mark.parametrize("states", [2, 5])
def test_memory_for_fewer_states_than_requests(states, prompts, expected):
    longest = max(len(prompt) for prompt in prompts) + 24
    blocks = 1 + states * STATE_BLOCKS + -(-longest // 64)
    options = {"num_gpu_blocks_override": blocks, "max_model_len": longest, "enable_prefix_caching": True}
    with engine(RECALL, **options) as running:
        same(running.complete(prompts, max_tokens=24), expected)
