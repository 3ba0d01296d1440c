"""serve/load without a server: scenarios, traces, command lines, metrics, the report, the comparison."""

import json
import re
import sys
from pathlib import Path

import httpx
import pytest
import typer
from rich.console import Console
from support.load import CHAT, TARGET, make_record, result, scenario
from typer.testing import CliRunner

from serve.common.server import program
from serve.load import __main__ as load_test
from serve.load import compare, plots, record, report, scrape, traffic
from serve.load.generator import GeneratorError, Target, command, guidellm_numbers, run
from serve.load.scenario import ConversationWorkload, MixedWorkload, ScenarioError, points, read

SHIPPED = sorted((Path(__file__).parents[2] / "serve" / "load" / "scenarios").glob("*.yaml"))


def option(words, name):
    return words[words.index(name) + 1]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_scenarios_make_command_lines(path, tmp_path):
    for point in (point.at(2.0) for point in points(read(path))):
        words = command(point, TARGET, tmp_path)
        assert int(option(words, "--num-prompts")) == point.num_requests > 0
        assert option(words, "--seed") == str(point.number)


def test_all_scenarios_are_there():
    names = {path.stem for path in SHIPPED}
    assert names == {"quick", "steady-chat", "burst", "long-context", "mixed", "multi-turn", "soak"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parts: [{name: a, workload: {kind: random, prompt: 1, output: 1}, speed: 3}]", "parts.0.speed: Extra inputs"),
        (
            "parts: [{name: a, workload: {kind: random, prompt: 1, outptu: 1}, rate: [1]}]",
            r"parts.0.*output: Field req",
        ),
        ("parts: [{name: a, workload: {kind: random, prompt: 1, output: 1}}]", "give either concurrency or rate"),
        ("parts: [{name: a, workload: {kind: random, prompt: 1, output: 1}, rate: [1]}]", "rate needs seconds"),
        ("parts: [{name: a, workload: {kind: walk}, rate: [1]}]", "walk"),
        ("parts: [{name: a, workload: {kind: random, prompt: 0, output: 1}, concurrency: [1]}]", "greater than 0"),
        (
            "parts: [{name: a, workload: {kind: mixed, decoders: 1, decode_output: 9, prompt: 9, arrivals: 1,"
            " every: 1}, rate: [1]}]",
            "a mixed workload has its own timing",
        ),
        (
            CHAT[:-1]
            + ", {name: b, workload: {kind: random, prompt: 1, output: 1}, rate: [1], seconds: 1, rate_of: c}]",
            "rate_of 'c', which is no earlier part",
        ),
        ("soak: {part: b}\n" + CHAT, "soak judges 'b', which is no part"),
        ("parts: []", "at least 1 item"),
        ("parts: [", "is not YAML"),
        ("server: {model: x, port: 3}\n" + CHAT, "server.port: Extra inputs"),
    ],
)
def test_a_wrong_scenario_names_the_key(tmp_path, text, message):
    with pytest.raises(ScenarioError, match=message) as caught:
        read(scenario(tmp_path, text))
    assert "scenario.yaml" in str(caught.value)


def test_an_unknown_scenario_is_answered_with_those_that_exist():
    app = typer.Typer()
    app.command()(load_test.main)
    done = CliRunner().invoke(app, ["nonsense"])
    assert done.exit_code == 2
    assert "there is no scenario 'nonsense': shipped are burst, long-context, mixed, multi-turn, quick" in done.output


def test_points_are_the_product_of_what_is_swept(tmp_path):
    text = "parts: [{name: a, workload: {kind: random, prompt: [8, 16], output: 1}, rate: [0.5, 2], seconds: 9}]"
    labels = [point.label for point in points(read(scenario(tmp_path, text)))]
    assert labels == ["a, 8 tokens, 0.5/s", "a, 8 tokens, 2/s", "a, 16 tokens, 0.5/s", "a, 16 tokens, 2/s"]
    assert [point.num_requests for point in points(read(scenario(tmp_path, text)))] == [5, 18, 5, 18]


def test_objectives_bursts_and_shared_beginnings_reach_the_generator(tmp_path):
    text = (
        "parts: [{name: a, workload: {kind: random, prompt: 64, output: 8, prefix: 32, spread: 0.5}, rate: [3], "
        "seconds: 2, burstiness: 0.2}]"
    )
    [point] = points(read(scenario(tmp_path, text)))
    words = command(point, Target("http://h:1", "kimi", "t", ("ttft:500", "tpot:50")), tmp_path)
    assert words[-3:] == ["--goodput", "ttft:500", "tpot:50"]
    assert (option(words, "--request-rate"), option(words, "--burstiness")) == ("3", "0.2")
    assert (option(words, "--random-prefix-len"), option(words, "--random-range-ratio")) == ("32", "0.5")


IMAGE = r'<img alt="([^"]*)" src="data:image/svg\+xml;base64,'


def test_a_turn_begins_with_the_whole_turn_before_and_the_shared_system_prompt():
    talk = ConversationWorkload(kind="conversation", users=3, turns=3, system=64, turn=32, output=4, seconds=6)
    lines = traffic.trace(talk)
    assert [line["timestamp"] for line in lines] == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    for user in range(3):
        first, second, third = (lines[user + 3 * turn]["hash_ids"] for turn in range(3))
        assert second[: len(first)] == first
        assert third[: len(second)] == second
        assert len(third) == (64 + 3 * 32) // traffic.CHUNK
    own = [set(lines[6 + user]["hash_ids"]) for user in range(3)]
    assert own[0] & own[1] == own[1] & own[2] == set(range(64 // traffic.CHUNK))


def test_mixed_traffic_shares_nothing_and_prompts_come_one_by_one(tmp_path):
    mixed = MixedWorkload(kind="mixed", decoders=2, decode_output=50, prompt=160, arrivals=3, every=1.5)
    lines = traffic.trace(mixed)
    assert [(line["timestamp"], line["input_length"]) for line in lines] == [
        (0, 32),
        (0, 32),
        (1.5, 160),
        (3.0, 160),
        (4.5, 160),
    ]
    ids = [number for line in lines for number in line["hash_ids"]]
    assert len(ids) == len(set(ids))


def test_metrics_are_added_up_over_engines():
    text = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{engine="0"} 128.0
vllm:prefix_cache_hits_created{engine="0"} 1.7e9
# TYPE kimi_state_slots gauge
kimi_state_slots{engine="0",kind="live"} 2.0
# TYPE kimi_state_blocks gauge
kimi_state_blocks{engine="0",kind="clean"} 5.0
# TYPE other gauge
other 9.0
"""
    assert scrape.parse(text) == {"running": 7, "prefix_hits": 128, "slots_live": 2, "blocks_clean": 5}


def test_hit_rate_is_of_the_window_and_not_of_all_time():
    samples = [{"t": t, "hits": max(0, t - 4) * 10.0, "asked": t * 10.0} for t in range(9)]
    rates = dict(plots.hit_rate(samples, "hits", ["asked"], window=2))
    assert 0 not in rates  # nothing was asked yet
    assert rates[3] == 0
    assert rates[5] == 0.5
    assert rates[8] == 1


def test_the_report_is_one_page_with_every_number_picture_and_command(tmp_path):
    text = """
parts:
  - {name: chat, workload: {kind: random, prompt: 64, output: 8}, concurrency: [2, 4]}
  - {name: poisson, workload: {kind: random, prompt: 64, output: 8}, rate: [1, 2], seconds: 4}
  - {name: length, workload: {kind: random, prompt: [64, 128], output: 8}, concurrency: [1]}
  - {name: mix, workload: {kind: mixed, decoders: 1, decode_output: 9, prompt: 99, arrivals: 1, every: 1}}
"""
    made = make_record(tmp_path, text)
    made.goodput = ["ttft:500"]
    made.points[0].error, made.points[0].result = "line\n<b>broken</b>", {}
    made.points[-1].file = "mix.json"
    lists = {"start_times": [5, 6], "ttfts": [0.1, 0.5], "itls": [[0.01, 0.02], []], "input_lens": [32, 99]}
    (tmp_path / "mix.json").write_text(json.dumps(lists))
    made.samples = [
        {
            "t": t,
            "prefix_hits": t * 1.0,
            "prefix_queries": t * 2.0,
            "blocks_state": 1.0,
            "blocks_clean": 3.0,
            "running": 1.0,
        }
        for t in range(5)
    ]
    page = report.write(made, tmp_path).read_text()
    titles = re.findall(IMAGE, page)
    assert titles == [
        "poisson: latency against requests per second",
        "length: latency against context length",
        "Throughput against latency",
        "mix: time between tokens while prompts arrive",
        "Caches and requests over time",
    ]
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "&lt;b&gt;broken&lt;/b&gt;" in page
    assert "<b>broken" not in page
    for shown in ("chat, 4 at once", "vllm bench serve", "ttft:500", made.environment["python"], "396.0"):
        assert shown in page
    assert "Partial" not in page


def test_after_an_interruption_there_is_a_report_of_what_was_measured(tmp_path, monkeypatch):
    def measured_once(words, point, folder, tick):
        if point.number:
            raise KeyboardInterrupt
        return result()

    monkeypatch.setattr(load_test, "run", measured_once)
    load_test._measure(read(scenario(tmp_path)), TARGET, [], tmp_path)
    kept = record.load(tmp_path / "run.json")
    assert not kept.complete
    assert [point.label for point in kept.points] == ["chat, 2 at once"]
    page = (tmp_path / "report.html").read_text()
    assert "Partial: the load test was interrupted after 1" in page


def test_a_generator_that_fails_shows_the_end_of_its_output_and_one_that_is_interrupted_is_ended(tmp_path):
    point = points(read(scenario(tmp_path)))[0]
    with pytest.raises(GeneratorError, match=r"status 3; [\s\S]*no such tokenizer"):
        run([sys.executable, "-c", "print('no such tokenizer'); raise SystemExit(3)"], point, tmp_path, lambda: None)

    def interrupt():
        raise KeyboardInterrupt

    marker = tmp_path / "marker"
    code = f"import time, pathlib; time.sleep(3); pathlib.Path({str(marker)!r}).touch()"
    with pytest.raises(KeyboardInterrupt):
        run([sys.executable, "-c", code], point, tmp_path, interrupt)
    assert not marker.exists()


def test_a_record_has_commands_as_one_types_them_and_no_paths_of_the_machine(tmp_path):
    root = str(Path(load_test.__file__).parents[2])
    words = [f"{root}/.venv/bin/vllm", "serve", f"{root}/configs/models/recall", "--port", "1"]
    made = record.new(read(scenario(tmp_path)), TARGET, words)
    assert made.server_command == ["vllm", "serve", "configs/models/recall", "--port", "1"]
    numbers = record.without_root({"tokenizer_id": f"{root}/configs/models/recall", "completed": 3})
    assert numbers == {"tokenizer_id": "configs/models/recall", "completed": 3}


def test_a_record_is_read_as_it_was_written_and_other_files_are_refused(tmp_path):
    made = make_record(tmp_path)
    record.save(made, tmp_path / "run.json")
    assert record.load(tmp_path / "run.json") == made
    for content in ("{}", "[]", "no", '{"format": 99, "points": []}'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(record.RecordError, match=r"other\.json"):
            record.load(tmp_path / "other.json")


def test_a_comparison_has_both_numbers_their_ratio_and_says_which_is_better(tmp_path):
    first, second = make_record(tmp_path), make_record(tmp_path, scale=2.0)
    second.environment["vllm"] = "0.99"
    rows = {(row.label, row.name): row for row in compare.differences(first, second)}
    throughput, latency = rows["chat, 4 at once", "output tok/s"], rows["chat, 4 at once", "TTFT p99, ms"]
    assert (throughput.first, throughput.second, throughput.ratio, throughput.style) == (400, 800, 2, "green")
    assert (latency.ratio, latency.style) == (2, "red")
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    console.print(compare.table(first, second))
    shown = console.export_text()
    assert re.search(r"vllm: \S+ → 0\.99", shown)
    assert re.search(r"TTFT p99, ms\s+│?\s*396\s+│?\s*792\s+│?\s*2\.00×", shown)
    second.points = []
    with pytest.raises(record.RecordError, match="no point in common"):
        compare.differences(first, second)


def test_two_load_tests_are_put_on_one_page(tmp_path):
    first, second = make_record(tmp_path), make_record(tmp_path, scale=2.0)
    second.environment["vllm"] = "0.99 <b>"
    for made, name in ((first, "a.json"), (second, "b.json")):
        record.save(made, tmp_path / name)
    app = typer.Typer()
    app.command()(load_test.main)
    words = ["--compare", tmp_path / "a.json", tmp_path / "b.json", "--output", tmp_path / "both"]
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "both" / "compare.html").read_text()
    assert re.findall(IMAGE, page) == ["chat: latency against requests at once", "Throughput against latency"]
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert re.search(r'<td class="green">400 → 800<br>\s*<b>2.00×</b>', page)
    assert re.search(r'<td class="red">396 → 792<br>\s*<b>2.00×</b>', page)
    assert "<td>0.99 &lt;b&gt;</td>" in page
    first_point, second_point = page.index("<td>chat, 2 at once"), page.index("<td>chat, 4 at once")
    assert first_point < second_point


def test_the_front_is_what_nothing_beats():
    places = [(1.0, 9.0), (2.0, 9.0), (3.0, 5.0), (2.5, 4.0), (4.0, 1.0), (0.5, 2.0)]
    assert plots.front(places) == [(2.0, 9.0), (3.0, 5.0), (4.0, 1.0)]


def test_guidellms_numbers_take_the_names_of_vllms():
    def summary(value):
        return {"successful": {"mean": value, "percentiles": {"p50": value, "p90": value, "p99": value}}}

    metrics = {
        "request_totals": {"successful": 7, "errored": 1},
        "requests_per_second": summary(2),
        "output_tokens_per_second": summary(30),
        "time_to_first_token_ms": summary(40),
        "time_per_output_token_ms": summary(5),
        "inter_token_latency_ms": summary(6),
    }
    numbers = guidellm_numbers({"benchmarks": [{"metrics": metrics}]})
    assert (numbers["completed"], numbers["failed"], numbers["output_throughput"]) == (7, 1, 30)
    assert (numbers["p99_ttft_ms"], numbers["p50_tpot_ms"], numbers["p90_itl_ms"]) == (40, 5, 6)


def test_guidellm_is_asked_for_only_where_it_is_installed(tmp_path, monkeypatch):
    [point, _] = points(read(scenario(tmp_path, CHAT.replace("name: chat", "name: chat, engine: guidellm"))))
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ScenarioError, match="'chat' wants GuideLLM: pip install guidellm"):
        command(point, TARGET, tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: name)
    words = command(point, TARGET, tmp_path)
    assert words[:2] == [program("guidellm"), "run"]
    assert option(words, "--profile") == "kind=concurrent,streams=2"


@pytest.mark.parametrize(
    "url", ["http://there:8000", "http://there:8000/", "http://there:8000/v1", "http://there:8000/v1/"]
)
def test_the_address_of_a_server_may_be_its_apis(url, tmp_path, monkeypatch):
    asked = []

    def get(address, **options):
        asked.append(address)
        return httpx.Response(200, json={"data": [{"id": "m"}]}, request=httpx.Request("GET", address))

    monkeypatch.setattr(httpx, "get", get)
    with load_test._target(read(SHIPPED[0]), url, None, (), tmp_path) as (target, _, _):
        assert target.url == "http://there:8000"
    assert asked == ["http://there:8000/v1/models"]
