"""serve/bench/engine, all of it, with the tiny geometry: every measurement leaves a row that makes sense."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from serve.bench.engine.plan import MEASUREMENTS, ON_REQUEST
from serve.bench.engine.rows import read

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.engine


@pytest.mark.slow
def test_every_measurement_leaves_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    few = ["--contexts", "128,4K", "--steps", "4", "--prompts", "4K", "--prefills", "128", "--arrivals", "2"]
    few += ["--beside", "96", "--draft-requests", "1", *(f"--measure={name}" for name in MEASUREMENTS + ON_REQUEST)]
    few += [
        "--engine",
        json.dumps({"num_gpu_blocks_override": 300, "additional_config": {"kimi": {"session_dir": str(tmp_path)}}}),
    ]
    command = [sys.executable, "-m", "serve.bench.engine", "run", "--json", str(path), *few]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read(path)
    assert not [row for row in rows if "error" in row or "error_after" in row]
    assert [row["provider"] for row in rows if "skipped" in row] == ["in-tree"]
    ours = {(row["bench"], *row["case"].values()): row for row in rows if row["provider"] == "kimi-vllm"}
    assert ours["header", "recall"]["env"]["vllm"].startswith("vllm")
    assert ours["engine", "recall"]["model_class"].startswith("kimi_vllm.")
    for batch, context, requests in (("1", 128, 1), ("1", 4096, 1), ("largest", 128, 8), ("largest", 4096, 3)):
        row = ours["tpot", context, batch]
        assert row["context"] == "synthetic"
        assert (row["requests"], row["tpot"]["count"], row["preemptions"]) == (requests, 4, 0)
        assert row["steps_with_all_requests"] == "5/5"
    # 299 blocks of 64 tokens hold three prompts of 4K, their states and what they grow by.
    assert (ours["concurrency", 4096]["running"], ours["concurrency", 4096]["limited_by"]) == (3, "memory")
    mixed = [row for row in rows if row["bench"] == "mixed"]
    assert [row["mixed_step_tokens"] for row in mixed] == [0, 96]
    assert {(row["running_decoders"], row["answered"], row["preemptions"]) for row in mixed} == {(4, 2, 0)}
    assert ours["drafts", 1, 256, 0, None]["tokens_per_step"] == 1
    assert ours["prefill", 128]["context"] == "real"
    assert ours["prefill", 128]["tokens_per_s"] > 0
    resumed = ours["resume", 512]
    assert (resumed["sessions_resumed"], resumed["sessions_missed"]) == (11, 0)
    assert resumed["running_decoders"] == 4
    assert resumed["resumed"]["count"] == resumed["resumed_uncached"]["count"] == 3


@pytest.mark.slow
def test_prompts_come_again_from_host_memory(tmp_path):
    path = tmp_path / "rows.jsonl"
    memory = {"enable_prefix_caching": True, "num_gpu_blocks_override": 170}
    command = [
        sys.executable,
        "-m",
        "serve.bench.engine",
        "run",
        "--variant=ours",
        "--measure=again",
        "--max-model-len=2048",
        "--json",
        str(path),
    ]
    for host in (0, 1):
        more = json.dumps(memory | {"additional_config": {"kimi": {"host_memory_gib": host}}})
        done = subprocess.run(
            [*command, "--engine", more], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    without, with_host = [row for row in read(path) if row["bench"] == "again"]
    assert without["hit_share"] < 0.5
    assert with_host["hit_share"] == 1
    assert with_host["counts"]["page_swaps_in"] > 0
    assert with_host["running_decoders"] > 0
