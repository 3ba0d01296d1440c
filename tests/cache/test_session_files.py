"""Files of sessions: names that are no paths, fingerprints that must agree, and every byte that counts."""

import os
import stat

import pytest
import torch

from kimi_vllm.cache import session_files
from kimi_vllm.cache.session_files import SessionError, check_name, digest, file_of, read, read_tokens, write

FINGERPRINT = {"format": "1", "weights": "abc", "window": "0"}
PARTS = {
    "tokens": torch.tensor([5, 6, 7]),
    "pages": torch.arange(64, dtype=torch.uint8).view(2, 32),
    "state": torch.arange(48, dtype=torch.uint8),
}


@pytest.fixture
def file(tmp_path):
    path = file_of(tmp_path, "one", None, 0, 1)
    write(path, PARTS, FINGERPRINT)
    return path


@pytest.mark.parametrize("name", ["a", "chat-7_b.v2", "A" * 128, "0", "-", "a..b"])
def test_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "../a", "/etc/passwd", "a\\b", "a b", "a\n", "ä", "a\0"])
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
    assert file_of(tmp_path, "a", None, 0, 1).name == "a.safetensors"
    assert "secret" not in file_of(tmp_path, "a", "secret", 0, 1).name


def test_what_was_written_is_read(file):
    assert read_tokens(file) == [5, 6, 7]
    found = read(file, FINGERPRINT, digest(PARTS["tokens"]))
    assert found.keys() == PARTS.keys()
    assert all(torch.equal(found[name], part) for name, part in PARTS.items())


def test_a_file_is_its_owners_and_nothing_is_left_beside_it(file):
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == [file.name]


def test_a_file_is_replaced_at_once(file):
    before = os.open(file, os.O_RDONLY)
    write(file, PARTS | {"tokens": torch.tensor([9])}, FINGERPRINT)
    assert read_tokens(file) == [9]
    assert os.fstat(before).st_ino != file.stat().st_ino
    os.close(before)


@pytest.mark.parametrize("other", [{"weights": "abd"}, {"window": "4"}, {"format": "2"}, {"more": "1"}])
def test_another_fingerprint_is_told_by_what_differs(file, other):
    [name] = other
    with pytest.raises(SessionError, match=f"its {name} differ"):
        read(file, FINGERPRINT | other, digest(PARTS["tokens"]))


def test_other_tokens_than_those_matched(file):
    with pytest.raises(SessionError, match="replaced"):
        read(file, FINGERPRINT, digest(torch.tensor([5, 6])))


def test_every_byte_counts(file):
    """A flipped bit anywhere is an error or, in what pads the header, changes nothing."""
    whole = file.read_bytes()
    expected = digest(PARTS["tokens"])
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 1 << place % 8
        file.write_bytes(broken)
        try:
            found = read(file, FINGERPRINT, expected)
        except SessionError:
            continue
        assert all(torch.equal(found[name], part) for name, part in PARTS.items()), place


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -33, -1])
def test_a_truncated_file(file, length):
    whole = file.read_bytes()
    file.write_bytes(whole[: length if length >= 0 else len(whole) + length])
    with pytest.raises(SessionError, match="cannot be read"):
        read_tokens(file)
    with pytest.raises(SessionError, match="cannot be read"):
        read(file, FINGERPRINT, digest(PARTS["tokens"]))


def test_what_is_no_file(tmp_path):
    with pytest.raises(SessionError, match="there is no such file"):
        read_tokens(tmp_path / "missing.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")  # which to open would wait for a writer
    with pytest.raises(SessionError, match="there is no such file"):
        read_tokens(tmp_path / "pipe.safetensors")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), session_files.SafetensorError("no space")])
def test_a_full_folder_keeps_the_file_that_was_there(file, monkeypatch, error):
    def full(*args, **named):
        raise error

    monkeypatch.setattr(session_files, "save_file", full)
    with pytest.raises(SessionError, match="cannot be written"):
        write(file, PARTS | {"tokens": torch.tensor([9])}, FINGERPRINT)
    assert os.listdir(file.parent) == [file.name]
    assert read_tokens(file) == [5, 6, 7]


def test_a_folder_that_is_gone(tmp_path):
    with pytest.raises(SessionError, match="cannot be written"):
        write(tmp_path / "gone" / "one.safetensors", PARTS, FINGERPRINT)
