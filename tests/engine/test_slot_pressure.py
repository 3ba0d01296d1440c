"""States are kept where it was asked for and given up when memory runs out; answers stay the same."""

import pytest
from support.engine import RECALL, STATE_BLOCKS, check_cold, engine, random_prompts

pytestmark = pytest.mark.engine


def test_little_memory_evicts_and_stays_right():
    prompts = [prompt for prompt in random_prompts([65, 200, 330, 129, 257], 100, seed=10) for _ in range(2)] * 2
    options = {"num_gpu_blocks_override": 4 * STATE_BLOCKS + 10, "max_model_len": 400, "enable_prefix_caching": True}
    with engine(RECALL, **options) as running:
        completions = [running.complete([prompt])[0] for prompt in prompts]
        assert running.slots.num_idle > 0
        assert running.counts["evictions"] > 0
        assert sum(completion.cached for completion in completions) > 0
        check_cold(running, completions[-5:])


def test_interval_keeps_states_inside_a_prompt():
    [prompt] = random_prompts([600], 100, seed=11)
    options = {"additional_config": {"kimi": {"checkpoint_interval": 128}}, "enable_prefix_caching": True}
    with engine(RECALL, **options) as running:
        running.complete([prompt])
        branch = prompt[:400] + random_prompts([50], 100, seed=12)[0]
        completion = running.complete([branch])[0]
        assert completion.cached == 384
        check_cold(running, [completion])
