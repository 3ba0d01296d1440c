"""A quantised checkpoint is served with f_b_proj and g_b_proj in full precision, and refused with these quantised."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.amx import emulate_amx
from support.checkpoints import write_checkpoint
from support.engine import RECALL, engine

sys.path.insert(0, str(Path(__file__).parents[2] / "serve" / "demo"))
from recall_task import held_out_prompt

pytestmark = pytest.mark.engine

LINEAR = re.compile(r"_proj(_with_mqa)?\.weight$")
NOT_KDA = ["lm_head", r"re:.*\.(mlp|block_sparse_moe)\..*", r"re:.*\.layers\.[37]\.self_attn\..*"]
NOT_EXPERTS = ["lm_head", r"re:.*\.experts\..*", r"re:.*\.block_sparse_moe\.gate"]
LOW_RANK = r"re:.*\.self_attn\.[fg]_b_proj"


def int8_checkpoint(folder, ignore):
    """The shipped checkpoint as compressed-tensors writes it: int8 linears, one scale per output, but for some."""
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    linears = {
        "targets": ["Linear"],
        "weights": int8 | {"strategy": "channel", "dynamic": False},
        "input_activations": int8 | {"strategy": "token", "dynamic": True},
    }
    quantisation = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {"group_0": linears},
    }
    tensors = load_file(RECALL / "model.safetensors")
    ignored = re.compile("|".join(pattern.removeprefix("re:") for pattern in ignore))
    for linear in [name.removesuffix(".weight") for name in tensors if LINEAR.search(name)]:
        if not ignored.fullmatch(linear):
            weight = tensors[f"{linear}.weight"]
            scale = tensors[f"{linear}.weight_scale"] = weight.abs().amax(1, keepdim=True) / 127
            tensors[f"{linear}.weight"] = (weight / scale).round().to(torch.int8)
    config = json.loads((RECALL / "config.json").read_text()) | {"quantization_config": quantisation}
    return write_checkpoint(folder, config, tensors, tokenizer_from=RECALL)


def right_answers(running):
    """How many of 100 held-out prompts the engine answers as it should."""
    from vllm import SamplingParams

    rng = random.Random(7)
    asked = [held_out_prompt(rng, rng.randint(1, 20)) for _ in range(100)]
    parameters = SamplingParams(temperature=0, max_tokens=8)
    outputs = running.llm.generate([prompt for prompt, _ in asked], parameters, use_tqdm=False)
    return sum(output.outputs[0].text.strip() == answer for output, (_, answer) in zip(outputs, asked, strict=True))


def test_int8_input_projections(tmp_path):
    checkpoint = int8_checkpoint(tmp_path / "int8", [*NOT_KDA, LOW_RANK])
    with engine(checkpoint, dtype="bfloat16", skip_tokenizer_init=False, max_num_seqs=32) as running:
        layer = running.model.model.layers[0].self_attn
        assert "CompressedTensors" in type(layer.in_proj.quant_method).__name__
        assert layer.fg_b_proj.weight.dtype == torch.bfloat16
        assert right_answers(running) >= 98


def test_int8_where_a_cpu_has_amx(tmp_path, monkeypatch):
    """AMX packs int8 weights in whole blocks of 32 outputs."""
    amx = emulate_amx(monkeypatch)
    checkpoint = int8_checkpoint(tmp_path / "int8", [*NOT_EXPERTS, LOW_RANK])
    with engine(checkpoint, dtype="bfloat16", skip_tokenizer_init=False, max_num_seqs=32) as running:
        layer = running.model.model.layers[0].self_attn
        packed = amx.shapes(torch.int8)
        assert packed.count((sum(layer.in_proj.splits), 128)) == 6
        assert right_answers(running) >= 98
    assert torch.int8 in amx.products


def test_int8_low_rank_projections_are_refused(tmp_path):
    from vllm.distributed import cleanup_dist_env_and_memory

    checkpoint = int8_checkpoint(tmp_path / "int8", NOT_KDA)
    refused = r"\.[fg]_b_proj\.weight\w* \(\w+\): quantised f_b_proj and g_b_proj are not supported.*`ignore`"
    try:
        with pytest.raises(Exception, match=refused), engine(checkpoint):
            pass
    finally:
        cleanup_dist_env_and_memory()
