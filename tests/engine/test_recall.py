"""The shipped checkpoint does what it was trained for when it is served: any state mix-up shows as a wrong answer."""

import random

import pytest
from support.engine import RECALL, engine

from serve.demo.recall_task import held_out_prompt

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32", "enable_prefix_caching": True, "max_num_batched_tokens": 100},
        {"dtype": "bfloat16"},
    ],
    ids=["fp32-cache-chunked", "bf16"],
)
def test_at_least_99_percent_right(options, record_property):
    record_property("covers", options["dtype"])
    from vllm import SamplingParams

    rng = random.Random(5)
    asked = [held_out_prompt(rng, rng.randint(1, 20)) for _ in range(200)]
    with engine(RECALL, skip_tokenizer_init=False, max_num_seqs=32, **options) as running:
        parameters = SamplingParams(temperature=0, max_tokens=8)
        outputs = running.llm.generate([prompt for prompt, _ in asked], parameters, use_tqdm=False)
        running.check_idle()
    right = [
        output.outputs[0].text.strip() == answer and output.outputs[0].finish_reason == "stop"
        for output, (_, answer) in zip(outputs, asked, strict=True)
    ]
    assert sum(right) >= 198
