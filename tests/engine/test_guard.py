"""A state that becomes NaN or infinite: its request ends alone, or starts again; nobody else notices."""

import pytest
from support.checkpoints import SICK_TOKEN
from support.engine import RECALL, check_cold, engine, poison, random_prompts

pytestmark = pytest.mark.engine


def prompts_without_it(lengths, seed):
    return [[token if token != SICK_TOKEN else 3 for token in p] for p in random_prompts(lengths, 100, seed=seed)]


def run(running, prompts, max_tokens=24, poison_at=None, victim=0):
    """Answer all prompts at once; before step `poison_at`, plant NaN in the victim's live slot."""
    from vllm import SamplingParams, TokensPrompt

    parameters = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    core = running.llm.llm_engine
    for index, prompt in enumerate(prompts):
        core.add_request(str(index), TokensPrompt(prompt_token_ids=prompt), parameters)
    answers, step = {}, 0
    while core.has_unfinished_requests():
        if step == poison_at:
            [table] = [t for name, t in running.manager.req_to_blocks.items() if name.split("-")[0] == str(victim)]
            poison(running.pool, [table[-1].block_id])
        for output in core.step():
            if output.finished:
                answers[int(output.request_id)] = output.outputs[0]
        running.scheduler.check_memory()
        step += 1
    running.check_idle()
    return [answers[index] for index in range(len(prompts))]


def counted(running, name):
    return running.scheduler._counts[name]


def test_one_of_eight_ends_with_an_error_and_the_others_do_not_notice():
    prompts = random_prompts([40, 63, 64, 65, 100, 130, 200, 30], 100, seed=31)
    with engine(RECALL, enable_prefix_caching=True) as running:
        expected = [list(answer.token_ids) for answer in run(running, prompts)]
        assert running.llm.reset_prefix_cache()
        answers = run(running, prompts, poison_at=5, victim=3)
        assert answers[3].finish_reason == "error"
        assert "on_nonfinite" in answers[3].stop_reason
        assert list(answers[3].token_ids) == expected[3][: len(answers[3].token_ids)]
        assert [list(a.token_ids) for i, a in enumerate(answers) if i != 3] == expected[:3] + expected[4:]
        assert counted(running, "quarantined") == 1
        assert not running.pool.nonfinite.any()
        # Its slot and whatever it had published: the same prompts are answered as before.
        assert [list(answer.token_ids) for answer in run(running, prompts)] == expected


@pytest.mark.parametrize("chunk", [64, 97, 1024], ids="chunk{}".format)
def test_what_a_sick_request_left_in_the_caches_is_never_used(sick_checkpoint, chunk):
    """It falls ill in its third block. Its first two blocks may be shared, nothing after them, pages included."""
    [stem] = prompts_without_it([300], seed=32)
    sick = [*stem[:150], SICK_TOKEN, *stem[150:]]
    options = {"enable_prefix_caching": True, "max_num_batched_tokens": chunk}
    with engine(sick_checkpoint, **options) as running:
        for _ in range(2):
            [answer] = run(running, [sick])
            assert answer.finish_reason == "error"
            assert len(answer.token_ids) == 0
        assert counted(running, "quarantined") == 2
        check_cold(running, running.complete([stem[:140], stem[:128], stem], max_tokens=12))
        [answer] = run(running, [[*sick[:151], *stem]])
        assert answer.finish_reason == "error"
        check_cold(running, running.complete([stem], max_tokens=12))


def test_resume_computes_the_same_answer():
    prompts = random_prompts([40, 130, 200], 100, seed=33)
    options = {"enable_prefix_caching": True, "additional_config": {"kimi": {"on_nonfinite": "resume"}}}
    with engine(RECALL, **options) as running:
        expected = [list(answer.token_ids) for answer in run(running, prompts)]
        assert running.llm.reset_prefix_cache()
        answers = run(running, prompts, poison_at=9, victim=1)
        assert [list(answer.token_ids) for answer in answers] == expected
        assert [answer.finish_reason for answer in answers] == ["length"] * 3
        assert counted(running, "quarantined") == 1
        assert running.num_preemptions == 1


def test_resume_is_tried_once(sick_checkpoint):
    [prompt] = prompts_without_it([100], seed=34)
    options = {"enable_prefix_caching": True, "additional_config": {"kimi": {"on_nonfinite": "resume"}}}
    with engine(sick_checkpoint, **options) as running:
        healthy, sick = run(running, [prompt, [*prompt[:80], SICK_TOKEN, *prompt]])
        assert (healthy.finish_reason, sick.finish_reason) == ("length", "error")
        assert counted(running, "quarantined") == 2
        assert running.num_preemptions == 1
        assert not running.scheduler._resumed


def test_without_prefix_caching_too(sick_checkpoint):
    [prompt] = prompts_without_it([100], seed=35)
    with engine(sick_checkpoint) as running:
        healthy, sick = run(running, [prompt, [*prompt, SICK_TOKEN]])
        assert (healthy.finish_reason, sick.finish_reason) == ("length", "error")
        running.check_idle()
