"""Answers with a seed are the same again, and do not tell in how many steps their prompt was computed."""

import pytest
from support.engine import PLAIN, RECALL, engines, ngram, random_prompts

pytestmark = pytest.mark.engine

OPTIONS = {"block_size": 16, "max_model_len": 256}
# A step has room for all drafts beside the chunks: fewer drafts are fewer draws.
CHUNKED = OPTIONS | {"max_num_batched_tokens": 80, "long_prefill_token_threshold": 12, "enable_prefix_caching": True}
ALWAYS = {"additional_config": {"kimi": {"least_drafts_accepted": 0}}}
DRAFTS, NONE = {"speculative_config": ngram(5)} | ALWAYS, {"speculative_config": None}
CONFIGURATIONS = {
    PLAIN: OPTIONS,
    "chunks": CHUNKED | NONE,
    "chunks, few blocks": CHUNKED | NONE | {"num_gpu_blocks_override": 120},
    "drafts": OPTIONS | DRAFTS,
    "drafts, chunks": CHUNKED | DRAFTS,
}
PROMPTS = random_prompts([100, 5, 180, 64, 33], 100, seed=2)


@pytest.fixture(scope="module")
def running():
    with engines(RECALL, CONFIGURATIONS) as started:
        yield started


def sampled(running, prompts, seeds, max_tokens=70):
    """Answers to all prompts at once; one without a seed is sampled beside them."""
    from vllm import SamplingParams, TokensPrompt

    common = {"temperature": 1, "max_tokens": max_tokens, "ignore_eos": True, "detokenize": False}
    parameters = [SamplingParams(seed=seed, **common) for seed in [*seeds, None]]
    inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in [*prompts, prompts[0]]]
    outputs = running.llm.generate(inputs, parameters, use_tqdm=False)
    running.check_idle()
    return [list(output.outputs[0].token_ids) for output in outputs[:-1]]


@pytest.mark.parametrize(("chunked", "whole"), [("chunks", PLAIN), ("drafts, chunks", "drafts")])
def test_chunks_draw_nothing(running, chunked, whole):
    """Beside one without a seed, beside all others, and again with hits; another seed is another answer."""
    seeds = [11, 12, 13, 14, 15]
    expected = [sampled(running[whole], [prompt], [seed])[0] for prompt, seed in zip(PROMPTS, seeds, strict=True)]
    assert [sampled(running[chunked], [p], [s])[0] for p, s in zip(PROMPTS, seeds, strict=True)] == expected
    for name in (chunked, chunked, whole):
        assert sampled(running[name], PROMPTS, seeds) == expected, name
    assert sampled(running[chunked], PROMPTS[:1], [99]) != expected[:1]


def test_what_is_computed_again_draws_nothing(running):
    """Preempted requests come back in chunks, their answers so far among them."""
    few, seeds = running["chunks, few blocks"], [11, 12, 13, 14, 15]
    answers = sampled(few, PROMPTS, seeds)
    assert few.num_preemptions
    assert answers == sampled(running[PLAIN], PROMPTS, seeds)
