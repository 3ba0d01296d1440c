"""The output of a batch: a line per answered request, appended and synced; what is in it is done, whatever happens.

A request counts as done when its line, newline included, is in the output. A line that was being written when the
process or the machine died is torn; it is cut off and its request is done again. Lines that failed go to a second file,
which every run writes anew, because a run tries them again.
"""

import fcntl
import json
import os
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

import numpy as np

from serve.batch.requests import BatchError, Request, key_of


def answered(request: Request, status: int, body: dict[str, Any]) -> dict[str, Any]:
    """The line of a request that was answered, in the batch format of OpenAI."""
    response = {"status_code": status, "request_id": str(body.get("id", "")), "body": body}
    identity = f"batch_req_{key_of(request.custom_id):016x}"
    return {"id": identity, "custom_id": request.custom_id, "response": response, "error": None}


def failed(line: int, raw: bytes, custom_id: str | None, status: int | None, message: str) -> dict[str, Any]:
    """The line of a request that was not: where it was, what it was, and why it failed."""
    return {
        "line": line,
        "custom_id": custom_id,
        "error": {"status_code": status, "message": message},
        "input": raw.decode(errors="replace").rstrip("\r\n"),
    }


def _line(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair is valid in JSON as an escape only
        return json.dumps(record).encode() + b"\n"


class Results:
    """The two files. One run at a time may write them.

    Attributes:
        done: hashes of the ids in the output when it was opened, 8 bytes each.
        torn_bytes: length of the torn line that was cut off.
    """

    def __init__(self, output: Path, errors: Path) -> None:
        self._output_path, self._errors_path = output, errors
        self.done = np.empty(0, dtype=np.uint64)
        self.torn_bytes = 0

    def __enter__(self) -> Self:
        """Open and lock the output, and find what is in it.

        Raises:
            BatchError: a file cannot be opened, another run is writing it, or it is not the output of a batch.
        """
        self._output = _open(self._output_path, "a+b")
        try:
            fcntl.flock(self._output, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by the kernel, even after kill -9
            self._recover()
            self._errors = _open(self._errors_path, "wb")
        except BlockingIOError as error:
            self._output.close()
            raise BatchError(f"another run is writing {self._output_path}") from error
        except BaseException:
            self._output.close()
            raise
        folder = os.open(self._output_path.parent, os.O_RDONLY)
        os.fsync(folder)  # the file's name must survive, too
        os.close(folder)
        return self

    def __exit__(self, *reason: object) -> None:
        """Close both files; an empty one for errors goes."""
        self._output.close()
        self._errors.close()
        if self._errors_path.stat().st_size == 0:
            self._errors_path.unlink()

    def write(self, answers: Iterable[dict[str, Any]], failures: Iterable[dict[str, Any]]) -> None:
        """Append lines and return once the answers are on the disk."""
        for file, records in ((self._output, answers), (self._errors, failures)):
            lines = [_line(record) for record in records]
            if lines:
                file.write(b"".join(lines))
                file.flush()
                os.fsync(file.fileno())

    def _recover(self) -> None:
        keys = array("Q")
        good_end = 0  # bytes up to the end of the last whole line
        torn_line = 0
        self._output.seek(0)
        for number, raw in enumerate(self._output, 1):
            try:
                if not raw.endswith(b"\n"):
                    raise ValueError("no newline")
                key = key_of(json.loads(raw)["custom_id"])
            except (ValueError, KeyError, TypeError, AttributeError):
                torn_line = torn_line or number
                continue
            if torn_line:
                raise BatchError(
                    f"line {torn_line} of {self._output_path} is not the answer to a request, and lines follow it: "
                    "this is not the output of a batch, or it was edited. Choose another output, or repair the line."
                )
            keys.append(key)
            good_end += len(raw)
        if torn_line == 1 and good_end == 0 and self._output.tell() and not self._looks_torn():
            raise BatchError(f"{self._output_path} is not the output of a batch; choose another")
        self.torn_bytes = self._output.seek(0, os.SEEK_END) - good_end
        self._output.truncate(good_end)
        self.done = np.unique(np.frombuffer(keys, dtype=np.uint64))
        if len(self.done) != len(keys):
            raise BatchError(f"{self._output_path} has {len(keys) - len(self.done)} ids twice; choose another output")

    def _looks_torn(self) -> bool:
        self._output.seek(0)
        head = self._output.read(8)
        return b'{"id": "'.startswith(head) or not head.strip(b"\0")


def _open(path: Path, mode: str) -> BinaryIO:
    try:
        return cast("BinaryIO", path.open(mode))
    except OSError as error:
        raise BatchError(f"{path}: {error.strerror}") from error
