"""What the config hook does about memory before anything is loaded; engines that serve in it: `tests/engine`."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from kimi_vllm import sizing
from kimi_vllm.options import KimiOptions

MODELS = Path(__file__).parents[1] / "configs" / "models"
BLOCK, STATE_BLOCKS = 32_768, 8
"""Of the recall model in float32: 64 latents of two MLA layers, and a state of 233,472 bytes."""
ASKED = {"max_model_len": 1024, "max_num_seqs": 4, "dtype": "float32", "skip_tokenizer_init": True}
FULL = 1024 // 64 + 2 * STATE_BLOCKS


@pytest.fixture
def create(monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    memory = SimpleNamespace(available=2**34)
    monkeypatch.setattr(sizing, "psutil", SimpleNamespace(virtual_memory=lambda: memory))
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)

    def create(model="recall", available=2**34, **options):
        memory.available = available
        return EngineArgs(model=str(MODELS / model), **(ASKED | options)).create_engine_config()

    return create


def test_on_a_cpu_vllm_takes_what_sequences_can_fill(create):
    cache = create().cache_config
    assert (cache.block_size, cache.kv_cache_memory_bytes) == (64, (1 + 4 * FULL) * BLOCK)
    plain = create(enable_prefix_caching=False).cache_config
    assert plain.kv_cache_memory_bytes == (1 + 4 * (FULL - STATE_BLOCKS)) * BLOCK
    scheduler = create(max_num_seqs=9, max_num_active_seqs=7).scheduler_config
    assert (scheduler.max_num_seqs, scheduler.max_num_active_seqs) == (9, 7)


def test_on_a_cpu_vllm_takes_no_more_than_is_left(create):
    config = create(max_num_seqs=100_000, max_num_batched_tokens=100_000)
    assert config.scheduler_config.max_num_seqs == 100_000
    taken = config.cache_config.kv_cache_memory_bytes
    assert taken % BLOCK == 0
    utilization = config.cache_config.gpu_memory_utilization
    weights = sizing.planned_costs(config, KimiOptions())[0].weights
    left = int(2**34 * utilization) - 2**34 // 18 - weights
    assert left - BLOCK < taken <= left
    on_host = create(
        max_num_seqs=100_000, max_num_batched_tokens=100_000, additional_config={"kimi": {"host_memory_gib": 4}}
    )
    assert on_host.cache_config.kv_cache_memory_bytes < taken - 2 * 2**30


def test_memory_of_a_cpu_is_shared_by_its_workers(create):
    whole = create(max_num_seqs=100_000, max_num_batched_tokens=100_000).cache_config.kv_cache_memory_bytes
    half = create(max_num_seqs=100_000, max_num_batched_tokens=100_000, tensor_parallel_size=2)
    assert half.cache_config.kv_cache_memory_bytes < 0.51 * whole


def test_what_the_user_sets_wins(create, monkeypatch):
    assert create(num_gpu_blocks_override=1 + FULL).cache_config.kv_cache_memory_bytes is None
    assert create(kv_cache_memory_bytes=(1 + FULL) * BLOCK).cache_config.kv_cache_memory_bytes == (1 + FULL) * BLOCK
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert create(available=0).cache_config.kv_cache_memory_bytes == 2**30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_gpu_blocks_override": FULL}, "there are 32 .* or raise --num-gpu-blocks-override"),
        ({"kv_cache_memory_bytes": FULL * BLOCK}, "there are 32 .* or raise --kv-cache-memory-bytes"),
        (
            {"available": 8 * 2**20},
            "beside weights of .* raise --gpu-memory-utilization .* --kv-cache-memory-bytes if",
        ),
    ],
)
def test_a_memory_without_room_for_one_request_is_refused_before_loading(create, options, message):
    with pytest.raises(
        ValueError, match=f"--max-model-len 1024: one request with its state needs 33 blocks .*{message}"
    ):
        create(**options)
    shorter = {"max_model_len": 64, "enable_prefix_caching": False, "available": 2**34}
    create(**(options | shorter))


def test_max_model_len_auto_is_left_to_vllm(create):
    assert create(max_model_len=-1, num_gpu_blocks_override=2 + 2 * STATE_BLOCKS).cache_config.block_size == 64
    with pytest.raises(ValueError, match=r"--max-model-len 1: one request with its state needs 18 blocks"):
        create(max_model_len=-1, num_gpu_blocks_override=1 + 2 * STATE_BLOCKS)


@pytest.mark.parametrize(("model", "tokens"), [("recall", 64), ("synthetic/mqar", 128), ("synthetic/needle", 512)])
def test_a_block_holds_a_part_of_a_head_unless_the_user_says_how_large_it_is(create, model, tokens):
    assert create(model).cache_config.block_size == tokens
    assert create(model, block_size=2 * tokens).cache_config.block_size == 2 * tokens
    if tokens > 64:
        with pytest.raises(ValueError, match="holds no part of a KDA head: use a larger --block-size"):
            create(model, block_size=tokens // 2)


def test_on_a_gpu_nothing_is_decided_before_vllm_has_measured(create, monkeypatch):
    config = create()
    config.cache_config.kv_cache_memory_bytes = None
    monkeypatch.setattr(sizing, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr(sizing, "planned_costs", None)
    sizing.settle_memory(config, KimiOptions())
    assert config.cache_config.kv_cache_memory_bytes is None
    config.cache_config.num_gpu_blocks_override = FULL
    with pytest.raises(ValueError, match="raise --num-gpu-blocks-override"):
        sizing.settle_memory(config, KimiOptions())


def test_weights_of_an_unknown_format_are_said_to_be_estimated(create, monkeypatch):
    def unknown(config):
        raise sizing.QuantizationError("quantisation odd: the size of its weights is unknown.")

    monkeypatch.setattr(sizing, "weight_format", unknown)
    with mock.patch.object(sizing.logger, "warning") as warned:
        create()
    [message, reason] = warned.call_args.args
    assert "Set --kv-cache-memory-bytes to override the plan." in message
    assert "the size of its weights is unknown" in str(reason)
