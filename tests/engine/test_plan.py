"""`kimi-vllm plan` says of a memory what an engine makes of it: the same blocks, and no more requests than run."""

import json

import pytest
from support.engine import RECALL, engine, random_prompts
from typer.testing import CliRunner

from kimi_vllm.cli import app

pytestmark = pytest.mark.engine

MEMORY = 12_345_678
TOKENS, ANSWER = 120, 40


def planned(**options):
    arguments = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    done = CliRunner().invoke(app, ["plan", "--model", str(RECALL), "--memory", "8GB", "--json", *arguments])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


@pytest.mark.parametrize("drafts", [0, 3])
def test_plan_and_engine_divide_a_memory_alike(drafts, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    drafting = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 3}
    options = {"kv_cache_memory_bytes": MEMORY, "max_model_len": 1024, "max_num_seqs": 64, "block_size": 64}
    served = {
        "dtype": "float32",
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 8192,
        "speculative_config": drafting if drafts else None,
    }
    with engine(RECALL, **options, **served) as running:
        plan = planned(**options, dtype="float32", device="cpu", speculative_tokens=drafts, contexts=TOKENS)
        costs, arena = plan["costs"], running.scheduler.arena
        assert plan["capacity"]["blocks"] == arena.num_gpu_blocks == MEMORY // costs["block"]
        assert costs["block"] == running.pool.memory[0].numel() * running.pool.memory.element_size()
        assert costs["state_blocks"] == running.slots.state_blocks
        most, schedule = [0], running.scheduler.schedule

        def watched(*args, **kwargs):
            output = schedule(*args, **kwargs)
            most[0] = max(most[0], len(running.scheduler.running))
            return output

        running.scheduler.schedule = watched
        running.complete(random_prompts([TOKENS - ANSWER] * 64, 100), max_tokens=ANSWER)
        # A few blocks stay free for requests that grow.
        fits = plan["contexts"][0]["concurrency"]["ours"]
        assert 0.9 * fits < most[0] <= fits < 64
