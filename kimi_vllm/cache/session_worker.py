"""The workers' half of sessions: copies between memory and files, behind the steps; see `sessions.py`.

A session is copied while steps run: the scheduler holds its blocks until then. A load that is found broken has copied
some of it; vLLM then gives up all blocks of the request, and its prompt is computed in others.
"""

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)

from kimi_vllm.cache.fingerprint import fingerprint_of, weights_digest
from kimi_vllm.cache.pool import StatePool
from kimi_vllm.cache.session_copies import Buffer, Copies, behind_steps
from kimi_vllm.cache.session_files import TOKENS, Form, read, write
from kimi_vllm.cache.session_folder import SessionError, file_of, salted
from kimi_vllm.options import KimiOptions

logger = logging.getLogger("vllm.kimi_vllm")

PART_BYTES = 2**24
"""Of a part, if a block is not more: enough for a disk's full speed."""
BASE = "base"
"""The part that says where windows of drafts begin."""
THREADS = 4
"""That copy a session on a GPU's host. On a CPU it is one, for the others compute."""


@dataclass(frozen=True, slots=True)
class Job:
    """One session to load or to save.

    Attributes:
        request_id: Whose blocks these are.
        name, salt: Which session.
        digest, count: Of its tokens.
        slot, pages: Where its state and its pages are.
        first: Of the pages, those before are other requests' too, and hold what the file has.
        tokens: What to save.
    """

    request_id: str
    name: str
    salt: str | None
    digest: str
    count: int
    slot: int
    pages: list[int]
    first: int
    tokens: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """A part that is the beginning of some blocks.

    Attributes:
        of_state: Whether they are the slot's; else they are pages.
        start, stop: Which of them.
    """

    of_state: bool
    start: int
    stop: int


@dataclass(eq=False, repr=False)
class Jobs(KVConnectorMetadata):
    """What workers are told with a step."""

    loads: list[Job] = field(default_factory=list)
    saves: list[Job] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class Report(KVConnectorWorkerMetadata):
    """What workers tell beside what is done.

    Attributes:
        unsaved: Requests whose sessions could not be saved.
        missed: Requests whose sessions could not be loaded, to the reason.
    """

    unsaved: set[str] = field(default_factory=set)
    missed: dict[str, str] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "Report":
        """Those of several workers."""
        assert isinstance(other, Report)
        return Report(self.unsaved | other.unsaved, self.missed | other.missed)


class SessionWorker:
    """Mixed into the connector; idle in the scheduler's process."""

    _pool: StatePool
    _model: nn.Module

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)  # type: ignore[call-arg]
        self._config = vllm_config
        self._parallel = vllm_config.parallel_config
        self._jobs = Jobs()
        self._reading: dict[str, tuple[Job, Future[None]]] = {}
        self._writing: dict[str, Future[bool]] = {}
        self._report = Report()
        self._fingerprint: dict[str, str] = {}
        # One writer, so that the last of two sessions of a name stays, on all ranks.
        self._reader, self._writer = ThreadPoolExecutor(1, "session-read"), ThreadPoolExecutor(1, "session-write")

    def bind(self, model: nn.Module, pool: StatePool) -> None:
        """Say what is saved; again after the weights have changed.

        Raises:
            ValueError: It is not known which weights these are.
        """
        of = fingerprint_of(self._config, pool.layout, self._parallel.rank, self._parallel.world_size)
        loaded = getattr(model, "noted", None)
        load_format = self._config.load_config.load_format
        if loaded is not None and not loaded.digests and load_format != "dummy":
            raise ValueError(
                f"kimi.session_dir with --load-format {load_format}: it does not show which weights it loads, by which "
                "sessions are told from another model's. Drop one of them."
            )
        self._fingerprint = of | {"weights": weights_digest(model, loaded)}
        if not hasattr(self, "_pool"):
            threads = 1 if pool.device.type == "cpu" else THREADS
            tokens = self._config.model_config.max_model_len * torch.int64.itemsize
            size = max(PART_BYTES, pool.layout.block_bytes, tokens)
            # Of their own, for a load does not wait behind the parts of a save.
            self._loads, self._saves = (Copies(threads, size, pool.device) for _ in range(2))
        self._pool = pool

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Take what is to be done with this step."""
        super().bind_connector_metadata(connector_metadata)  # type: ignore[misc]
        assert isinstance(connector_metadata, Jobs)
        self._jobs = connector_metadata

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start reading."""
        for job in self._jobs.loads:
            step = behind_steps(self._pool.device)
            self._reading[job.request_id] = job, self._reader.submit(self._read, job, self._expected(job), step)
        self._jobs.loads.clear()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request runs when its load is done."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to save: requests are saved when they have ended."""

    def wait_for_save(self) -> None:
        """Start saving: the step that is behind a request's last one has been given to the device."""
        for job in self._jobs.saves:
            step = behind_steps(self._pool.device)
            self._writing[job.request_id] = self._writer.submit(self._write, job, self._expected(job), step)
        self._jobs.saves.clear()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Tell what is done."""
        results = KVConnectorTransferResults()
        for name in [name for name, future in self._writing.items() if future.done()]:
            results.finished_sending.add(name)
            if not self._writing.pop(name).result():
                self._report.unsaved.add(name)
        for name in [name for name, (_, future) in self._reading.items() if future.done()]:
            job, future = self._reading.pop(name)
            results.finished_recving.add(name)
            try:
                future.result()
            except SessionError as error:
                results.failed_recving.add(name)
                self._report.missed[name] = str(error)
                logger.warning("Session %s: %s The prompt is computed.", job.name, error)
        return results

    def build_connector_worker_meta(self) -> Report | None:
        """Tell what could not be saved or loaded."""
        report, self._report = self._report, Report()
        return report if report.unsaved or report.missed else None

    def shutdown(self) -> None:
        """Finish writing."""
        self._reader.shutdown(cancel_futures=True)
        self._writer.shutdown()
        if hasattr(self, "_pool"):
            self._loads.shutdown()
            self._saves.shutdown()

    def _expected(self, job: Job) -> dict[str, str]:
        return self._fingerprint | {"tenant": salted(job.salt)}

    def _path(self, job: Job) -> Path:
        folder = KimiOptions.of(self._config).session_dir
        assert folder is not None
        return file_of(Path(folder), job.name, job.salt, self._parallel.rank, self._parallel.world_size)

    def _read(self, job: Job, expected: Mapping[str, str], step: torch.cuda.Event | None) -> None:
        """Load a session, behind the steps that had its blocks for another request."""
        pool, rows = self._pool, self._rows(job)

        def put(name: str, part: Tensor, buffer: Buffer) -> None:
            if name == TOKENS:
                return
            with buffer.after(step):
                values = part.to(pool.device, non_blocking=True)
                if name == BASE:
                    self._check_base(job, int(part))
                    pool.base[job.slot] = values[0]
                elif not (which := rows[name]).of_state:
                    known = max(0, job.first - which.start)  # are other requests' too
                    pool.scatter(self._blocks(job, which)[known:], values[known:])
                else:
                    self._check_state(which, values)
                    pool.scatter(self._blocks(job, which), values)

        with _told_as_session_error():
            read(self._path(job), self._forms(job, rows), put, expected, job.digest, self._loads)

    def _write(self, job: Job, expected: Mapping[str, str], step: torch.cuda.Event | None) -> bool:
        pool, rows = self._pool, self._rows(job)

        def fill(name: str, room: Tensor, buffer: Buffer) -> None:
            if name == TOKENS:
                assert job.tokens is not None
                room.copy_(job.tokens)
                return
            with buffer.after(step):
                if name == BASE:
                    room.copy_(pool.base[job.slot : job.slot + 1])
                    self._check_base(job, int(room))
                    return
                which = rows[name]
                values = pool.gather(self._blocks(job, which), room.shape[1])
                if which.of_state:
                    self._check_state(which, values)
                    # Behind the last unit is what the block's former owner left.
                    values.view(-1)[self._units(which) * pool.layout.cut.unit_bytes :] = 0
                room.copy_(values, non_blocking=True)

        try:
            with _told_as_session_error():
                write(self._path(job), self._forms(job, rows), fill, expected, self._saves)
        except SessionError as error:
            logger.warning("Session %s: %s It is not saved.", job.name, error)
            return False
        return True

    def _rows(self, job: Job) -> dict[str, Rows]:
        """The parts that are blocks."""
        at_once = max(1, PART_BYTES // self._pool.layout.block_bytes)
        rows = {}
        for of_state, count in ((True, self._pool.layout.blocks), (False, len(job.pages))):
            for start in range(0, count, at_once):
                name = f"{'state' if of_state else 'pages'} from block {start}"
                rows[name] = Rows(of_state, start, min(count, start + at_once))
        return rows

    def _forms(self, job: Job, rows: Mapping[str, Rows]) -> dict[str, Form]:
        layout = self._pool.layout
        forms: dict[str, Form] = {TOKENS: ((job.count,), torch.int64)}
        if layout.cut.window:
            forms[BASE] = (1,), torch.int64
        for name, which in rows.items():
            width = self._pool.used if which.of_state else layout.block_bytes
            forms[name] = (which.stop - which.start, width), torch.uint8
        return forms

    def _blocks(self, job: Job, which: Rows) -> Tensor:
        if which.of_state:
            return self._pool.blocks(job.slot)[which.start : which.stop]
        return torch.tensor(job.pages[which.start : which.stop], device=self._pool.device)

    def _check_base(self, job: Job, base: int) -> None:
        """Raise SessionError for a state that nobody could go on from at the session's last token."""
        if not 0 <= job.count - base <= self._pool.layout.cut.window:
            raise SessionError("its state is not of its last token.")

    def _check_state(self, which: Rows, values: Tensor) -> None:
        """Raise SessionError for one that is not finite."""
        cut = self._pool.layout.cut
        units = values.view(-1, cut.unit_bytes)[: self._units(which), : cut.state_bytes].contiguous()
        if not units.view(cut.state_dtype).isfinite().all():
            raise SessionError("its state is NaN or infinite.")

    def _units(self, which: Rows) -> int:
        """Units of the state in these blocks."""
        cut = self._pool.layout.cut
        every = self._pool.layout.num_layers * cut.H * cut.pieces
        return int(min(every - which.start * cut.units, (which.stop - which.start) * cut.units))


@contextmanager
def _told_as_session_error() -> Iterator[None]:
    """A copy that fails, as where the device has no memory left, costs a session and no other request."""
    try:
        yield
    except SessionError:
        raise
    except Exception as error:
        logger.exception("A session could not be copied.")
        raise SessionError(f"it cannot be copied: {type(error).__name__}: {str(error)[:200]}.") from error
