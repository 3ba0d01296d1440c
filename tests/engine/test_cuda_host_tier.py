"""Host memory for states and pages on a GPU: prompts of several times its memory are hits, beside steps in flight."""

import pytest
from support.engine import RECALL, STATE_BLOCKS, check_cold, engine, ngram, random_prompts

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

BLOCK = 64
LENGTHS = [boundary + offset for boundary in (64, 128, 192, 256, 320) for offset in (-1, 0, 1)] * 2
MORE = {
    "second runner": {},
    "first runner": {},
    "chunked": {"max_num_batched_tokens": 97},
    "drafts": {"speculative_config": ngram(3)},
}


@pytest.mark.parametrize("how", MORE)
def test_prompts_of_three_times_the_memory_are_hits(how, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0" if how == "first runner" else "1")
    options = {
        "enable_prefix_caching": True,
        "enforce_eager": False,
        "num_gpu_blocks_override": 24 + 9 * (STATE_BLOCKS + 2 * (how == "drafts")),
        "additional_config": {"kimi": {"host_memory_gib": 0.1}},
    }
    with engine(RECALL, **options | MORE[how]) as running:
        assert running.scheduler.scheduler_config.async_scheduling
        assert running.pool.host.is_pinned()
        prompts = random_prompts(LENGTHS, 100, seed=40)
        for prompt in prompts:
            running.complete([prompt])
        one_by_one = [running.complete([prompt], max_tokens=12)[0] for prompt in prompts]
        at_once = running.complete(prompts, max_tokens=12)
        for again in (one_by_one, at_once):
            assert [one.cached for one in again] == [(length - 1) // BLOCK * BLOCK for length in LENGTHS]
        assert running.counts["page_swaps_out"] > 48
        assert running.counts["page_swaps_in"] > 48
        check_cold(running, one_by_one)
        check_cold(running, at_once)
