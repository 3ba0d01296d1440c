"""What the tools share: rows that survive a kill, tables, the environment of engines, the launcher's command."""

import os
from dataclasses import dataclass

import pytest
import typer

from serve.bench.engine.__main__ import _loads, _numbers
from serve.common import environment
from serve.common.rows import append, read, take
from serve.common.server import Server, ServerError
from serve.common.tables import ResultTable, tokens


@dataclass(frozen=True)
class Found:
    name: str
    us: float


def test_a_row_after_half_a_row_is_whole(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    append(path, {"a": 1})
    path.write_text(path.read_text() + '{"a": 2, "cut')
    append(path, {"a": 3})
    assert read(path) == [{"a": 1}, {"a": 3}]


def test_what_is_taken_is_in_the_file_with_its_benchmark_and_environment(tmp_path):
    found = [Found("x", 1.5), Found("y", 2.5)]
    assert take("speed", iter(found), {"cores": 2}, tmp_path / "rows") == found
    assert read(tmp_path / "rows")[1] == {"bench": "speed", "name": "y", "us": 2.5, "env": {"cores": 2}}
    assert take("speed", found, {}, None) == found


def test_a_table_in_markdown_aligns_numbers_and_keeps_its_columns():
    table = ResultTable("times", ["what", "case", "ms"], [["a|b", "c\nd", "1.0"]], words=2)
    assert table.markdown().splitlines() == [
        *("**times**", "", "| what | case | ms |", "| --- | --- | ---: |", "| a/b | c d | 1.0 |")
    ]


def test_lengths_are_written_as_people_write_them():
    assert [tokens(count) for count in (512, 4096, 131072, 1 << 20)] == ["512", "4K", "128K", "1M"]


def test_lengths_are_read_as_people_write_them():
    assert _numbers("4K, 128k,1M,4096") == (4096, 131072, 1 << 20, 4096)
    assert _loads("64x4K+128,2x1M+1") == ((64, 4096, 128), (2, 1 << 20, 1))
    for read_them, text in ((_numbers, "4G"), (_numbers, ""), (_loads, "64x4K")):
        with pytest.raises(typer.BadParameter, match="expected"):
            read_them(text)


def test_what_the_caller_has_set_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    environment.prepare(environment.ENGINE)
    assert (os.environ["OMP_NUM_THREADS"], os.environ["HF_HUB_OFFLINE"]) == ("7", "1")


def test_a_server_is_told_its_words_and_a_free_port(tmp_path):
    server = Server("some/model", tmp_path / "log", "--dtype", "float32", name="me")
    assert server.command[1:3] == ["serve", "some/model"]
    assert server.command[-4:] == ["--served-model-name", "me", "--dtype", "float32"]
    assert server.url.endswith(f":{server.port}")
    assert server.port > 1023
    assert "--served-model-name" not in Server("some/model", tmp_path / "log").command


def test_a_server_that_ends_says_why(tmp_path):
    server = Server("some/model", tmp_path / "log")
    server.command = ["sh", "-c", "echo 'ValueError: no such thing'; exit 3"]
    with pytest.raises(ServerError, match=r"ended \(status 3\)[^\0]*ValueError: no such thing"), server:
        server.wait_ready(20)


def test_an_assertion_without_words_is_told_by_its_line(tmp_path):
    server = Server("some/model", tmp_path / "log")
    source = ["    from zmq import ZMQError", "    raise errors.ModelError", "  File x.py", "    assert ready"]
    for prefix in ("", "(Worker pid=7) ERROR 11-28 [x.py:1] "):
        trace = [*source, f"{prefix}AssertionError", *["and so on"] * 99, "RuntimeError: ''"]
        server.log.write_text("\n".join(trace))
        assert server.why().startswith("  File x.py\n    assert ready\nAssertionError\n")
