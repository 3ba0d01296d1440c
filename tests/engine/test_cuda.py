"""On a GPU: vLLM's MLA, CUDA graphs and asynchronous scheduling around our kernels say what transformers says.

The other engine tests hold there too, in float32; these are about what a CPU does not have.
"""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from openai import OpenAI
from support.checkpoints import GEOMETRIES, make_random
from support.cuda import HEADS_OF_48B, SMOOTH, distributions, relative_error
from support.engine import DRAFTS, RECALL, STATE_BLOCKS, engine, random_prompts
from support.server import serving

from serve.demo.recall_task import held_out_prompt

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

LENGTHS = [1, 2, 4, 5, 6, 63, 64, 65, 129, 321]
CASES = {name: values | SMOOTH for name, values in GEOMETRIES.items()}
CASES["heads-of-48b"] = HEADS_OF_48B
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}


@pytest.fixture(scope="module")
def smooth(tmp_path_factory):
    """Random checkpoints whose numbers are all bfloat16, so that no dtype rounds them, and transformers' model."""
    from support.oracle import Oracle

    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("smooth") / name
            make_random(folder, CASES[name], dtype=torch.bfloat16)
            made[name] = folder, Oracle(folder)
        return made[name]

    return make


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, dtype, smooth, record_property):
    record_property("covers", dtype)
    from vllm import SamplingParams, TokensPrompt

    checkpoint, oracle = smooth(name)
    vocab_size = oracle.model.config.vocab_size
    prompts = random_prompts(LENGTHS, vocab_size)
    options = {"dtype": dtype, "enforce_eager": False, "max_logprobs": vocab_size, "max_num_batched_tokens": 128}
    parameters = SamplingParams(
        temperature=0, max_tokens=70, ignore_eos=True, logprobs=vocab_size, prompt_logprobs=vocab_size, detokenize=False
    )
    with engine(checkpoint, **options) as running:
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        outputs = running.llm.generate(inputs, parameters, use_tqdm=False)
        running.check_idle()
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = [*prompt, *output.outputs[0].token_ids]
        error = relative_error(distributions(output, vocab_size), oracle.logprobs(tokens)[:-1])
        assert error <= TOLERANCE[dtype], f"{len(prompt)} tokens: {error:.1e}"


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "scheduling"),
    [
        *((dtype, "float32", scheduling) for dtype in TOLERANCE for scheduling in (True, False)),
        ("bfloat16", "bfloat16", True),
        ("float16", "float16", True),
    ],
)
def test_recall_with_graphs_chunks_hits_preemption_and_swaps(dtype, state_dtype, scheduling, record_property):
    record_property("covers", dtype)
    from vllm import SamplingParams

    rng = random.Random(6)
    # The longest last: they are asked again, and hit what they have left.
    asked = sorted([held_out_prompt(rng, rng.randint(1, 20)) for _ in range(150)], key=lambda pair: len(pair[0]))
    state_blocks = STATE_BLOCKS * getattr(torch, state_dtype).itemsize // getattr(torch, dtype).itemsize
    options = {
        "dtype": dtype,
        "enforce_eager": False,
        "async_scheduling": scheduling,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 97,
        "enable_prefix_caching": True,
        "num_gpu_blocks_override": 30 + 12 * state_blocks,
        "skip_tokenizer_init": False,
        "additional_config": {"kimi": {"state_dtype": state_dtype, "host_memory_gib": 0.1}},
    }
    with engine(RECALL, **options) as running:
        assert running.scheduler.scheduler_config.async_scheduling == scheduling
        assert running.pool.layout.cut.state_dtype == getattr(torch, state_dtype)
        assert running.slots.state_blocks == state_blocks or DRAFTS
        # Long answers, so that requests outgrow the pages.
        for questions in (asked, asked[-4:]):
            parameters = SamplingParams(temperature=0, max_tokens=130, ignore_eos=True)
            outputs = running.llm.generate([prompt for prompt, _ in questions], parameters, use_tqdm=False)
            running.check_idle()
            right = [
                output.outputs[0].text.strip().startswith(answer)
                for output, (_, answer) in zip(outputs, questions, strict=True)
            ]
            assert sum(right) >= 0.99 * len(questions)
        # With drafts fewer run at once.
        assert DRAFTS or sum(output.num_cached_tokens or 0 for output in outputs) > 0
        assert DRAFTS or running.num_preemptions > 0
        assert running.counts["swaps_out"] > 0


FIRST_REQUESTS = """
import json, sys
import triton
from support.engine import DRAFTS, RECALL, STATE_BLOCKS, engine, random_prompts
from vllm import SamplingParams, TokensPrompt

if __name__ == "__main__":
    compiled = []

    def record(*, fn, **_):
        compiled.append(f"{fn.module}.{fn.name}")

    options = {"dtype": "bfloat16", "enforce_eager": False, "max_num_seqs": 20, "max_num_batched_tokens": 300}
    options |= {"kernel_config": {"enable_jit_warmup": True}}
    sampled = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05},
        {"temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
        {"temperature": 0, "logprobs": 5, "prompt_logprobs": 2},
        {"temperature": 0, "logit_bias": {7: 2.0}, "min_tokens": 3, "stop_token_ids": [9]},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 7},
    ]
    if DRAFTS:  # vLLM refuses these then
        sampled = [
            {name: value for name, value in each.items() if name not in ("min_p", "logit_bias")} for each in sampled
        ]
    with engine(RECALL, quantization=json.loads(sys.argv[1]), **options) as running:
        # Called for what is compiled and for what is loaded from a cache on disk, so a warm cache hides nothing.
        triton.knobs.runtime.jit_post_compile_hook = record
        for lengths in ([1], [2], [4], [5], [64], [500], [3, 1, 700, 64] * 6, range(20, 900, 17)):
            inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in random_prompts(list(lengths), 100)]
            parameters = [SamplingParams(max_tokens=9, **sampled[i % len(sampled)]) for i in range(len(inputs))]
            running.llm.generate(inputs, parameters, use_tqdm=False)
        for alike in sampled:
            for count in (1, 3, 20):
                inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in random_prompts([5] * count, 100)]
                running.llm.generate(inputs, SamplingParams(max_tokens=5, **alike), use_tqdm=False)
        triton.knobs.runtime.jit_post_compile_hook = None
    print("COMPILED", json.dumps(sorted(set(compiled))))
"""


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_nothing_is_compiled_for_a_request(quantization, tmp_path, record_property):
    """In a process of its own, where no other engine has compiled anything yet."""
    record_property("covers", "bfloat16" if quantization is None else "FP8")
    script = tmp_path / "first_requests.py"
    script.write_text(FIRST_REQUESTS)
    environment = os.environ | {"PYTHONPATH": f"tests:.:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(script), json.dumps(quantization)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    said = [line for line in done.stdout.splitlines() if line.startswith("COMPILED")]
    assert said == ["COMPILED []"], f"{said}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_recall_through_vllm_serve(dtype, tmp_path, record_property):
    record_property("covers", dtype)
    rng = random.Random(7)
    asked = [held_out_prompt(rng, rng.randint(1, 20)) for _ in range(100)]
    # What it measures of the memory, other tests' engines would disturb.
    memory = ("--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", str(2**30))
    options = ("--dtype", dtype, "--no-enforce-eager", *memory)
    with serving(RECALL, tmp_path / "log", *options) as port:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        prompts = [prompt for prompt, _ in asked]
        answered = client.completions.create(model="recall", prompt=prompts, max_tokens=8, temperature=0)
    texts = [choice.text.strip() for choice in sorted(answered.choices, key=lambda choice: choice.index)]
    assert sum(text == answer for text, (_, answer) in zip(texts, asked, strict=True)) >= 99
