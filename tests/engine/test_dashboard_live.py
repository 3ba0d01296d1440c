"""The dashboard's queries, answered by a real Prometheus that scrapes a real server under load."""

import json
import math
import random
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
import yaml
from support import dashboard
from support.engine import RECALL, ngram
from support.server import free_port, serving

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="needs a Prometheus: apt-get install prometheus"),
]

# Little memory and some on the host, so that checkpoints are given up, moved out and fetched back.
SHORTAGE = '{"kimi": {"host_memory_gib": 0.05}}'
LITTLE = ("--num-gpu-blocks-override", "80", "--max-model-len", "1024")  # eight states, each with a window of four
DRAFTS = ("--speculative-config", json.dumps(ngram(3)))
LOAD_SECONDS = 25
IDLE_SECONDS = 9
# What Grafana puts in for its variables; the interval is four scrapes and a step, as there.
VARIABLES = {"$model": ".*", "$__rate_interval": "5s", "$__range": "300s"}
ALWAYS_ZERO = ("preemptions", "quarantined")  # this load provokes neither


@contextmanager
def prometheus(folder, server_port):
    """Prometheus with the configuration that is shipped, but for the address and a faster beat."""
    config = yaml.safe_load((dashboard.FILE.parent / "prometheus.yml").read_text())
    config["global"]["scrape_interval"] = "1s"
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{server_port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    words = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(["prometheus", *words, f"--web.listen-address={address}"], stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=30) as client:
            for _ in range(100):
                assert process.poll() is None, (folder / "prometheus.log").read_text()
                try:
                    if client.get("/-/ready").is_success:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.2)
            yield client
    finally:
        process.terminate()
        process.wait(20)


def put_load_on(port, seconds):
    """Conversations that return after others have pushed their states out, twelve at once."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    until = time.monotonic() + seconds

    def talk(number):
        rng = random.Random(number)
        while time.monotonic() < until:
            prompt = [10 + rng.randrange(8)] * 130 + [number] * 4
            client.completions.create(
                model="recall", prompt=prompt, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
            )

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(talk, range(12)))


def values(series):
    return [float(value) for one in series for _, value in one["values"]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each query has for the time of the load, by its text; the models; and since when rates are 0."""
    folder = tmp_path_factory.mktemp("prometheus")
    with (
        serving(RECALL, folder / "log", "--additional-config", SHORTAGE, *LITTLE, *DRAFTS) as port,
        prometheus(folder, port) as client,
    ):
        start = time.time()
        put_load_on(port, LOAD_SECONDS)
        idle = time.time() + 6  # an interval and a scrape
        time.sleep(IDLE_SECONDS)
        # Later than an interval: Prometheus extrapolates the rates of young counters, and ratios suffer.
        span = {"start": start + 10, "end": time.time(), "step": "1"}
        found = {}
        for query in dashboard.expressions():
            text = query
            for name, value in VARIABLES.items():
                text = text.replace(name, value)
            assert "$" not in text
            answer = client.get("/api/v1/query_range", params={"query": text, **span}).json()
            assert answer["status"] == "success", (text, answer)
            found[query] = answer["data"]["result"]
        models = client.get("/api/v1/label/model_name/values", params={"match[]": "vllm:num_requests_running"}).json()
        yield found, models["data"], idle


@pytest.mark.parametrize("query", dashboard.expressions())
def test_a_panels_query_has_data(answers, query):
    numbers = [value for value in values(answers[0][query]) if math.isfinite(value)]
    assert len(numbers) >= 5
    if not any(name in query for name in ALWAYS_ZERO):
        assert max(numbers) > 0


def test_the_model_can_be_chosen(answers):
    assert answers[1] == ["recall"]


def test_the_share_of_hits_is_a_share(answers):
    [series] = [series for query, series in answers[0].items() if "state_hit_tokens" in query]
    assert all(0 <= share <= 1 for share in values(series) if math.isfinite(share))


def test_drafts_are_shown_while_there_are_any(answers):
    """A share for each position, no larger than the one before; and nothing, not NaN, when the server idles."""
    found = {query: series for query, series in answers[0].items() if dashboard.of_drafts(query)}
    [by_position] = [series for query, series in found.items() if "per_pos" in query]
    shares = {one["metric"]["position"]: dict(one["values"]) for one in by_position}
    assert set(shares) == {"0", "1", "2"}
    for moment in shares["0"]:
        falling = [1, *(float(shares[position][moment]) for position in "012"), 0]
        assert falling == sorted(falling, reverse=True)
    for query, series in found.items():
        low, high = (1, 4) if query.startswith("1 +") else (0, 1)
        assert all(low <= value <= high for value in values(series)), query
        assert all(moment < answers[2] for one in series for moment, _ in one["values"]), query
