"""Speculative decoding: answers are those of an engine that does not speculate, whatever is drafted and accepted."""

from collections import Counter
from contextlib import contextmanager
from itertools import cycle

import pytest
import torch
from support.checkpoints import SICK_TOKEN
from support.engine import PLAIN, RECALL, check_equal, engine, engines, ngram, random_prompts

from kimi_vllm.cache.layout import StateLayout
from kimi_vllm.cli.plan_data import read_model

pytestmark = pytest.mark.engine

BLOCK = 64 if torch.cuda.is_available() else 16
"""Where it may be, so small that a window of six ends in another block three times in ten."""
OPTIONS = {"block_size": BLOCK, "max_model_len": 16 * BLOCK}
LENGTHS = [BLOCK * number + offset for number in (1, 2, 4) for offset in (-1, 0, 1)]


def options(states, pages=None, drafts=5, block=BLOCK, **kimi):
    held = state_blocks(drafts, block)
    pages = pages or 8 * held
    return OPTIONS | {
        "block_size": block,
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 37,
        "num_gpu_blocks_override": states * held + pages,
        "speculative_config": ngram(drafts),
        "additional_config": {"kimi": {"least_drafts_accepted": 0} | kimi},
    }


def state_blocks(drafts, block):
    """Blocks of a state with a window."""
    geometry = read_model(RECALL)[0]
    kda = sum(geometry.kda)
    return StateLayout.of(
        geometry, kda, geometry.num_layers - kda, block_size=block, cache_itemsize=4, window=drafts + 1
    ).blocks


@pytest.fixture(autouse=True)
def _covers(record_property):
    record_property("covers", "n-gram drafts")


@contextmanager
def watched(running):
    """Count drafts, those accepted, and steps."""
    seen = Counter()
    stats, execute = running.scheduler.make_spec_decoding_stats, running.worker.execute_model

    def counted(*args, num_draft_tokens, num_accepted_tokens, **named):
        seen.update(drafted=num_draft_tokens, accepted=num_accepted_tokens)
        return stats(*args, num_draft_tokens=num_draft_tokens, num_accepted_tokens=num_accepted_tokens, **named)

    def stepped(output):
        seen["steps"] += 1
        return execute(output)

    running.scheduler.make_spec_decoding_stats, running.worker.execute_model = counted, stepped
    yield seen
    running.scheduler.make_spec_decoding_stats, running.worker.execute_model = stats, execute


def run(running, prompts, answer):
    """Three turns: prompts, their answers continued, and the same once more."""
    first = running.complete(prompts, max_tokens=answer)
    more = random_prompts([5] * len(prompts), 100, seed=4)
    turns = [done.prompt + done.tokens + tail for done, tail in zip(first, more, strict=True)]
    return first, running.complete(turns, max_tokens=20), running.complete(turns, max_tokens=20)


CONFIGURATIONS = {
    "ample": options(60),
    "two drafts": options(60, drafts=2),
    "fifteen drafts": options(30, drafts=15, block=64),
    "by batch size": options(60)
    | {"speculative_config": ngram(5) | {"num_speculative_tokens_per_batch_size": [[1, 2, 5], [3, 4, 2], [5, 8, 0]]}},
    "seldom": options(60, least_drafts_accepted=1),
    "few states": options(9),
    "few states, host": options(9, host_memory_gib=0.01),
    "few pages": options(6, pages=30),
    "nothing cached": options(60) | {"enable_prefix_caching": False},
}


@pytest.fixture(scope="module")
def running():
    with engines(RECALL, {PLAIN: OPTIONS | {"num_gpu_blocks_override": 400}} | CONFIGURATIONS) as started:
        yield started


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_answers_are_the_plain_ones(running, name):
    """Windows across blocks, chunks, hits on answers, eviction, swaps and preemption."""
    prompts = random_prompts(LENGTHS, 100, seed=3)
    chosen = running[name]
    with watched(chosen) as seen:
        turns = run(chosen, prompts, 3 * BLOCK + 5)
    for answers in turns:
        asked = [answer.prompt for answer in answers]
        expected = running[PLAIN].complete(asked, max_tokens=len(answers[0].tokens))
        for ours, theirs in zip(answers, expected, strict=True):
            check_equal(ours, theirs)
    assert 0 < seen["accepted"] < seen["drafted"]
    if name.startswith("few"):
        assert chosen.counts["evictions"] or chosen.num_preemptions
    elif name == "seldom":
        assert 0 < chosen.scheduler._counts["steps_without_drafts"] < seen["steps"]
    elif name != "nothing cached":
        block = CONFIGURATIONS[name]["block_size"]
        # The last token of an answer was never computed.
        known = [len(prompt) + 3 * BLOCK + 4 for prompt in prompts]
        assert [done.cached for done in turns[1]] == [length // block * block for length in known]


def test_a_prompt_of_one_token_beside_a_longer_hit(running):
    """Left alone, vLLM fills it up with drafts of -1 and orders it behind the other, as a prompt of six tokens."""
    from vllm import SamplingParams, TokensPrompt

    trunk, first, more = random_prompts([2 * BLOCK + 8, 20, 30], 100, seed=8)
    prompts = {"0": first, "1": [7], "2": trunk + more}
    chosen = running["ample"]
    chosen.complete([trunk])
    parameters = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    core, answers = chosen.llm.llm_engine, {}
    for name, prompt in prompts.items():
        core.add_request(name, TokensPrompt(prompt_token_ids=prompt), parameters)
        if name == "0":
            core.step()
            core.step()
    while core.has_unfinished_requests():
        answers |= {done.request_id: list(done.outputs[0].token_ids) for done in core.step() if done.finished}
    chosen.check_idle()
    for name, prompt in prompts.items():
        assert answers[name] == running[PLAIN].complete([prompt], max_tokens=40)[0].tokens, name


def test_periodic_answers_take_fewer_steps(running):
    prompts = random_prompts([40, 50], 100, seed=5)
    steps = []
    for name in (PLAIN, "ample"):
        with watched(running[name]) as seen:
            running[name].complete(prompts, max_tokens=150)
        steps.append(seen["steps"])
    assert steps[1] < steps[0] / 2


ONE_RUNNER = pytest.mark.skipif(torch.cuda.is_available(), reason="for both of a GPU's in test_cuda_speculation.py")


def test_sampled_answers_beside_greedy_ones(running):
    """Of the likeliest token alone to choose from is greedy; what is sampled otherwise is likely, and harms nobody."""
    from vllm import SamplingParams, TokensPrompt

    prompts = random_prompts([40, 30, 20, 50], 100, seed=9)
    common = {"max_tokens": 60, "ignore_eos": True, "detokenize": False, "logprobs": 0}
    sampled = [
        SamplingParams(temperature=0.7, top_k=1, **common),
        SamplingParams(temperature=0.2, top_p=0.9, **common),
        SamplingParams(temperature=0, **common),
        SamplingParams(temperature=0.5, top_k=5, **common),
    ]
    inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    with watched(running["ample"]) as seen:
        outputs = running["ample"].llm.generate(inputs, sampled, use_tqdm=False)
    assert seen["accepted"]
    answers = [output.outputs[0] for output in outputs]
    greedy = running[PLAIN].complete(prompts, max_tokens=60)
    for index in (0, 2):
        assert list(answers[index].token_ids) == greedy[index].tokens
    for answer in answers:
        least = min(step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True))
        assert least > -5


@pytest.mark.parametrize("asked", [{"min_p": 0.1}, {"logit_bias": {7: 2.0}}], ids=["min_p", "logit_bias"])
def test_what_vllm_leaves_out_beside_drafts_is_refused(running, asked):
    from vllm import SamplingParams, TokensPrompt

    inputs = TokensPrompt(prompt_token_ids=[5, 6, 7])
    parameters = SamplingParams(temperature=1, detokenize=False, **asked)
    running[PLAIN].llm.generate(inputs, parameters, use_tqdm=False)
    with pytest.raises(Exception, match=r"min_p and logit_bias .* not yet supported with speculative decoding"):
        running["ample"].llm.generate(inputs, parameters, use_tqdm=False)
    running["ample"].check_idle()


@contextmanager
def drafts(running, lengths):
    """Draft the sick token only, so many times in turn."""
    runner, numbers = running.worker.model_runner, cycle(lengths)
    real = runner.drafter.propose

    def proposed(most, sampled, *args, **named):
        return [[SICK_TOKEN] * min(most, next(numbers)) if new else [] for new in sampled]

    runner.drafter.propose = proposed
    yield
    runner.drafter.propose = real


@ONE_RUNNER
def test_a_rejected_draft_that_breaks_its_state_harms_nobody(sick_checkpoint):
    prompts = [[token if token != SICK_TOKEN else 3 for token in p] for p in random_prompts(LENGTHS, 100, seed=6)]
    with engine(sick_checkpoint, **CONFIGURATIONS["ample"]) as running:
        expected = running.complete(prompts, max_tokens=2 * BLOCK)
        assert running.llm.reset_prefix_cache()
        with watched(running) as seen, drafts(running, [1, 2, 3, 4, 5]):
            answers = running.complete(prompts, max_tokens=2 * BLOCK)
        assert seen["drafted"] > 0 == seen["accepted"]
        for ours, theirs in zip(answers, expected, strict=True):
            assert ours.tokens == theirs.tokens
        assert not running.scheduler._counts["quarantined"]


@ONE_RUNNER
def test_an_accepted_draft_that_breaks_its_state_ends_its_request(sick_checkpoint):
    """With the sick token allowed alone, every draft of it is accepted; the window's first token is healthy."""
    from vllm import SamplingParams, TokensPrompt

    prompts = [[token if token != SICK_TOKEN else 3 for token in p] for p in random_prompts([20, 30], 100, seed=7)]
    only = SamplingParams(
        temperature=0, max_tokens=40, ignore_eos=True, detokenize=False, allowed_token_ids=[SICK_TOKEN]
    )
    healthy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    with engine(sick_checkpoint, **CONFIGURATIONS["ample"]) as running:
        expected = running.complete(prompts[:1], max_tokens=40)[0].tokens
        assert running.llm.reset_prefix_cache()
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        with drafts(running, [5]):
            first, second = running.llm.generate(inputs, [healthy, only], use_tqdm=False)
        running.check_idle()
        assert second.outputs[0].finish_reason == "error"
        assert list(first.outputs[0].token_ids) == expected
        assert running.scheduler._counts["quarantined"] == 1
        again = running.complete(prompts[:1], max_tokens=40)[0]
        assert again.tokens == expected


def test_structured_answers():
    """A grammar cuts drafts off where it forbids them."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    asked = ["a=7 k=2 m=5 ? k →", "b=1 c=3 ? c →"]
    parameters = SamplingParams(
        temperature=0, max_tokens=30, structured_outputs=StructuredOutputsParams(regex="( [0-9][0-9] x){4}")
    )
    plain, speculating = (chosen | {"skip_tokenizer_init": False} for chosen in (OPTIONS, CONFIGURATIONS["ample"]))
    texts = []
    with engines(RECALL, {PLAIN: plain, "drafts": speculating}) as running:
        for engine in running.values():
            outputs = engine.llm.generate(asked, parameters, use_tqdm=False)
            texts.append([output.outputs[0].text for output in outputs])
            engine.check_idle()
    assert texts[0] == texts[1]
