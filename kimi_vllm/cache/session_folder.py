"""The folder of sessions: names that are no paths, whose files are whose, and which go when there are too many bytes.

Only files that are named as ours are ever deleted. Knows neither torch nor vLLM.
"""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO

_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_PREFIX = r"\+[0-9a-f]{16}-[1-9][0-9]{0,8}"
_FILE = re.compile(
    rf"(?P<name>{_NAME}|{_PREFIX})(@(?P<tenant>[0-9a-f]{{32}}))?(~(?P<rank>\d+)of(?P<ranks>\d+))?\.session"
)
_SCRATCH = ".kimi-vllm-", ".part"
_PROMISE, _TRIES = ".promise", 5


class SessionError(Exception):
    """A session that cannot be saved or resumed. The message goes on after "Session NAME: "."""


@dataclass(slots=True)
class Session:
    """The files that ranks have saved under one name, which a request gave, or `prefix_name`.

    Attributes:
        name, tenant: Which session; `salted` of a cache salt, or empty.
        ranks: How many ranks the engine had that saved it.
        files: By rank.
        size: Bytes of all files.
        used: When it was last saved or loaded, in seconds since the epoch.
        inodes: Of its files; a session that is saved again has others.
    """

    name: str
    tenant: str
    ranks: int
    files: dict[int, Path] = field(default_factory=dict)
    size: int = 0
    used: float = 0.0
    inodes: set[int] = field(default_factory=set)

    @property
    def whole(self) -> bool:
        """Whether every rank has its file."""
        return len(self.files) == self.ranks

    @property
    def is_prefix(self) -> bool:
        """Whether nobody has asked for it by name."""
        return self.name.startswith("+")

    def delete(self) -> None:
        """Delete its files; who reads one of them right now reads it to its end."""
        for path in self.files.values():
            path.unlink(missing_ok=True)


def check_name(name: object) -> str:
    """The name of a session, as a request gives it.

    Raises:
        SessionError: It is something else, such as a path.
    """
    if not isinstance(name, str) or not re.fullmatch(_NAME, name):
        raise SessionError("this is no name of a session: 1 to 128 of A-Z a-z 0-9 . _ -, not . or - first.")
    return name


def prefix_name(digest: str, count: int) -> str:
    """The name of a prefix of so many tokens that is saved without a name; no request can give it."""
    return f"+{digest[:16]}-{count}"


def is_prefix_name(name: str) -> bool:
    """Whether `prefix_name` makes such names."""
    return bool(re.fullmatch(_PREFIX, name))


def salted(salt: str | None) -> str:
    """What stands for a cache salt in names and fingerprints; empty for none."""
    return hashlib.sha256(salt.encode()).hexdigest()[:32] if salt else ""


def file_of(folder: Path, name: str, salt: str | None, rank: int, ranks: int) -> Path:
    """Where a rank of so many keeps a session. ``@`` and ``~`` are in no name."""
    tenant, part = f"@{salted(salt)}" if salt else "", f"~{rank}of{ranks}" if ranks > 1 else ""
    return folder / f"{name}{tenant}{part}.session"


def sessions(folder: Path) -> list[Session]:
    """All sessions, those first that nobody has named, of either kind the least recently used.

    Raises:
        OSError: The folder cannot be read.
    """
    found: dict[tuple[str, str, int], Session] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if not (match := _FILE.fullmatch(entry.name)) or not entry.is_file(follow_symlinks=False):
                continue
            name, tenant, ranks = match["name"], match["tenant"] or "", int(match["ranks"] or 1)
            with suppress(FileNotFoundError):  # deleted meanwhile
                stat = entry.stat(follow_symlinks=False)
                session = found.setdefault((name, tenant, ranks), Session(name, tenant, ranks))
                session.files[int(match["rank"] or 0)] = Path(entry.path)
                session.size += stat.st_size
                session.inodes.add(stat.st_ino)
                session.used = max(session.used, stat.st_mtime)
    return sorted(found.values(), key=lambda session: (not session.is_prefix, session.used))


def trim(found: Sequence[Session], most: int) -> list[Session]:
    """Delete sessions that are larger than so many bytes, then the first of `sessions` until all take no more.

    Args:
        found: All that there are, from `sessions`.

    Returns:
        The sessions that were deleted.

    Raises:
        OSError: The folder cannot be written.
    """
    kept = sorted(found, key=lambda session: session.size <= most)
    total, deleted = sum(session.size for session in kept), []
    for session in kept:
        if total <= most:
            break
        session.delete()
        total -= session.size
        deleted.append(session)
    return deleted


def mark_used(path: Path) -> None:
    """Note that a session is loaded, so that others are deleted first."""
    with suppress(OSError):  # a folder that others write is read only, and they delete from it
        os.utime(path)


@contextmanager
def scratch(folder: Path) -> Iterator[IO[bytes]]:
    """A file to write and then to rename, for its owner only, that is gone if it was not renamed.

    It is locked while it is open, which tells it from what a process left that was killed.

    Raises:
        OSError: The folder cannot be written.
    """
    prefix, suffix = _SCRATCH
    with NamedTemporaryFile(suffix=suffix, prefix=prefix, dir=folder, delete=False) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
        finally:
            Path(file.name).unlink(missing_ok=True)


class Promise:
    """Tells other processes that a session is about to be written, until it is kept or this process ends.

    It is a locked file beside the session's, in which stands which files it is to replace. Where none can be made, as
    in a folder that is full or whose file system has no locks, nobody waits.

    Args:
        paths: The session's files, of all ranks.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._path = _promise_of(paths[0])
        self._handle = -1
        for _ in range(_TRIES):
            handle = -1
            try:
                handle = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _inode(self._path) == os.fstat(handle).st_ino:  # else who had it has just removed it
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, " ".join(str(_inode(path)) for path in paths).encode(), 0)
                    self._handle = handle
                    return
            except BlockingIOError:
                time.sleep(1e-3)  # somebody looks at it, or another process has promised the same session
            except OSError:
                if handle >= 0:
                    self._remove()
                    os.close(handle)
                return
            if handle >= 0:
                os.close(handle)

    def renew(self) -> None:
        """Another session of this name follows: files that are replaced before it do not end the promise any more."""
        if self._handle >= 0:
            os.ftruncate(self._handle, 0)

    def keep(self) -> None:
        """The session is there, or will not come."""
        if self._handle < 0:
            return
        if _inode(self._path) == os.fstat(self._handle).st_ino:
            self._remove()
        os.close(self._handle)
        self._handle = -1

    def _remove(self) -> None:
        with suppress(OSError):  # from a folder that has become read only
            self._path.unlink(missing_ok=True)


def promised(paths: Sequence[Path]) -> bool:
    """Whether a process, this one included, is about to write this session, and has not replaced all its files yet."""
    try:
        handle = os.open(_promise_of(paths[0]), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        replaced, found = os.pread(handle, 2**16, 0).decode().split(), [_inode(path) for path in paths]
        return len(replaced) != len(found) or any(
            not now or str(now) == then for now, then in zip(found, replaced, strict=True)
        )
    except OSError:
        return False
    finally:
        os.close(handle)
    return False  # its process was killed


def _promise_of(path: Path) -> Path:
    return path.with_name(f".{path.name}{_PROMISE}")


def _inode(path: Path) -> int:
    """0 for none."""
    try:
        return os.stat(path, follow_symlinks=False).st_ino
    except OSError:
        return 0


def remove_scratch(folder: Path) -> int:
    """Remove what processes left that were killed while they saved; how many files these were."""
    removed = 0
    for path in [*folder.glob("*".join(_SCRATCH)), *folder.glob(f".*.session{_PROMISE}")]:
        # Being written, gone, or another user's. Network file systems lock files exclusively that are open for writing.
        with suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            removed += 1
    return removed
