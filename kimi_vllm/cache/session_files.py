"""Files of sessions: safetensors, whose metadata are a fingerprint and a checksum of every part.

A file is written under a temporary name and renamed when it is on disk, so one that has its name is whole. What is
read is believed only if its fingerprint is the expected one and every part has its checksum. Knows neither vLLM nor
states.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "1"
"""Of what is in a file; part of its fingerprint."""

TOKENS = "tokens"
"""The part that every file has: the tokens after which it goes on, int64."""

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_CHECKSUM = "sha256 of "


class SessionError(Exception):
    """A session that cannot be saved or resumed. The message goes on after "Session NAME: "."""


def check_name(name: object) -> str:
    """The name of a session, as a request gives it.

    Raises:
        SessionError: It is something else, such as a path.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SessionError("this is no name of a session: 1 to 128 of A-Z a-z 0-9 . _ -, not . first.")
    return name


def salted(salt: str | None) -> str:
    """What stands for a cache salt in names and fingerprints; empty for none."""
    return hashlib.sha256(salt.encode()).hexdigest()[:32] if salt else ""


def file_of(folder: Path, name: str, salt: str | None, rank: int, size: int) -> Path:
    """Where a rank of so many keeps a session. ``@`` and ``~`` are in no name."""
    tenant, part = f"@{salted(salt)}" if salt else "", f"~{rank}of{size}" if size > 1 else ""
    return folder / f"{name}{tenant}{part}.safetensors"


def digest(part: Tensor) -> str:
    """Checksum of a tensor on the CPU."""
    return hashlib.sha256(part.contiguous().view(torch.uint8).numpy().data).hexdigest()


def write(path: Path, parts: Mapping[str, Tensor], fingerprint: Mapping[str, str]) -> None:
    """Put a session in the place of what was there, or leave that.

    Raises:
        SessionError: The folder is full, or cannot be written.
    """
    scratch = None
    try:
        handle, scratch = tempfile.mkstemp(".part", ".", path.parent)  # for its owner only
        os.close(handle)
        save_file(dict(parts), scratch, {**fingerprint, **{_CHECKSUM + name: digest(x) for name, x in parts.items()}})
        os.chmod(scratch, 0o600)
        _sync(scratch)
        os.rename(scratch, path)
        scratch = None
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise SessionError(f"it cannot be written: {error}.") from error
    finally:
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)


def read_tokens(path: Path) -> list[int]:
    """The tokens after which a session goes on.

    Raises:
        SessionError: There is no such file, or it is broken.
    """
    return _read(path, None)[TOKENS].tolist()  # type: ignore[no-any-return]


def read(path: Path, fingerprint: Mapping[str, str], tokens: str) -> dict[str, Tensor]:
    """All parts of a session, checked.

    Args:
        fingerprint: What it must have been written with.
        tokens: `digest` of its tokens.

    Raises:
        SessionError: There is no such file, it is broken, was written by another model or for other sizes, or has been
            replaced by one of other tokens.
    """
    parts = _read(path, fingerprint)
    if digest(parts[TOKENS]) != tokens:
        raise SessionError("it has been replaced by one of other tokens.")
    return parts


def _read(path: Path, fingerprint: Mapping[str, str] | None) -> dict[str, Tensor]:
    """All parts, or only the tokens if no fingerprint is given."""
    if not path.is_file():
        raise SessionError("there is no such file.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = {key.removeprefix(_CHECKSUM) for key in metadata if key.startswith(_CHECKSUM)}
            if TOKENS not in names or names != set(file.keys()):
                raise SessionError("its parts are not those that were written.")
            if fingerprint is not None:
                written = {key: value for key, value in metadata.items() if not key.startswith(_CHECKSUM)}
                _compare(written, fingerprint)
            parts = {name: file.get_tensor(name) for name in (names if fingerprint is not None else (TOKENS,))}
    except (OSError, SafetensorError, RuntimeError) as error:
        raise SessionError(f"it cannot be read: {error}.") from error
    for name, part in parts.items():
        if digest(part) != metadata[_CHECKSUM + name]:
            raise SessionError(f"its {name} are not what was written.")
    if parts[TOKENS].dtype != torch.int64 or parts[TOKENS].ndim != 1:
        raise SessionError("its tokens are not what was written.")
    return parts


def _compare(written: Mapping[str, str], expected: Mapping[str, str]) -> None:
    keys = sorted(written.keys() | expected.keys())
    if other := [key for key in keys if written.get(key) != expected.get(key)]:
        raise SessionError(f"its {', '.join(other)} differ from this engine's.")


def _sync(path: Path | str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
