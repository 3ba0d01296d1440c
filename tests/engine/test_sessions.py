"""Sessions on disk: what one engine saved, another resumes at the same token."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from support.engine import DRAFTS, RECALL, STATE_BLOCKS, check_cold, completion, engine, ngram, random_prompts
from support.sessions import ANSWER, LENGTHS, ask, check_stops, complete, counts, near, options, parameters, save

pytestmark = pytest.mark.engine


def check_ends(done, lengths):
    """All tokens were resumed, the last one too where drafts behind it were right."""
    ends = {one.cached - length - ANSWER for one, length in zip(done, lengths, strict=True)}
    assert ends <= {-1, 0}


HOW = {
    "alone": {"max_num_seqs": 1},
    "batched": {},
    "chunked": {"max_num_batched_tokens": 37},
    "not cached": {"enable_prefix_caching": False},
    "few blocks": {"num_gpu_blocks_override": 5 * STATE_BLOCKS + 5},
    "host memory": {"num_gpu_blocks_override": 5 * STATE_BLOCKS + 5, "kimi": {"host_memory_gib": 0.1}},
}
SCARCE = ("few blocks", "host memory")


SLOW = pytest.param("host memory", marks=pytest.mark.slow)  # prefixes without a name have a shorter test of it


@pytest.mark.parametrize("how", [*(how for how in HOW if how != "host memory"), SLOW])
def test_a_session_goes_on_in_another_engine(saved, how, record_property):
    record_property("covers", "sessions")
    folder, names, prompts = saved
    with engine(RECALL, **options(folder, **HOW[how])) as running:
        done = ask(running, prompts, names, "load", max_tokens=20 if how not in SCARCE else 150)
        if how not in SCARCE:
            check_ends(done, LENGTHS)
        else:
            assert running.num_preemptions
        assert counts(running)["sessions_resumed"] >= len(names)
        check_cold(running, done)


def test_a_session_in_bfloat16(tmp_path):
    """Rounding depends on the steps in which a prompt is computed, so answers are near each other, and not equal."""
    prompts = random_prompts(LENGTHS, 100)
    names = [f"s{length}" for length in LENGTHS]
    onward = save(tmp_path, prompts, names, dtype="bfloat16")
    with engine(RECALL, **options(tmp_path, dtype="bfloat16")) as running:
        done = ask(running, onward, names, "load", max_tokens=8)
        check_ends(done, LENGTHS)
        cold = running.complete([one.prompt for one in done], skip_reading_prefix_cache=True)
        assert all(map(near, done, cold))


@pytest.mark.parametrize("drafts", [3, 5])
def test_a_session_has_the_records_of_its_window(tmp_path, drafts):
    """Prompts that repeat themselves, so that some drafts are right and ends lie inside of windows."""
    prompts = [prompt[:7] * 12 for prompt in random_prompts([7] * 6, 100, seed=5)]
    prompts = [prompt[: len(prompt) - number] for number, prompt in enumerate(prompts)]
    names = [f"d{number}" for number in range(len(prompts))]
    more = {"speculative_config": ngram(drafts)}
    kimi = {"least_drafts_accepted": 0}
    onward = save(tmp_path, prompts, names, kimi=kimi, **more)
    with engine(RECALL, **options(tmp_path, kimi=kimi, **more)) as running:
        done = ask(running, onward, names, "load")
        check_ends(done, [len(prompt) for prompt in prompts])
        check_cold(running, done)
    with engine(RECALL, **options(tmp_path, kimi=kimi, speculative_config=ngram(drafts + 1))) as running:
        done = ask(running, onward, names, "load", max_tokens=8)
        assert [one.cached for one in done] == [0] * len(prompts)
        check_cold(running, done)


def test_a_session_is_saved_by_one_that_was_resumed_and_by_one_that_stopped(tmp_path):
    """Load and save in one request, after an answer that its last token or a stop has ended."""
    [prompt] = random_prompts([100], 100)
    with engine(RECALL, **options(tmp_path)) as running:
        [first] = ask(running, [prompt], ["turn"], "save")
        stop = next(token for token in first.tokens[5:] if first.tokens.index(token) >= 5)
        text, known = prompt, 0
        for _ in range(3):
            running.llm.reset_prefix_cache()
            outputs = complete(running, [text], [parameters(stop=stop, load="turn", save="turn")])
            [done] = [completion(output) for output in outputs]
            assert done.cached == known
            check_cold(running, [done])
            text, known = text + done.tokens + [7, 8, 9], len(text + done.tokens) - 1


def test_a_prefix_that_is_cached_is_not_loaded_again(saved):
    folder, names, prompts = saved
    with engine(RECALL, **options(folder)) as running:
        first = ask(running, prompts, names, "load", max_tokens=8)
        again = ask(running, prompts, names, "load", max_tokens=8)
        assert [one.tokens for one in again] == [one.tokens for one in first]
        assert all(ours.cached >= theirs.cached for ours, theirs in zip(again, first, strict=True))
        check_cold(running, again)


def test_a_session_that_is_being_written_is_waited_for(tmp_path, log):
    """Saved and loaded without a step between: the load asks for what is not on disk yet."""
    from vllm import TokensPrompt

    [prompt] = random_prompts([70], 100)
    with engine(RECALL, **options(tmp_path)) as running:
        inputs = [TokensPrompt(prompt_token_ids=prompt)]
        [first] = running.llm.generate(inputs, [parameters(save="a")], use_tqdm=False)
        assert [path.name for path in tmp_path.iterdir()] == [".a.session.promise"]
        assert first.kv_transfer_params["save"] == "a"
        done = ask(running, [prompt + list(first.outputs[0].token_ids) + [7, 8]], ["a"], "load")
        check_ends(done, [70])
        assert log.messages == []
        check_cold(running, done)


TWO_WORKERS = """
import sys, time
from pathlib import Path
from support.engine import RECALL, random_prompts
from support.sessions import flip

if __name__ == "__main__":
    from vllm import LLM, SamplingParams, TokensPrompt

    folder = Path(sys.argv[1])
    options = {"dtype": "float32", "max_num_seqs": 8, "max_model_len": 1024, "enforce_eager": True}
    kimi = {"session_dir": str(folder), "session_gib": 1, "session_prefix_tokens": 64}
    options |= {"tensor_parallel_size": 2, "enable_prefix_caching": True, "additional_config": {"kimi": kimi}}
    llm = LLM(str(RECALL), **options)
    [prompt] = random_prompts([90], 100)

    def ask(prompt, params):
        extra = {"kv_transfer_params": params}
        sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, extra_args=extra)
        [output] = llm.generate([TokensPrompt(prompt_token_ids=prompt)], sampling, use_tqdm=False)
        return list(output.outputs[0].token_ids), output.num_cached_tokens

    def forget():
        while not llm.reset_prefix_cache():  # as long as something is being saved
            ask([7], {})

    tokens, _ = ask(prompt, {"save": "a"})
    while len([*folder.glob("a~?of2.session")]) < 2:
        time.sleep(0.1)
    onward = prompt + tokens + [7, 8, 9]
    answers = []
    for wanted in ({}, {}, {"load": "a"}, {"load": "a"}):
        forget()
        if len(answers) == 3:
            flip(folder / "a~1of2.session", -5)
        answers.append(ask(onward, wanted))
    texts, cached = zip(*answers)
    print("EQUAL", texts == texts[:1] * 4, "CACHED", cached)
"""


def test_two_workers_resume_together_or_not_at_all(tmp_path):
    script = tmp_path / "two_workers.py"
    script.write_text(TWO_WORKERS)
    folder = tmp_path / "sessions"
    folder.mkdir()
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": "tests:."}

    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    # Computed, from a prefix without a name, from the session, and computed where one rank cannot read its file.
    assert "EQUAL True CACHED (0, 64, 109, 0)" in done.stdout, done.stdout + done.stderr[-4000:]
    assert sorted(path.name for path in folder.glob("a*")) == ["a~0of2.session", "a~1of2.session"]
    assert len([*folder.glob("+*-64~?of2.session")]) == 2


class _Stream:
    """Stands in for a stream of CUDA, and for an event: everything has happened already."""

    device = torch.device("cpu")

    def __init__(self, *args, **named):
        pass

    def wait_stream(self, *args):
        pass

    record = synchronize = wait_stream


@pytest.fixture
def in_flight(monkeypatch):
    """Two steps in flight, which vLLM's platform for CPUs turns off: their runner copies with CUDA's streams."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def keep(cls, vllm_config):
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep))
    for name in ("Event", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, _Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


@pytest.mark.skipif(DRAFTS > 0, reason="vLLM drafts n-grams between steps, with none in flight")
def test_a_session_that_stopped_with_a_step_in_flight(in_flight, tmp_path):
    """That step has computed the token that stopped it."""
    with engine(RECALL, **options(tmp_path, async_scheduling=True)) as running:
        assert running.scheduler.scheduler_config.async_scheduling
        assert running.core.batch_queue_size == 2
        check_stops(running)
