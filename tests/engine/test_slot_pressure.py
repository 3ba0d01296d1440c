"""States are kept where it was asked for and given up when slots run out; answers stay the same."""

import pytest
from support.engine import RECALL, check_cold, engine, random_prompts

pytestmark = pytest.mark.engine


def test_few_slots_evict_and_stay_right():
    prompts = [prompt for prompt in random_prompts([65, 200, 330, 129, 257], 100, seed=10) for _ in range(2)] * 2
    options = {"additional_config": {"kimi": {"state_slots": 4}}, "enable_prefix_caching": True}
    with engine(RECALL, **options) as running:
        completions = [running.complete([prompt])[0] for prompt in prompts]
        assert 0 < running.slots.num_idle <= 4
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
