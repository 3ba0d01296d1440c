"""The OpenAI API as clients use it, on one server that serves by configs/serve/cpu-demo.yaml.

Nothing here is ours but the model and its states; that vLLM's features work with them is what is shown.
"""

import asyncio
import json
import random
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from support.documents import PAGES, commands
from support.engine import DRAFTS, RECALL
from support.server import serving_process

ROOT = Path(__file__).parents[2]
from serve.demo.recall_task import held_out_prompt  # noqa: E402

pytestmark = pytest.mark.engine

KEY = "a-key-of-this-test"
PROMPT = "a=7 k=2 m=5 ? k →"
SCHEMA = {
    "type": "object",
    "properties": {"key": {"enum": ["a", "k", "m"]}, "digits": {"type": "array", "items": {"enum": [2, 5]}}},
    "required": ["key", "digits"],
    "additionalProperties": False,
}
SCHEMA["properties"]["digits"] |= {"minItems": 2, "maxItems": 3}  # type: ignore[index]


@dataclass(frozen=True)
class Server:
    url: str
    client: OpenAI
    process: Popen[bytes]
    log: Path

    def complete(self, **options: Any) -> Any:
        defaults = {"model": "recall", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        return self.client.completions.create(**(defaults | options))

    def long(self, tokens: int, **options: Any) -> Any:
        """An answer that goes on after its end."""
        return self.complete(max_tokens=tokens, extra_body={"ignore_eos": True}, **options)

    def chat(self, **options: Any) -> Any:
        defaults = {"model": "recall", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8}
        return self.client.chat.completions.create(**(defaults | {"temperature": 0} | options))

    def metric(self, start: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        [value] = [float(line.split()[-1]) for line in text.splitlines() if re.match(start, line)]
        return value

    def live_slots(self) -> float:
        return self.metric(r'kimi_state_slots\{.*kind="live"')


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("api") / "log"
    profile = str(ROOT / "configs" / "serve" / "cpu-demo.yaml")
    # The profile's 20 s are for a machine that runs nothing else; beyond them vLLM kills the engine amid a stream.
    options = ["--config", profile, "--api-key", KEY, "--shutdown-timeout", "300"]
    with serving_process(RECALL, log, *options) as (port, process):
        url = f"http://127.0.0.1:{port}"
        client = OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)
        yield Server(url, client, process, log)


def test_our_plugin_serves_by_the_profile(server):
    log = server.log.read_text()
    assert "kimi-vllm serves KimiLinearForCausalLM" in log
    assert "kimi-vllm: states and KV cache share" in log
    assert "'max_num_seqs': 8" in log
    [model] = server.client.models.list().data
    assert (model.id, model.max_model_len) == ("recall", 2048)


def test_health_metrics_and_version_need_no_key(server):
    for path in ("health", "ping", "metrics", "version"):
        assert httpx.get(f"{server.url}/{path}").status_code == 200


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}])
def test_without_the_key_nothing_is_answered(server, headers):
    body = {"model": "recall", "prompt": PROMPT, "max_tokens": 4}
    refused = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)
    assert (refused.status_code, refused.json()) == (401, {"error": "Unauthorized"})
    allowed = httpx.post(f"{server.url}/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert allowed.status_code == 200


def test_a_wrong_key_is_the_clients_authentication_error(server):
    with pytest.raises(openai.AuthenticationError):
        server.client.with_options(api_key="wrong").models.list()


def test_completion_and_chat(server):
    completion = server.complete()
    assert (completion.choices[0].text, completion.choices[0].finish_reason) == (" 2", "stop")
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (1 + len(PROMPT), 3)
    roles = [("user", PROMPT), ("assistant", "2"), ("user", "? a →")]
    chat = server.chat(messages=[{"role": role, "content": content} for role, content in roles])
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == ("7", "stop")


def test_a_batch_of_prompts_is_answered_in_order(server):
    prompts = [f"a=7 k=2 m=5 ? {key} →" for key in "mak"]
    assert [choice.text for choice in server.complete(prompt=prompts).choices] == [" 5", " 7", " 2"]


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_ends_with_usage(server, chat):
    ask = server.chat if chat else server.complete
    *pieces, last = ask(stream=True, stream_options={"include_usage": True})
    whole = ask()
    texts = [(piece.choices[0].delta.content if chat else piece.choices[0].text) or "" for piece in pieces]
    assert "".join(texts) == (whole.choices[0].message.content if chat else whole.choices[0].text)
    assert [piece.choices[0].finish_reason for piece in pieces if piece.choices[0].finish_reason] == ["stop"]
    assert all(piece.usage is None for piece in pieces)
    assert last.choices == []
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_usage_reports_cached_tokens(server):
    prompt = " ".join(f"{letter}={number % 10}" for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz" * 2))
    before = server.metric("vllm:prefix_cache_hits_total")
    usages = [server.complete(prompt=f"{prompt} ? c →", max_tokens=2).usage for _ in range(2)]
    assert usages[0].prompt_tokens == usages[1].prompt_tokens > 128
    hit = (usages[1].prompt_tokens - 1) // 64 * 64
    assert [usage.prompt_tokens_details.cached_tokens for usage in usages] == [0, hit]
    assert server.metric("vllm:prefix_cache_hits_total") - before >= 64


def test_a_prompt_that_is_too_long_is_an_http_error(server):
    with pytest.raises(openai.BadRequestError, match="maximum context length is 2048"):
        server.complete(prompt="a=1 " * 1500, max_tokens=1)


def test_logprobs_of_a_completion(server):
    found = server.complete(logprobs=3).choices[0].logprobs
    assert found.tokens == [" ", "2", "<eos>"]
    assert found.text_offset == [0, 1, 2]
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 3
        assert top[token] == logprob == max(top.values())
        assert -0.1 < logprob <= 0


def test_logprobs_of_a_chat_and_of_the_prompt(server):
    [token, _] = server.chat(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert (token.token, token.bytes, len(token.top_logprobs)) == ("2", [ord("2")], 2)
    echoed = server.complete(echo=True, logprobs=1, max_tokens=1).choices[0]
    assert echoed.text == PROMPT + " "
    assert echoed.logprobs.token_logprobs[0] is None
    # "k=" must be followed by its digit, which cannot be known; that a blank follows the digit can.
    at = 1 + PROMPT.index("k=2 ")
    assert echoed.logprobs.token_logprobs[at + 2] < -1 < -0.1 < echoed.logprobs.token_logprobs[at + 3] < 0


def test_several_answers_to_one_prompt(server):
    choices = server.long(24, n=4, temperature=1, seed=5).choices
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in choices}) > 1
    with pytest.raises(openai.BadRequestError, match="n must be 1 when using greedy sampling"):
        server.complete(n=2)


def test_stop_strings(server):
    text = server.long(24).choices[0].text
    assert text.count("?") > 1
    stopped = server.long(24, stop=["zz", "?"]).choices[0]
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (text[: text.index("?")], "stop", "?")
    kept = server.complete(
        max_tokens=24, stop=["?"], extra_body={"ignore_eos": True, "include_stop_str_in_output": True}
    )
    assert kept.choices[0].text == text[: text.index("?") + 1]


@pytest.mark.skipif(DRAFTS > 0, reason="steps that rest from drafts draw other random numbers, as the docs say")
def test_a_seed_repeats_an_answer(server):
    texts = [server.long(40, temperature=1, seed=seed).choices[0].text for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_without_a_temperature_the_profile_has_the_say(server):
    # Sampled at 1, three answers of 40 tokens have never been equal.
    texts = [server.long(40, temperature=openai.NOT_GIVEN).choices[0].text for _ in range(3)]
    assert set(texts) == {server.long(40).choices[0].text}


def test_json_schema(server):
    schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    choice = server.chat(max_tokens=80, response_format=schema).choices[0]
    assert choice.finish_reason == "stop"
    check_schema(json.loads(choice.message.content))
    # `structured_outputs` is vLLM's own name for the same, on both endpoints.
    own = server.complete(max_tokens=80, extra_body={"structured_outputs": {"json": SCHEMA}})
    check_schema(json.loads(own.choices[0].text))


def check_schema(found: dict[str, Any]) -> None:
    assert set(found) == {"key", "digits"}
    assert found["key"] in ("a", "k", "m")
    assert 2 <= len(found["digits"]) <= 3
    assert set(found["digits"]) <= {2, 5}


def test_regex_and_choice(server):
    regex = server.complete(extra_body={"structured_outputs": {"regex": " [x-z]{2}=[0-9]"}}).choices[0]
    assert re.fullmatch(" [x-z]{2}=[0-9]", regex.text)
    choice = server.complete(extra_body={"structured_outputs": {"choice": [" 5", " 7"]}}).choices[0]
    assert choice.text in (" 5", " 7")
    assert (regex.finish_reason, choice.finish_reason) == ("stop", "stop")
    with pytest.raises(openai.BadRequestError):
        server.complete(extra_body={"structured_outputs": {"regex": "(["}})


def tools(*, strict: bool) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "look_up", "parameters": SCHEMA, "strict": strict}}]


@pytest.mark.skipif(DRAFTS > 0, reason="vLLM refuses logit_bias with drafts")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "look_up"}}, "required"])
def test_a_forced_tool_call(server, choice, stream):
    """The grammar makes the model spell Kimi's markup, a character at a time, and the parser reads it."""
    end, *blanks = httpx.post(
        f"{server.url}/tokenize",
        json={"model": "recall", "prompt": "< \n\t", "add_special_tokens": False},
        headers={"Authorization": f"Bearer {KEY}"},
    ).json()["tokens"]
    # A call's number may have any number of digits and its JSON any number of blanks, whatever the profile says of
    # blanks, and this model would end neither.
    options = {"max_tokens": 250, "logit_bias": {str(end): 30} | {str(blank): -100 for blank in blanks}}
    asked = server.chat(tools=tools(strict=True), tool_choice=choice, stream=stream, **options)
    if stream:
        deltas = [piece.choices[0].delta.tool_calls[0] for piece in asked if piece.choices[0].delta.tool_calls]
        [name] = [delta.function.name for delta in deltas if delta.function.name]
        arguments = "".join(delta.function.arguments or "" for delta in deltas)
        identifier = deltas[0].id
    else:
        [call] = asked.choices[0].message.tool_calls
        identifier, name, arguments = call.id, call.function.name, call.function.arguments
        # As OpenAI has it: "stop" for a call of a function that the client named.
        assert asked.choices[0].finish_reason == ("tool_calls" if choice == "required" else "stop")
    assert name == "look_up"
    assert re.fullmatch(r"functions\.look_up:\d+", identifier)
    check_schema(json.loads(arguments))


def test_tools_that_are_not_called_leave_the_answer_alone(server):
    message = server.chat(tools=tools(strict=False)).choices[0].message
    assert (message.content, message.tool_calls) == ("2", None)


def test_a_client_that_leaves_frees_its_slot(server):
    generated = server.metric("vllm:generation_tokens_total")
    stream = server.long(1900, stream=True)
    next(iter(stream))
    stream.close()
    time.sleep(1)  # the metrics know of the request by now
    assert wait_until(lambda: server.live_slots() == 0)
    # Aborted, not finished behind the client's back.
    assert server.metric("vllm:generation_tokens_total") - generated < 1800


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met


def test_two_hundred_clients_at_once(server):
    rng = random.Random(6)
    asked = [held_out_prompt(rng, num_pairs=6, filler_chars=60) for _ in range(200)]

    async def ask() -> list[httpx.Response]:
        bodies = [{"model": "recall", "prompt": prompt, "max_tokens": 4, "temperature": 0} for prompt, _ in asked]
        limits = httpx.Limits(max_connections=200)
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(timeout=60, limits=limits, headers=headers) as client:
            return await asyncio.gather(*(client.post(f"{server.url}/v1/completions", json=body) for body in bodies))

    responses = asyncio.run(ask())
    assert [response.status_code for response in responses] == [200] * 200
    texts = [response.json()["choices"][0]["text"].strip() for response in responses]
    assert sum(text == answer for text, (_, answer) in zip(texts, asked, strict=True)) >= 198
    assert wait_until(lambda: server.live_slots() == 0)


def test_metrics_and_log_have_no_prompt_and_no_key(server):
    secret = "qqq=7 zzz"
    server.complete(prompt=f"{secret} ? q →")
    for text in (httpx.get(f"{server.url}/metrics").text, server.log.read_text()):
        assert len(text) > 1000
        assert secret not in text
        assert KEY not in text


def test_what_the_documents_ask_is_answered(server):
    shown = [command for page in PAGES for command in commands(page) if command.words[0] == "curl"]
    assert shown
    for command in shown:
        words = [word.replace("http://127.0.0.1:8000", server.url) for word in command.words]
        words += ["-H", f"Authorization: Bearer {KEY}"]
        answer = json.loads(subprocess.run(words, capture_output=True, check=True, timeout=60).stdout)
        assert answer["choices"][0]["text"] == " 2", command.text


def test_sigterm_lets_a_stream_finish(server):
    """The last test of this server: it ends it."""
    # So long that it is not over before the signal, where others keep the cores from this process.
    stream = iter(server.long(700, stream=True, stream_options={"include_usage": True}))
    next(stream)
    server.process.send_signal(signal.SIGTERM)
    wait_for(server.log, "draining in-flight requests")
    # Both are vLLM's, and docs/troubleshooting.md tells of them until they are otherwise.
    with pytest.raises(openai.InternalServerError) as caught:
        server.complete()
    assert caught.value.status_code == 500
    assert httpx.get(f"{server.url}/health").status_code == 200
    *_, last = stream
    assert last.usage.completion_tokens == 700
    assert server.process.wait(60) == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health")


@pytest.mark.slow  # another server
def test_a_stream_beyond_the_shutdown_timeout_holds_the_server_until_its_client_gives_up(tmp_path):
    """VLLM's own; docs/troubleshooting.md says what to do. A client with a timeout of its own lets the server go."""
    log = tmp_path / "log"
    with serving_process(RECALL, log, "--shutdown-timeout", "1") as (port, process):
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=5)
        options = {"model": "recall", "prompt": PROMPT, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
        stream = iter(client.completions.create(stream=True, **options))
        next(stream)
        process.send_signal(signal.SIGTERM)
        wait_for(log, "shutting down FastAPI HTTP server")
        time.sleep(1)
        assert process.poll() is None
        with pytest.raises(openai.APITimeoutError):
            list(stream)
        assert process.wait(20) == 0


def wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)
