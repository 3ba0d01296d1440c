"""What a user gets wrong is answered with the name of what is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import write_checkpoint
from support.engine import RECALL, engine, random_prompts

from kimi_vllm import cpu_quantization

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def config():
    return json.loads((RECALL / "config.json").read_text())


@pytest.fixture(scope="module")
def tensors():
    return load_file(RECALL / "model.safetensors")


def fails(message, checkpoint, **options):
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        with pytest.raises(Exception, match=message), engine(checkpoint, **options):
            pass
    finally:
        cleanup_dist_env_and_memory()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu': Kimi Linear is served with hidden_act='silu' only"),
        ({"kv_lora_rank": None}, "kv_lora_rank: missing from config.json"),
        ({"attn_res_block_size": 4}, "attn_res_block_size=4: this field belongs to another model"),
    ],
    ids=["unknown-value", "missing-key", "kimi-k3"],
)
def test_config_errors_name_the_key(changes, message, config, tmp_path):
    fails(message, write_checkpoint(tmp_path / "bad", config | changes, {}), load_format="dummy")


def test_truncated_safetensors(tmp_path):
    folder = shutil.copytree(RECALL, tmp_path / "truncated")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    fails("a safetensors file of the checkpoint is truncated or damaged", folder)


def test_missing_and_unexpected_tensors_are_listed(config, tensors, tmp_path):
    fewer = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(("0.self_attn.A_log", "experts.3.w2.weight"))
    }
    fails(r"lacks tensors: .*experts.3.w2.weight.*", write_checkpoint(tmp_path / "fewer", config, fewer))
    more = tensors | {"model.layers.0.self_attn.g_proj.weight": torch.zeros(2, 2)}
    fails(
        r"belong nowhere: model.layers.0.self_attn.g_proj.weight",
        write_checkpoint(tmp_path / "more", config, more),
    )


def test_a_tensor_of_the_wrong_shape_is_named(config, tensors, tmp_path):
    name = "model.layers.0.self_attn.q_conv1d.weight"
    wrong = tensors | {name: torch.zeros(128, 1, 3)}
    fails(
        rf"{name} \(128, 1, 3\) does not fit: by config.json it is \(128, 4\)",
        write_checkpoint(tmp_path / "wrong", config, wrong),
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"intermediate_size": 128}, r"mlp.\w+_proj.weight \(\d+, \d+\) does not fit: by config.json it is .*128"),
        ({"num_attention_heads": 2, "num_key_value_heads": 2}, r"3.self_attn.\w+_proj.weight \(.*\) does not fit"),
    ],
    ids=["intermediate", "heads"],
)
def test_a_checkpoint_larger_than_its_config_is_refused(overrides, message):
    fails(message, RECALL, hf_overrides=overrides)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"additional_config": {"kimi": {"slots": 3}}}, "kimi.slots: no such option"),
        (
            {"additional_config": {"kimi": {"state_slots": 12}}},
            "kimi.state_slots: replaced. --max-num-seqs limits running requests",
        ),
        (
            {"additional_config": {"kimi": {"state_dtype": "bfloat16"}}},
            "kimi.state_dtype: on CPUs states are float32, not torch.bfloat16",
        ),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 16, "prompt_lookup_max": 3}},
            "--speculative-config .num_speculative_tokens on CPUs.: a step verifies at most 16 tokens of a request",
        ),
        ({"enable_lora": True}, "--enable-lora: kimi-vllm does not support it|does not support LoRA"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"mamba_ssm_cache_dtype": "bfloat16"}, r"--mamba-ssm-cache-dtype: .* kimi.state_dtype"),
        ({"mamba_cache_mode": "align"}, "--mamba-cache-mode: it configures vLLM's own state cache"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls .*: kimi-vllm needs"),
        ({"worker_cls": "vllm.v1.worker.gpu_worker.Worker"}, "--worker-cls .*: kimi-vllm needs"),
    ],
    ids=[
        "option",
        "memory",
        "state-dtype",
        "speculative",
        "lora",
        "fp8-cache",
        "mamba-dtype",
        "mamba-mode",
        "scheduler",
        "worker",
    ],
)
def test_what_is_not_served_is_refused_by_name(options, message, record_property):
    if "kv_cache_dtype" in options:
        record_property("refuses", "FP8 latents")
    fails(message, RECALL, **options)


NUMBER = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
W4A16 = {"weights": NUMBER | {"num_bits": 4, "strategy": "group", "group_size": 128}, "input_activations": None}
EXPERTS = ["lm_head", r"re:.*\.experts\..*"]


def compressed(group, ignore=EXPERTS, form="pack-quantized"):
    group = {"targets": ["Linear"]} | group
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ignore,
        "config_groups": {"group_0": group},
    }


@pytest.mark.parametrize(
    ("quantisation", "options", "message"),
    [
        (
            None,
            {"quantization": "fp8"},
            "--quantization fp8: vLLM has no kernel for it on CPUs. Drop the option. Any x86-64 CPU",
        ),
        (
            {"quant_method": "fp8", "activation_scheme": "dynamic"},
            {},
            "quantization_config: fp8, a scale per tensor: vLLM has no kernel for it on CPUs. Take another checkpoint",
        ),
        (
            {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
            {},
            r"fp8, a scale per block of \[128, 128\]: vLLM multiplies it with AMX only, which this CPU lacks",
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True},
            {"dtype": "float16"},
            "awq, 4-bit weights: vLLM multiplies it with AVX-512 only, which this CPU lacks",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False},
            {"dtype": "float16"},
            "gptq, 4-bit weights: vLLM multiplies it with AVX-512 only, which this CPU lacks",
        ),
        (compressed(W4A16), {}, "4-bit int weights with a scale per group, 16-bit inputs: .* AVX-512 only"),
        (
            compressed(
                {"weights": NUMBER, "input_activations": NUMBER | {"strategy": "token", "dynamic": True}},
                ["lm_head"],
                "int-quantized",
            ),
            {},
            "8-bit int weights .*, experts: vLLM's kernels for quantised experts on CPUs lack Kimi Linear's routing",
        ),
    ],
    ids=["online", "fp8", "fp8-block", "awq", "gptq", "w4a16", "experts"],
)
def test_quantised_weights_that_a_cpu_with_avx2_cannot_multiply(
    quantisation, options, message, config, tensors, tmp_path, monkeypatch
):
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(cpu_quantization, "instruction_sets", frozenset)
    written = {} if quantisation is None else {"quantization_config": quantisation}
    folder = write_checkpoint(tmp_path / "quantised", config | written, tensors, tokenizer_from=RECALL)
    with pytest.raises(Exception, match=message):
        EngineArgs(str(folder), **({"dtype": "bfloat16"} | options)).create_engine_config()


def test_four_bits_in_a_model_of_float32(config, tensors, tmp_path, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(cpu_quantization, "instruction_sets", lambda: frozenset({"AVX-512"}))
    folder = write_checkpoint(tmp_path / "int4", config | {"quantization_config": compressed(W4A16)}, tensors)
    with pytest.raises(Exception, match=r"--dtype float32: vLLM multiplies .* with bfloat16 or float16 only"):
        EngineArgs(str(folder), dtype="float32", skip_tokenizer_init=True).create_engine_config()


def test_batch_invariance_is_not_promised(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    fails("VLLM_BATCH_INVARIANT=1: kimi-vllm does not support it with KDA state yet", RECALL)


@pytest.mark.parametrize(
    ("feature", "options", "message"),
    [
        ("DP 2", {"data_parallel_size": 2}, r"--data-parallel-size: .* Start several servers"),
        (
            "EP 2",
            {"tensor_parallel_size": 2, "enable_expert_parallel": True},
            r"--enable-expert-parallel: .* --tensor-parallel-size splits every expert instead",
        ),
    ],
)
def test_experts_apart_on_cpus_are_refused_before_the_first_request_would_fail(
    feature, options, message, record_property
):
    from vllm.engine.arg_utils import EngineArgs

    record_property("refuses", feature)
    with pytest.raises(Exception, match=message):
        EngineArgs(str(RECALL), **options).create_engine_config()


@pytest.mark.parametrize(("stages", "partition"), [(4, None), (2, "3,5"), (2, "7,1")])
def test_stages_without_a_kind_of_layer_are_refused_by_name(stages, partition, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    if partition:
        monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", partition)
    message = rf"--pipeline-parallel-size {stages}: stage \d has layers .* at least one KDA layer and one MLA layer"
    with pytest.raises(Exception, match=message):
        EngineArgs(str(RECALL), pipeline_parallel_size=stages).create_engine_config()


def test_a_prompt_longer_than_the_model():
    with engine(RECALL, max_model_len=128) as running:
        [prompt] = random_prompts([200], 100)
        with pytest.raises(Exception, match="maximum context length is 128 tokens"):
            running.complete([prompt])
        assert len(running.complete([prompt[:100]])[0].tokens) == 8
