"""Speculative decoding on a GPU: both model runners, graphs or none, drafts made on the host or on the device."""

from contextlib import contextmanager

import pytest
import torch
from support.checkpoints import SICK_TOKEN
from support.engine import PLAIN, RECALL, check_equal, engine, random_prompts
from test_speculation import BLOCK, LENGTHS, OPTIONS, options, run, watched

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

# Drafts of n-grams: the second runner makes them on the device, and does not wait for them with "ngram_gpu".
RUNNERS = {
    "second-graphs": ("1", "ngram_gpu", True, False),
    "second-eager": ("1", "ngram_gpu", True, True),
    "second-waiting": ("1", "ngram", False, False),
    "first-graphs": ("0", "ngram", False, False),
    "first-eager": ("0", "ngram", False, True),
}


def configurations(name, monkeypatch):
    """Of one runner: with room for all, the same with drafts in few steps, with less room, and without drafts."""
    runner, method, asynchronous, eager = RUNNERS[name]
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    common = {"enforce_eager": eager, "async_scheduling": asynchronous}

    def drafting(states, **kimi):
        chosen = options(states, **kimi)
        return chosen | common | {"speculative_config": chosen["speculative_config"] | {"method": method}}

    plain = OPTIONS | common | {"num_gpu_blocks_override": 400, "speculative_config": None}
    return {
        "ample": drafting(60),
        "seldom": drafting(60, least_drafts_accepted=1),
        "scarce": drafting(9, host_memory_gib=0.01),
        PLAIN: plain,
    }


def check_kind(running, name):
    runner, _, asynchronous, _ = RUNNERS[name]
    assert hasattr(running.worker.model_runner, "speculator") == (runner == "1")
    assert running.scheduler.scheduler_config.async_scheduling == asynchronous


@pytest.mark.parametrize("name", RUNNERS)
def test_answers_are_the_plain_ones(name, monkeypatch, record_property):
    """Windows across blocks, chunks, hits on answers, eviction and swaps."""
    record_property("covers", "n-gram drafts")
    prompts, turns = random_prompts(LENGTHS, 100, seed=3), {}
    # One after another: vLLM's memory for experts is one for all engines of a process, and graphs fix its size.
    for kind, chosen in configurations(name, monkeypatch).items():
        with engine(RECALL, **chosen) as running:
            check_kind(running, name)
            if kind == PLAIN:
                for answers in (answers for turn in turns.values() for answers in turn):
                    expected = running.complete([a.prompt for a in answers], max_tokens=len(answers[0].tokens))
                    for ours, theirs in zip(answers, expected, strict=True):
                        check_equal(ours, theirs)
                break
            with watched(running) as seen:
                turns[kind] = run(running, prompts, 3 * BLOCK + 5)
            assert 0 < seen["accepted"] < seen["drafted"]
            assert kind != "scarce" or running.counts["evictions"]
            assert (kind == "seldom") == (running.scheduler._counts["steps_without_drafts"] > 0)
    known = [len(prompt) + 3 * BLOCK + 4 for prompt in prompts]
    assert [done.cached for done in turns["ample"][1]] == [length // BLOCK * BLOCK for length in known]


@contextmanager
def sick_drafts(running, number):
    """Draft the sick token only, so many times a window."""
    runner = running.worker.model_runner
    drafter = getattr(runner, "speculator", None) or runner.drafter
    real = drafter.propose

    def on_device(batch, *args, **named):
        drafted = torch.full_like(drafter.drafts[: batch.num_reqs], 3)
        drafted[:, :number] = SICK_TOKEN
        return drafted

    def on_host(most, sampled, *args, **named):
        return [[SICK_TOKEN] * min(most, number) if new else [] for new in sampled]

    drafter.propose = on_device if hasattr(drafter, "drafts") else on_host
    yield
    drafter.propose = real


@pytest.mark.parametrize("name", ["second-graphs", "second-waiting", "first-graphs"])
def test_a_draft_that_breaks_its_state_harms_nobody_unless_it_counts(name, monkeypatch, sick_checkpoint):
    from vllm import SamplingParams, TokensPrompt

    prompts = [[token if token != SICK_TOKEN else 3 for token in p] for p in random_prompts(LENGTHS, 100, seed=6)]
    sampled = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "detokenize": False}
    with engine(sick_checkpoint, **configurations(name, monkeypatch)["ample"]) as running:
        check_kind(running, name)
        expected = running.complete(prompts, max_tokens=40)
        for number in (1, 3, 5):
            assert running.llm.reset_prefix_cache()
            with watched(running) as seen, sick_drafts(running, number):
                answers = running.complete(prompts, max_tokens=40)
            assert seen["drafted"] > 0
            assert [ours.tokens for ours in answers] == [theirs.tokens for theirs in expected]
        assert not running.scheduler._counts["quarantined"]

        assert running.llm.reset_prefix_cache()
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts[:2]]
        only = SamplingParams(allowed_token_ids=[SICK_TOKEN], **sampled)
        with sick_drafts(running, 5):
            first, second = running.llm.generate(inputs, [SamplingParams(**sampled), only], use_tqdm=False)
        running.check_idle()
        assert second.outputs[0].finish_reason == "error"
        assert list(first.outputs[0].token_ids) == expected[0].tokens
        assert running.scheduler._counts["quarantined"] == 1
        assert running.complete(prompts[:1], max_tokens=40)[0].tokens == expected[0].tokens
