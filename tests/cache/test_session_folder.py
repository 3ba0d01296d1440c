"""The folder of sessions: names that are no paths, whose files are whose, and what is deleted."""

import errno
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from kimi_vllm.cache.session_folder import (
    Promise,
    SessionError,
    check_name,
    file_of,
    mark_used,
    promised,
    remove_scratch,
    salted,
    sessions,
    trim,
)


@pytest.mark.parametrize("name", ["a", "chat-7_b.v2", "A" * 128, "0", "_", "a-", "a..b"])
def test_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "-", "-rf", "a/b", "../a", "/etc/passwd", "a\\b", "a b", "a\n", "ä", "a\0"]
)
def test_what_is_no_name(name):
    with pytest.raises(SessionError, match="is no name of a session: 1 to 128 of"):
        check_name(name)


@pytest.mark.parametrize("name", ["A" * 129, "a@b", "a~0of2", 5, None, ["a"], b"a"])
def test_what_is_no_name_either(name):
    with pytest.raises(SessionError, match="is no name of a session: 1 to 128 of"):
        check_name(name)


def test_salts_and_ranks_have_files_of_their_own(tmp_path):
    files = [
        file_of(tmp_path, name, salt, rank, size)
        for name in ("a", "a.b")
        for salt in (None, "b", "c")
        for rank, size in ((0, 1), (0, 2), (1, 2))
    ]
    assert len(set(files)) == len(files)
    assert {file.parent for file in files} == {tmp_path}
    assert file_of(tmp_path, "a", None, 0, 1).name == "a.session"
    assert "secret" not in file_of(tmp_path, "a", "secret", 0, 1).name


OTHERS = ["model.safetensors", "a.session.bak", ".a.session", "a@b.session", "a~0.session", "notes.txt", "a b.session"]


def put(folder, name, size=100, used=0.0, salt=None, rank=0, ranks=1):
    path = file_of(folder, name, salt, rank, ranks)
    path.write_bytes(bytes(size))
    os.utime(path, (used, used))
    return path


@pytest.fixture
def folder(tmp_path):
    """Sessions of 100 bytes a rank, and files that are none."""
    for name in OTHERS:
        (tmp_path / name).write_bytes(bytes(1000))
    (tmp_path / "folder.session").mkdir()
    (tmp_path / "link.session").symlink_to(tmp_path / "notes.txt")
    put(tmp_path, "b", used=30)
    put(tmp_path, "a", used=10)
    put(tmp_path, "a", used=20, salt="x")
    put(tmp_path, "a", used=5, rank=0, ranks=2)
    put(tmp_path, "a", used=40, rank=1, ranks=2)
    put(tmp_path, "c.session", used=50, rank=1, ranks=2)
    return tmp_path


def test_sessions_are_told_apart_and_come_by_use(folder):
    found = [(one.name, one.tenant, one.ranks, one.size, one.used, one.whole) for one in sessions(folder)]
    assert found == [
        ("a", "", 1, 100, 10, True),
        ("a", salted("x"), 1, 100, 20, True),
        ("b", "", 1, 100, 30, True),
        ("a", "", 2, 200, 40, True),
        ("c.session", "", 2, 100, 50, False),
    ]


@pytest.mark.parametrize(("most", "left"), [(600, 5), (599, 4), (500, 4), (499, 3), (300, 2), (200, 1), (0, 0)])
def test_the_least_recently_used_go_with_all_their_files(folder, most, left):
    before, others = sessions(folder), {folder / name for name in [*OTHERS, "folder.session", "link.session"]}
    assert trim(sessions(folder), most) == before[: len(before) - left]
    assert sessions(folder) == before[len(before) - left :]
    assert {path for path in folder.iterdir() if path in others} == others


def test_a_session_that_is_too_large_costs_no_other(folder):
    before = sessions(folder)
    put(folder, "large", size=1000, used=100)
    assert [session.name for session in trim(sessions(folder), 999)] == ["large"]
    assert sessions(folder) == before


def test_what_is_used_stays_longer(folder):
    mark_used(folder / "a.session")
    assert (sessions(folder)[-1].name, sessions(folder)[-1].ranks) == ("a", 1)
    mark_used(folder / "gone.session")
    assert not (folder / "gone.session").exists()


PROMISES = """
import sys
from pathlib import Path
from kimi_vllm.cache.session_folder import Promise

promise = Promise([Path(path) for path in sys.argv[1:]])
print("promised", flush=True)
if sys.stdin.readline():
    promise.keep()
    print("kept", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def promise_of_another_process(*paths):
    command = [sys.executable, "-c", PROMISES, *map(str, paths)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as other:
        try:
            assert other.stdout.readline() == "promised\n"
            yield other
        finally:
            other.kill()
            other.wait()


@pytest.mark.parametrize("end", ["kept", "killed"])
def test_a_promise_of_another_process_holds_until_it_is_kept_or_the_process_is_gone(end, tmp_path):
    path = file_of(tmp_path, "a", None, 0, 1)
    assert not promised([path])
    with promise_of_another_process(path) as other:
        assert promised([path])
        assert not promised([file_of(tmp_path, "b", None, 0, 1)])
        mine = Promise([path])  # of the same session: the other's holds, and stays
        mine.keep()
        assert promised([path])
        assert remove_scratch(tmp_path) == 0
        assert sessions(tmp_path) == []
        if end == "kept":
            other.stdin.write("keep it\n")
            other.stdin.flush()
            assert other.stdout.readline() == "kept\n"
            assert list(tmp_path.iterdir()) == []
        else:
            other.kill()
            other.wait()
            assert remove_scratch(tmp_path) == 1
        assert not promised([path])
        if end == "killed":
            Promise([path])  # which takes over what was left


@pytest.mark.parametrize("before", [False, True])
def test_a_promise_ends_when_all_ranks_have_replaced_their_files(before, tmp_path):
    """Whoever made it may be idle, and say nothing more."""
    paths = [file_of(tmp_path, "a", None, rank, 2) for rank in range(2)]
    for path in paths if before else ():
        path.write_bytes(b"old")
    with promise_of_another_process(*paths):
        for path in paths:
            assert promised(paths)
            (tmp_path / "new").write_bytes(b"new")
            (tmp_path / "new").rename(path)
        assert not promised(paths)


def test_a_promise_of_several_sessions_ends_with_the_last(tmp_path):
    path = file_of(tmp_path, "a", None, 0, 1)
    promise = Promise([path])
    promise.renew()
    path.write_bytes(b"the first")
    assert promised([path])
    promise.keep()
    assert not promised([path])


def test_what_is_left_of_a_killed_process_is_promised_again(tmp_path):
    path = file_of(tmp_path, "a", None, 0, 1)
    with promise_of_another_process(path):
        pass
    mine = Promise([path])
    assert promised([path])
    mine.keep()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["gone", "a fifo", "a link", "no locks"])
def test_where_no_promise_can_be_made_nobody_waits(what, tmp_path, monkeypatch):
    folder = tmp_path / "gone" if what == "gone" else tmp_path
    path = file_of(folder, "a", None, 0, 1)
    place = path.with_name(f".{path.name}.promise")
    if what == "a fifo":
        os.mkfifo(place)  # which to open would wait for a writer
    if what == "a link":
        place.symlink_to(tmp_path / "elsewhere")
    if what == "no locks":
        monkeypatch.setattr("fcntl.flock", _no_locks)
    promise = Promise([path])
    assert not promised([path])
    promise.keep()
    assert not (tmp_path / "elsewhere").exists()
    if what == "no locks":
        assert not place.exists()


def test_a_folder_that_is_taken_away_is_nobody_s_end(tmp_path):
    folder = tmp_path / "sessions"
    folder.mkdir()
    promise = Promise([file_of(folder, "a", None, 0, 1)])
    folder.rename(tmp_path / "old")
    folder.write_text("no folder")
    promise.keep()
    promise.keep()


def test_scratch_that_cannot_be_locked_stays(tmp_path, monkeypatch):
    (tmp_path / ".kimi-vllm-a.part").touch()
    monkeypatch.setattr("fcntl.flock", _no_locks)
    assert remove_scratch(tmp_path) == 0


def _no_locks(*args):
    raise OSError(errno.ENOLCK, "No locks available")
