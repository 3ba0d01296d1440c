"""Files of sessions: safetensors, whose metadata are a fingerprint and a checksum of every part.

A file is written under a temporary name and renamed when it is on disk, so one that has its name is whole. What is
read is believed only if its fingerprint is the expected one and every part has its checksum. Parts are read and written
several at a time, as `Copies` has threads. safetensors itself maps a file into memory, and a file that is truncated
meanwhile would end the process; here files are read. Knows neither vLLM nor states.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kimi_vllm.cache.session_copies import Buffer, Copies, shape_bytes
from kimi_vllm.cache.session_folder import SessionError, scratch

FORMAT = "2"
"""Of what is in a file; part of its fingerprint."""

TOKENS = "tokens"
"""The part that every file has: the tokens after which it goes on, int64."""

Form = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a part."""

Move = Callable[[str, Tensor, Buffer], None]
"""Takes a part's name, its values or the room for them, and the thread's means."""

_CHECKSUM = "sha256 of "
_DTYPES = {"I64": torch.int64, "U8": torch.uint8}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 2**20


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of its parts.

    Attributes:
        fingerprint: What it was written with.
        checksums: By part.
        parts: By part, its dtype, its shape and the place of its first byte.
    """

    fingerprint: dict[str, str]
    checksums: dict[str, str]
    parts: dict[str, tuple[torch.dtype, list[int], int]]

    @property
    def num_tokens(self) -> int:
        """After how many tokens the session goes on."""
        return prod(self.parts[TOKENS][1])


def digest(part: Tensor) -> str:
    """Checksum of a tensor on the CPU."""
    return hashlib.sha256(_bytes(part)).hexdigest()


def write(path: Path, forms: Mapping[str, Form], fill: Move, fingerprint: Mapping[str, str], copies: Copies) -> None:
    """Put a session in the place of what was there, or leave that.

    Args:
        forms: Of all parts, int64 or uint8.
        fill: Puts a part's values where they are to be written from. Called by several threads.

    Raises:
        SessionError: The folder is full, or cannot be written; there are too many parts; or `fill` raised it.
    """
    checksums = {_CHECKSUM + name: digest(torch.empty(0)) for name in forms}  # in place of others that are as long
    described, places, end = dict[str, Any](), dict[str, int](), 0
    for name, (shape, dtype) in forms.items():
        places[name], end = end, end + shape_bytes(shape, dtype)
        described[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [places[name], end]}

    def header() -> bytes:
        text = json.dumps({"__metadata__": {**fingerprint, **checksums}, **described}).encode()
        text += b" " * (-len(text) % 8)  # so that parts are aligned
        return len(text).to_bytes(8, "little") + text

    start = len(header())
    if start > _LONGEST_HEADER:
        raise SessionError(f"it has {len(forms)} parts, more than a file can list.")
    try:
        with scratch(path.parent) as file:

            def one(name: str, buffer: Buffer) -> None:
                part = buffer.room(*forms[name])
                fill(name, part, buffer)
                checksums[_CHECKSUM + name] = digest(part)
                _write(file.fileno(), _bytes(part), start + places[name])

            copies.each(forms, one)
            _write(file.fileno(), memoryview(header()), 0)
            os.fsync(file.fileno())
            os.rename(file.name, path)
        _sync(path.parent)
    except OSError as error:
        raise SessionError(f"it cannot be written: {error}.") from error


def read_header(path: Path) -> Header:
    """What a session is of; its parts are not read, and not checked.

    Raises:
        SessionError: There is no such file, or it is broken.
    """
    with _opened(path) as file:
        return _header(file)


def read_tokens(path: Path) -> list[int]:
    """The tokens after which a session goes on.

    Raises:
        SessionError: There is no such file, or it is broken.
    """
    with _opened(path) as file:
        return _part(file, _header(file), TOKENS).tolist()  # type: ignore[no-any-return]


def read(
    path: Path, forms: Mapping[str, Form], put: Move, fingerprint: Mapping[str, str], tokens: str, copies: Copies
) -> None:
    """Take parts of a session, each when it is checked.

    Args:
        forms: Of all parts.
        put: Takes what is right of one part, while others may be found wrong. Called by several threads.
        fingerprint: What it must have been written with.
        tokens: `digest` of its tokens.

    Raises:
        SessionError: There is no such file, it is broken, was written by another model or for other sizes, or has been
            replaced by one of other tokens; or `put` raised it.
    """
    with _opened(path) as file:
        header = _header(file)
        keys = sorted(header.fingerprint.keys() | fingerprint.keys())
        if other := [key for key in keys if header.fingerprint.get(key) != fingerprint.get(key)]:
            raise SessionError(f"its {', '.join(other)} differ from this engine's.")
        if header.checksums[TOKENS] != tokens:
            raise SessionError("it has been replaced by one of other tokens.")
        if {name: (tuple(shape), dtype) for name, (dtype, shape, _) in header.parts.items()} != forms:
            raise SessionError("its parts have other sizes.")

        def one(name: str, buffer: Buffer) -> None:
            part = buffer.room(*forms[name])
            _fill(file, header, name, part)
            put(name, part, buffer)

        copies.each(forms, one)


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    try:
        if not path.is_file():
            raise SessionError("there is no such file.")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise SessionError(f"it cannot be read: {error}.") from error


def _header(file: BufferedReader) -> Header:
    size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
    if length > min(_LONGEST_HEADER, size - 8):
        raise SessionError("it cannot be read: its header is broken.")
    try:
        header = json.loads(file.read(length))
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__").items()}
        described = [
            (str(name), _DTYPES[part["dtype"]], list(part["shape"]), *part["data_offsets"])
            for name, part in header.items()
        ]
        parts, place = {}, 0
        for name, dtype, shape, start, end in sorted(described, key=lambda part: part[3]):
            if {type(number) for number in (*shape, start, end)} != {int} or min(shape) < 0:
                raise ValueError(f"{name} has no such shape")
            if start != place or end - start != prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has no such place")
            parts[name], place = (dtype, shape, 8 + length + start), end
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise SessionError("it cannot be read: its header is broken.") from error
    if place != size - 8 - length:
        raise SessionError(f"it cannot be read: it has {size} bytes, and not {8 + length + place}.")
    checksums = {key.removeprefix(_CHECKSUM): value for key, value in metadata.items() if key.startswith(_CHECKSUM)}
    if TOKENS not in parts or parts.keys() != checksums.keys():
        raise SessionError("its parts are not those that were written.")
    if parts[TOKENS][0] != torch.int64 or len(parts[TOKENS][1]) != 1:
        raise SessionError("its tokens are not what was written.")
    fingerprint = {key: value for key, value in metadata.items() if not key.startswith(_CHECKSUM)}
    return Header(fingerprint, checksums, parts)


def _part(file: BufferedReader, header: Header, name: str) -> Tensor:
    dtype, shape, _ = header.parts[name]
    part = torch.empty(shape, dtype=dtype)
    _fill(file, header, name, part)
    return part


def _fill(file: BufferedReader, header: Header, name: str, part: Tensor) -> None:
    """Read a part of this form, and check it."""
    place, left = header.parts[name][2], _bytes(part)
    while left:
        if not (count := os.preadv(file.fileno(), [left], place)):
            raise SessionError("it cannot be read: it ends too early.")
        left, place = left[count:], place + count
    if digest(part) != header.checksums[name]:
        raise SessionError(f"its {name} are not what was written.")


def _write(handle: int, data: memoryview, place: int) -> None:
    while data:
        count = os.pwrite(handle, data, place)
        data, place = data[count:], place + count


def _bytes(part: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, to read and to write."""
    return part.view(-1).view(torch.uint8).numpy().data


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
