"""The engine's memory is what `kimi-vllm plan` says, and the engine says so itself when it starts."""

import json

import psutil
import pytest
from support.engine import DRAFTS, RECALL, STATE_BLOCKS, engine, random_prompts
from typer.testing import CliRunner

from kimi_vllm import sizing as planner
from kimi_vllm.cache import scheduler
from kimi_vllm.cli import app

pytestmark = pytest.mark.engine


@pytest.fixture
def said(monkeypatch):
    """What the scheduler logs at start; vLLM's logger is silenced in tests."""
    lines = []
    monkeypatch.setattr(scheduler.logger, "info", lambda text, *values: lines.append(text % values))
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    return lines


@pytest.fixture
def weight_bytes(monkeypatch):
    """Bytes of the parameters once they are loaded; on CPUs vLLM repacks some afterwards."""
    from kimi_vllm.model import KimiLinearForCausalLM

    seen = []
    load = KimiLinearForCausalLM.load_weights

    def spy(self, weights):
        loaded = load(self, weights)
        seen.append(sum(parameter.nbytes for parameter in self.parameters()))
        return loaded

    monkeypatch.setattr(KimiLinearForCausalLM, "load_weights", spy)
    return seen


def planned(checkpoint, *options):
    memory = str(psutil.virtual_memory().available)
    arguments = ["plan", "--model", str(checkpoint), "--memory", memory, "--device", "cpu", "--dtype", "float32"]
    report = CliRunner().invoke(app, [*arguments, *options, "--json"])
    assert report.exit_code == 0, report.output
    return json.loads(report.stdout)


@pytest.mark.parametrize(
    ("name", "layout", "caching"),
    [("recall", "hub", True), ("wide-heads", "transformers", False), ("odd-pattern", "hub", True)],
)
def test_plan_and_engine_agree_to_the_byte(name, layout, caching, checkpoints, said, weight_bytes):
    checkpoint = checkpoints[name, layout]
    flag = "--prefix-caching" if caching else "--no-prefix-caching"
    drafts = ["--speculative-tokens", str(DRAFTS)] if DRAFTS else []
    plan = planned(checkpoint, "--max-num-seqs", "5", "--max-model-len", "500", flag, *drafts)
    costs, block_size = plan["costs"], plan["capacity"]["block_size"]
    with engine(checkpoint, max_num_seqs=5, max_model_len=500, enable_prefix_caching=caching) as running:
        pool, arena = running.pool, running.scheduler.arena
        assert pool.layout.blocks == costs["state_blocks"]
        assert pool.layout.state_bytes == costs["state"]
        assert pool.memory.shape == (arena.num_gpu_blocks, costs["block"])
        states = 2 if caching else 1
        assert arena.num_gpu_blocks == 1 + 5 * (-(-500 // block_size) + states * costs["state_blocks"])
        assert weight_bytes == [costs["weights"]]
        assert running.scheduler.max_num_running_reqs == 5
        [table] = [line for line in said if line.startswith("kimi-vllm: states and KV cache share")]
        assert f"share {arena.num_gpu_blocks} blocks" in table
        assert f"{costs['state_blocks']} blocks per request" in table
        running.complete(random_prompts([480] * 5, 100), max_tokens=20)
        assert running.num_preemptions == 0


def test_more_sequences_than_memory_has_room_for_wait():
    """Memory for six requests of 300 tokens: all sixteen are answered, and nobody is preempted."""
    blocks = 1 + 6 * (STATE_BLOCKS + 5) + 3
    with engine(RECALL, max_num_seqs=16, max_model_len=512, num_gpu_blocks_override=blocks) as running:
        most = []
        schedule = running.scheduler.schedule
        running.scheduler.schedule = lambda *args, **named: (
            schedule(*args, **named),
            most.append(len(running.scheduler.running)),
        )[0]
        assert running.scheduler.max_num_running_reqs == 16
        assert len(running.complete(random_prompts([300] * 16, 100), max_tokens=4)) == 16
        assert max(most) == 6
        assert running.num_preemptions == 0


def test_what_cannot_fit_is_refused_before_weights_are_loaded(said, monkeypatch):
    from kimi_vllm.model import KimiLinearForCausalLM

    little = type("Memory", (), {"available": 2**20})
    monkeypatch.setattr(planner.psutil, "virtual_memory", lambda: little)
    monkeypatch.setattr(KimiLinearForCausalLM, "__init__", lambda *args, **kwargs: pytest.fail("the model was built"))
    with pytest.raises(Exception, match="--max-model-len 1024: one request"), engine(RECALL):
        pass


def test_two_engines_from_one_dictionary_of_options():
    """What is settled for the first engine is not the second's option."""
    given = {"kimi": {"checkpoint_interval": 128}}
    for sequences in (2, 6):
        with engine(RECALL, max_num_seqs=sequences, additional_config=given) as running:
            assert running.llm.llm_engine.vllm_config.additional_config == given
    assert given == {"kimi": {"checkpoint_interval": 128}}
