"""Layers that were imported before vLLM decided on CUDA graphs do not run in them unnoticed."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from vllm.config import CUDAGraphMode

from kimi_vllm._vllm import installed_vllm

EARLY = """
import os
from kimi_vllm.layers.kda import kimi_delta_attention
from vllm.model_executor.layers.attention.mla_attention import unified_mla_attention_with_output
from kimi_vllm.graph_breaks import check_graph_breaks
from vllm.config import CUDAGraphMode
from types import SimpleNamespace

os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] = "1"  # as vLLM sets it when it makes the config
for mode in ("FULL", "NONE", "FULL_AND_PIECEWISE"):
    config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode]))
    check_graph_breaks(config, kimi_delta_attention)
    check_graph_breaks(config, unified_mla_attention_with_output)
    print(mode, "passed")
"""


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "VLLM_USE_BREAKABLE_CUDAGRAPH"}
    return subprocess.run(
        [sys.executable, "-c", EARLY], env=kept | environment, capture_output=True, text=True, check=False
    )


def test_layers_imported_too_early_are_refused():
    _, release = installed_vllm()
    done = run()
    if release.startswith("0.32"):
        assert done.stdout.split() == ["FULL", "passed", "NONE", "passed"], done.stderr
        assert "RuntimeError: kimi_vllm.layers.kda was imported before the engine's config" in done.stderr
    else:  # graphs break there whenever the layers were imported
        assert done.returncode == 0, done.stderr


def test_the_environment_variable_makes_the_order_irrelevant():
    done = run(VLLM_USE_BREAKABLE_CUDAGRAPH="1")
    assert done.returncode == 0, done.stderr
    assert "FULL_AND_PIECEWISE passed" in done.stdout


def test_without_breaks_in_graphs_there_is_nothing_to_check(monkeypatch: pytest.MonkeyPatch):
    from kimi_vllm.graph_breaks import check_graph_breaks

    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    piecewise = SimpleNamespace(cudagraph_mode=CUDAGraphMode.PIECEWISE)
    check_graph_breaks(SimpleNamespace(compilation_config=piecewise), run)
