"""Sessions on disk: what one engine saved, another resumes at the same token; what is broken is computed."""

import logging
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engine import RECALL, STATE_BLOCKS, check_cold, completion, engine, ngram, random_prompts
from support.limits import largest_file

pytestmark = pytest.mark.engine

LENGTHS = [5, 24, 25, 63, 64, 65, 88, 127, 128, 129, 200, 300]
"""With answers of 40, files end at these and 39: at and between multiples of 64."""
ANSWER = 40
OPTIONS = {"enable_prefix_caching": True}


def options(folder, **more):
    kimi = {"session_dir": str(folder)} | more.pop("kimi", {})
    return OPTIONS | {"additional_config": {"kimi": kimi}} | more


def ask(running, prompts, names, what, max_tokens=ANSWER, salt=None):
    """Complete prompts, each with a session of its own to save or to load."""
    from vllm import SamplingParams, TokensPrompt

    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            extra_args={"kv_transfer_params": {what: name}},
        )
        for name in names
    ]
    inputs = [TokensPrompt(prompt_token_ids=prompt, **({"cache_salt": salt} if salt else {})) for prompt in prompts]
    outputs = running.llm.generate(inputs, sampling, use_tqdm=False)
    settle(running)
    return [completion(output) for output in outputs]


def check_ends(done, lengths):
    """All tokens were resumed, the last one too where drafts behind it were right."""
    ends = {one.cached - length - ANSWER for one, length in zip(done, lengths, strict=True)}
    assert ends <= {-1, 0}


def counts(running):
    """Sessions resumed, missed, saved and unsaved so far."""
    return running.scheduler.connector.counts


@pytest.fixture
def log(caplog, monkeypatch):
    """What the plugin logs."""
    logger = logging.getLogger("vllm")
    monkeypatch.setattr(logger, "propagate", caplog.handler not in logger.handlers)
    with caplog.at_level(logging.WARNING, logger="vllm.kimi_vllm"):
        yield caplog


def settle(running):
    """Let what ended be written: an engine in this process steps only when it is asked to."""
    while running.scheduler.has_requests():
        running.llm.llm_engine.step()
    running.check_idle()


def save(folder, prompts, names, salt=None, **more):
    """Save sessions in an engine of their own, and return prompts that go on where they ended."""
    with engine(RECALL, **options(folder, **more)) as running:
        done = ask(running, prompts, names, "save", salt=salt)
    tail = random.Random(8)
    return [one.prompt + one.tokens + [tail.randrange(3, 100) for _ in range(tail.choice((1, 2, 70)))] for one in done]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of sessions, their names, and prompts that go on."""
    folder = tmp_path_factory.mktemp("sessions")
    names = [f"s{length}" for length in LENGTHS]
    return folder, names, save(folder, random_prompts(LENGTHS, 100), names)


HOW = {
    "alone": {"max_num_seqs": 1},
    "batched": {},
    "chunked": {"max_num_batched_tokens": 37},
    "not cached": {"enable_prefix_caching": False},
    "few blocks": {"num_gpu_blocks_override": 5 * STATE_BLOCKS + 5},
}


@pytest.mark.parametrize("how", HOW)
def test_a_session_goes_on_in_another_engine(saved, how):
    folder, names, prompts = saved
    with engine(RECALL, **options(folder, **HOW[how])) as running:
        done = ask(running, prompts, names, "load", max_tokens=150 if how == "few blocks" else 20)
        if how != "few blocks":
            check_ends(done, LENGTHS)
        else:
            assert running.num_preemptions
        assert counts(running)["sessions_resumed"] >= len(names)
        check_cold(running, done)


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
    """Load and save in one request; and a token that stops it, while the next step may be on its way."""
    from vllm import SamplingParams, TokensPrompt

    [prompt] = random_prompts([100], 100)
    with engine(RECALL, **options(tmp_path)) as running:
        [first] = ask(running, [prompt], ["turn"], "save")
        stop = next(token for token in first.tokens[5:] if first.tokens.index(token) >= 5)
        count = first.tokens.index(stop) + 1
        for turn in range(3):
            sampling = SamplingParams(
                temperature=0,
                max_tokens=ANSWER,
                stop_token_ids=[stop],
                detokenize=False,
                extra_args={"kv_transfer_params": {"save": f"stopped{turn}"}},
            )
            running.llm.generate([TokensPrompt(prompt_token_ids=prompt)], [sampling], use_tqdm=False)
            settle(running)
            onward = prompt + first.tokens[:count] + [7, 8, 9]
            done = ask(running, [onward], [f"stopped{turn}"], "load")
            assert done[0].cached >= len(prompt) + count - 1
            check_cold(running, done)


def test_a_prefix_that_is_cached_is_not_loaded_again(saved):
    folder, names, prompts = saved
    with engine(RECALL, **options(folder)) as running:
        first = ask(running, prompts, names, "load", max_tokens=8)
        again = ask(running, prompts, names, "load", max_tokens=8)
        assert [one.tokens for one in again] == [one.tokens for one in first]
        assert all(ours.cached >= theirs.cached for ours, theirs in zip(again, first, strict=True))
        check_cold(running, again)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def rewrite(path, **parts):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path) | parts, path, metadata)


BROKEN = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a byte at its end": lambda path: flip(path, -1),
    "a byte in its middle": lambda path: flip(path, path.stat().st_size // 2),
    "a byte in its header": lambda path: flip(path, 30),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "no such part": lambda path: rewrite(path, more=torch.zeros(1)),
    "other tokens": lambda path: rewrite(path, tokens=load_file(path)["tokens"][:-1]),
}


def test_a_broken_file_is_a_miss(saved, tmp_path, log):
    folder, names, prompts = saved
    name, prompt = names[-1], prompts[-1]
    with engine(RECALL, **options(tmp_path)) as running:
        for number, (how, damage) in enumerate(BROKEN.items()):
            path = tmp_path / f"{name}.session"
            shutil.rmtree(path, ignore_errors=True)
            if path.is_dir():
                path.rmdir()
            shutil.copy(folder / path.name, path)
            damage(path)
            log.clear()
            running.llm.reset_prefix_cache()
            [done] = ask(running, [prompt], [name], "load", max_tokens=8)
            assert done.cached == 0, how
            assert counts(running)["sessions_missed"] == number + 1, how
            assert sum(f"Session {name}" in line for line in log.messages) == 1, (how, log.messages)
            check_cold(running, [done])


def test_another_text_another_salt_and_what_is_no_name_are_misses(saved, tmp_path, log):
    folder, names, prompts = saved
    with engine(RECALL, **options(folder)) as running:
        other = [*prompts[0][:3], 99, *prompts[0][4:]]
        shorter = prompts[1][: LENGTHS[1] + ANSWER - 1]  # nothing is left to compute the next token from
        done = ask(running, [other, shorter], names[:2], "load", max_tokens=8)
        done += ask(running, [prompts[2]], [names[2]], "load", max_tokens=8, salt="tenant")
        done += ask(running, prompts[3:6], ["../s63", "nobody", 7], "load", max_tokens=8)
        assert [one.cached for one in done] == [0] * 6
        assert counts(running)["sessions_missed"] == 6
        assert "is no name of a session" in log.text
        check_cold(running, done)


def test_a_salt_has_sessions_of_its_own(tmp_path):
    [prompt] = random_prompts([70], 100)
    [onward] = save(tmp_path, [prompt], ["a"], salt="one")
    with engine(RECALL, **options(tmp_path)) as running:
        [hit] = ask(running, [onward], ["a"], "load", salt="one")
        [other] = ask(running, [onward], ["a"], "load", salt="two")
        [none] = ask(running, [onward], ["a"], "load")
        assert [hit.cached, other.cached, none.cached] == [70 + ANSWER - 1, 0, 0]


@pytest.mark.parametrize("how", ["weights", "block_size", "dtype"])
def test_another_model_or_cut_is_a_miss(saved, tmp_path, how):
    folder, names, prompts = saved
    model, more = RECALL, {}
    if how == "weights":
        model = shutil.copytree(RECALL, tmp_path / "other")
        weights = load_file(model / "model.safetensors")
        name = next(name for name in weights if "norm" in name)
        weights[name] = weights[name] * 1.01
        save_file(weights, model / "model.safetensors", {"format": "pt"})
    elif how == "block_size":
        more = {"block_size": 128}
    else:
        more = {"dtype": "bfloat16"}
    with engine(model, **options(folder, **more)) as running:
        done = ask(running, prompts[-2:], names[-2:], "load", max_tokens=8)
        assert [one.cached for one in done] == [0, 0]
        assert counts(running)["sessions_missed"] == 2


def test_a_folder_that_is_full(tmp_path, log):
    [prompt] = random_prompts([70], 100)
    with engine(RECALL, **options(tmp_path)) as running:
        with largest_file(50_000):
            done = ask(running, [prompt], ["a"], "save")
        assert counts(running)["sessions_unsaved"] == 1
        assert "Session a: it cannot be written" in log.text
        ask(running, [prompt], ["../a"], "save")
        assert counts(running)["sessions_unsaved"] == 2
        assert list(tmp_path.iterdir()) == []
        check_cold(running, done)
        ask(running, [prompt], ["a"], "save")
        assert counts(running)["sessions_saved"] == 1
        assert [path.name for path in tmp_path.iterdir()] == ["a.session"]


def test_an_aborted_load_and_an_aborted_save_leave_nothing(saved):
    from vllm import SamplingParams, TokensPrompt

    folder, names, prompts = saved
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with engine(RECALL, **options(folder)) as running:
        for steps in range(4):
            for name, prompt in zip(names, prompts, strict=True):
                sampling = SamplingParams(
                    temperature=0, extra_args={"kv_transfer_params": {"load": name, "save": name}}, max_tokens=100
                )
                running.llm.llm_engine.add_request(f"{steps}-{name}", TokensPrompt(prompt_token_ids=prompt), sampling)
            for _ in range(steps):
                running.llm.llm_engine.step()
            running.llm.llm_engine.abort_request([f"{steps}-{name}" for name in names])
            settle(running)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_session_that_is_being_written_is_waited_for(tmp_path, log):
    """Saved and loaded without a step between: the load asks for what is not on disk yet."""
    from vllm import SamplingParams, TokensPrompt

    [prompt] = random_prompts([70], 100)
    save_it = {"kv_transfer_params": {"save": "a"}}
    with engine(RECALL, **options(tmp_path)) as running:
        sampling = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, detokenize=False)
        sampling.extra_args = save_it
        [first] = running.llm.generate([TokensPrompt(prompt_token_ids=prompt)], [sampling], use_tqdm=False)
        assert list(tmp_path.iterdir()) == []
        assert first.kv_transfer_params["save"] == "a"
        done = ask(running, [prompt + list(first.outputs[0].token_ids) + [7, 8]], ["a"], "load")
        check_ends(done, [70])
        assert log.messages == []
        check_cold(running, done)


TWO_WORKERS = """
import sys, time
from pathlib import Path
from support.engine import RECALL, random_prompts

if __name__ == "__main__":
    from vllm import LLM, SamplingParams, TokensPrompt

    folder, what, *broken = sys.argv[1:]
    options = {"dtype": "float32", "max_num_seqs": 8, "max_model_len": 1024, "enforce_eager": True}
    llm = LLM(str(RECALL), tensor_parallel_size=2, additional_config={"kimi": {"session_dir": folder}}, **options)
    [prompt] = random_prompts([90], 100)

    def ask(prompt, params):
        extra = {"kv_transfer_params": params}
        sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, extra_args=extra)
        [output] = llm.generate([TokensPrompt(prompt_token_ids=prompt)], sampling, use_tqdm=False)
        return list(output.outputs[0].token_ids), output.num_cached_tokens

    tokens, _ = ask(prompt, {"save": "a"} if what == "save" else {})
    while what == "save" and len([*Path(folder).glob("a~?of2.session")]) < 2:
        time.sleep(0.1)
    llm.reset_prefix_cache()
    onward = prompt + tokens + [7, 8, 9]
    cold, _ = ask(onward, {})
    llm.reset_prefix_cache()
    resumed, cached = ask(onward, {"load": "a"})
    print("EQUAL", resumed == cold, "CACHED", cached)
"""


def test_two_workers_resume_together_or_not_at_all(tmp_path):
    script = tmp_path / "two_workers.py"
    script.write_text(TWO_WORKERS)
    folder = tmp_path / "sessions"
    folder.mkdir()
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": "tests:."}

    def run(what):
        done = subprocess.run(
            [sys.executable, str(script), str(folder), what],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert "EQUAL" in done.stdout, done.stderr[-4000:]
        return done.stdout

    assert "EQUAL True CACHED 109" in run("save")
    assert sorted(path.name for path in folder.iterdir()) == ["a~0of2.session", "a~1of2.session"]
    flip(folder / "a~1of2.session", -5)
    assert "EQUAL True CACHED 0" in run("load")
