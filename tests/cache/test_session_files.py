"""Files of sessions: fingerprints that must agree, every byte that counts, and processes that are killed."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.limits import largest_file
from support.session_files import COPIES, forms_of, read_parts, write_parts

from kimi_vllm.cache.session_files import digest, read, read_header, read_tokens, write
from kimi_vllm.cache.session_folder import SessionError, file_of, remove_scratch

FINGERPRINT = {"format": "1", "weights": "abc", "window": "0"}
PARTS = {
    "tokens": torch.tensor([5, 6, 7]),
    "pages": torch.arange(64, dtype=torch.uint8).view(2, 32),
    "state": torch.arange(48, dtype=torch.uint8),
}


@pytest.fixture
def file(tmp_path):
    path = file_of(tmp_path, "one", None, 0, 1)
    write_parts(path, PARTS, FINGERPRINT)
    return path


def test_what_was_written_is_read(file):
    assert read_tokens(file) == [5, 6, 7]
    found = read_parts(file, PARTS, FINGERPRINT)
    assert found.keys() == PARTS.keys()
    assert all(torch.equal(found[name], part) for name, part in PARTS.items())


def test_a_file_is_its_owners_and_nothing_is_left_beside_it(file):
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == [file.name]


def test_a_file_is_replaced_at_once(file):
    before = os.open(file, os.O_RDONLY)
    write_parts(file, PARTS | {"tokens": torch.tensor([9])}, FINGERPRINT)
    assert read_tokens(file) == [9]
    assert os.fstat(before).st_ino != file.stat().st_ino
    os.close(before)


@pytest.mark.parametrize("other", [{"weights": "abd"}, {"window": "4"}, {"format": "2"}, {"more": "1"}])
def test_another_fingerprint_is_told_by_what_differs(file, other):
    [name] = other
    with pytest.raises(SessionError, match=f"its {name} differ"):
        read_parts(file, PARTS, FINGERPRINT | other)


def test_other_tokens_than_those_matched(file):
    with pytest.raises(SessionError, match="replaced"):
        read_parts(file, PARTS, FINGERPRINT, digest(torch.tensor([5, 6])))


def test_safetensors_reads_them_and_what_it_has_written_is_read(file):
    """They are what their users' tools expect, with a header that is laid out otherwise."""
    parts = load_file(file)
    assert parts.keys() == PARTS.keys()
    assert all(torch.equal(parts[name], part) for name, part in PARTS.items())
    header = read_header(file)
    assert (header.fingerprint, header.num_tokens) == (FINGERPRINT, 3)
    save_file(parts, file, FINGERPRINT | {f"sha256 of {name}": digest(part) for name, part in parts.items()})
    found = read_parts(file, PARTS, FINGERPRINT)
    assert all(torch.equal(found[name], part) for name, part in PARTS.items())


def test_every_byte_counts(file):
    """A flipped bit anywhere is an error or, in what pads the header, changes nothing."""
    whole = file.read_bytes()
    expected = digest(PARTS["tokens"])
    for place in range(len(whole)):
        for bit in range(8):
            broken = bytearray(whole)
            broken[place] ^= 1 << bit
            file.write_bytes(broken)
            try:
                found = read_parts(file, PARTS, FINGERPRINT, expected)
            except SessionError:
                continue
            assert found.keys() == PARTS.keys()
            assert all(torch.equal(found[name], part) for name, part in PARTS.items()), (place, bit)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -33, -1])
def test_a_truncated_file(file, length):
    whole = file.read_bytes()
    file.write_bytes(whole[: length if length >= 0 else len(whole) + length])
    with pytest.raises(SessionError, match="cannot be read"):
        read_tokens(file)
    with pytest.raises(SessionError, match="cannot be read"):
        read_parts(file, PARTS, FINGERPRINT)


HEADERS = {
    "no object": b"[]",
    "no metadata": b"{}",
    "no text": b"\xff\xff",
    "deep": b"[" * 100_000,
    "no numbers": b'{"__metadata__": {}, "tokens": {"dtype": "I64", "shape": [1.0], "data_offsets": [0, 8]}}',
    "no places": b'{"__metadata__": {}, "tokens": {"dtype": "I64", "shape": [1], "data_offsets": []}}',
    "a size below zero": b'{"__metadata__": {}, "tokens": {"dtype": "I64", "shape": [-1, -1], "data_offsets": [0, 8]}}',
    "more than there is": b'{"__metadata__": {}, "tokens": {"dtype": "I64", "shape": [9], "data_offsets": [0, 72]}}',
    "another dtype": b'{"__metadata__": {}, "tokens": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}',
    "no checksums": b'{"__metadata__": {}, "tokens": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}',
}


@pytest.mark.parametrize("how", HEADERS)
def test_a_header_that_nobody_has_written(file, how):
    header = HEADERS[how]
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(SessionError, match=r"its header is broken|it has .* bytes, and not|its parts are not those"):
        read_tokens(file)


def test_a_header_without_an_end(file):
    file.write_bytes((2**62).to_bytes(8, "little") + bytes(100))
    with pytest.raises(SessionError, match="its header is broken"):
        read_tokens(file)


def test_a_file_that_is_truncated_while_it_is_read(file):
    """Where it was mapped into memory, this would be a signal that ends the process."""
    parts = PARTS | {f"part {number}": torch.zeros(2**20, dtype=torch.uint8) for number in range(8)}
    write_parts(file, parts, FINGERPRINT)
    taken = []

    def put(name, part, _):
        taken.append(name)
        os.truncate(file, file.stat().st_size // 2)

    with pytest.raises(SessionError, match="ends too early"):
        read(file, forms_of(parts), put, FINGERPRINT, digest(PARTS["tokens"]), COPIES)
    assert len(taken) < len(parts)


def test_parts_of_other_sizes(file):
    with pytest.raises(SessionError, match="other sizes"):
        read_parts(file, PARTS | {"pages": torch.zeros(4, 16, dtype=torch.uint8)}, FINGERPRINT)


def test_the_first_error_ends_the_copying(file):
    parts = PARTS | {f"part {number}": torch.zeros(8, dtype=torch.uint8) for number in range(40)}
    write_parts(file, parts, FINGERPRINT)
    taken = []

    def fail(name, part, _):
        taken.append(name)
        time.sleep(0.01)
        raise SessionError("its state is odd.")

    with pytest.raises(SessionError, match="odd"):
        read(file, forms_of(parts), fail, FINGERPRINT, digest(PARTS["tokens"]), COPIES)
    assert len(taken) < 10


def test_too_many_parts_are_not_written(tmp_path):
    parts = PARTS | {f"{number} {'x' * 4000}": torch.zeros(1, dtype=torch.uint8) for number in range(300)}
    with pytest.raises(SessionError, match="303 parts, more than a file can list"):
        write_parts(tmp_path / "a.session", parts, FINGERPRINT)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_who_fills_or_takes_a_part_ends_it(file):
    def fail(name, part, _):
        if name == "state":
            raise SessionError("its state is odd.")

    with pytest.raises(SessionError, match="odd"):
        read(file, forms_of(PARTS), fail, FINGERPRINT, digest(PARTS["tokens"]), COPIES)
    before = file.read_bytes()
    with pytest.raises(SessionError, match="odd"):
        write(file, forms_of(PARTS), fail, FINGERPRINT, COPIES)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_what_is_no_file(tmp_path):
    with pytest.raises(SessionError, match="there is no such file"):
        read_tokens(tmp_path / "missing.session")
    os.mkfifo(tmp_path / "pipe.session")  # which to open would wait for a writer
    with pytest.raises(SessionError, match="there is no such file"):
        read_tokens(tmp_path / "pipe.session")


@pytest.mark.parametrize("most", [0, 100, 1000])
def test_a_full_folder_keeps_the_file_that_was_there(file, most):
    with largest_file(most), pytest.raises(SessionError, match="cannot be written"):
        write_parts(file, PARTS | {"pages": torch.zeros(2**20, dtype=torch.uint8)}, FINGERPRINT)
    assert os.listdir(file.parent) == [file.name]
    assert read_tokens(file) == [5, 6, 7]


def test_a_folder_that_is_gone(tmp_path):
    with pytest.raises(SessionError, match="cannot be written"):
        write_parts(tmp_path / "gone" / "one.session", PARTS, FINGERPRINT)


KILLED = """
import os, sys, time
from pathlib import Path
import torch
from support.session_files import write_parts

path, at = Path(sys.argv[1]), int(sys.argv[2])
calls = 0

def wait(handle):
    global calls
    calls += 1
    if calls == at:
        print("waits", flush=True)
        time.sleep(600)

os.fsync = wait
write_parts(path, {"tokens": torch.tensor([9]), "pages": torch.zeros(2**20, dtype=torch.uint8)}, {})
"""


@pytest.mark.parametrize("at", [1, 2])
def test_a_process_that_is_killed_while_it_saves(file, at):
    """Before the file is on disk and has its name, and before its name is on disk."""
    others = [file.parent / name for name in (".kimi-vllm", ".other.part", "kimi-vllm-a.part", "model.safetensors")]
    for other in others:
        other.touch()
    saving = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(file), str(at)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": "tests:."},
    )
    try:
        assert saving.stdout.readline() == b"waits\n"
        parts = [*file.parent.glob(".kimi-vllm-*.part")]
        assert len(parts) == 2 - at
        assert remove_scratch(file.parent) == 0, "it is being written"
    finally:
        saving.send_signal(signal.SIGKILL)
        saving.wait()
    assert read_tokens(file) == ([5, 6, 7] if at == 1 else [9])
    assert remove_scratch(file.parent) == len(parts)
    assert {*file.parent.iterdir()} == {file, *others}
