"""Which quantised weights a CPU serves, by its instruction sets; `tests/engine/test_quantized.py` serves them."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.quantised import SCHEMES
from vllm.platforms import CpuArchEnum, current_platform

from kimi_vllm import cpu_quantization
from kimi_vllm.geometry import KimiGeometry
from kimi_vllm.quantization import QuantizationError

GEOMETRY = KimiGeometry.from_config(
    json.loads((Path(__file__).parents[1] / "configs" / "models" / "recall" / "config.json").read_text())
)
DENSE = replace(GEOMETRY, moe=None, sparse=(False,) * GEOMETRY.num_layers)
AVX2, AVX512, AMX = frozenset[str](), frozenset({"AVX-512"}), frozenset({"AVX-512", "AMX"})
CPUS = (AVX2, AVX512, AMX)


def refused(written, cpu, monkeypatch, geometry=DENSE, dtype=torch.bfloat16, architecture=CpuArchEnum.X86):
    """What is said against a quantisation, if anything."""
    monkeypatch.setattr(cpu_quantization, "instruction_sets", lambda: cpu)
    monkeypatch.setattr(type(current_platform), "get_cpu_architecture", classmethod(lambda cls: architecture))
    model = SimpleNamespace(quantization="any", dtype=dtype)
    try:
        cpu_quantization.refuse_unserved(SimpleNamespace(model_config=model), geometry, written)
    except QuantizationError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("scheme", "serving"),
    [
        ("compressed-tensors-fp8", CPUS),
        ("compressed-tensors-w4a16", (AVX512, AMX)),
        ("gptq", (AVX512, AMX)),
        ("awq", (AVX512, AMX)),
        ("fp8-block", (AMX,)),
    ],
)
def test_what_serves_what(scheme, serving, monkeypatch):
    found = [cpu for cpu in CPUS if refused(SCHEMES[scheme][1], cpu, monkeypatch) is None]
    assert found == list(serving)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_of_quantised_experts_only_blocks_of_fp8_are_served(scheme, monkeypatch):
    said = refused(SCHEMES[scheme][1], AMX, monkeypatch, GEOMETRY)
    if scheme == "fp8-block":
        assert said is None
    else:
        assert "experts: vLLM's kernels for quantised experts on CPUs lack Kimi Linear's routing" in said


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"quant_method": "gptq", "bits": 8, "group_size": 64}, "gptq, 8-bit weights"),
        ({"quant_method": "fp8", "weight_block_size": [64, 128]}, r"fp8, a scale per block of [64, 128]"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}},
            },
            "compressed-tensors, 8-bit float weights with a scale per tensor, 16-bit inputs",
        ),
    ],
)
def test_what_no_cpu_serves_is_named(written, named, monkeypatch):
    assert f"quantization_config: {named}: vLLM has no kernel for it on CPUs" in refused(written, AMX, monkeypatch)


def test_other_processors_are_left_to_vllm(monkeypatch):
    assert refused({"quant_method": "gptq", "bits": 8}, AVX2, monkeypatch, architecture=CpuArchEnum.ARM) is None


def test_instruction_sets_are_what_torch_finds(monkeypatch):
    for avx512, amx, expected in ((False, False, AVX2), (True, False, AVX512), (True, True, AMX)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda found=avx512: found)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda found=amx: found)
        assert cpu_quantization.instruction_sets() == expected
