"""torch.compile traces the whole model around our ops, and the compiled model says the same."""

import os
import subprocess
import sys

import pytest
from support.checkpoints import make_transformers_layout
from support.engine import engine, random_prompts

pytestmark = pytest.mark.engine

SCRIPT = """
import sys
from support.engine import engine, random_prompts
with engine(sys.argv[1], enforce_eager=False, enable_prefix_caching=True, max_num_batched_tokens=64) as running:
    mode = running.llm.llm_engine.vllm_config.compilation_config.mode
    print("ANSWER", int(mode), [c.tokens for c in running.complete(random_prompts([3, 70, 150], 100, seed=30))])
"""


def test_a_compiled_model_answers_the_same(tmp_path):
    # Four layers, of all kinds: what is compiled is written out layer by layer.
    checkpoint = make_transformers_layout(tmp_path / "mixed-mlp", "mixed-mlp")
    # In a process of its own: dynamo reads whether it is disabled when it is imported.
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "0", "VLLM_CPU_CI_ENV": "1", "PYTHONPATH": "tests:."}
    environment["VLLM_CACHE_ROOT"] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    answer = next((line for line in result.stdout.splitlines() if line.startswith("ANSWER")), result.stderr[-3000:])
    with engine(checkpoint) as running:
        expected = [completion.tokens for completion in running.complete(random_prompts([3, 70, 150], 100, seed=30))]
    dynamo_trace_once = 2
    assert answer == f"ANSWER {dynamo_trace_once} {expected}"
