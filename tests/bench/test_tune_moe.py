"""serve/bench/moe: what it tries, and that vLLM finds and reads what it writes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vllm.model_executor.layers.fused_moe import fused_moe
from vllm.platforms import current_platform

from kimi_vllm.geometry import GeometryError
from serve.bench.moe.__main__ import FP8_TOLERANCE, TOLERANCE, search
from serve.bench.moe.space import (
    SHARED_MEMORY,
    Experts,
    candidates,
    file_name,
    shared_memory,
    variants,
    vllm_default,
    write,
)

ROOT = Path(__file__).parents[2]
TOKENS = [1 << exponent for exponent in range(14)]
LARGE = Experts.of_model(ROOT / "configs" / "models" / "48b-a3b")
FP8 = replace(LARGE, fp8=True)
NAME = "E=256,N=1024,device_name=NVIDIA_H200.json"
FP8_NAME = "E=256,N=1024,device_name=NVIDIA_H200,dtype=fp8_w8a8.json"


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(type(current_platform), "get_device_name", classmethod(lambda cls, device_id=0: "NVIDIA H200"))


def test_geometry_of_the_48b_model():
    assert Experts(number=256, per_token=8, hidden=2304, intermediate=1024) == LARGE


def test_geometry_of_one_of_two_gpus():
    folder = ROOT / "configs" / "models" / "48b-a3b"
    assert Experts.of_model(folder, 2, fp8=True) == Experts(256, 8, 2304, 512, fp8=True)
    with pytest.raises(GeometryError, match="1024 channels on 3 GPUs"):
        Experts.of_model(folder, 3)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_candidates_are_few_distinct_and_fit(tokens, fp8):
    configs = candidates(tokens, fp8=fp8)
    assert 20 <= len(configs) <= (48 if tokens <= 64 else 40)
    assert len({tuple(config.items()) for config in configs}) == len(configs)
    assert max(shared_memory(config, fp8=fp8) for config in configs) <= SHARED_MEMORY


@pytest.mark.parametrize("experts", [LARGE, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_default_has_the_keys_of_a_candidate(tokens, experts):
    default = vllm_default(experts, tokens)
    assert default.keys() == candidates(tokens)[0].keys()
    assert shared_memory(default, fp8=experts.fp8) <= SHARED_MEMORY


def test_kernels_differ_by_unsorted_rows_and_by_a_number_of_rows_that_16_does_not_divide():
    assert variants(LARGE, TOKENS) == {1: 1, 2: 2, 4: 2, 8: 2, **dict.fromkeys(TOKENS[4:], 16)}


@pytest.mark.usefixtures("h200")
def test_name_is_the_one_that_vllm_looks_for():
    assert file_name(LARGE) == NAME == fused_moe.get_config_file_name(256, 1024, None)
    assert file_name(FP8) == FP8_NAME


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize(("experts", "kind"), [(LARGE, None), (FP8, "fp8_w8a8")], ids=["bf16", "fp8"])
def test_vllm_launches_what_the_file_says(experts, kind, tmp_path, monkeypatch):
    chosen = {tokens: candidates(tokens, fp8=experts.fp8)[-1] for tokens in TOKENS}
    write(tmp_path / "new" / file_name(experts), chosen)
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path / "new"))
    fused_moe.get_moe_configs.cache_clear()
    try:
        assert fused_moe.get_moe_configs(256, 1024, kind) == chosen
        launched = [
            fused_moe.try_get_optimal_moe_config((256, 2048, 2304), (256, 2304, 1024), 8, kind, tokens)
            for tokens in (1, 70, 5_000, 100_000)
        ]
    finally:
        fused_moe.get_moe_configs.cache_clear()
    assert launched == [chosen[1], chosen[64], chosen[4096], chosen[8192]]


def test_file_looks_like_those_of_vllm(tmp_path):
    write(tmp_path / NAME, {8: candidates(8)[0], 1: candidates(1)[0]})
    assert list(json.loads((tmp_path / NAME).read_text())) == ["triton_version", "1", "8"]
    shipped = json.loads(
        (Path(fused_moe.__file__).parent / "configs" / "E=512,N=512,device_name=NVIDIA_H200.json").read_text()
    )
    assert shipped["1"].keys() == candidates(1)[0].keys()


def test_help_names_the_variable_that_vllm_reads():
    done = subprocess.run(
        [sys.executable, "-m", "serve.bench.moe", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "VLLM_TUNED_CONFIG_FOLDER" in done.stdout


class FakeLayer:
    """Outputs that are wrong for two warps."""

    def __init__(self, experts=LARGE, wrong=1.0):
        self.experts, self.wrong = experts, wrong

    def calls(self, tokens, routings):
        return lambda config: [torch.full((tokens, 4), 1.0 + self.wrong * (config["num_warps"] == 2))] * routings


def test_search_keeps_the_fastest_whose_output_is_right(monkeypatch):
    def median_us(run, config, routings, worst_us, budget_us):
        if config["num_stages"] == 9:
            raise RuntimeError("out of resource: shared memory")
        return times[config["num_warps"]]

    monkeypatch.setattr("serve.bench.moe.layer.median_us", median_us)
    default = candidates(8)[0]
    configs = [default, *({**default, "num_warps": warps} for warps in (2, 8, 16)), {**default, "num_stages": 9}]
    rows = []

    def row(tokens, config, stage, **found):
        rows.append((stage, config["num_warps"], found))

    times = {4: 10.0, 2: 5.0, 8: 7.0, 16: 30.0}
    assert search(FakeLayer(), 8, configs, row) == (configs[2], 7.0, 10.0)
    assert [found["dropped"] for stage, _, found in rows if stage == "search" and "us" in found] == [
        *(False, False, False, True)
    ]
    assert sum("error" in found for *_, found in rows) == 1
    assert {warps: found["difference"] for stage, warps, found in rows if stage == "final"} == {2: 1.0, 8: 0.0, 4: 0.0}
    times[8] = 9.95  # not worth a change
    assert search(FakeLayer(), 8, configs, row) == (default, 10.0, 10.0)


def test_search_without_the_default_is_refused(monkeypatch):
    monkeypatch.setattr("serve.bench.moe.layer.median_us", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(RuntimeError, match="default for 8 tokens"):
        search(FakeLayer(), 8, candidates(8)[:2], lambda *args, **found: None)


@pytest.mark.parametrize(("experts", "kept"), [(LARGE, False), (FP8, True)], ids=["bf16", "fp8"])
def test_search_allows_for_what_fp8_rounds(experts, kept, monkeypatch):
    monkeypatch.setattr("serve.bench.moe.layer.median_us", lambda run, config, *args, **named: config["num_warps"])
    default = candidates(8)[0]
    other = {**default, "num_warps": 2}
    layer = FakeLayer(experts, wrong=(TOLERANCE + FP8_TOLERANCE) / 2)
    assert search(layer, 8, [default, other], lambda *args, **found: None)[0] == (other if kept else default)
