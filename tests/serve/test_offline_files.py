"""The files of serve/batch: what is read, resumed and written, without a server."""

import asyncio
import json
import tracemalloc

import httpx
import numpy as np
import pytest
import typer
from openai import AsyncOpenAI
from typer.testing import CliRunner

from serve.batch import __main__ as offline
from serve.batch.requests import BadLineError, BatchError, Mark, Rejected, Request, key_of, left_to_do, parse, survey
from serve.batch.results import Results, answered
from serve.batch.runner import Outcome, Run, send

NONE = np.empty(0, dtype=np.uint64)


def line(custom_id, **changes):
    values = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "?"}}
    return json.dumps(values | changes) + "\n"


def write_input(folder, *lines):
    path = folder / "in.jsonl"
    path.write_text("".join(lines))
    return path


def ids(path):
    return [json.loads(raw)["custom_id"] for raw in path.read_bytes().splitlines()]


def answer(custom_id):
    return answered(Request(1, b"", custom_id, "/v1/completions", {}), 200, {"id": "a", "text": "é\u2028"})


def fill(path, *custom_ids):
    with Results(path, path.with_suffix(".bad")) as results:
        results.write([answer(custom_id) for custom_id in custom_ids], [])


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("nonsense", "not JSON"),
        ("[1]", "not a JSON object"),
        (line(7), "custom_id must be a text"),
        (line(""), "custom_id must be a text"),
        (line("a", method="GET"), "method must be POST, not 'GET'"),
        (line("a", url="completions"), "url must be a path such as /v1/chat/completions, not 'completions'"),
        (line("a", body="x"), "body must be a JSON object"),
        (line("a", body={"stream": True}), "a batch cannot stream"),
    ],
)
def test_a_line_that_is_no_request_says_why(raw, reason):
    with pytest.raises(BadLineError, match=reason):
        parse(raw.encode(), 1)


def test_bad_double_and_done_lines_are_told_apart(tmp_path):
    path = write_input(tmp_path, line("a"), "oops\n", "\n", line("b"), line("a"), line("c"))
    found = survey(path, np.array([key_of("b")], dtype=np.uint64))
    assert [Mark(mark).name for mark in found.marks] == ["LEFT", "BAD", "BLANK", "DONE", "DOUBLE", "LEFT"]
    assert found.complaints == ["line 2: not JSON: Expecting value: line 1 column 1 (char 0)"]
    left = list(left_to_do(path, found))
    assert [item.custom_id for item in left if isinstance(item, Request)] == ["a", "c"]
    assert [(item.line, item.raw[:4]) for item in left if isinstance(item, Rejected)] == [(2, b"oops"), (5, b'{"cu')]


def test_an_output_of_another_input_is_refused(tmp_path):
    with pytest.raises(BatchError, match=r"the output has 1 ids that .*in\.jsonl has not"):
        survey(write_input(tmp_path, line("a")), np.array([key_of("b")], dtype=np.uint64))


@pytest.mark.parametrize("changed", [(line("a"),), (line("a"), line("x")), (line("a"), line("b"), line("c"))])
def test_an_input_that_changes_is_noticed(tmp_path, changed):
    path = write_input(tmp_path, line("a"), line("b"))
    found = survey(path, NONE)
    write_input(tmp_path, *changed)
    with pytest.raises(BatchError, match="changed while it was read"):
        list(left_to_do(path, found))


def test_a_line_costs_bytes_not_objects(tmp_path):
    lines = 40_000
    path = write_input(tmp_path, *(line(f"request-{number}") for number in range(lines)))
    done = np.array([key_of(f"request-{number}") for number in range(0, lines, 2)], dtype=np.uint64)
    tracemalloc.start()
    found = survey(path, done)
    held, peak = tracemalloc.get_traced_memory()
    left = sum(1 for _ in left_to_do(path, found))
    tracemalloc.stop()
    assert left == lines // 2
    assert held < lines * 12 + 100_000
    assert peak < lines * 80 + 100_000  # an id as a Python text and its place in a set are 130 bytes


def test_a_torn_line_is_cut_off_and_done_again(tmp_path):
    output = tmp_path / "out.jsonl"
    fill(output, "a", "b")
    whole = output.read_bytes()
    for torn in (b'{"id": "batch', b"\0\0\0\0", b'{"id": "x"}\n{"custom', json.dumps(answer("c")).encode()):
        output.write_bytes(whole + torn)
        with Results(output, tmp_path / "bad") as results:
            assert results.torn_bytes == len(torn)
            assert set(results.done) == {key_of("a"), key_of("b")}
            results.write([answer("c")], [])
        assert ids(output) == ["a", "b", "c"]
        assert output.read_bytes().startswith(whole)


@pytest.mark.parametrize("content", ["some text\n", "some text", '{"custom_id": 3}\n', "x\n" + json.dumps(answer("a"))])
def test_a_file_that_is_no_output_is_left_alone(tmp_path, content):
    output = tmp_path / "notes.txt"
    output.write_text(content)
    with pytest.raises(BatchError, match=r"not the output of a batch"), Results(output, tmp_path / "bad"):
        pass
    assert output.read_text() == content


def test_damage_before_the_end_is_an_error_that_names_the_line(tmp_path):
    output = tmp_path / "out.jsonl"
    fill(output, "a", "b", "c")
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(lines[0] + b"broken\n" + lines[2])
    with pytest.raises(BatchError, match=r"line 2 of .* is not the answer"), Results(output, tmp_path / "bad"):
        pass


def test_two_runs_may_not_write_one_output(tmp_path):
    output = tmp_path / "out.jsonl"
    with (
        Results(output, tmp_path / "bad"),
        pytest.raises(BatchError, match="another run is writing"),
        Results(output, tmp_path / "bad"),
    ):
        pass
    fill(output, "a")  # and afterwards it is free


def test_half_a_surrogate_pair_is_the_same_id_when_read_back(tmp_path):
    output = tmp_path / "out.jsonl"
    custom_id = json.loads('"\\ud83d"')
    fill(output, custom_id, "😀")
    with Results(output, tmp_path / "bad") as results:
        assert set(results.done) == {key_of(custom_id), key_of("😀")}


class Sink:
    def __init__(self):
        self.groups = []

    def write(self, answers, failures):
        self.groups.append((len(answers), len(failures)))


def test_requests_at_once_are_bounded_and_answers_are_written_in_groups():
    running = highest = 0
    taken = []

    def lines():
        for number in range(100):
            taken.append(number)
            yield Request(number, b"", str(number), "/v1/completions", {})

    async def slow(request):
        nonlocal running, highest
        running += 1
        highest = max(highest, running)
        assert len(taken) - sum(map(sum, sink.groups)) <= 2 * 8  # no line is read before somebody can send it
        await asyncio.sleep(0.001)
        running -= 1
        return Outcome(answer(request.custom_id))

    sink, counted = Sink(), []
    asyncio.run(Run(lines(), slow, sink, lambda *numbers: counted.append(numbers)).run(8))
    assert highest == 8
    assert sum(answers for answers, _ in sink.groups) == sum(numbers[0] for numbers in counted) == 100
    assert len(sink.groups) < 60


def test_when_the_server_is_gone_finished_answers_are_written_and_the_rest_is_left():
    async def until_the_fifth(request):
        if request.line == 5:
            raise BatchError("gone")
        await asyncio.sleep(0.02 if request.line > 5 else 0)
        return Outcome(answer(request.custom_id))

    sink = Sink()
    lines = (Request(number, b"", str(number), "/v1/completions", {}) for number in range(100))
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(Run(lines, until_the_fifth, sink, lambda *numbers: None).run(4))
    assert caught.value.subgroup(BatchError)
    assert sum(answers for answers, _ in sink.groups) == 5
    assert not any(failures for _, failures in sink.groups)


def served(status, body, health=200):
    def handle(request):
        return httpx.Response(health) if request.url.path == "/health" else httpx.Response(status, **body)

    http = httpx.AsyncClient(transport=httpx.MockTransport(handle))
    openai = AsyncOpenAI(base_url="http://test", api_key="none", http_client=http, max_retries=0)
    return asyncio.run(send(openai, Request(3, b"raw", "a", "/v1/completions", {"prompt": "?"})))


def test_an_answer_keeps_the_servers_json():
    outcome = served(200, {"json": {"id": "x", "usage": {"prompt_tokens": 3, "completion_tokens": 2}}})
    assert outcome.answer["custom_id"] == "a"
    assert outcome.answer["response"]["status_code"] == 200
    assert (outcome.tokens("prompt"), outcome.tokens("completion")) == (3, 2)


@pytest.mark.parametrize(("status", "body"), [(400, {"json": {"error": "too long"}}), (200, {"text": "<html>"})])
def test_a_refused_request_fails_alone(status, body):
    outcome = served(status, body)
    assert outcome.answer is None
    assert outcome.failure["error"]["status_code"] == status
    assert (outcome.failure["line"], outcome.failure["input"]) == (3, "raw")


def test_an_error_of_a_healthy_server_is_the_requests_and_of_a_sick_one_is_not():
    assert served(500, {"text": "state became NaN"}).failure["error"]["status_code"] == 500
    with pytest.raises(BatchError, match="not healthy"):
        served(500, {"text": "engine died"}, health=503)


def run_cli(*arguments):
    app = typer.Typer()
    app.command()(offline.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_with_nothing_left_no_server_is_needed(tmp_path):
    source = write_input(tmp_path, line("a"), "oops\n")
    output = tmp_path / "out.jsonl"
    fill(output, "a")
    before = output.read_bytes()
    done = run_cli(source, output, "--model", "no/such/model")
    assert done.exit_code == 1  # the bad line
    assert output.read_bytes() == before
    [bad] = (tmp_path / "out.errors.jsonl").read_text().splitlines()
    assert json.loads(bad)["input"] == "oops"
    write_input(tmp_path, line("a"))
    assert run_cli(source, output, "--model", "no/such/model").exit_code == 0
    assert not (tmp_path / "out.errors.jsonl").exists()


def test_options_that_contradict_are_refused(tmp_path):
    source = write_input(tmp_path, line("a"))
    for arguments, text in (
        ((source, tmp_path / "out"), "either --model or --url"),
        ((source, source, "--model", "m"), "must be three files"),
        ((source, tmp_path / "out", "--url", "http://127.0.0.1:1", "--", "--dtype", "float32"), "not for --url"),
    ):
        done = run_cli(*arguments)
        assert done.exit_code == 2
        assert text in " ".join(done.output.replace("│", " ").split())
    assert json.loads(source.read_text())["custom_id"] == "a"


@pytest.mark.parametrize("place", ["missing/out.jsonl", "out.jsonl"], ids=["output", "errors"])
def test_a_file_that_cannot_be_opened_is_named(place, tmp_path):
    source = write_input(tmp_path, line("a"))
    errors = tmp_path / "missing" / "bad.jsonl"
    done = run_cli(source, tmp_path / place, "--errors", errors, "--url", "http://127.0.0.1:9")
    assert done.exit_code == offline.UNFINISHED
    assert isinstance(done.exception, SystemExit)
    assert "missing/" in done.output
    assert "No such file or directory" in done.output


@pytest.mark.parametrize(
    "url", ["http://there:8000", "http://there:8000/", "http://there:8000/v1", "http://there:8000/v1/"]
)
def test_the_address_of_a_server_may_be_its_apis(url, tmp_path, monkeypatch):
    asked = []

    def get(address, **options):
        asked.append(address)
        return httpx.Response(200, json={"data": [{"id": "m"}]}, request=httpx.Request("GET", address))

    monkeypatch.setattr(httpx, "get", get)
    found = survey(write_input(tmp_path, line("a", body={"model": "m"})), NONE)
    with offline._server(None, url, [], found, tmp_path / "out.jsonl") as base:
        assert base == "http://there:8000"
    assert asked == ["http://there:8000/v1/models"]
