"""The engine divides memory as `kimi-vllm plan` says, and says so itself when it starts."""

import json

import psutil
import pytest
from support.engine import RECALL, engine, random_prompts
from typer.testing import CliRunner

from kimi_vllm import sizing as planner
from kimi_vllm.cli import app

pytestmark = pytest.mark.engine


@pytest.fixture
def said(monkeypatch):
    """What the config hook logs, by level; vLLM's logger is silenced in tests."""
    lines = []
    for level in ("info", "warning"):
        log = lambda text, *values, level=level: lines.append((level, text % values))  # noqa: E731
        monkeypatch.setattr(planner.logger, level, log)
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
    text = CliRunner().invoke(app, [*arguments, *options])
    report = CliRunner().invoke(app, [*arguments, *options, "--json"])
    assert (text.exit_code, report.exit_code) == (0, 0), text.output
    return text.stdout, json.loads(report.stdout)["sizing"]


@pytest.mark.parametrize(
    ("name", "layout", "caching"),
    [("recall", "hub", True), ("wide-heads", "transformers", False), ("odd-pattern", "hub", True)],
)
def test_plan_and_engine_agree_to_the_byte(name, layout, caching, checkpoints, said, weight_bytes):
    checkpoint = checkpoints[name, layout]
    flag = "--prefix-caching" if caching else "--no-prefix-caching"
    text, sizing = planned(checkpoint, "--max-num-seqs", "5", "--max-model-len", "500", flag)
    with engine(checkpoint, max_num_seqs=5, max_model_len=500, enable_prefix_caching=caching) as running:
        table = next(line for level, line in said if line.startswith("kimi-vllm memory per worker"))
        assert table in text
        assert running.slots.num_slots == 1 + sizing["state_slots"] == (11 if caching else 6)
        pool = running.pool
        assert pool.state.nbytes + pool.conv.nbytes == sizing["state_bytes"]
        assert sizing["costs"]["slot"] * running.slots.num_slots == sizing["state_bytes"]
        config = running.scheduler.kv_cache_config
        caches = [
            layer.self_attn.attn.kv_cache for layer in running.model.model.layers if hasattr(layer, "state_group")
        ]
        assert sum(cache.nbytes for cache in caches) == sizing["kv_bytes"]
        assert config.num_blocks == sizing["num_pages"] == 1 + 5 * 8
        assert running.scheduler.kv_cache_manager.block_pool.num_gpu_blocks == sizing["num_pages"]
        assert weight_bytes == [sizing["costs"]["weights"]]
        assert running.scheduler.max_num_running_reqs == sizing["live"] == 5
        running.complete(random_prompts([480] * 5, 100), max_tokens=20)
        assert running.num_preemptions == 0


@pytest.mark.parametrize("host_memory_gib", [0, 0.25])
def test_too_many_sequences_are_clamped_and_served(host_memory_gib, said, monkeypatch):
    """Memory for the weights, a few slots and their pages: fewer requests run at once, and the others wait."""
    _, ample = planned(RECALL, "--max-num-seqs", "16", "--max-model-len", "512")
    costs = ample["costs"]
    enough_for_six = costs["weights"] + 8 * costs["slot"] + (1 + 6 * 8) * costs["page"]
    memory = round(enough_for_six / (0.92 - 1 / 20) + host_memory_gib * 2**30)
    monkeypatch.setattr(planner, "_memory", lambda vllm_config: memory)
    host_tier = {"kimi": {"host_memory_gib": host_memory_gib}}
    options = {"max_num_seqs": 16, "max_num_active_seqs": 12, "max_model_len": 512}
    with engine(RECALL, **options, additional_config=host_tier) as running:
        assert running.scheduler.max_num_running_reqs == running.scheduler.max_num_active_reqs == 6
        assert running.slots.num_slots == 7
        warnings = [line for level, line in said if level == "warning"]
        assert len(warnings) == 1
        assert "--max-num-seqs 16 lowered to 6" in warnings[0]
        assert "kimi.state_slots" in warnings[0]
        answers = running.complete(random_prompts([300] * 16, 100), max_tokens=4)
        assert len(answers) == 16
        assert running.num_preemptions == 0


def test_what_cannot_fit_is_refused_before_weights_are_loaded(said, monkeypatch):
    from kimi_vllm.model import KimiLinearForCausalLM

    monkeypatch.setattr(planner, "_memory", lambda vllm_config: 2**20)
    monkeypatch.setattr(KimiLinearForCausalLM, "__init__", lambda *args, **kwargs: pytest.fail("the model was built"))
    with pytest.raises(Exception, match="--max-model-len 1024: one request and its state slots need"), engine(RECALL):
        pass


def test_two_engines_from_one_dictionary_of_options():
    """The number chosen for the first engine is not the second's option."""
    given = {"kimi": {"checkpoint_interval": 128}}
    for sequences in (2, 6):
        with engine(RECALL, max_num_seqs=sequences, additional_config=given) as running:
            assert running.slots.num_slots == 1 + sequences
            assert running.llm.llm_engine.vllm_config.additional_config == given
    assert given == {"kimi": {"checkpoint_interval": 128}}
