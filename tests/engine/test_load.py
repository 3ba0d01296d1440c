"""serve/load as users run it: a server of its own, `vllm bench serve`, and a page with pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.engine

SCENARIO = """
title: Smoke
server:
  model: configs/models/recall
  options: [--dtype, float32, --max-model-len, "512", --max-num-seqs, "8", --enforce-eager]
parts:
  - name: prompts arrive
    workload: {kind: mixed, decoders: 2, decode_output: 60, prompt: 256, arrivals: 2, every: 0.2}
"""


@pytest.mark.slow
def test_a_scenario_is_measured_and_reported(tmp_path):
    (tmp_path / "smoke.yaml").write_text(SCENARIO)
    output = tmp_path / "out"
    command = [sys.executable, "-m", "serve.load", "smoke.yaml", "--output", "out", "--goodput", "e2el:100000"]
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "timeout": 240}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads((output / "run.json").read_text())
    [point] = run["points"]
    result = point["result"]
    assert run["complete"]
    assert (result["completed"], result["failed"]) == (4, 0)
    assert result["total_input_tokens"] == 2 * 32 + 2 * 256
    assert result["total_output_tokens"] == 2 * 60 + 2
    assert result["request_goodput"] == pytest.approx(result["request_throughput"])
    assert 0 < result["p50_ttft_ms"] <= result["p99_ttft_ms"]
    # What /metrics counted in the end is what was sent.
    last = run["samples"][-1]
    assert last["finished"] == 4
    assert last["state_hit_tokens"] + last["state_miss_tokens"] == last["prompt_tokens"]
    assert last["slots_live"] == 0
    assert max(sample.get("slots_live", 0) for sample in run["samples"]) >= 1
    page = (output / "report.html").read_text()
    assert "prompts arrive: time between tokens while prompts arrive" in page
    assert "Caches and requests over time" in page
