"""The worker of hashes with sessions: what it saves must be exact, and what it loads comes some steps later."""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

from kimi_vllm.cache.session_files import TOKENS
from kimi_vllm.cache.session_folder import file_of
from kimi_vllm.cache.session_worker import Job, Jobs, Report
from support.hash_worker import HashWorker
from support.hashes import states
from support.session_files import write_parts


@dataclass(frozen=True)
class Saved:
    """A slot and the pages of a session, as they were."""

    contents: tuple[int, ...]
    base: int
    pages: list[list[int]]


class SessionHashWorker(HashWorker):
    """Keeps sessions in memory, beside files that have tokens only.

    Attributes:
        folder: Where the scheduler looks for files.
        random: Decides how many steps a copy takes, and which fail.
        failing: The share of loads and saves that fail.
        sessions: By name, what was saved.
    """

    folder: Path
    random = Random(0)
    failing = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sessions: dict[str, Saved] = {}
        self._loading: dict[str, tuple[Job, int]] = {}
        self._writing: dict[str, tuple[Job, Saved, int]] = {}

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Run a step; saves see what it leaves, and loads are put behind it."""
        jobs = output.kv_connector_metadata
        assert isinstance(jobs, Jobs)
        for job in jobs.loads:
            self._loading[job.request_id] = job, self.random.randrange(4)
        result = super().execute(output)
        for job in jobs.saves:
            self._writing[job.request_id] = job, self._copy(job), self.random.randrange(4)
        result.kv_connector_output = self._finished()
        return result

    def _copy(self, job: Job) -> Saved:
        assert job.tokens is not None
        assert job.count >= self._bases[job.slot], f"{job.name}: a step in flight has gone on from its slot"
        known, contents = states(job.tokens.tolist()), self.slot(job.slot)
        assert contents is not None, f"{job.name}: slot {job.slot} is in pieces"
        held = [state for page in job.pages for state in self.page(page)][: job.count]
        assert held == known[1:], f"{job.name}: its pages are not those of its {job.count} tokens"
        assert self.state(job.slot, job.count) == known[-1], f"{job.name}: its state is not after {job.count} tokens"
        return Saved(contents, self._bases[job.slot], [list(self.page(page)) for page in job.pages])

    def _finished(self) -> KVConnectorOutput:
        output, unsaved = KVConnectorOutput(finished_sending=set(), finished_recving=set(), failed_recving=set()), set()
        for name, (job, saved, wait) in list(self._writing.items()):
            self._writing[name] = job, saved, wait - 1
            if wait <= 0:
                del self._writing[name]
                output.finished_sending.add(name)
                if self.random.random() < self.failing:
                    unsaved.add(name)
                else:
                    self.sessions[job.name] = saved
                    write_parts(file_of(self.folder, job.name, None, 0, 1), {TOKENS: job.tokens}, {})
        for name, (job, wait) in list(self._loading.items()):
            self._loading[name] = job, wait - 1
            if wait <= 0:
                del self._loading[name]
                output.finished_recving.add(name)
                if self.random.random() < self.failing:
                    output.failed_recving.add(name)
                else:
                    self._put(job)
        output.kv_connector_worker_meta = Report(unsaved) if unsaved else None
        return output

    def _put(self, job: Job) -> None:
        saved = self.sessions[job.name]
        self._store(job.slot, saved.contents, saved.base)
        # Drafts behind the end are in its last page.
        self._tried[job.request_id] = {state for page in saved.pages for state in page}
        for page, kept in list(zip(job.pages, saved.pages, strict=True))[job.first :]:
            self.conversions["states to pages"] += isinstance(self._memory.get(page), tuple)
            self._memory[page] = list(kept)
