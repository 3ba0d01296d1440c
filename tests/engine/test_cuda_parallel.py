"""On two GPUs: every kind of parallelism says what one GPU says, from the prefix cache and after preemption too."""

import random

import pytest
import torch
from openai import OpenAI
from support.engine import RECALL, STATE_BLOCKS, check_equal, engine, random_prompts
from support.server import serving

from serve.demo.recall_task import held_out_prompt

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

LAYOUTS = {
    "TP 2": {"tensor_parallel_size": 2},
    "TP 2, EP 2": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    "PP 2": {"pipeline_parallel_size": 2},  # like DP 2, with an NCCL that vLLM can use: `kimi-vllm doctor`
}
OPTIONS = {
    "dtype": "float32",
    "enforce_eager": False,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 97,
    "enable_prefix_caching": True,
    "num_gpu_blocks_override": 24 + 8 * STATE_BLOCKS,  # so few that requests preempt each other as they grow
}
PROMPTS = random_prompts([1, 63, 64, 65, *range(100, 320, 5)], 100)
TOKENS = 140


@pytest.fixture(scope="module")
def alone():
    """What one GPU answers, one request at a time."""
    with engine(RECALL, **OPTIONS | {"max_num_seqs": 1, "enable_prefix_caching": False}) as running:
        return running.complete(PROMPTS, max_tokens=TOKENS)


def break_the_second_worker(worker):
    """The states of one head become NaN on one worker only; the other has to hear of it."""
    if worker.rank == 1:
        layer = next(module for module in worker.get_model().modules() if hasattr(module, "A_log"))
        layer.A_log.data[0] = float("nan")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_say_what_one_says(layout, alone, monkeypatch, record_property):
    record_property("covers", layout.rpartition(", ")[2])
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send a function to the workers
    with engine(RECALL, **OPTIONS, **LAYOUTS[layout]) as running:
        together = running.complete(PROMPTS, max_tokens=TOKENS)
        assert running.num_preemptions > 0
        # One prompt twice: so little memory keeps nothing of the others.
        [first], [again] = (running.complete(PROMPTS[-1:], max_tokens=TOKENS) for _ in range(2))
        for completion, plain in zip([*together, first, again], [*alone, alone[-1], alone[-1]], strict=True):
            check_equal(completion, plain)
        assert again.cached > 0
        running.llm.collective_rpc(break_the_second_worker)
        [output] = running.llm.generate([{"prompt_token_ids": [5, 6, 7]}], use_tqdm=False)
        assert output.outputs[0].finish_reason == "error"


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_recall_in_bfloat16_on_two_gpus(quantization, record_property):
    from vllm import SamplingParams

    record_property("covers", "TP 2")
    rng = random.Random(9)
    asked = [held_out_prompt(rng, rng.randint(1, 20)) for _ in range(100)]
    options = OPTIONS | {"dtype": "bfloat16", "quantization": quantization, "skip_tokenizer_init": False}
    with engine(RECALL, **options, **LAYOUTS["TP 2"]) as running:
        prompts = [prompt for prompt, _ in asked]
        outputs = running.llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    right = [output.outputs[0].text.strip() == answer for output, (_, answer) in zip(outputs, asked, strict=True)]
    assert sum(right) >= 98


@pytest.mark.parametrize("options", [(), ("--enable-expert-parallel",)], ids=["DP 2", "DP 2, EP 2"])
def test_data_parallel_through_vllm_serve(options, tmp_path, record_property):
    record_property("covers", "DP 2")
    rng = random.Random(10)
    asked = [held_out_prompt(rng, rng.randint(1, 20)) for _ in range(100)]
    memory = ("--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", str(2**30))
    parallel = ("--data-parallel-size", "2", "--kernel-config", '{"enable_jit_warmup": false}', *options)
    with serving(RECALL, tmp_path / "log", "--dtype", "bfloat16", "--no-enforce-eager", *memory, *parallel) as port:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        prompts = [prompt for prompt, _ in asked]
        answered = client.completions.create(model="recall", prompt=prompts, max_tokens=8, temperature=0)
        # Alone, a request is a step of one row, whose experts other kernels could serve.
        alone = [client.completions.create(model="recall", prompt=p, max_tokens=8, temperature=0) for p in prompts[:20]]
    texts = [choice.text.strip() for choice in sorted(answered.choices, key=lambda choice: choice.index)]
    assert sum(text == answer for text, (_, answer) in zip(texts, asked, strict=True)) >= 98
    assert sum(one.choices[0].text.strip() == answer for one, (_, answer) in zip(alone, asked, strict=False)) >= 19
