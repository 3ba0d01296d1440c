"""The workers' half of sessions: copies between memory and files, in order with the steps; see `sessions.py`.

A thread reads a file and checks it before anything is written to memory; another one writes files. Memory is touched
between steps only.
"""

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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
from vllm.utils.math_utils import cdiv

from kimi_vllm.cache.fingerprint import fingerprint_of, weights_digest
from kimi_vllm.cache.pool import StatePool
from kimi_vllm.cache.session_files import TOKENS, read, write
from kimi_vllm.cache.session_folder import SessionError, file_of, salted
from kimi_vllm.options import KimiOptions

logger = logging.getLogger("vllm.kimi_vllm")


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
        self._reading: dict[str, tuple[Job, Future[dict[str, Tensor]]]] = {}
        self._writing: dict[str, Future[bool]] = {}
        self._report = Report()
        self._fingerprint: dict[str, str] | None = None
        # One writer, so that the last of two sessions of a name stays, on all ranks.
        self._reader, self._writer = ThreadPoolExecutor(1, "session-read"), ThreadPoolExecutor(1, "session-write")

    def bind(self, model: nn.Module, pool: StatePool) -> None:
        """Say what is saved; again after the weights have changed."""
        self._model, self._pool, self._fingerprint = model, pool, None

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Take what is to be done with this step."""
        super().bind_connector_metadata(connector_metadata)  # type: ignore[misc]
        assert isinstance(connector_metadata, Jobs)
        self._jobs = connector_metadata

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start reading."""
        for job in self._jobs.loads:
            self._reading[job.request_id] = job, self._reader.submit(self._read, job, self._expected(job))
        self._jobs.loads.clear()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request runs when its load is done."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to save: requests are saved when they have ended."""

    def wait_for_save(self) -> None:
        """Copy what is to be saved out of memory, and start writing."""
        for job in self._jobs.saves:
            assert job.tokens is not None
            parts = {
                TOKENS: job.tokens,
                "pages": self._pool.memory[torch.tensor(job.pages, device=self._pool.device)].cpu(),
                "state": self._pool.read(job.slot).cpu(),
            }
            if self._pool.layout.cut.window:
                parts["base"] = self._pool.base[job.slot : job.slot + 1].cpu().clone()
            self._writing[job.request_id] = self._writer.submit(self._write, job, parts, self._expected(job))
        self._jobs.saves.clear()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Put what has been read into memory, and tell what is done."""
        results = KVConnectorTransferResults()
        for name in [name for name, future in self._writing.items() if future.done()]:
            results.finished_sending.add(name)
            if not self._writing.pop(name).result():
                self._report.unsaved.add(name)
        for name in [name for name, (_, future) in self._reading.items() if future.done()]:
            job, future = self._reading.pop(name)
            results.finished_recving.add(name)
            try:
                self._put(job, future.result())
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

    def _expected(self, job: Job) -> dict[str, str]:
        if self._fingerprint is None:
            of = fingerprint_of(self._config, self._pool.layout, self._parallel.rank, self._parallel.world_size)
            self._fingerprint = of | {"weights": weights_digest(self._model)}
        return self._fingerprint | {"tenant": salted(job.salt)}

    def _path(self, job: Job) -> Path:
        folder = KimiOptions.of(self._config).session_dir
        assert folder is not None
        return file_of(Path(folder), job.name, job.salt, self._parallel.rank, self._parallel.world_size)

    def _read(self, job: Job, expected: Mapping[str, str]) -> dict[str, Tensor]:
        parts = read(self._path(job), expected, job.digest)
        layout, block_size = self._pool.layout, self._config.cache_config.block_size
        shapes = {
            TOKENS: ((job.count,), torch.int64),
            "pages": ((cdiv(job.count, block_size), layout.block_bytes), torch.uint8),
            "state": ((layout.state_bytes,), torch.uint8),
        }
        if layout.cut.window:
            shapes["base"] = (1,), torch.int64
        if {name: (tuple(part.shape), part.dtype) for name, part in parts.items()} != shapes:
            raise SessionError("its parts have other sizes.")
        self._check(job, parts)
        return parts

    def _write(self, job: Job, parts: dict[str, Tensor], fingerprint: Mapping[str, str]) -> bool:
        try:
            self._check(job, parts)
            write(self._path(job), parts, fingerprint)
        except SessionError as error:
            logger.warning("Session %s: %s It is not saved.", job.name, error)
            return False
        return True

    def _check(self, job: Job, parts: Mapping[str, Tensor]) -> None:
        """Raise SessionError for a state that nobody could go on from at the session's last token."""
        cut = self._pool.layout.cut
        units = parts["state"].view(-1, cut.unit_bytes)[:, : cut.state_bytes].contiguous()
        if not units.view(cut.state_dtype).isfinite().all():
            raise SessionError("its state is NaN or infinite.")
        if cut.window and not 0 <= job.count - int(parts["base"]) <= cut.window:
            raise SessionError("its state is not of its last token.")

    def _put(self, job: Job, parts: Mapping[str, Tensor]) -> None:
        pool = self._pool
        pages = torch.tensor(job.pages[job.first :], device=pool.device)
        pool.memory[pages] = parts["pages"][job.first :].to(pool.device)
        pool.write(job.slot, parts["state"].to(pool.device))
        if pool.layout.cut.window:
            pool.base[job.slot] = int(parts["base"])
