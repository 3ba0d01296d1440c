"""`vllm serve` as users start it: its own processes, the OpenAI API, and our plugin in each of them."""

import httpx
import pytest
from openai import OpenAI
from support.engine import RECALL
from support.server import serving, start

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("serve") / "log"
    with serving(RECALL, log) as port:
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none"), log, port


def test_our_model_was_built_in_the_worker(server):
    _, log, _ = server
    assert "kimi-vllm serves KimiLinearForCausalLM" in log.read_text()
    assert "kimi-vllm: states and KV cache share" in log.read_text()


def test_completion_and_chat(server):
    client, _, _ = server
    completion = client.completions.create(model="recall", prompt="a=7 k=2 m=5 ? k →", max_tokens=8, temperature=0)
    assert completion.choices[0].text.strip() == "2"
    assert completion.choices[0].finish_reason == "stop"
    message = {"role": "user", "content": "a=7 k=2 m=5 ? a →"}
    chat = client.chat.completions.create(model="recall", messages=[message], max_tokens=8, temperature=0)
    assert chat.choices[0].message.content.strip() == "7"


def test_streaming_equals_one_piece(server):
    client, _, _ = server
    options = {"model": "recall", "prompt": "b=3 c=9 ? b →", "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**options, extra_body={"ignore_eos": True})
    pieces = client.completions.create(**options, extra_body={"ignore_eos": True}, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text


def test_usage_reports_cached_tokens(server):
    client, _, _ = server
    prompt = (
        " ".join(f"{letter}={number % 10}" for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz" * 2)) + " ? c →"
    )
    usages = [
        client.completions.create(model="recall", prompt=prompt, max_tokens=2, temperature=0).usage for _ in range(2)
    ]
    assert usages[0].prompt_tokens == usages[1].prompt_tokens > 128
    hit = (usages[1].prompt_tokens - 1) // 64 * 64
    assert [usage.prompt_tokens_details.cached_tokens for usage in usages] == [0, hit]
    metrics = httpx.get(str(client.base_url).replace("/v1/", "/metrics")).text
    hits = [float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("vllm:prefix_cache_hits_total")]
    assert sum(hits) >= 64


def test_a_prompt_that_is_too_long_is_an_http_error(server):
    client, _, _ = server
    with pytest.raises(Exception, match="maximum context length is 2048") as caught:
        client.completions.create(model="recall", prompt="a=1 " * 1500, max_tokens=1)
    assert caught.value.status_code == 400


def test_a_taken_port_is_an_error_that_says_so(server, tmp_path):
    _, _, port = server
    log = tmp_path / "log"
    assert start(RECALL, port, log).wait(120) != 0
    assert "Address already in use" in log.read_text()
