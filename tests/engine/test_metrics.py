"""The state cache on ``/metrics`` of a server with two API server processes, and what a sick request's client sees."""

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import dashboard
from support.checkpoints import SICK_TOKEN
from support.engine import DRAFTS, STATE_BLOCKS
from support.server import serving

pytestmark = pytest.mark.engine

HOST_MEMORY = '{"kimi": {"host_memory_gib": 0.05}}'
BLOCKS = 4 * STATE_BLOCKS + 12


@pytest.fixture(scope="module")
def server(sick_checkpoint, tmp_path_factory):
    log = tmp_path_factory.mktemp("serve") / "log"
    memory = ["--num-gpu-blocks-override", str(BLOCKS), "--max-model-len", "400"]
    options = ["--api-server-count", "2", "--additional-config", HOST_MEMORY, *memory]
    with serving(sick_checkpoint, log, *options) as port:
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0), port, log


def metrics(port):
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    return {
        (sample.name, sample.labels.get("kind", sample.labels.get("le", ""))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("kimi_state")
    }


def ask(client, prompt):
    return client.completions.create(
        model="recall", prompt=prompt, max_tokens=4, temperature=0, extra_body={"ignore_eos": True}
    )


def test_what_happened_is_counted_and_a_sick_request_is_an_http_error(server):
    client, port, log = server
    prompts = [[10 + i] * 130 for i in range(8)]
    before = [ask(client, prompt).choices[0].text for prompt in prompts]
    with pytest.raises(openai.InternalServerError) as error:
        ask(client, [5] * 70 + [SICK_TOKEN] + [5] * 70)
    assert error.value.status_code == 500
    assert [ask(client, prompt).choices[0].text for prompt in prompts] == before

    seen = metrics(port)
    assert seen["kimi_state_quarantined_total", ""] == 1
    assert seen["kimi_state_hit_tokens_total", ""] == 8 * 128
    assert seen["kimi_state_miss_tokens_total", ""] == 8 * 130 + 141 + 8 * 2
    assert seen["kimi_state_hit_length_tokens_count", ""] == 17
    assert seen["kimi_state_hit_length_tokens_bucket", "64.0"] == 9
    assert seen["kimi_state_hit_length_tokens_bucket", "128.0"] == 17
    # Memory for four states cannot hold those of eight prompts: they went to host memory and came back.
    assert seen["kimi_state_evictions_total", ""] >= 4
    assert seen["kimi_state_swaps_out_total", ""] >= 4
    assert seen["kimi_state_swaps_in_total", ""] >= 4
    swaps = seen["kimi_state_swaps_out_total", ""] + seen["kimi_state_swaps_in_total", ""]
    assert seen["kimi_state_swap_bytes_total", ""] % swaps == 0
    assert seen["kimi_state_swap_bytes_total", ""] > 0
    slots = {kind: seen["kimi_state_slots", kind] for kind in ("live", "checkpoint", "host")}
    assert slots["live"] == 0
    assert slots["checkpoint"] + slots["host"] == 8
    blocks = {kind: seen["kimi_state_blocks", kind] for kind in ("clean", "loose", "kept", "page", "state")}
    assert sum(blocks.values()) == BLOCKS - 1
    assert blocks["page"] == 0
    assert blocks["kept"] == 16
    assert "is not finite: the request ends with an error" in log.read_text()


def test_metrics_carry_numbers_only(server):
    _, port, _ = server
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    ours = [line for line in text.splitlines() if line.startswith("kimi_state")]
    labels = {part.split("=")[0] for line in ours for part in line[line.find("{") + 1 : line.find("}")].split(",")}
    assert labels == {"model_name", "engine", "kind", "le"}


def test_the_dashboard_asks_for_what_the_server_has_and_for_drafts(server):
    _, port, _ = server
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    names = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    asked = dashboard.metrics()
    assert len(asked) > 15
    # Without --speculative-config there are no such series, and their panels are empty.
    assert asked - names == (set() if DRAFTS else set(filter(dashboard.of_drafts, asked)))
