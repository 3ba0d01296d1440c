"""A quantised checkpoint is served with f_b_proj and g_b_proj in full precision, and refused with these quantised."""

import json
import random
import re

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import write_checkpoint
from support.cpus import emulate_amx, emulate_avx512
from support.engine import RECALL, engine, random_prompts
from support.quantised import SCHEMES
from support.sessions import LENGTHS, ask, counts, near, options, save

from serve.demo.recall_task import held_out_prompt

pytestmark = pytest.mark.engine

LOW_RANK = r".*\.self_attn\.[fg]_b_proj"
EXPERTS = r".*\.block_sparse_moe\.experts\..*"
NOT_KDA = r".*\.(mlp|block_sparse_moe)\..*|.*\.layers\.[37]\.self_attn\..*"
LINEAR = re.compile(r".*\.(\w+_proj|kv_a_proj_with_mqa|w[123])\.weight")
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}


def int8(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}, None


INT8_SCHEME = (
    int8,
    {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": INT8 | {"strategy": "channel", "dynamic": False},
                "input_activations": INT8 | {"strategy": "token", "dynamic": True},
            }
        },
    },
)


def quantised_checkpoint(folder, scheme, left_out):
    """The shipped checkpoint as quantisers write it: linears in few bits, but for those of the names in `left_out`."""
    quantise, quantisation = scheme
    left_out = re.compile("|".join(left_out))
    tensors, kept = load_file(RECALL / "model.safetensors"), []
    for name in [name for name in tensors if LINEAR.fullmatch(name)]:
        linear = name.removesuffix(".weight")
        if left_out.fullmatch(linear):
            kept.append(linear)
            # vLLM asks for all experts of a layer at once by this name, but for those of compressed-tensors.
            kept += [linear.rpartition(".experts.")[0] + ".experts"] * (".experts." in linear)
        else:
            parts, _ = quantise(tensors.pop(name))
            tensors |= {f"{linear}.{end}": part for end, part in parts.items()}
    ignored = {
        "compressed-tensors": {"ignore": ["lm_head", *kept]},
        "awq": {"modules_to_not_convert": ["lm_head", *kept]},
        "gptq": {"dynamic": {f"-:{re.escape(name)}\\b": {} for name in kept}},
    }[quantisation["quant_method"]]
    config = json.loads((RECALL / "config.json").read_text()) | {"quantization_config": quantisation | ignored}
    return write_checkpoint(folder, config, tensors, tokenizer_from=RECALL)


def right_answers(running):
    """How many of 100 held-out prompts the engine answers as it should."""
    from vllm import SamplingParams

    rng = random.Random(7)
    asked = [held_out_prompt(rng, rng.randint(1, 20)) for _ in range(100)]
    parameters = SamplingParams(temperature=0, max_tokens=8)
    outputs = running.llm.generate([prompt for prompt, _ in asked], parameters, use_tqdm=False)
    return sum(output.outputs[0].text.strip() == answer for output, (_, answer) in zip(outputs, asked, strict=True))


def served(checkpoint, dtype="bfloat16"):
    return engine(checkpoint, dtype=dtype, skip_tokenizer_init=False, max_num_seqs=32)


def test_int8_input_projections(tmp_path, record_property):
    record_property("covers", "W8A8 int8")
    checkpoint = quantised_checkpoint(tmp_path / "int8", INT8_SCHEME, [NOT_KDA, LOW_RANK])
    with served(checkpoint) as running:
        layer = running.model.model.layers[0].self_attn
        assert "CompressedTensors" in type(layer.in_proj.quant_method).__name__
        assert layer.fg_b_proj.weight.dtype == torch.bfloat16
        assert right_answers(running) >= 98


@pytest.mark.parametrize("scheme", ["int8", "compressed-tensors-fp8"])
def test_eight_bits_in_all_linear_layers(scheme, tmp_path, record_property):
    record_property("covers", "W8A8 int8" if scheme == "int8" else "FP8")
    scheme = INT8_SCHEME if scheme == "int8" else SCHEMES[scheme]
    with served(quantised_checkpoint(tmp_path / "quantised", scheme, [EXPERTS, LOW_RANK])) as running:
        layers = running.model.model.layers
        for linear in (layers[0].self_attn.in_proj, layers[3].self_attn.kv_b_proj, layers[0].mlp.down_proj):
            assert "CompressedTensors" in type(linear.quant_method).__name__
        assert right_answers(running) >= 98
        running.llm.collective_rpc("reload_weights")
        assert right_answers(running) >= 98


def test_a_session_of_a_quantised_checkpoint(tmp_path):
    """Its weights are known as they were loaded, in eight bits."""
    checkpoint = quantised_checkpoint(tmp_path / "int8", INT8_SCHEME, [EXPERTS, LOW_RANK])
    prompts = random_prompts(LENGTHS, 100)
    names = [f"s{length}" for length in LENGTHS]
    folder = tmp_path / "sessions"
    folder.mkdir()
    onward = save(folder, prompts, names, checkpoint, dtype="bfloat16")
    with engine(checkpoint, **options(folder, dtype="bfloat16")) as running:
        assert running.llm.llm_engine.vllm_config.model_config.quantization == "compressed-tensors"
        done = ask(running, onward, names, "load", max_tokens=8)
        assert counts(running)["sessions_resumed"] == len(names)
        cold = running.complete([one.prompt for one in done], skip_reading_prefix_cache=True)
        # Two tokens may be as likely.
        assert sum(map(near, done, cold)) >= len(done) - 1
    with engine(RECALL, **options(folder, dtype="bfloat16")) as running:
        done = ask(running, onward[-1:], names[-1:], "load", max_tokens=8)
        assert done[0].cached == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_int8_where_a_cpu_has_amx(dtype, tmp_path, monkeypatch):
    """AMX packs int8 weights in whole blocks of 32 outputs and multiplies bfloat16; oneDNN has the rest."""
    amx = emulate_amx(monkeypatch)
    with served(quantised_checkpoint(tmp_path / "int8", INT8_SCHEME, [EXPERTS, LOW_RANK]), dtype) as running:
        width = sum(running.model.model.layers[0].self_attn.in_proj.splits)
        assert amx.shapes(torch.int8).count((width, 128)) == (6 if dtype == "bfloat16" else 0)
        assert right_answers(running) >= 98
        running.llm.collective_rpc("reload_weights")
        assert amx.shapes(torch.int8).count((width, 128)) == (12 if dtype == "bfloat16" else 0)
        assert right_answers(running) >= 98
    assert (torch.int8 in amx.products) == (dtype == "bfloat16")


# GPTQ and AWQ pack eight outputs to an integer, and the two heads' b_proj has two.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "left_out"),
    [
        ("compressed-tensors-w4a16", []),
        ("gptq", [r".*\.([qkvb]|[fg]_a)_proj"]),
        ("awq", [r".*\.([qkvb]|[fg]_a)_proj"]),
    ],
)
def test_four_bits_where_a_cpu_has_avx512(scheme, left_out, tmp_path, monkeypatch):
    from vllm.model_executor.layers.quantization import auto_gptq

    emulate_avx512(monkeypatch)
    # With experts of other sizes than Marlin's, as these are, vLLM forgets that GPTQ has left them out.
    monkeypatch.setattr(auto_gptq, "check_moe_marlin_supports_layer", lambda *arguments, **options: True)
    checkpoint = quantised_checkpoint(tmp_path / "int4", SCHEMES[scheme], [NOT_KDA, LOW_RANK, *left_out])
    with served(checkpoint) as running:
        layer = running.model.model.layers[0].self_attn
        assert {"qweight", "weight_packed"} & dict(layer.o_proj.named_parameters()).keys()
        assert left_out or "weight_packed" in dict(layer.in_proj.named_parameters())
        assert right_answers(running) >= 98


def test_int8_low_rank_projections_are_refused(tmp_path):
    from vllm.distributed import cleanup_dist_env_and_memory

    checkpoint = quantised_checkpoint(tmp_path / "int8", INT8_SCHEME, [NOT_KDA])
    refused = r"\.[fg]_b_proj\.weight\w* \(\w+\): quantised f_b_proj and g_b_proj are not supported.*`ignore`"
    try:
        with pytest.raises(Exception, match=refused), engine(checkpoint):
            pass
    finally:
        cleanup_dist_env_and_memory()
