"""`kimi-vllm sessions`: what is in a folder, and what is deleted."""

import json
import os

import pytest
import torch
from support.session_files import write_parts
from typer.testing import CliRunner

from kimi_vllm.cache.session_folder import file_of, salted
from kimi_vllm.cli import app

PARTS = {"tokens": torch.arange(1234), "pages": torch.zeros(2**20, dtype=torch.uint8)}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "notes.txt").touch()
    for name, salt, rank, ranks in (
        ("a", None, 0, 1),
        ("b", None, 0, 1),
        ("b", "me", 0, 1),
        ("b", "you", 0, 1),
        ("c", None, 0, 2),
        ("c", None, 1, 2),
        ("half", None, 1, 2),
    ):
        path = file_of(tmp_path, name, salt, rank, ranks)
        write_parts(path, PARTS, {"dtype": "float32"})
        os.utime(path, (rank, ord(name[0])))
    broken = file_of(tmp_path, "z", None, 0, 1)
    broken.write_bytes(b"12345678{}")
    return tmp_path


def run(*words):
    result = CliRunner().invoke(app, ["sessions", *map(str, words)], env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.output


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_list(folder):
    status, output = run("list", "--dir", folder)
    assert status == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    assert [(row[0], row[2], row[4]) for row in rows] == [
        ("a", "1,234", "1"),
        *[("b", "1,234", "1")] * 3,
        ("c", "1,234", "2"),
        ("half", "1,234", "2"),
        ("z", "?", "1"),
    ]
    assert {row[1] for row in rows} == {"", salted("me")[:8], salted("you")[:8]}
    assert [row[3] for row in rows[:5]] == ["1.0"] * 4 + ["2.0"]
    assert [row[6] for row in rows[-3:]] == ["whole", "lacks rank 0", "it cannot be read: its header is broken."]


def test_list_as_json_and_an_empty_folder(folder, tmp_path_factory):
    status, output = run("list", "--dir", folder, "--json")
    found = json.loads(output)
    assert status == 0
    assert (found[0]["name"], found[0]["tokens"], found[0]["state"]) == ("a", 1234, "whole")
    assert found[0]["bytes"] == (folder / "a.session").stat().st_size
    assert json.loads(run("list", "--dir", tmp_path_factory.mktemp("empty"), "--json")[1]) == []


def test_show(folder):
    status, output = run("show", "c", "--dir", folder)
    assert status == 0
    assert all(word in output for word in ("1234", "float32", "c~0of2.session", "c~1of2.session", "whole"))
    [one] = json.loads(run("show", "b", "--tenant", salted("me"), "--dir", folder, "--json")[1])
    assert one["files"] == [str(file_of(folder, "b", "me", 0, 1))]
    assert one["fingerprint"] == {"dtype": "float32"}


def test_ranks_that_have_saved_different_sessions(folder):
    write_parts(file_of(folder, "c", None, 1, 2), PARTS | {"tokens": torch.arange(1233)}, {"dtype": "float32"})
    assert "its ranks have saved different tokens" in run("show", "c", "--dir", folder)[1]


def test_delete_takes_all_ranks_and_no_other_tenant(folder):
    before = names(folder)
    assert run("delete", "c", "--dir", folder)[0] == 0
    assert before - names(folder) == {"c~0of2.session", "c~1of2.session"}
    status, output = run("delete", "b", "--dir", folder)
    assert (status, output.count("Deleted b: 1 file(s)")) == (0, 1)
    assert before - names(folder) == {"c~0of2.session", "c~1of2.session", "b.session"}
    run("delete", "b", "--tenant", salted("you")[:8], "--dir", folder)
    assert file_of(folder, "b", "me", 0, 1).exists()
    assert not file_of(folder, "b", "you", 0, 1).exists()


@pytest.mark.parametrize("command", ["show", "delete"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nobody"], "Session nobody: there is no such session."),
        (["a", "--tenant", "f"], "there is no such session."),
        (["../a"], "this is no name of a session"),
        (["notes.txt"], "there is no such session."),
    ],
)
def test_what_is_no_session(command, words, message, folder):
    before = names(folder)
    status, output = run(command, *words, "--dir", folder)
    assert status == 1
    assert message in output
    assert names(folder) == before


def test_tenants_that_have_a_session_of_this_name_are_told(folder):
    (folder / "b.session").unlink()
    _, output = run("delete", "b", "--dir", folder)
    assert salted("me")[:8] in output
    assert salted("you")[:8] in output


def test_a_folder_that_is_not_there(tmp_path):
    status, output = run("list", "--dir", tmp_path / "gone")
    assert status == 2
    assert "does not exist" in output


def test_a_device_is_no_folder():
    code, output = run("list", "--dir", "/dev/null")
    assert code == 2
    assert "/dev/null is not a folder" in output
