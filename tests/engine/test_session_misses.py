"""Sessions that cannot be saved or resumed: each is told, and computed; nothing half is left or believed."""

import os
import re
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engine import RECALL, check_cold, completion, engine, random_prompts
from support.limits import largest_file
from support.sessions import ANSWER, LENGTHS, ask, complete, counts, flip, options, parameters, save, settle

from kimi_vllm.cache.pool import StatePool
from kimi_vllm.cache.session_copies import Copies
from kimi_vllm.cache.session_folder import Promise, promised

pytestmark = pytest.mark.engine


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


@pytest.mark.parametrize("how", ["weights", "linear", "block_size", "dtype"])
def test_another_model_or_cut_is_a_miss(saved, tmp_path, how):
    """Weights of linear layers are not among the parameters any more, once a CPU's kernels have arranged them."""
    folder, names, prompts = saved
    model, more = RECALL, {}
    if how == "linear":
        model = shutil.copytree(RECALL, tmp_path / "other")
        weights = load_file(model / "model.safetensors")
        name = next(name for name in weights if name.endswith("o_proj.weight"))
        weights[name] = weights[name] * 1.01
        save_file(weights, model / "model.safetensors", {"format": "pt"})
    elif how == "weights":
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


@pytest.mark.parametrize("what", ["gather", "scatter"])
def test_a_copy_that_fails_costs_its_session_only(what, saved, tmp_path, log, monkeypatch):
    """As where a GPU has no memory left for it."""
    folder, names, prompts = saved
    other = random_prompts([60], 100)[0]

    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with engine(RECALL, **options(folder if what == "scatter" else tmp_path)) as running:
        plain = running.complete([other], max_tokens=30)
        monkeypatch.setattr(StatePool, what, fail)
        wanted = {"load": names[-1]} if what == "scatter" else {"save": "a"}
        sampling = [parameters(8, **wanted), parameters(30)]
        done = [completion(output) for output in complete(running, [prompts[-1], other], sampling)]
        assert done[1].tokens == plain[0].tokens
        assert done[0].cached == 0
        assert "cannot be copied: OutOfMemoryError: CUDA out of memory." in log.text
        assert counts(running)["sessions_missed" if what == "scatter" else "sessions_unsaved"] == 1
        check_cold(running, done[:1])


def test_the_last_of_two_sessions_of_a_name_is_waited_for(tmp_path, monkeypatch):
    """The first one to be written is not what a request waits for that comes behind both."""
    each = Copies.each

    def late(copies, parts, copy):
        time.sleep(0.2)
        each(copies, parts, copy)

    monkeypatch.setattr(Copies, "each", late)
    prompts = random_prompts([70, 80], 100)
    from vllm import TokensPrompt

    with engine(RECALL, **options(tmp_path)) as running:
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        outputs = running.llm.generate(inputs, [parameters(3, save="s"), parameters(4, save="s")], use_tqdm=False)
        onward = prompts[1] + list(outputs[1].outputs[0].token_ids) + [7, 8]
        running.llm.reset_prefix_cache()
        [done] = ask(running, [onward], ["s"], "load", max_tokens=3)
        assert done.cached >= len(onward) - 3
        assert counts(running)["sessions_missed"] == 0


def test_a_process_that_never_writes_what_it_promised_is_not_waited_for_forever(saved, tmp_path, monkeypatch):
    folder, names, prompts = saved
    shutil.copy(folder / f"{names[5]}.session", tmp_path)
    path = tmp_path / f"{names[5]}.session"
    monkeypatch.setattr("kimi_vllm.cache.sessions._PATIENCE_S", 0.5)
    promise, looks, steps = Promise([path]), [], []
    monkeypatch.setattr("kimi_vllm.cache.sessions.promised", lambda paths: looks.append(len(steps)) or promised(paths))
    with engine(RECALL, **options(tmp_path)) as running:
        schedule = running.scheduler.schedule
        monkeypatch.setattr(
            running.scheduler, "schedule", lambda *args, **named: steps.append(0) or schedule(*args, **named)
        )
        done = ask(running, [prompts[5]], [names[5]], "load", max_tokens=8)
        assert done[0].cached  # it had what was there before
        # Not a thousand steps a second, which would take a core from the process that it waits for.
        assert looks[-1] - looks[0] <= 2 * len(looks)
        assert running.scheduler.connector._waiting == {}
        check_cold(running, done)
    promise.keep()


def test_an_aborted_load_and_an_aborted_save_leave_nothing(saved):
    from vllm import TokensPrompt

    folder, names, prompts = saved
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with engine(RECALL, **options(folder)) as running:
        for steps in range(4):
            for name, prompt in zip(names, prompts, strict=True):
                sampling = parameters(100, load=name, save=name)
                running.llm.llm_engine.add_request(f"{steps}-{name}", TokensPrompt(prompt_token_ids=prompt), sampling)
            for _ in range(steps):
                running.llm.llm_engine.step()
            running.llm.llm_engine.abort_request([f"{steps}-{name}" for name in names])
            settle(running)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def errors(running, prompts, sampling):
    """What responses say of sessions that were not saved or not loaded, and how much was cached."""
    outputs = complete(running, prompts, sampling)
    return [((one.kv_transfer_params or {}).get("error"), one.num_cached_tokens) for one in outputs]


def test_responses_say_why(saved, tmp_path):
    folder, names, prompts = saved
    for name in names:
        shutil.copy(folder / f"{name}.session", tmp_path)
    flip(tmp_path / f"{names[0]}.session", -1)
    flip(tmp_path / f"{names[1]}.session", 30)
    with engine(RECALL, **options(tmp_path)) as running:
        for number, (wanted, message) in enumerate(
            [
                ({"load": names[0]}, f"Session {names[0]}: its .* not what was written. The prompt was computed."),
                ({"load": names[1]}, f"Session {names[1]}: its .* differ from this engine's. The prompt was computed."),
                ({"load": "a\nb"}, r"Session a\\nb: this is no name of a session: .* The prompt was computed."),
                ({"save": "../a"}, r"Session ../a: this is no name .* It is not saved."),
                ({"load": "b", "save": "/a"}, r"Session b: there is no .* computed. Session /a: .* It is not saved."),
                ({"laod": "a", "lode": "b"}, "kv_transfer_params: laod, lode is not known; load and save are."),
            ]
        ):
            [(error, cached)] = errors(running, [prompts[number]], [parameters(8, **wanted)])
            assert re.fullmatch(message, error), error
            assert cached == 0
        assert errors(running, prompts[-1:], [parameters(8, load=names[-1])])[0] == (None, LENGTHS[-1] + ANSWER - 1)
        assert {path.name for path in tmp_path.iterdir()} == {f"{name}.session" for name in names}


def test_requests_whose_tokens_are_not_known_or_that_read_no_prefix(saved, tmp_path):
    from vllm import TokensPrompt

    folder, names, prompts = saved
    weights = load_file(RECALL / "model.safetensors")
    [embedding] = [weights[name] for name in weights if "embed_tokens" in name]
    with engine(RECALL, **options(folder, enable_prompt_embeds=True)) as running:
        sampling = parameters(8, load=names[2], save="vectors")
        [output] = running.llm.generate({"prompt_embeds": embedding[prompts[2]]}, sampling, use_tqdm=False)
        settle(running)
        error = "Session {}: the prompt is given as embeddings, and a session is known by its tokens. {}"
        told = [error.format(names[2], "The prompt was computed."), error.format("vectors", "It is not saved.")]
        assert output.kv_transfer_params == {"error": " ".join(told)}
        sampling = parameters(8, prompt_logprobs=0, load=names[3])
        [output] = running.llm.generate([TokensPrompt(prompt_token_ids=prompts[3])], sampling, use_tqdm=False)
        assert "reads no cached prefix, as with prompt_logprobs" in output.kv_transfer_params["error"]
        assert len(output.prompt_logprobs) == len(prompts[3])
        assert not (folder / "vectors.session").exists()


def test_a_session_of_weights_that_were_updated_is_a_miss(tmp_path):
    weights = load_file(RECALL / "model.safetensors")
    name = next(name for name in weights if "norm" in name)
    other = shutil.copytree(RECALL, tmp_path / "other")
    save_file(weights | {name: weights[name] * 1.01}, other / "model.safetensors", {"format": "pt"})
    folder = tmp_path / "sessions"
    folder.mkdir()
    [prompt] = random_prompts([70], 100)
    with engine(RECALL, **options(folder)) as running:
        [first] = ask(running, [prompt], ["a"], "save")
        onward = prompt + first.tokens + [7, 8]
        for path, cached in ((other, 0), (RECALL, 70 + ANSWER - 1)):
            running.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
            running.llm.reset_prefix_cache()
            [done] = ask(running, [onward], ["a"], "load", max_tokens=8)
            assert done.cached == cached
            check_cold(running, [done])


def test_the_least_recently_used_sessions_make_room(tmp_path):
    prompts = random_prompts([70] * 4, 100)
    with engine(RECALL, **options(tmp_path)) as running:
        first = ask(running, prompts[:3], ["a", "b", "c"], "save")
    size = (tmp_path / "a.session").stat().st_size
    (tmp_path / "notes").write_bytes(bytes(4 * size))
    for age, name in enumerate("abc"):
        os.utime(tmp_path / f"{name}.session", (age, age))
    left = {f"{name}.session" for name in "acd"} | {"notes"}
    with engine(RECALL, **options(tmp_path, kimi={"session_gib": 3.5 * size / 2**30})) as running:
        assert len(list(tmp_path.iterdir())) == 4
        # The first is used, so the second is the oldest.
        ask(running, [first[0].prompt + first[0].tokens + [7]], ["a"], "load", max_tokens=2)
        ask(running, prompts[3:], ["d"], "save")
        deadline = time.monotonic() + 20
        while counts(running)["sessions_deleted"] < 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert {path.name for path in tmp_path.iterdir()} == left
        assert counts(running)["sessions_deleted"] == 1
    # A limit that was lowered holds from the start.
    with engine(RECALL, **options(tmp_path, kimi={"session_gib": 1.5 * size / 2**30})) as running:
        assert {path.name for path in tmp_path.iterdir()} == {"d.session", "notes"}
        assert counts(running)["sessions_deleted"] == 2
