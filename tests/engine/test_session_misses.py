"""Sessions that cannot be saved or resumed: each is told, and computed; nothing half is left or believed."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engine import RECALL, check_cold, engine, random_prompts
from support.limits import largest_file
from support.sessions import ANSWER, LENGTHS, ask, counts, flip, options, parameters, save, settle

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
