"""Sessions as clients use them: saved by one server, resumed by the next; tenants, names, and what responses say."""

import json
import time

import httpx
import pytest
from openai import OpenAI
from support.documents import ROOT, code
from support.engine import RECALL
from support.server import serving, serving_process

from kimi_vllm.cache.session_files import read_tokens

pytestmark = pytest.mark.engine

PROMPT = "a=7 k=2 m=5 x=9 b=3 ? k →"
SAID, GOES_ON = [json.loads(piece.text) for piece in code(ROOT / "docs" / "sessions.md") if piece.language == "json"]
"""The two requests that the page shows."""


def options(folder):
    return ["--shutdown-timeout", "20", "--additional-config", f'{{"kimi": {{"session_dir": "{folder}"}}}}']


def complete(port, prompt=PROMPT, **fields):
    body = {"model": "recall", "prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True} | fields
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat(port, body):
    """Ask as OpenAI's client does."""
    body = dict(body)
    extra = {"kv_transfer_params": body.pop("kv_transfer_params")}
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(model="recall", temperature=0, extra_body=extra, **body)
    return answer.model_dump()


def tokens(answer):
    return answer["choices"][0]["token_ids"]


def onward(answer):
    """A prompt that goes on where the answer ended: by ids, as what follows an answer's end is no text."""
    [choice] = answer["choices"]
    return choice["prompt_token_ids"] + choice["token_ids"] + choice["prompt_token_ids"][-8:]


def cached(answer):
    return (answer["usage"]["prompt_tokens_details"] or {"cached_tokens": 0})["cached_tokens"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder in which a server that has been stopped saved sessions, and what it answered."""
    folder = tmp_path_factory.mktemp("sessions")
    with serving_process(RECALL, folder.parent / "first.log", *options(folder)) as (port, process):
        answers = {
            "open": complete(port, kv_transfer_params={"save": "open"}),
            "mine": complete(port, PROMPT.replace("9", "8"), kv_transfer_params={"save": "mine"}, cache_salt="me"),
        }
        answers["chat-7"] = chat(port, SAID)
        # The last one is being written: it is on disk when the server has ended.
        process.terminate()
        assert process.wait(60) == 0
    return folder, answers


@pytest.fixture(scope="module")
def port(saved, tmp_path_factory):
    folder, _ = saved
    with serving(RECALL, tmp_path_factory.mktemp("log") / "second.log", *options(folder)) as port:
        yield port


def test_the_response_says_what_is_saved_and_only_its_owner_may_read_it(saved):
    folder, answers = saved
    for name, answer in answers.items():
        told = answer["kv_transfer_params"]
        assert (told.keys(), told["save"]) == ({"save", "tokens"}, name)
        assert answer["usage"]["total_tokens"] - told["tokens"] in (0, 1)
    assert {path.name.partition("@")[0].partition(".")[0] for path in folder.iterdir()} == {"open", "mine", "chat-7"}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_another_server_goes_on_at_the_same_token(saved, port):
    _, answers = saved
    prompt = onward(answers["open"])
    resumed = complete(port, prompt, kv_transfer_params={"load": "open"})
    assert cached(resumed) == answers["open"]["kv_transfer_params"]["tokens"]
    assert cached(resumed) % 64
    assert resumed["kv_transfer_params"] is None
    cold = complete(port, prompt, cache_salt="another")
    assert cached(cold) == 0
    assert tokens(resumed) == tokens(cold)
    assert _resumed(port) >= 1


def test_a_chat_goes_on_as_the_page_shows_it(saved, port):
    folder, answers = saved
    assert answers["chat-7"]["choices"][0]["message"]["content"].strip() == "2"
    before = (folder / "chat-7.session").read_bytes()
    again = chat(port, GOES_ON)
    assert again["choices"][0]["message"]["content"].strip() == "7"
    assert cached(again) == answers["chat-7"]["kv_transfer_params"]["tokens"]
    assert again["kv_transfer_params"]["save"] == "chat-7"
    deadline = time.monotonic() + 20
    while (folder / "chat-7.session").read_bytes() == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(read_tokens(folder / "chat-7.session")) == again["kv_transfer_params"]["tokens"]


def test_a_tenant_never_resumes_another_s(saved, port):
    _, answers = saved
    prompt = onward(answers["mine"])
    wanted = {"kv_transfer_params": {"load": "mine"}}
    for salt in ({}, {"cache_salt": "you"}, {"cache_salt": "me "}):
        other = complete(port, prompt, **wanted, **salt)
        assert cached(other) == 0
        assert other["kv_transfer_params"]["error"] == "Session mine: there is no such file. The prompt was computed."
    own = complete(port, prompt, **wanted, cache_salt="me")
    assert cached(own) >= answers["mine"]["kv_transfer_params"]["tokens"]
    assert tokens(own) == tokens(other)


@pytest.mark.parametrize("name", ["../mine", "/etc/passwd", "", ".", "a b", 7, ["a"], "a" * 129, "a@b", "a~0of2"])
def test_what_is_no_name_is_told_and_touches_no_file(name, saved, port):
    folder, _ = saved
    before = {path: path.stat().st_mtime_ns for path in [*folder.iterdir(), *folder.parent.iterdir()]}
    answer = complete(port, max_tokens=2, kv_transfer_params={"save": name})
    assert "this is no name of a session: 1 to 128 of" in answer["kv_transfer_params"]["error"]
    assert "save" not in answer["kv_transfer_params"]
    answer = complete(port, max_tokens=2, kv_transfer_params={"load": name}, cache_salt="new")
    assert "this is no name of a session: 1 to 128 of" in answer["kv_transfer_params"]["error"]
    assert {path: path.stat().st_mtime_ns for path in [*folder.iterdir(), *folder.parent.iterdir()]} == before


def test_one_server_computes_prompts_and_another_answers_them(saved, port, tmp_path):
    """As docs/sessions.md has it: the prompt without its last token, and at once the whole prompt elsewhere."""
    folder, _ = saved
    before = _resumed(port)
    with serving(RECALL, tmp_path / "prefill.log", *options(folder)) as prefill:
        conversation = [{"role": "user", "content": PROMPT}]
        for number in range(6):
            url = f"http://127.0.0.1:{prefill}/tokenize"
            prompt = httpx.post(url, json={"model": "recall", "messages": conversation}, timeout=60).json()["tokens"]
            name = f"request-{number}"
            computed = complete(prefill, prompt[:-1], max_tokens=1, kv_transfer_params={"save": name})
            assert computed["kv_transfer_params"] == {"save": name, "tokens": len(prompt) - 1}
            body = {"messages": conversation, "max_tokens": 8, "kv_transfer_params": {"load": name}}
            answer = chat(port, body)
            assert answer["kv_transfer_params"] is None
            assert cached(answer) == len(prompt) - 1
            plain = chat(prefill, body | {"kv_transfer_params": {}})
            assert answer["choices"][0]["message"]["content"] == plain["choices"][0]["message"]["content"]
            conversation.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
            conversation.append({"role": "user", "content": f"? {'amxb'[number % 4]} →"})
    assert _resumed(port) - before == 6


def _resumed(port):
    metrics = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text
    [line] = [line for line in metrics.splitlines() if line.startswith("kimi_state_sessions_resumed_total")]
    return float(line.split()[-1])
