"""The input of a batch: OpenAI's batch format, a request a line, read twice and never held in memory.

The first reading counts and finds what is bad, done or double, before a model is loaded. It keeps 9 bytes a line: a
64-bit hash of the `custom_id` and a mark. The second reading hands out the requests that are left to do.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

MAX_NAMES = 16


class BatchError(Exception):
    """The batch cannot go on; the message is for the user."""


class BadLineError(Exception):
    """A line that is no request; the message says why."""


class Mark(IntEnum):
    """What the first reading found on a line."""

    LEFT = 0
    DONE = 1
    BAD = 2
    DOUBLE = 3
    BLANK = 4


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the input."""

    line: int  # from 1
    raw: bytes
    custom_id: str  # the user's name for it, unique in the file
    url: str  # path on the server, such as /v1/chat/completions
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A line that is not sent to the server, and why."""

    line: int
    raw: bytes
    reason: str


@dataclass(slots=True)
class Survey:
    """What the first reading found."""

    keys: np.ndarray  # uint64, hash of each line's `custom_id`; 0 where there is none
    marks: np.ndarray  # uint8, a `Mark` for each line
    # the first `MAX_NAMES` values of `model` in the bodies left to do or done; None for a body without
    models: set[str | None] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)  # the first few bad lines, in words

    def count(self, *marks: Mark) -> int:
        """How many lines have one of these marks."""
        return int(np.isin(self.marks, marks).sum())


def key_of(custom_id: str) -> int:
    """A 64-bit hash. Among a million ids two agree once in 40 million files; the second is then reported as double."""
    return int.from_bytes(hashlib.blake2b(custom_id.encode(errors="surrogatepass"), digest_size=8).digest())


def parse(raw: bytes, line: int) -> Request:
    """Read one line.

    Raises:
        BadLineError: it is not a request that can be posted and answered in one piece.
    """
    try:
        values = json.loads(raw)
    except ValueError as error:
        raise BadLineError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise BadLineError("not a JSON object")
    custom_id, url, body = values.get("custom_id"), values.get("url"), values.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise BadLineError("custom_id must be a text that is not empty")
    if values.get("method", "POST") != "POST":
        raise BadLineError(f"method must be POST, not {values['method']!r}")
    if not isinstance(url, str) or not url.startswith("/v1/"):
        raise BadLineError(f"url must be a path such as /v1/chat/completions, not {url!r}")
    if not isinstance(body, dict):
        raise BadLineError("body must be a JSON object")
    if body.get("stream"):
        raise BadLineError("a batch cannot stream: remove `stream` from the body")
    return Request(line, raw, custom_id, url, body)


def survey(path: Path, done: np.ndarray) -> Survey:
    """Read the input for the first time.

    Args:
        done: hashes of the ids that the output has already.

    Raises:
        BatchError: the output has ids that are not in this input.
    """
    keys, marks = array("Q"), bytearray()
    models: set[str | None] = set()
    complaints: list[str] = []
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            key, mark = 0, Mark.BLANK
            if raw.strip():
                try:
                    request = parse(raw, number)
                except BadLineError as error:
                    mark = Mark.BAD
                    if len(complaints) < 3:
                        complaints.append(f"line {number}: {error}")
                else:
                    key, mark = key_of(request.custom_id), Mark.LEFT
                    if len(models) < MAX_NAMES:
                        model = request.body.get("model")
                        models.add(model if isinstance(model, str) else None)
            keys.append(key)
            marks.append(mark)
    found = Survey(np.frombuffer(keys, dtype=np.uint64), np.frombuffer(marks, dtype=np.uint8), models, complaints)
    _mark_doubles(found)
    strangers = int((~np.isin(done, found.keys)).sum())
    if strangers:
        raise BatchError(f"the output has {strangers} ids that {path} has not: it belongs to another input")
    found.marks[np.isin(found.keys, done) & (found.marks == Mark.LEFT)] = Mark.DONE
    return found


def _mark_doubles(found: Survey) -> None:
    places = np.flatnonzero(found.marks == Mark.LEFT)
    places = places[np.argsort(found.keys[places], kind="stable")]  # stable: the first in the file stays
    again = np.flatnonzero(found.keys[places[1:]] == found.keys[places[:-1]]) + 1
    found.marks[places[again]] = Mark.DOUBLE


def left_to_do(path: Path, found: Survey) -> Iterator[Request | Rejected]:
    """Read the input again: the requests to send, and between them the lines to reject.

    Raises:
        BatchError: the file is not the one that was surveyed.
    """
    changed = f"{path} changed while it was read"
    number = 0
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            if number > len(found.marks):
                raise BatchError(changed)
            mark = found.marks[number - 1]
            if mark in (Mark.DONE, Mark.BLANK):
                continue
            try:
                request = parse(raw, number)
            except BadLineError as error:
                if mark != Mark.BAD:
                    raise BatchError(changed) from error
                yield Rejected(number, raw, str(error))
                continue
            if mark == Mark.BAD or key_of(request.custom_id) != found.keys[number - 1]:
                raise BatchError(changed)
            if mark == Mark.DOUBLE:
                yield Rejected(number, raw, f"custom_id {request.custom_id!r} was on an earlier line")
            else:
                yield request
    if number != len(found.marks):
        raise BatchError(changed)
